#!/usr/bin/env bash
# Train on this machine's GPUs, all of them in one process:
#
#   launch/gpu_node.sh --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
#
# Several machines without a scheduler: the same on each but for the last flag. The workdir is one that all of them see;
# the coordinator is the first machine, by a name or address that the others reach, and any free port.
#
#   launch/gpu_node.sh --config=FILE --workdir=DIR --coordinator=node0:1234 --processes=2 --process=0    # on node0
#   launch/gpu_node.sh --config=FILE --workdir=DIR --coordinator=node0:1234 --processes=2 --process=1    # on node1
#
# Where a machine is lost, the others' processes end and are started again, and wait for it, by launch/restart.sh; there
# is what it does, and RESTARTS. To end a run, interrupt it on each machine: the step is finished and saved.
set -euo pipefail
if [[ $# == 0 || $1 == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
# Paths are from the caller's folder; the program is found here, wherever that is.
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
if ! nvidia-smi --list-gpus > /dev/null; then
    echo "error: nvidia-smi finds no GPU on $(hostname)." >&2
    exit 2
fi
if ! "$here/.venv/bin/python" -c 'import jax_cuda12_plugin' 2> /dev/null; then
    "$here/launch/install.sh" cuda12
fi
# jax takes 75 % of a GPU's memory if not told more.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
export JAX_PLATFORMS=cuda,cpu # named, a platform that fails is an error; else training would go on without the GPUs
exec "$here/launch/restart.sh" "$here/.venv/bin/python" -m stf_jax.main "$@"
