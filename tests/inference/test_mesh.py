"""The mesh on which a run evaluates: the same devices, over which no weight is gathered for a decoded token."""

import jax
import numpy as np
import pytest
from tiny import Setup

from stf_jax.config import MeshConfig
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.inference.mesh import inference_mesh
from stf_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, 8, 1), (4, 1, 2)), ((2, 2, 2), (4, 1, 2)), ((1, 1, 1), (1, 1, 1))],
    ids=str,
)
def test_tensor_divides_the_kv_heads(sizes, expected):
    setup = Setup.of()  # with two kv heads
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    found = inference_mesh(setup.plan, mesh)
    assert tuple(found.shape.values()) == expected
    assert list(found.devices.flat) == list(mesh.devices.flat)


def test_parameters_move_to_it_unchanged():
    tokenizer = load_tokenizer("miniature")
    setup = Setup.of(**{"mesh.data": 1, "mesh.fsdp": 8})
    state, mesh = setup.state(), inference_mesh(setup.plan, setup.mesh)
    generator = Generator(setup.config.model, tokenizer, mesh, "v1", "square").load_params(state.params.items())
    for path, value in state.params.items():
        weight = generator._weights[path]
        layers = weight if isinstance(weight, tuple) else (weight,)
        assert all(layer.sharding.mesh == mesh for layer in layers)
        np.testing.assert_array_equal(np.stack(layers) if isinstance(weight, tuple) else layers[0], value)
