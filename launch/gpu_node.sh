#!/usr/bin/env bash
# Train on all GPUs of this machine, in one process:
#
#   launch/gpu_node.sh --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
#
# On several machines without a scheduler, run the same command on each, with a different --process. All machines must
# share the workdir. The coordinator is the first machine, by a name or address that the others reach, and a free port.
#
#   launch/gpu_node.sh --config=FILE --workdir=DIR --coordinator=node0:1234 --processes=2 --process=0    # on node0
#   launch/gpu_node.sh --config=FILE --workdir=DIR --coordinator=node0:1234 --processes=2 --process=1    # on node1
#
# If a machine is lost, the processes of the others end, and launch/restart.sh restarts them (see there for details and
# RESTARTS); they wait for the lost one. To stop a run, interrupt it on each machine: it finishes and saves the step.
set -euo pipefail
if [[ $# == 0 || $1 == --help ]]; then
    sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
    exit
fi
# Relative paths start at the caller's folder; the program is found next to this script.
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
if ! nvidia-smi --list-gpus > /dev/null; then
    echo "error: nvidia-smi finds no GPU on $(hostname)." >&2
    exit 2
fi
# The plugin alone is not enough: requirements-plan.txt has it without CUDA's libraries.
if ! "$here/.venv/bin/python" -c 'import jax_cuda12_plugin, nvidia.cublas' 2> /dev/null; then
    "$here/launch/install.sh" cuda12
fi
# By default, jax allocates only 75 % of a GPU's memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
export JAX_PLATFORMS=cuda,cpu # makes failing GPUs an error; otherwise training would silently use the CPU
exec "$here/launch/restart.sh" "$here/.venv/bin/python" -m stf_jax.main "$@"
