#!/usr/bin/env bash
# Run a command, and restart it while a restart would resume from the last checkpoint:
#
#   launch/restart.sh .venv/bin/python -m stf_jax.main --config=FILE --workdir=DIR
#
# It restarts after exit status 75 (another machine was lost or late), 143 (SIGTERM), and 134, 137 and 139 (aborted,
# killed, crashed). With any other status, this script exits. HUP, INT (Ctrl-C) and TERM are passed on as TERM: training
# finishes its step, saves it and ends, without a restart; a second signal ends it at once.
#
# RESTARTS: maximum number of consecutive restarts (default: 10). A run of an hour or more resets the count.
set -euo pipefail
if [[ $# == 0 || $1 == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
if [[ ! ${RESTARTS:=10} =~ ^[0-9]+$ ]]; then
    echo "error: RESTARTS=$RESTARTS is not a number." >&2
    exit 2
fi

child="" ending="" signaled=""
trap 'ending=yes signaled=yes; kill -TERM "$child" 2> /dev/null || true' HUP INT TERM

# Runs a command and sets `status`. It ignores INT and HUP, which terminals send to all; this script passes them on.
run() {
    (
        trap '' HUP INT
        exec "$@"
    ) &
    child=$!
    [[ -z $ending ]] || kill -TERM "$child" || true # the signal came before the child started, or in the pause
    status=0
    wait "$child" || status=$?
    while [[ -n $signaled ]]; do # the signal interrupted that wait
        signaled="" status=0
        wait "$child" || status=$?
    done
}

restarts=0
while true; do
    begin=$(date +%s)
    run "$@"
    case $status in
        75 | 134 | 137 | 139 | 143) ;;
        *) exit "$status" ;;
    esac
    [[ -z $ending ]] || exit "$status"
    if (($(date +%s) - begin >= 3600)); then
        restarts=0
    fi
    if ((restarts == RESTARTS)); then
        echo "restart.sh: ended with status $status after $restarts consecutive restarts (RESTARTS)." >&2
        exit "$status"
    fi
    restarts=$((restarts + 1))
    echo "restart.sh: ended with status $status; restarting in 10 s, $restarts of $RESTARTS in a row." >&2
    run sleep 10
done
