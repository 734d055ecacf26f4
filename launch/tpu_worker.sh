#!/usr/bin/env bash
# What tpu_pod.sh asks of each machine of a TPU:
#
#   launch/tpu_worker.sh run --config=FILE --workdir=DIR    # train, detached; one that still runs is ended first
#   launch/tpu_worker.sh status    # "stf-jax: " and running | ended STATUS | gone (the machine restarted) | not started
#   launch/tpu_worker.sh log       # follow the output until the run has ended
#
# The run's log and exit status are in ~/stf-jax-run.
set -euo pipefail
verb=${1:-}
shift || true
state=$HOME/stf-jax-run

# A run is known by a lock, which its processes hold until the last has ended; a process number may be another's then.
running() {
    ! flock --nonblock "$state/lock" true
}

end() {
    kill "-$1" -- "-$(< "$state/pid")" 2> /dev/null || true
}

case $verb in
    run)
        mkdir -p "$state"
        if running; then
            end TERM
            flock --timeout 120 "$state/lock" true || end KILL # a step is finished and saved
        fi
        exec 9> "$state/lock"
        flock --timeout 30 9
        rm -f "$state/status"
        # A session of its own survives the ssh that started it.
        setsid "$0" supervise "$@" >> "$state/log" 2>&1 < /dev/null &
        echo "$!" > "$state/pid"
        ;;
    supervise)
        status=0
        cd "$(dirname "$0")/.."
        PYTHONUNBUFFERED=1 .venv/bin/python -m stf_jax.main "$@" || status=$?
        echo "$status" > "$state/status"
        ;;
    status)
        if [[ ! -e $state/pid ]]; then
            echo "stf-jax: not started"
        elif [[ -s $state/status ]]; then
            echo "stf-jax: ended $(< "$state/status")"
        elif running; then
            echo "stf-jax: running"
        else
            echo "stf-jax: gone"
        fi
        ;;
    log)
        exec tail -n 100 -F --pid="$(< "$state/pid")" "$state/log"
        ;;
    *)
        sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
        [[ $verb == --help ]] && exit
        exit 2
        ;;
esac
