#!/usr/bin/env bash
# Train on this machine's devices, or on simulated ones, for example to try a mesh before renting hardware:
#
#   launch/local.sh --config=configs/demo.py --workdir=runs/demo
#   DEVICES=8 launch/local.sh --config=configs/demo.py:stage=pretrain,steps=20 --workdir=runs/mesh --config.mesh.fsdp=4
#   PROCESSES=2 DEVICES=4 launch/local.sh --config=configs/demo.py:stage=pretrain,steps=20 --workdir=runs/two
#
# DEVICES: number of CPU devices to simulate per process; if unset, jax uses the accelerators that it finds.
# PROCESSES: number of processes, connected like those of several machines. The output of the first is shown, that of
# the others goes to files; if one fails, all end, with the lowest of their exit statuses.
# launch/restart.sh restarts killed or crashed processes; see there for RESTARTS. Ctrl-C saves the step and ends.
set -euo pipefail
if [[ ${1:-} == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
# Relative paths start at the caller's folder; the program is found next to this script.
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
if [[ -n ${DEVICES:-} ]]; then
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES
fi
# A step on a CPU allocates and frees gigabytes; without huge pages that takes a seventh of its time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
if [[ ! ${PROCESSES:=1} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: PROCESSES=$PROCESSES is not a number of processes." >&2
    exit 2
fi
if ((PROCESSES == 1)); then
    exec "$here/launch/restart.sh" "$here/.venv/bin/python" -m stf_jax.main "$@"
fi
if [[ ${1:-} != together ]]; then
    exec "$here/launch/restart.sh" "$here/launch/local.sh" together "$@" # all processes restart together
fi
shift

logs=$(mktemp -d)
running=() # process ids, by index

finish() {
    local status=$?
    trap - EXIT
    trap '' TERM
    if ((${#running[@]})); then
        kill -TERM "${running[@]}" 2> /dev/null || true
        for ((tenths = 0; tenths < 300; tenths++)); do
            kill -0 "${running[@]}" 2> /dev/null || break
            sleep 0.1
        done
        kill -KILL "${running[@]}" 2> /dev/null || true
    fi
    if ((status == 0)); then
        rm -r "$logs"
    else
        echo "local.sh: the output of the other processes is in $logs" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM # the only signal that restart.sh sends

port=$("$here/.venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for ((i = 0; i < PROCESSES; i++)); do
    command=("$here/.venv/bin/python" -m stf_jax.main "$@")
    command+=(--coordinator="127.0.0.1:$port" --processes="$PROCESSES" --process="$i")
    if ((i == 0)); then
        "${command[@]}" &
    else
        "${command[@]}" > "$logs/process_$i.log" 2>&1 &
    fi
    running[i]=$!
done
trap 'kill -TERM "${running[@]}" 2> /dev/null || true' TERM
cause=0 # the lowest failure status: statuses of a process's own failure are lower than those after losing a peer
while ((${#running[@]})); do
    for i in "${!running[@]}"; do
        if ! kill -0 "${running[i]}" 2> /dev/null; then
            status=0
            wait "${running[i]}" || status=$?
            unset "running[i]"
            if ((status != 0)); then
                echo "local.sh: process $i of 0 to $((PROCESSES - 1)) ended with status $status" >&2
                if ((i > 0)); then
                    tail -n 5 "$logs/process_$i.log" >&2
                fi
                if ((cause == 0 || status < cause)); then
                    cause=$status
                fi
            fi
        fi
    done
    # After SIGTERM all processes finish the same step, and others may still be saving it.
    ((cause == 0 || cause == 143)) || exit "$cause"
    sleep 0.2
done
((cause == 0)) || exit "$cause"
