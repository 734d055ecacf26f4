#!/usr/bin/env bash
# Create or update .venv for this machine's accelerators, with the versions of requirements.txt:
#
#   launch/install.sh tpu       # a Cloud TPU machine
#   launch/install.sh cuda12    # a machine with NVIDIA GPUs
set -euo pipefail
case ${1:-} in
    tpu | cuda12) ;;
    *)
        sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$0"
        [[ ${1:-} == --help ]] && exit
        exit 2
        ;;
esac
cd "$(dirname "$0")/.."
if [[ ! -x .venv/bin/python ]]; then
    python=$(command -v python3.12 || command -v python3.11 || true)
    if [[ -n $python ]] && "$python" -c 'import ensurepip' 2> /dev/null; then
        "$python" -m venv .venv
    else # most images of TPU machines are Ubuntu 22.04, which has Python 3.10
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
fi
# requirements.txt pins jax, and with it jax[...]; requirements-dev.txt only pins the packages for gs:// paths.
.venv/bin/python -m pip install --quiet --constraint requirements-dev.txt --requirement requirements.txt \
    "jax[$1]" gcsfs google-cloud-storage
