"""Honeybee's C-Abstractor (arXiv 2312.06742)."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from stf_jax.config import FusionConfig
from stf_jax.models.fusions.base import FusionSpec, Grid
from stf_jax.models.fusions.parts import DepthwiseConv, Projector, average_windows
from stf_jax.models.layers import LayerNorm, Linear, apply_layers, initializers, normal, parameter
from stf_jax.models.tensor_names import DEPTHWISE, MATRIX, POINTWISE, Tensor, TensorNames, name_layer, name_norm

DEPTH = 3  # number of blocks before and after pooling by default


class CAbstractor(nnx.Module):
    """Honeybee's C-Abstractor: [B, g, g, C] → [B, g/k, g/k, D].

    Adds learned positions [P, C], then applies L convolutional blocks, the mean of each window, L more blocks, and a
    projector with SiLU. The original reads the tower's last block (24 of CLIP-L), and pools adaptively, so it allows
    any number of windows per side.
    """

    spec = FusionSpec()
    torch_file = "c_abstractor_torch.py"

    @staticmethod
    def resolve(config: FusionConfig, grid: Grid) -> FusionConfig:
        """The config with the published depth in place of zero."""
        del grid
        return dataclasses.replace(config, depth=config.depth or DEPTH)

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, grid: Grid, out: int) -> None:
        depth = config.depth
        self.kernel, self.layers = config.kernel, range(depth)
        positions = [(grid.side**2, "position"), (grid.channels, "embed")]
        self.position_embed = parameter(rngs, positions, normal(0.02))
        self.before = ConvBlock(rngs, config, grid.channels, depth)
        self.after = ConvBlock(rngs, config, grid.channels, depth)
        self.projector = Projector(rngs, config, grid.channels, out, jax.nn.silu)

    def __call__(self, x: Float[Array, "B g g C"]) -> Float[Array, "B h h D"]:
        x = x + self.position_embed[...].astype(x.dtype).reshape(x.shape[1:])
        x = apply_layers(self.before, x, layers=self.layers, scan=False, remat="none")
        x = apply_layers(self.after, average_windows(x, self.kernel), layers=self.layers, scan=False, remat="none")
        return self.projector(x)

    @staticmethod
    def tensor_names(config: FusionConfig) -> TensorNames:
        """Names of the parameters in exports."""
        del config
        return {
            **Projector.name_tensors("projector/", "mm_projector.mlp"),
            "position_embed": Tensor("mm_projector.position_embedding", MATRIX),
            **ConvBlock.name_tensors("before", "mm_projector.before.{layer}"),
            **ConvBlock.name_tensors("after", "mm_projector.after.{layer}"),
        }


class ConvBlock(nnx.Module):
    """RegNet-Y's residual block (arXiv 2003.13678) as Honeybee configures it: [B, h, w, C] → [B, h, w, C].

    1×1, depth-wise 3×3 (groups of one channel) and 1×1 convolutions without biases, each followed by a layer norm over
    the channels of each position; SiLU. After the second, squeeze and excitation (through C/4) weighs channels by their
    mean over all positions. Holds all blocks' parameters; a call sees one block's.
    """

    def __init__(self, rngs: nnx.Rngs, config: FusionConfig, width: int, stack: int) -> None:
        width_axis, inner_axis, squeezed_axis = (width, "embed"), (width, "mlp"), (round(width / 4), "mlp")
        conv_init = initializers(config.init, width, width)
        squeeze_init, excite_init = (
            initializers(config.init, *fans) for fans in ((width, squeezed_axis[0]), (squeezed_axis[0], width))
        )
        self.first = Linear(rngs, [width_axis], [inner_axis], bias=False, stack=stack, **conv_init)
        self.first_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.depthwise = DepthwiseConv(rngs, config, inner_axis, bias=False, stack=stack)
        self.depthwise_norm = LayerNorm(rngs, width, 1e-5, stack=stack)
        self.squeeze = Linear(rngs, [width_axis], [squeezed_axis], stack=stack, **squeeze_init)
        self.excite = Linear(rngs, [squeezed_axis], [width_axis], stack=stack, **excite_init)
        self.last = Linear(rngs, [inner_axis], [width_axis], bias=False, stack=stack, **conv_init)
        self.last_norm = LayerNorm(rngs, width, 1e-5, stack=stack)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = jax.nn.silu(self.first_norm(self.first(x)))
        y = jax.nn.silu(self.depthwise_norm(self.depthwise(y)))
        weights = self.excite(jax.nn.silu(self.squeeze(y.mean((1, 2)))))
        y = y * jax.nn.sigmoid(weights)[:, None, None]
        return jax.nn.silu(x + self.last_norm(self.last(y)))

    @staticmethod
    def name_tensors(path: str, name: str) -> dict[str, Tensor]:
        """Names the layers of the block."""
        return {
            **name_layer(f"{path}/first", f"{name}.conv1", POINTWISE),
            **name_norm(f"{path}/first_norm", f"{name}.norm1"),
            **name_layer(f"{path}/depthwise", f"{name}.conv2", DEPTHWISE),
            **name_norm(f"{path}/depthwise_norm", f"{name}.norm2"),
            **name_layer(f"{path}/squeeze", f"{name}.squeeze", POINTWISE),
            **name_layer(f"{path}/excite", f"{name}.excite", POINTWISE),
            **name_layer(f"{path}/last", f"{name}.conv3", POINTWISE),
            **name_norm(f"{path}/last_norm", f"{name}.norm3"),
        }


COMPONENTS = {"c_abstractor": CAbstractor}
