#!/usr/bin/env bash
# Run by tpu_pod.sh on each machine of a TPU:
#
#   launch/tpu_worker.sh run --config=FILE --workdir=DIR    # train, detached, after ending a run in progress
#   launch/tpu_worker.sh status    # "stf-jax: " and running | ended STATUS | gone (the machine rebooted) | not started
#   launch/tpu_worker.sh log       # follow the output until the run has ended
#
# The run's log and exit status are in ~/stf-jax-run.
set -euo pipefail
subcommand=${1:-}
shift || true
state=$HOME/stf-jax-run

# The processes of a run hold a lock until the last has ended. A process id would not do, because it may be reused.
running() {
    ! flock --nonblock "$state/lock" true
}

signal_run() {
    kill "-$1" -- "-$(< "$state/pid")" 2> /dev/null || true
}

case $subcommand in
    run)
        mkdir -p "$state"
        if running; then
            signal_run TERM
            flock --timeout 120 "$state/lock" true || signal_run KILL # time to finish and save a step
        fi
        exec 9> "$state/lock"
        flock --timeout 30 9
        rm -f "$state/status"
        # A new session survives the ssh connection that started it.
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
        [[ $subcommand == --help ]] && exit
        exit 2
        ;;
esac
