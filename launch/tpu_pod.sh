#!/usr/bin/env bash
# Train on a Cloud TPU: a slice of one or many machines, or several slices. Needs gcloud, logged in, on this machine.
#
#   launch/tpu_pod.sh up --name=NAME --zone=ZONE --type=v5litepod-32 -- --config=FILE --workdir=gs://BUCKET/RUN
#   launch/tpu_pod.sh VERB --name=NAME --zone=ZONE [options] [-- what stf_jax.main is given]
#
#   up       create, install, run, watch and, once the run has ended well, delete
#   create   ask for the TPU and wait until it is there                      (needs --type)
#   install  copy this tree to its machines and make .venv there
#   run      start training on all of them, detached; what ran is ended      (needs what follows --)
#   log      follow the first machine's output
#   status   the TPU's state, and the run's on each machine
#   watch    wait for the run's end; a TPU that was taken away is asked for again, a run whose machines lost each other,
#            crashed or restarted is started again, and it goes on from its last checkpoint; the exit status is the
#            run's                                                           (needs --type and what follows --)
#   delete   give the TPU back: nothing more is paid for
#
#   --type=TYPE        v4-32, v5litepod-32, v5p-32, v6e-32, … as gcloud names them
#   --node-count=N     slices, each of that type; 1 if not given
#   --spot             cheaper, and may be taken away
#   --direct           create at once or not at all, rather than wait in the queue; one slice
#   --runtime=VERSION  of the machines' system; told by the type
#   --project=PROJECT  gcloud's own if not given
#   --restarts=N       so often in a row the run is started again on a TPU that is there; 10. Who has run for an hour
#                      starts a new row
#   --poll=SECONDS     between two looks at a state; 60
#   --delete-on-exit   up, create and watch: delete also if something fails or you interrupt
#   --dry-run          print every command and run none
set -euo pipefail

usage() {
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
}

say() {
    echo "tpu_pod.sh: $*" >&2
}

refuse() {
    echo "error: $*" >&2
    exit 2
}

# ---- What is asked ---------------------------------------------------------------------------------------------------
verb=${1:-}
case $verb in
    up | create | install | run | log | status | watch | delete) shift ;;
    "" | --help | -h)
        usage
        exit
        ;;
    *) refuse "Unknown verb $verb; see --help." ;;
esac
name="" zone="" type="" node_count=1 spot="" direct="" runtime="" project="" restarts=10 poll=60
delete_on_exit="" dry_run=""
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --node-count=*) node_count=${1#*=} ;;
        --spot) spot=yes ;;
        --direct) direct=yes ;;
        --runtime=*) runtime=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --delete-on-exit) delete_on_exit=yes ;;
        --dry-run) dry_run=yes ;;
        --help | -h)
            usage
            exit
            ;;
        --)
            shift
            break
            ;;
        *) refuse "Unexpected argument $1; what stf_jax.main is given goes behind --, see --help." ;;
    esac
    shift
done
[[ -n $name && -n $zone ]] || refuse "--name and --zone are needed; see --help."
[[ $node_count =~ ^[1-9][0-9]*$ ]] || refuse "--node-count=$node_count is not a number of slices."
[[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts=$restarts is not a number."
[[ -z $direct || $node_count == 1 ]] || refuse "--direct makes one slice; several come by the queue, without it."
case $verb in
    up | create | watch)
        [[ -n $type ]] || refuse "--type is needed for $verb, such as --type=v5litepod-32."
        if [[ -z $runtime ]]; then
            case $type in
                v[234]-*) runtime=tpu-ubuntu2204-base ;;
                v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
                v5p-*) runtime=v2-alpha-tpuv5 ;;
                v6e-*) runtime=v2-alpha-tpuv6e ;;
                *) refuse "No runtime is known for --type=$type; give --runtime=VERSION." ;;
            esac
        fi
        ;;
esac
case $verb in
    up | run | watch) (($#)) || refuse "Behind -- goes what stf_jax.main is given: -- --config=FILE --workdir=gs://…" ;;
esac
printf -v program ' %q' "$@" # one string that the other side's shell reads as the same arguments

where=(--zone="$zone" ${project:+--project="$project"} --quiet)
if [[ -n $direct ]]; then
    tpus=(gcloud compute tpus tpu-vm) state_field=state ready=READY all=(--worker=all) first=(--worker=0)
else
    tpus=(gcloud compute tpus queued-resources) state_field=state.state ready=ACTIVE
    all=(--node=all --worker=all) first=(--node=0 --worker=0)
fi

# ---- How it is done --------------------------------------------------------------------------------------------------
step=$verb # what a failure is named after
paid=""    # whether there may be a TPU that this command would leave behind
scratch=/tmp/stf-jax
if [[ -z $dry_run ]]; then
    scratch=$(mktemp -d)
fi

finish() {
    local status=$?
    trap - EXIT
    trap '' HUP INT TERM
    if [[ -z $dry_run ]]; then
        rm -rf "$scratch"
    fi
    if ((status != 0)); then
        say "$step ended with status $status."
        if [[ -n $paid && -n $delete_on_exit ]]; then
            delete || say "Deleting $name failed: see what is left, and delete it, in the Cloud console."
        elif [[ -n $paid ]]; then
            say "TPU $name may be there and cost money; what runs on it goes on. To delete it:"
            printf '%q ' "$0" delete --name="$name" --zone="$zone" ${project:+--project="$project"} \
                ${direct:+--direct} >&2
            echo >&2
        fi
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

call() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Sleep that a signal to this process alone interrupts.
pause() {
    sleep "$poll" > /dev/null 2>&1 &
    wait "$!"
}

# Sets `answer` to the TPU's state.
ask_state() {
    local command=("${tpus[@]}" describe "$name" "${where[@]}" --format="value($state_field)")
    if [[ -n $dry_run ]]; then
        call "${command[@]}"
        answer=$ready
    else
        answer=$("${command[@]}")
    fi
}

taken_away() {
    case $answer in
        PREEMPTED | SUSPENDED | FAILED | TERMINATED | STOPPED) ;;
        *) false ;;
    esac
}

remote() {
    call "${tpus[@]}" ssh "$name" "${all[@]}" "${where[@]}" --command="$1"
}

# Sets `answer` to what the run does on all machines together: running, gone, unreachable, or ended STATUS. That is the
# lowest of failures, for what a process did itself is below what losing another does to it.
ask_run() {
    local lines failure
    if [[ -n $dry_run ]]; then
        remote "stf-jax/launch/tpu_worker.sh status"
        answer="ended 0"
    elif ! lines=$(remote "stf-jax/launch/tpu_worker.sh status" 2> "$scratch/ssh" | grep '^stf-jax: '); then
        answer=unreachable
    elif [[ $lines == *gone* || $lines == *"not started"* ]]; then
        answer=gone
    elif failure=$(grep -o 'ended [1-9][0-9]*' <<< "$lines" | sort -n -k 2 | head -n 1); then
        answer=$failure
    elif [[ $lines == *running* ]]; then
        answer=running
    elif grep -qvx 'stf-jax: ended 0' <<< "$lines"; then
        answer=unreachable
    else
        answer="ended 0"
    fi
}

create() {
    step=create paid=yes
    if [[ -n $direct ]]; then
        call "${tpus[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --version="$runtime" \
            ${spot:+--spot} || return
    elif ((node_count == 1)); then
        call "${tpus[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
            --node-id="$name" ${spot:+--spot} || return
    else
        call "${tpus[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
            --node-count="$node_count" --node-prefix="$name" ${spot:+--spot} || return
    fi
    local before=""
    while true; do
        ask_state || return
        if [[ $answer == "$ready" ]]; then
            return
        fi
        if [[ $answer != "$before" ]]; then
            say "$name is $answer"
            before=$answer
        fi
        if taken_away; then
            return 1
        fi
        pause
    done
}

install() {
    step=install
    # The tree as it stands, edits included, but only what training needs: not data or runs that lie in it.
    call tar -czf "$scratch/stf-jax.tgz" --exclude=__pycache__ -C "$(dirname "$0")/.." \
        stf_jax configs launch requirements.txt requirements-dev.txt &&
        call "${tpus[@]}" scp "$scratch/stf-jax.tgz" "$name:stf-jax.tgz" "${all[@]}" "${where[@]}" &&
        remote "mkdir -p stf-jax && find stf-jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&\
 tar -xzf stf-jax.tgz -C stf-jax && stf-jax/launch/install.sh tpu"
}

run() {
    step=run begin=$(date +%s)
    remote "stf-jax/launch/tpu_worker.sh run$program"
}

log() {
    step=log
    call "${tpus[@]}" ssh "$name" "${first[@]}" "${where[@]}" --command="stf-jax/launch/tpu_worker.sh log"
}

status() {
    step=status
    ask_state
    [[ -n $dry_run ]] || echo "$name: $answer"
    if [[ $answer == "$ready" ]]; then
        remote "stf-jax/launch/tpu_worker.sh status"
    fi
}

# Asks again for a TPU that was taken away. The new one may be taken as well, at any step; what else fails is a failure.
again() {
    local status=0
    delete || return
    { create && install && run; } || status=$?
    if ((status != 0)); then
        ask_state && taken_away || return "$status"
        pause
    fi
}

# Starts the run again on all machines, but for so often in a row; then its status is $1.
start_again() {
    if (($(date +%s) - begin >= 3600)); then
        row=0
    fi
    if ((row == restarts)); then
        say "The run was started again $row times in a row (--restarts)."
        fail "$1"
        return
    fi
    row=$((row + 1))
    say "The run is started again, $row of $restarts in a row."
    run || say "Starting it again failed; $name is looked at again."
}

# The run's end, with that status.
fail() {
    log || true
    step="the run"
    return "$1"
}

watch() {
    local before="" unanswered=0
    begin=$(date +%s) row=0
    paid=yes
    while true; do
        step=watch
        if ! ask_state; then
            answer=unreachable
        elif [[ $answer == "$ready" ]]; then
            ask_run
        fi
        [[ $answer == "$before" ]] || say "$name: $answer"
        if taken_away; then
            again || return
            before=""
            continue
        fi
        case $answer in
            "ended 0") return ;;
            "ended 2") fail 2 || return ;; # the input cannot be used
            # Machines lose each other while a TPU is being taken away, which its state tells only later: so any other
            # failure counts when it is seen twice.
            "ended 75" | "ended 134" | "ended 137" | "ended 139" | "ended 143")
                if [[ $answer == "$before" ]]; then
                    start_again "${answer#ended }" || return
                    answer=""
                fi
                ;;
            ended*) [[ $answer != "$before" ]] || fail "${answer#ended }" || return ;;
            gone) start_again 1 || return ;;
            unreachable)
                if ((++unanswered == 10)); then
                    cat "$scratch/ssh" >&2 || true
                    return 1
                fi
                ;;
        esac
        [[ $answer == unreachable ]] || unanswered=0
        before=$answer
        pause
    done
}

delete() {
    step=delete
    # A queued resource is deleted with the TPU that it got.
    local force=--force
    [[ -z $direct ]] || force=""
    call "${tpus[@]}" delete "$name" "${where[@]}" ${force:+"$force"} || return
    paid=""
}

if [[ $verb == up ]]; then
    create
    install
    run
    watch
    delete
else
    "$verb"
fi
