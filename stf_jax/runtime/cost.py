"""Counts a model's FLOPs from its shapes.

The count is of *model FLOPs*, as in PaLM's MFU (arXiv 2204.02311, appendix B): the operations that the mathematics of
a step requires, whatever else a program does. So programs of the same model compare by their time alone, and
recomputation, tile padding or attention over masked positions do not raise their utilization. The rules:

- A multiply-add is 2 FLOPs. Matrix products (including convolutions) and the two products of attention count.
  Norms, activations, softmax, rotations, lookups and the optimizer do not: they are under 1 % of a model of billions.
- Causal attention counts half of T², the vision tower's attention all of S². Packed segments do not reduce it, and
  padding counts: the count depends only on the shape of the batch.
- Tower blocks above the highest tap do not exist. Looking up text embeddings is free; a tied head counts as a head.
- In the backward pass, a product counts once more for each factor that needs a gradient: its weights if they are
  trainable, its input if anything below it is trainable. So a frozen tower counts once and the fusion three times, less
  the input of its first layer; the language model counts twice in stage 1, except attention, whose factors are all
  inputs and which counts three times; in stage 2 all of it counts three times.
- Recomputation does not count.
- With ``model.cells`` the model is the tower and the head that labels cells, which counts as the fusion.
- Reducers of image tokens (models/selection.py) count the extra products that they compute: VisionZip computes a
  block's queries and keys again, compares keys and sums states; FastV ranks by the attention of one position per row.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping

import jax

from stf_jax.config import ModelConfig
from stf_jax.models.fusion import tapped_blocks
from stf_jax.models.presets import get_llm_config, get_vision_config
from stf_jax.models.selection import FULL_LAYERS, contextual_tokens, resolve_reduction
from stf_jax.models.vit import VisionConfig
from stf_jax.models.vlm import slots_per_image
from stf_jax.training.state import blueprint, trainable_paths


@dataclasses.dataclass(frozen=True)
class Flops:
    """Model FLOPs of a batch: of the forward pass by part, and of a training step."""

    vision: int  # the vision tower
    fusion: int
    llm: int  # the decoder without its head
    head: int  # logits of all positions
    step: int  # forward and backward of everything: one optimizer step

    @property
    def forward(self) -> int:
        """Model FLOPs of the complete forward pass."""
        return self.vision + self.fusion + self.llm + self.head


def step_flops(
    model: ModelConfig, rules: tuple[tuple[str, str], ...], rows: int, length: int, images_per_row: int
) -> Flops:
    """Counts the model FLOPs of a training step.

    Args:
      model: the model; its precision, remat and kernels do not matter.
      rules: which parameters are trainable, as in the config.
      rows: B, of the global batch, all microbatches together.
      length: T, tokens per row.
      images_per_row: M.

    Raises:
      UserError: as :func:`stf_jax.training.state.blueprint` and :func:`stf_jax.training.state.trainable_paths` do.
    """
    shapes = blueprint(model).shapes
    return _flops_by_part(
        _cumulative_flops(model, _Counter(shapes, trainable_paths(rules, shapes)), rows, length, images_per_row)
    )


def forward_flops(model: ModelConfig, rows: int, length: int, images_per_row: int) -> Flops:
    """Counts the model FLOPs of the forward pass, which ``step`` equals.

    With ``model.reduce`` this is the cost of :meth:`stf_jax.models.vlm.VLM.prefill` of prompts that fill T, except for
    the head.
    """
    return _flops_by_part(_cumulative_flops(model, _Counter(blueprint(model).shapes, ()), rows, length, images_per_row))


def prefill_flops(model: ModelConfig, rows: int, length: int, images_per_row: int) -> Flops:
    """Counts the model FLOPs of prefill: as :func:`forward_flops`, with the head at one position per row."""
    flops = forward_flops(model, rows, length, images_per_row)
    head = flops.head // length
    return dataclasses.replace(flops, head=head, step=flops.step - flops.head + head)


def fusion_flops(model: ModelConfig, images: int) -> tuple[int, int]:
    """Counts the fusion's FLOPs: forward; and forward and backward, if it is trainable and the tower frozen."""
    shapes = blueprint(model).shapes
    trainable = [path for path in shapes if path.startswith("fusion/")]
    _, (before, _), (after, step), *_ = _cumulative_flops(model, _Counter(shapes, trainable), images, 1, 1)
    return after - before, step - before


def decode_flops(model: ModelConfig, rows: int, slots: int, images_per_row: int = 0) -> int:
    """Counts the model FLOPs of decoding one token per row, which attends to ``slots`` slots, including its own.

    If image tokens are dropped in the decoder, ``slots`` is that of the first layers, and holds ``images_per_row``
    images.
    """
    llm, fewer = get_llm_config(model), images_per_row * resolve_reduction(model).dropped
    assert llm is not None  # nothing decodes with a tower alone
    per_slot = rows * 2 * 2 * llm.heads * llm.head_dim  # both products of a layer's attention
    total_slots = llm.layers * slots - (llm.layers - FULL_LAYERS) * fewer
    return forward_flops(model, rows, 1, 0).forward - per_slot * llm.layers // 2 + per_slot * total_slots


_Totals = list[tuple[int, int]]  # FLOPs, forward and of a step, counted up to several points


def _flops_by_part(totals: _Totals) -> Flops:
    forward = [forward for forward, _ in totals]
    vision, fusion, llm, head = (after - before for before, after in itertools.pairwise(forward))
    return Flops(vision, fusion, llm, head, step=totals[-1][1])


def _cumulative_flops(model: ModelConfig, counter: "_Counter", rows: int, length: int, images_per_row: int) -> _Totals:
    """Returns FLOPs, forward and of a step, counted before the tower and after each part."""
    vision, llm, reduced = get_vision_config(model), get_llm_config(model), resolve_reduction(model)
    images, totals = rows * images_per_row, [(0, 0)]
    if images:
        assert vision is not None  # a language model alone has no images
        counter.count_modules("vision/patch_embed", positions=images * vision.grid**2)
        counter.count_modules("vision/class_token", "vision/position_embed", "vision/pre_norm")
        tokens = vision.grid**2 + vision.class_token
        for _ in range(max(tapped_blocks(model.fusion, vision.layers))):
            product = 2 * images * tokens**2 * vision.width
            counter.count_block("vision/blocks", vision.layers, images * tokens, product, (("up",), ("down",)))
        if reduced.name == "visionzip":
            counter.count_product(images * _visionzip_flops(model, vision, reduced.keep))
    totals.append((counter.forward, counter.step))
    if model.cells:
        assert vision is not None
        counter.count_modules("cells/scores", positions=images * vision.grid**2)
        return totals + [(counter.forward, counter.step)] * 3
    if images:
        assert vision is not None
        patches = images * (reduced.keep if reduced.name in ("random", "visionzip") else vision.grid**2)
        counter.count_modules("fusion/mbtf/first", positions=patches)
        counter.count_modules("fusion/mbtf/second", positions=patches)
        _CONNECTORS.get(model.fusion.fusion, _count_token_layers)(counter, _Counts.of(model, vision.grid, images))
    totals.append((counter.forward, counter.step))
    assert llm is not None  # only the tower that labels cells may be alone
    counter.count_modules("llm/embedding")
    fewer = images_per_row * reduced.dropped
    for layer in range(llm.layers):
        read_length = length if layer < FULL_LAYERS else length - fewer
        product = rows * read_length**2 * llm.heads * llm.head_dim  # 2·T²/2
        counter.count_block("llm/blocks", llm.layers, rows * read_length, product, (("gate", "up"), ("down",)))
    if fewer:
        counter.count_product(2 * rows * length * llm.heads * llm.head_dim)
    counter.count_modules("llm/norm")
    totals.append((counter.forward, counter.step))
    if llm.tied:
        counter.count_product(
            2 * rows * length * llm.vocab * llm.width, counter.needs_gradient, "llm/embedding" in counter.trainable
        )
    else:
        counter.count_modules("llm/head", positions=rows * length)
    totals.append((counter.forward, counter.step))
    return totals


def _visionzip_flops(model: ModelConfig, vision: VisionConfig, keep: int) -> int:
    """FLOPs of VisionZip's extra products per image."""
    patches, targets = vision.grid**2, contextual_tokens(keep)
    tokens, others = patches + vision.class_token, patches - keep
    queries = 1 if vision.class_token else tokens
    attention = 2 * (queries + tokens) * vision.width**2 + 2 * queries * tokens * vision.width
    taps = len(tapped_blocks(model.fusion, vision.layers))
    return attention + 2 * others * targets * (vision.width // vision.heads + taps * vision.width)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Numbers of images, patches and vision tokens in a batch."""

    images: int
    patches: int
    padded: int  # patches, with the grid padded to complete windows
    tokens: int

    @classmethod
    def of(cls, model: ModelConfig, grid: int, images: int) -> "_Counts":
        kernel = model.fusion.kernel
        padded = (math.ceil(grid / kernel) * kernel) ** 2
        return cls(images, images * grid**2, images * padded, images * slots_per_image(model))


def _count_token_layers(counter: "_Counter", counts: _Counts) -> None:
    for layer in ("conv", "mix", "out", "first", "second", "projector/first", "projector/second"):
        counter.count_modules(f"fusion/tokens/{layer}", positions=counts.tokens)


def _ldp_v2(counter: "_Counter", counts: _Counts) -> None:
    counter.count_modules("fusion/tokens/projector/first", positions=counts.padded)
    counter.count_modules("fusion/tokens/projector/second", positions=counts.padded)
    counter.count_modules("fusion/tokens/position", positions=counts.tokens)


def _c_abstractor(counter: "_Counter", counts: _Counts) -> None:
    counter.count_modules("fusion/tokens/position_embed")
    for name, grid_positions in (("fusion/tokens/before", counts.padded), ("fusion/tokens/after", counts.tokens)):
        layers = len(counter.shapes[f"{name}/first/kernel"])
        for _ in range(layers):
            for layer in ("first", "depthwise", "squeeze", "excite", "last"):
                positions = counts.images if layer in ("squeeze", "excite") else grid_positions
                counter.count_modules(f"{name}/{layer}", positions=positions, layers=layers)
                counter.count_modules(f"{name}/{layer}_norm")
    _count_token_layers(counter, counts)


def _resampler(counter: "_Counter", counts: _Counts) -> None:
    name, below = "fusion/tokens/blocks", counter.needs_gradient
    counter.count_modules("fusion/tokens/enter", positions=counts.patches)
    entered, counter.needs_gradient = counter.needs_gradient, below
    counter.count_modules("fusion/tokens/queries")
    layers, width = counter.shapes[f"{name}/query_norm/scale"].shape
    attended = counts.tokens + counts.patches
    for _ in range(layers):
        counter.count_modules(f"{name}/query_norm")
        both = counter.needs_gradient or entered or counter.is_trainable(f"{name}/patch_norm")
        product = 2 * counts.tokens * (attended // counts.images) * width
        reads = ((counter.needs_gradient, counts.tokens), (both, attended), (both, attended))
        counter.count_attention(f"{name}/attention", layers, product, *reads)
        counter.count_modules(f"{name}/mlp_norm")
        counter.count_modules(f"{name}/gate", f"{name}/up", positions=counts.tokens, layers=layers)
        counter.count_modules(f"{name}/hidden_norm")
        counter.count_modules(f"{name}/down", positions=counts.tokens, layers=layers)
    counter.count_modules("fusion/tokens/exit", positions=counts.tokens)


def _token_packer(counter: "_Counter", counts: _Counts) -> None:
    below, reads = counter.needs_gradient, []
    for layers, norm, positions in (
        (("coarse",), "query_norm", counts.tokens),
        (("keys/first", "keys/second"), "key_norm", counts.padded),
        (("values/first", "values/second"), "value_norm", counts.padded),
    ):
        counter.needs_gradient = below
        for layer in layers:
            counter.count_modules(f"fusion/tokens/{layer}", positions=positions)
        counter.count_modules(f"fusion/tokens/{norm}")
        reads.append((counter.needs_gradient, positions))
    (width,) = counter.shapes["fusion/tokens/query_norm/scale"].shape
    counter.count_attention("fusion/tokens/attention", 1, 2 * counts.padded * width, *reads)
    _count_token_layers(counter, counts)


_CONNECTORS = {  # the other fusions only have layers at each token
    "ldp_v2": _ldp_v2,
    "c_abstractor": _c_abstractor,
    "resampler": _resampler,
    "token_packer": _token_packer,
}


class _Counter:
    """Counts products from the bottom of a model upwards.

    Attributes:
      needs_gradient: whether anything below is trainable.
      forward: FLOPs of the forward pass so far.
      step: FLOPs of forward and backward passes so far.
    """

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct], trainable: Collection[str]) -> None:
        self.shapes, self.trainable = shapes, trainable
        self.needs_gradient, self.forward, self.step = False, 0, 0

    def count_product(self, flops: int, *gradients: bool) -> None:
        """Counts a product, and once more for each of its factors that needs a gradient."""
        self.forward += flops
        self.step += flops * (1 + sum(gradients))

    def is_trainable(self, *modules: str) -> bool:
        return any(path == module or path.startswith(f"{module}/") for path in self.trainable for module in modules)

    def count_modules(self, *modules: str, positions: int = 0, layers: int = 1) -> None:
        """Counts parallel modules with the same input: one of ``layers`` stacked layers, applied at ``positions``.

        Modules without a kernel cost nothing; modules that the model lacks are ignored.
        """
        for module in modules:
            kernel = f"{module}/kernel"
            if kernel in self.shapes:
                size = math.prod(self.shapes[kernel].shape) // layers
                self.count_product(2 * size * positions, self.needs_gradient, kernel in self.trainable)
        self.needs_gradient = self.needs_gradient or self.is_trainable(*modules)

    def count_block(
        self, name: str, layers: int, positions: int, product: int, mlp: tuple[tuple[str, ...], ...]
    ) -> None:
        """Counts one transformer layer; each of attention's two products costs ``product``."""
        self.count_modules(f"{name}/attention_norm")
        self.count_attention(f"{name}/attention", layers, product, *[(self.needs_gradient, positions)] * 3)
        self.count_modules(f"{name}/mlp_norm")
        for modules in mlp:
            self.count_modules(*(f"{name}/mlp/{module}" for module in modules), positions=positions, layers=layers)

    def count_attention(self, name: str, layers: int, product: int, *reads: tuple[bool, int]) -> None:
        """Counts attention. ``reads``, of query, key and value: does the input need a gradient, and positions."""
        gradients = []
        for head, (below, positions) in zip(("query", "key", "value"), reads, strict=True):
            self.needs_gradient = below
            self.count_modules(f"{name}/{head}", f"{name}/{head}_norm", positions=positions, layers=layers)
            gradients.append(self.needs_gradient)
        query, key, value = gradients
        self.count_product(product, query, key)  # scores
        self.count_product(product, query or key, value)
        self.needs_gradient = any(gradients)
        self.count_modules(f"{name}/out", positions=reads[0][1], layers=layers)
