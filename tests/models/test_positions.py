"""Interpolated position embeddings are those of transformers."""

import numpy as np
import pytest
import torch
import transformers

from stf_jax.models.positions import interpolated

MODULES = {
    "clip": (transformers.CLIPVisionConfig, transformers.models.clip.modeling_clip.CLIPVisionEmbeddings),
    "siglip": (transformers.SiglipVisionConfig, transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings),
}


def of_transformers(kind, table, old, new):
    """What transformers' own embeddings module adds to the patches of an image of ``new``×``new`` patches."""
    config, module = MODULES[kind]
    width, patch = table.shape[1], 4
    config = config(hidden_size=width, num_attention_heads=1, image_size=old * patch, patch_size=patch)
    module = module(config).double()
    with torch.no_grad():
        module.position_embedding.weight.copy_(torch.from_numpy(table))
        embeddings = torch.zeros(1, new * new + (kind == "clip"), width)
        return module.interpolate_pos_encoding(embeddings, new * patch, new * patch)[0].numpy()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("old", "new"), [(12, 6), (6, 12), (24, 16), (5, 7), (3, 1), (4, 4)])
def test_as_transformers_interpolates(kind, old, new):
    first = int(kind == "clip")
    table = np.random.default_rng(0).standard_normal((old * old + first, 8))
    found = interpolated(table, new * new + first)
    np.testing.assert_allclose(found, of_transformers(kind, table, old, new), rtol=0, atol=1e-12)
    assert found.dtype == table.dtype


def test_the_same_grid_is_the_same_table():
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    np.testing.assert_allclose(interpolated(table, 50), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(7, 5), (16, 8), (16, 10)])
def test_what_is_no_grid_is_refused(old, new):
    with pytest.raises(ValueError, match="positions"):
        interpolated(np.zeros((old, 2)), new)
