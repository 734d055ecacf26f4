"""The shardings of the paper's second stage on 8, 32 and 256 devices, leaf by leaf, against ``shardings/*.txt``.

A change shows as a diff. To accept it: ``STF_JAX_WRITE_GOLDEN=1 pytest tests/training/test_shardings.py``.
"""

import difflib
import math
import os
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from tiny import load_recipe

from stf_jax.models.blueprint import blueprint
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import state_layout

GOLDEN = pathlib.Path(__file__).parent / "shardings"
MESHES = {"8": (1, 8, 1), "32": (1, 32, 1), "256": (4, 16, 4)}


def dump(config, mesh):
    """One line per leaf: path, type, shape, sharding and shard shape; then the bytes per device."""
    layout = state_layout(config, blueprint(config.model), make_optimizer(config.optimizer, 100), mesh)
    lines, device_bytes = [], 0
    trees = {"trainable": layout.trainable, "frozen": layout.frozen, "moments": layout.moments}
    for tree, leaves in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
            shard = leaf.sharding.shard_shape(leaf.shape)
            device_bytes += leaf.dtype.itemsize * math.prod(shard)
            path_name = jax.tree_util.keystr(path, simple=True, separator="/")
            split = ", ".join(str(axis or "-") for axis in leaf.sharding.spec)
            lines.append(f"{tree}/{path_name}: {leaf.dtype} {list(leaf.shape)} over ({split}): {list(shard)}")
    return [*sorted(lines), f"a device holds {device_bytes:,} bytes"]


@pytest.mark.parametrize("devices", MESHES)
def test_shardings_equal_the_golden_files(devices):
    mesh = AbstractMesh(MESHES[devices], ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    file, found = GOLDEN / f"finetune_7b_{devices}.txt", dump(load_recipe("finetune.py"), mesh)
    if os.environ.get("STF_JAX_WRITE_GOLDEN"):
        file.write_text("\n".join(found) + "\n")
    changes = list(difflib.unified_diff(file.read_text().splitlines(), found, file.name, "now", lineterm="", n=0))
    assert not changes, "\n" + "\n".join(changes)
