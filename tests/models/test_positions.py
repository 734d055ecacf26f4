"""Interpolated position embeddings against transformers."""

import numpy as np
import pytest
import torch
import transformers

from stf_jax.models.positions import interpolate_positions

MODULES = {
    "clip": (transformers.CLIPVisionConfig, transformers.models.clip.modeling_clip.CLIPVisionEmbeddings),
    "siglip": (transformers.SiglipVisionConfig, transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings),
}


def transformers_positions(kind, table, old, new):
    """The position embeddings of transformers' own module for an image of ``new``×``new`` patches."""
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
def test_interpolation_equals_transformers(kind, old, new):
    class_tokens = int(kind == "clip")
    table = np.random.default_rng(0).standard_normal((old * old + class_tokens, 8))
    result = interpolate_positions(table, new * new + class_tokens)
    np.testing.assert_allclose(result, transformers_positions(kind, table, old, new), rtol=0, atol=1e-12)
    assert result.dtype == table.dtype


def test_same_grid_is_unchanged():
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    np.testing.assert_allclose(interpolate_positions(table, 50), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(7, 5), (16, 8), (16, 10)])
def test_incompatible_grids_are_rejected(old, new):
    with pytest.raises(ValueError, match="positions"):
        interpolate_positions(np.zeros((old, 2)), new)
