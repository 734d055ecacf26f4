#!/usr/bin/env bash
# Run a command, and run it again when another start would go on from the last checkpoint:
#
#   launch/restart.sh .venv/bin/python -m stf_jax.main --config=FILE --workdir=DIR
#
# That is after exit status 75 (another machine was lost or late), 143 (SIGTERM), 134, 137 and 139 (aborted, killed,
# crashed). Any other status is this script's own. HUP, INT (Ctrl-C) and TERM are passed on as TERM, after which
# training finishes its step, saves and ends, and is not started again; a second one ends it at once.
#
# RESTARTS: so often in a row, 10 if not given. Who has run for an hour starts a new row.
set -euo pipefail
if [[ $# == 0 || $1 == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
if [[ ! ${RESTARTS:=10} =~ ^[0-9]+$ ]]; then
    echo "error: RESTARTS=$RESTARTS is not a number." >&2
    exit 2
fi

child="" ending="" signalled=""
trap 'ending=yes signalled=yes; kill -TERM "$child" 2> /dev/null || true' HUP INT TERM

# Sets `status` to the command's. Terminals send INT and HUP to all; it heeds neither, and is told by us alone.
run() {
    (
        trap '' HUP INT
        exec "$@"
    ) &
    child=$!
    [[ -z $ending ]] || kill -TERM "$child" || true # the signal came when nothing ran, or in the pause
    status=0
    wait "$child" || status=$?
    while [[ -n $signalled ]]; do # that wait ended with the signal
        signalled="" status=0
        wait "$child" || status=$?
    done
}

again=0
while true; do
    begin=$(date +%s)
    run "$@"
    case $status in
        75 | 134 | 137 | 139 | 143) ;;
        *) exit "$status" ;;
    esac
    [[ -z $ending ]] || exit "$status"
    if (($(date +%s) - begin >= 3600)); then
        again=0
    fi
    if ((again == RESTARTS)); then
        echo "restart.sh: ended with status $status, and was started again $again times in a row (RESTARTS)." >&2
        exit "$status"
    fi
    again=$((again + 1))
    echo "restart.sh: ended with status $status; starting again in 10 s, $again of $RESTARTS in a row." >&2
    run sleep 10
done
