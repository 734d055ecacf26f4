#!/usr/bin/env bash
# Train on this machine's devices, or on simulated ones to try a mesh before renting it:
#
#   launch/local.sh --config=configs/demo.py --workdir=runs/demo
#   DEVICES=8 launch/local.sh --config=configs/demo.py:stage=pretrain,steps=20 --workdir=runs/mesh --config.mesh.fsdp=4
#
# DEVICES: CPU devices to simulate; unset, jax takes the accelerators that it finds.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -n ${DEVICES:-} ]]; then
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES
fi
exec .venv/bin/python -m stf_jax.main "$@"
