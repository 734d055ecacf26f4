#!/usr/bin/env bash
# Train on a Cloud TPU: a slice of one or more machines, or several slices. Needs gcloud, logged in, on this machine.
#
#   launch/tpu_pod.sh up --name=NAME --zone=ZONE --type=v5litepod-32 -- --config=FILE --workdir=gs://BUCKET/RUN
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of stf_jax.main]
#
#   up       create, install, run, watch and, when the run has succeeded, delete
#   create   request the TPU and wait until it is ready                      (needs --type)
#   install  copy this source tree to all machines and create .venv there
#   run      start training on all machines, detached, after ending any run  (needs arguments after --)
#   log      follow the output of the first machine
#   status   show the state of the TPU, and of the run on each machine
#   watch    wait for the end of the run and return its exit status; requests a preempted TPU again, and restarts the
#            run, which resumes from its last checkpoint, if machines lost each other, crashed or rebooted
#                                                                            (needs --type and arguments after --)
#   delete   delete the TPU, which ends its costs
#
#   --type=TYPE        v4-32, v5litepod-32, v5p-32, v6e-32, … as gcloud names them
#   --node-count=N     number of slices, each of that type (default: 1)
#   --spot             use Spot TPUs, which are cheaper and may be preempted
#   --direct           create one slice at once or fail, instead of waiting in the queue
#   --runtime=VERSION  software version of the machines (default: by type)
#   --project=PROJECT  Google Cloud project (default: gcloud's)
#   --restarts=N       maximum number of consecutive restarts of the run while the TPU exists (default: 10); a run of an
#                      hour or more resets the count
#   --poll=SECONDS     time between two checks of a state (default: 60)
#   --delete-on-exit   for up, create and watch: also delete after an error or interrupt
#   --dry-run          print all commands without running them
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

# ---- Arguments -------------------------------------------------------------------------------------------------------
subcommand=${1:-}
case $subcommand in
    up | create | install | run | log | status | watch | delete) shift ;;
    "" | --help | -h)
        usage
        exit
        ;;
    *) refuse "Unknown command $subcommand; see --help." ;;
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
        *) refuse "Unexpected argument $1; arguments of stf_jax.main go after --, see --help." ;;
    esac
    shift
done
[[ -n $name && -n $zone ]] || refuse "--name and --zone are required; see --help."
[[ $node_count =~ ^[1-9][0-9]*$ ]] || refuse "--node-count=$node_count is not a number of slices."
[[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts=$restarts is not a number."
[[ -z $direct || $node_count == 1 ]] || refuse "--direct creates one slice; omit it for several."
case $subcommand in
    up | create | watch)
        [[ -n $type ]] || refuse "--type is required for $subcommand, such as --type=v5litepod-32."
        if [[ -z $runtime ]]; then
            case $type in
                v[234]-*) runtime=tpu-ubuntu2204-base ;;
                v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
                v5p-*) runtime=v2-alpha-tpuv5 ;;
                v6e-*) runtime=v2-alpha-tpuv6e ;;
                *) refuse "No runtime version is known for --type=$type; give --runtime=VERSION." ;;
            esac
        fi
        ;;
esac
case $subcommand in
    up | run | watch)
        (($#)) || refuse "Give the arguments of stf_jax.main after --, such as: -- --config=FILE --workdir=gs://…"
        ;;
esac
printf -v program ' %q' "$@" # a string that the remote shell parses as the same arguments

where=(--zone="$zone" ${project:+--project="$project"} --quiet)
if [[ -n $direct ]]; then
    tpus=(gcloud compute tpus tpu-vm) state_field=state ready=READY all=(--worker=all) first=(--worker=0)
else
    tpus=(gcloud compute tpus queued-resources) state_field=state.state ready=ACTIVE
    all=(--node=all --worker=all) first=(--node=0 --worker=0)
fi

# ---- Commands --------------------------------------------------------------------------------------------------------
step=$subcommand # named in messages about failures
paid=""          # whether this command may leave a TPU behind
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
            delete || say "Deleting $name failed: check in the Cloud console what is left, and delete it."
        elif [[ -n $paid ]]; then
            say "TPU $name may exist and cost money, and its run continues. To delete it:"
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

# Sleeps until the next poll; a signal to this process interrupts it.
pause() {
    sleep "$poll" > /dev/null 2>&1 &
    wait "$!"
}

# Sets `state` to the TPU's state.
query_state() {
    local command=("${tpus[@]}" describe "$name" "${where[@]}" --format="value($state_field)")
    if [[ -n $dry_run ]]; then
        call "${command[@]}"
        state=$ready
    else
        state=$("${command[@]}")
    fi
}

is_preempted() {
    case $state in
        PREEMPTED | SUSPENDED | FAILED | TERMINATED | STOPPED) ;;
        *) false ;;
    esac
}

remote() {
    call "${tpus[@]}" ssh "$name" "${all[@]}" "${where[@]}" --command="$1"
}

# Sets `state` to the run's state on all machines together: running, gone, unreachable, or ended STATUS. STATUS is the
# lowest failure: statuses of a process's own failure are lower than those after losing a peer.
query_run() {
    local lines failure
    if [[ -n $dry_run ]]; then
        remote "stf-jax/launch/tpu_worker.sh status"
        state="ended 0"
    elif ! lines=$(remote "stf-jax/launch/tpu_worker.sh status" 2> "$scratch/ssh" | grep '^stf-jax: '); then
        state=unreachable
    elif [[ $lines == *gone* || $lines == *"not started"* ]]; then
        state=gone
    elif failure=$(grep -o 'ended [1-9][0-9]*' <<< "$lines" | sort -n -k 2 | head -n 1); then
        state=$failure
    elif [[ $lines == *running* ]]; then
        state=running
    elif grep -qvx 'stf-jax: ended 0' <<< "$lines"; then
        state=unreachable
    else
        state="ended 0"
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
    local previous=""
    while true; do
        query_state || return
        if [[ $state == "$ready" ]]; then
            return
        fi
        if [[ $state != "$previous" ]]; then
            say "$name is $state"
            previous=$state
        fi
        if is_preempted; then
            return 1
        fi
        pause
    done
}

install() {
    step=install
    # Packs the working tree with local edits, but only what training needs, without data or runs in it.
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
    query_state
    [[ -n $dry_run ]] || echo "$name: $state"
    if [[ $state == "$ready" ]]; then
        remote "stf-jax/launch/tpu_worker.sh status"
    fi
}

# Requests a preempted TPU again. The new one may be preempted as well, at any step; other failures are errors.
recreate() {
    local status=0
    delete || return
    { create && install && run; } || status=$?
    if ((status != 0)); then
        query_state && is_preempted || return "$status"
        pause
    fi
}

# Restarts the run on all machines, up to the maximum number of consecutive restarts; then fails with status $1.
restart() {
    if (($(date +%s) - begin >= 3600)); then
        count=0
    fi
    if ((count == restarts)); then
        say "The run failed after $count consecutive restarts (--restarts)."
        fail "$1"
        return
    fi
    count=$((count + 1))
    say "Restarting the run, $count of $restarts in a row."
    run || say "The restart failed; checking $name again."
}

# Ends with the run's status, $1.
fail() {
    log || true
    step="the run"
    return "$1"
}

watch() {
    local previous="" unreachable_count=0
    begin=$(date +%s) count=0
    paid=yes
    while true; do
        step=watch
        if ! query_state; then
            state=unreachable
        elif [[ $state == "$ready" ]]; then
            query_run
        fi
        [[ $state == "$previous" ]] || say "$name: $state"
        if is_preempted; then
            recreate || return
            previous=""
            continue
        fi
        case $state in
            "ended 0") return ;;
            "ended 2") fail 2 || return ;; # invalid input
            # Machines lose each other while a TPU is being preempted, before its state shows that: so any other failure
            # counts only when it is seen twice.
            "ended 75" | "ended 134" | "ended 137" | "ended 139" | "ended 143")
                if [[ $state == "$previous" ]]; then
                    restart "${state#ended }" || return
                    state=""
                fi
                ;;
            ended*) [[ $state != "$previous" ]] || fail "${state#ended }" || return ;;
            gone) restart 1 || return ;;
            unreachable)
                if ((++unreachable_count == 10)); then
                    cat "$scratch/ssh" >&2 || true
                    return 1
                fi
                ;;
        esac
        [[ $state == unreachable ]] || unreachable_count=0
        previous=$state
        pause
    done
}

delete() {
    step=delete
    # Deletes a queued resource together with its TPU.
    local force=--force
    [[ -z $direct ]] || force=""
    call "${tpus[@]}" delete "$name" "${where[@]}" ${force:+"$force"} || return
    paid=""
}

if [[ $subcommand == up ]]; then
    create
    install
    run
    watch
    delete
else
    "$subcommand"
fi
