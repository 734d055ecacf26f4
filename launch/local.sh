#!/usr/bin/env bash
# Train on this machine's devices, or on simulated ones to try a mesh before renting it:
#
#   launch/local.sh --config=configs/demo.py --workdir=runs/demo
#   DEVICES=8 launch/local.sh --config=configs/demo.py:stage=pretrain,steps=20 --workdir=runs/mesh --config.mesh.fsdp=4
#   PROCESSES=2 DEVICES=4 launch/local.sh --config=configs/demo.py:stage=pretrain,steps=20 --workdir=runs/two
#
# DEVICES: CPU devices to simulate (of each process); unset, jax takes the accelerators that it finds.
# PROCESSES: as many, joined as those of several machines are. The first's output is shown, the others' kept in files;
# when one fails, all end, with the lowest of their statuses.
# What is killed or crashes is started again by launch/restart.sh; there is RESTARTS. Ctrl-C saves the step and ends.
set -euo pipefail
if [[ ${1:-} == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
# Paths are from the caller's folder; the program is found here, wherever that is.
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
if [[ -n ${DEVICES:-} ]]; then
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES
fi
# A step on a CPU takes gigabytes and gives them back: by pages of 4 KiB that costs a seventh of its time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
if [[ ! ${PROCESSES:=1} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: PROCESSES=$PROCESSES is not a number of processes." >&2
    exit 2
fi
if ((PROCESSES == 1)); then
    exec "$here/launch/restart.sh" "$here/.venv/bin/python" -m stf_jax.main "$@"
fi
if [[ ${1:-} != together ]]; then
    exec "$here/launch/restart.sh" "$here/launch/local.sh" together "$@" # all end and start as one
fi
shift

logs=$(mktemp -d)
running=() # process numbers, by the places of the processes

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
        echo "local.sh: what the others said is in $logs" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM # restart.sh sends no other

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
cause=0 # of the statuses of failures the lowest: what a process did itself is below what losing another does to it
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
    # After SIGTERM all finish the same step, and may still be saving it.
    ((cause == 0 || cause == 143)) || exit "$cause"
    sleep 0.2
done
((cause == 0)) || exit "$cause"
