"""Names and layouts of parameters in PyTorch's state dicts.

A table maps the path of a parameter to the name of its tensor and a layout. For each axis of the tensor, the layout
lists the axes of the parameter that it holds, outermost first. Layouts are data, so the same table serves imports and
exports:

    tensor [H·Dh, D], parameter [D, H, Dh]      layout ((1, 2), (0,))

A parameter of a block has a leading axis L here and is one tensor per layer in PyTorch; layouts describe one layer.
"""

from collections.abc import Mapping
from typing import NamedTuple

Layout = tuple[tuple[int, ...], ...]


class Tensor(NamedTuple):
    """The name and layout of a parameter in a state dict; ``{layer}`` counts from 0."""

    name: str
    layout: Layout


TensorNames = Mapping[str, Tensor]  # by parameter path

#                                              tensor           parameter
VECTOR: Layout = ((0,),)  #                    [D]              [D]
MATRIX: Layout = ((0,), (1,))  #               [V, D]           [V, D]
LINEAR: Layout = ((1,), (0,))  #               [out, in]        [in, out]
TO_HEADS: Layout = ((1, 2), (0,))  #           [H·Dh, D]        [D, H, Dh]
HEADS: Layout = ((0, 1),)  #                   [H·Dh]           [H, Dh]
FROM_HEADS: Layout = ((2,), (0, 1))  #         [D, H·Dh]        [H, Dh, D]
CONV: Layout = ((3,), (2,), (0,), (1,))  #     [out, in, h, w]  [h, w, in, out]
POINTWISE: Layout = ((1,), (0,), (), ())  #    [out, in, 1, 1]  [in, out]
DEPTHWISE: Layout = ((2,), (), (0,), (1,))  #  [C, 1, h, w]     [h, w, C]
UNFOLDED: Layout = ((3,), (2, 0, 1))  #        [out, in·h·w]    [h, w, in, out]


def name_layer(path: str, name: str, kernel: Layout = LINEAR, bias: Layout = VECTOR) -> dict[str, Tensor]:
    """Names a linear layer or convolution."""
    return {f"{path}/kernel": Tensor(f"{name}.weight", kernel), f"{path}/bias": Tensor(f"{name}.bias", bias)}


def name_norm(path: str, name: str) -> dict[str, Tensor]:
    """Names a layer norm."""
    return {f"{path}/scale": Tensor(f"{name}.weight", VECTOR), f"{path}/bias": Tensor(f"{name}.bias", VECTOR)}


def name_by_convention(axes: Mapping[str, tuple[str, ...]], prefix: str) -> dict[str, Tensor]:
    """Names parameters like a PyTorch module with the same attributes, from their logical axes.

    ``blocks/up/kernel`` with an axis of layers becomes ``blocks.{layer}.up.weight``.
    """
    names: dict[str, Tensor] = {}
    for path, logical in axes.items():
        *modules, leaf = path.split("/")
        if logical[:1] == ("layers",):
            modules, logical = [modules[0], "{layer}", *modules[1:]], logical[1:]
        names[path] = Tensor(".".join([prefix, *modules, _LEAVES.get(leaf, leaf)]), _layout_of(leaf, logical))
    return names


_LEAVES = {"kernel": "weight", "scale": "weight"}


def _layout_of(leaf: str, axes: tuple[str, ...]) -> Layout:
    if leaf != "kernel":
        return HEADS if axes == ("heads", "head_dim") else tuple((axis,) for axis in range(len(axes)))
    if "head_dim" in axes:
        return TO_HEADS if axes[-1] == "head_dim" else FROM_HEADS
    if axes[:2] == ("window", "window"):
        return CONV if len(axes) == 4 else DEPTHWISE
    return LINEAR
