#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster with JobSet, using gke_jobset.yaml. Needs kubectl, configured for that cluster.
#
#   launch/gke.sh run --name=NAME --image=IMAGE --topology=v5e:4x8 -- --config=FILE --workdir=gs://BUCKET/RUN
#   launch/gke.sh log|status|delete --name=NAME
#
#   run      start training; if machines are preempted or lose each other, or a process is killed or crashes, all
#            machines restart and the run resumes from its last checkpoint
#   log      follow the output of the first machine
#   status   show the state of the job and its machines
#   delete   end the job; the node pool keeps costing money unless it scales down automatically
#
#   --image=IMAGE      built with launch/Dockerfile
#   --topology=T       of a slice, as in stf_jax.plan: v4:2x2x4, v5e:4x8, v5p:2x2x4, v6e:4x8
#   --slices=N         number of slices, each a node pool of that topology (default: 1)
#   --spot             use only Spot machines
#   --restarts=N       maximum number of restarts, including those after preemptions (default: 100)
#   --dry-run          print the commands, and the manifest that `run` applies, without running them
set -euo pipefail

usage() {
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
}

refuse() {
    echo "error: $*" >&2
    exit 2
}

subcommand=${1:-}
case $subcommand in
    run | log | status | delete) shift ;;
    "" | --help | -h)
        usage
        exit
        ;;
    *) refuse "Unknown command $subcommand; see --help." ;;
esac
name="" image="" topology="" slices=1 spot="" restarts=100 dry_run=""
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --spot) spot=yes ;;
        --restarts=*) restarts=${1#*=} ;;
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
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name should be up to 40 lowercase letters, digits and hyphens, starting with a letter."

call() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Prints a string as a JSON literal.
json() {
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# Replaces the placeholder ${$1} in `text` with $2.
fill() {
    text=${text//"\${$1}"/"$2"}
}

# Prints the manifest with all placeholders replaced.
manifest() {
    local accelerator shape chips=1 per_host arguments="" argument text side
    case $topology in
        v4:*) accelerator=tpu-v4-podslice ;;
        v5e:*) accelerator=tpu-v5-lite-podslice ;;
        v5p:*) accelerator=tpu-v5p-slice ;;
        v6e:*) accelerator=tpu-v6e-slice ;;
        *) refuse "--topology=$topology is unknown; it should be like v5e:4x8." ;;
    esac
    shape=${topology#*:}
    [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "--topology=$topology should be like v5e:4x8."
    [[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "--slices=$slices is not a number of slices."
    [[ $restarts =~ ^[0-9]+$ ]] || refuse "--restarts=$restarts is not a number."
    [[ -n $image ]] || refuse "--image is required; build one with launch/Dockerfile."
    (($#)) || refuse "Give the arguments of stf_jax.main after --, such as: -- --config=FILE --workdir=gs://…"
    for side in ${shape//x/ }; do
        chips=$((chips * side))
    done
    per_host=$((chips < 4 ? chips : 4)) # slices of several machines use machine types …-4t
    for argument; do
        # Kubernetes reads $$ as $, and $(NAME) as a variable.
        arguments+=${arguments:+, }$(json "${argument//\$/\$\$}")
    done
    text=$(< "$(dirname "$0")/gke_jobset.yaml")
    fill NAME "$name"
    fill RESTARTS "$restarts"
    fill SLICES "$slices"
    fill HOSTS "$((chips / per_host))"
    fill ACCELERATOR "$accelerator"
    fill TOPOLOGY "$shape"
    fill CHIPS "$per_host"
    fill IMAGE "$(json "$image")"
    fill ARGS "[$arguments]"
    if [[ -n $spot ]]; then
        text=${text/'# cloud.google.com/gke-spot'/cloud.google.com/gke-spot}
    fi
    printf '%s\n' "$text"
}

case $subcommand in
    run)
        rendered=$(manifest "$@")
        if [[ -n $dry_run ]]; then
            echo "# kubectl apply --filename=- < the following:"
            echo "$rendered"
        else
            kubectl apply --filename=- <<< "$rendered"
        fi
        ;;
    log)
        call kubectl logs --follow --tail=100 --container=train \
            --selector="job-name=$name-slice-0,batch.kubernetes.io/job-completion-index=0"
        ;;
    status)
        call kubectl get jobset "$name"
        call kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
        ;;
    delete) call kubectl delete jobset "$name" ;;
esac
