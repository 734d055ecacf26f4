"""What a model costs by its shapes.

A model's cost is counted in *model FLOPs*, as in PaLM's MFU (arXiv 2204.02311, appendix B): what the mathematics of a
step asks for, whatever a program does beside it. So two programs of the same model are compared by their time alone,
and recomputation, padding of tiles or attention over masked places make nobody look busier. The rules:

- A multiply-add is 2. Counted are products of matrices (convolutions among them) and attention's two products.
  Norms, activations, softmax, rotations, look-ups and the optimizer are not: under 1 % of a model of billions.
- Causal attention counts half of T², the tower's attention all of S². Segments of packed rows do not shorten it, and
  all positions count, filling included: the count follows from the batch's shape.
- Tower blocks above the highest tap do not exist. Looking up text embeddings is free; a tied head is a head.
- Going back, a product costs as much again for the gradient of each factor that needs one: of its weights where they
  learn, of its input where anything below learns. So the frozen tower counts once and the fusion three times, less the
  input of its first layer; the language model counts twice in stage 1, but its attention, whose factors are all inputs,
  three times; in stage 2 all of it three times.
- What is recomputed counts once.
- With ``model.cells`` there is the tower and, counted as the fusion, the head that labels cells; and nothing else.
- What reduces image tokens (models/selection.py) counts what it computes of its own, products alone: VisionZip asks a
  block for queries and keys again, compares keys and sums states; FastV ranks by the attention of one position a row.
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
from stf_jax.models.vlm import slots_per_image
from stf_jax.training.state import blueprint, trainable_paths


@dataclasses.dataclass(frozen=True)
class Flops:
    """Model FLOPs of a batch: forward by part, and what training needs."""

    vision: int  # tower
    fusion: int
    llm: int  # decoder without its head
    head: int  # logits of every position
    step: int  # forward and backward of everything: one optimizer step

    @property
    def forward(self) -> int:
        """Of all parts, forward alone."""
        return self.vision + self.fusion + self.llm + self.head


def step_flops(
    model: ModelConfig, rules: tuple[tuple[str, str], ...], rows: int, length: int, images_per_row: int
) -> Flops:
    """What a training step costs, by the module's rules.

    Args:
      model: which model; its precision, remat and kernels change nothing.
      rules: which parameters learn, as in the config.
      rows: B, in the global batch, all microbatches together.
      length: T, tokens per row.
      images_per_row: M.

    Raises:
      UserError: as :func:`stf_jax.training.state.blueprint` and :func:`stf_jax.training.state.trainable_paths` do.
    """
    shapes = blueprint(model).shapes
    return _flops(_marks(model, _Walk(shapes, trainable_paths(rules, shapes)), rows, length, images_per_row))


def forward_flops(model: ModelConfig, rows: int, length: int, images_per_row: int) -> Flops:
    """As :func:`step_flops` where nothing learns: ``step`` is the forward pass alone.

    With ``model.reduce`` it is what reading costs of prompts that fill T as :meth:`stf_jax.models.vlm.VLM.prefill` has
    it, but for the head.
    """
    return _flops(_marks(model, _Walk(blueprint(model).shapes, ()), rows, length, images_per_row))


def prefill_flops(model: ModelConfig, rows: int, length: int, images_per_row: int) -> Flops:
    """What reading prompts costs: as :func:`forward_flops`, with the head at one position a row."""
    found = forward_flops(model, rows, length, images_per_row)
    head = found.head // length
    return dataclasses.replace(found, head=head, step=found.step - found.head + head)


def fusion_flops(model: ModelConfig, images: int) -> tuple[int, int]:
    """Of the fusion alone: forward; and forward and backward, where it learns and nothing below it does."""
    shapes = blueprint(model).shapes
    learned = [path for path in shapes if path.startswith("fusion/")]
    _, (before, _), (after, step), *_ = _marks(model, _Walk(shapes, learned), images, 1, 1)
    return after - before, step - before


def decode_flops(model: ModelConfig, rows: int, slots: int, images_per_row: int = 0) -> int:
    """What one more token a row costs, which looks at so many slots of the cache, its own among them.

    Where image tokens are dropped in the decoder, these are the first layers' slots, and some are of so many images.
    """
    llm, fewer = get_llm_config(model), images_per_row * resolve_reduction(model).dropped
    one = rows * 2 * 2 * llm.heads * llm.head_dim  # both products of a layer for one slot
    looks = llm.layers * slots - (llm.layers - FULL_LAYERS) * fewer
    return forward_flops(model, rows, 1, 0).forward - one * llm.layers // 2 + one * looks


def _flops(marks):
    ends = [forward for forward, _ in marks]
    return Flops(*(after - before for before, after in itertools.pairwise(ends)), step=marks[-1][1])


def _marks(model, walk, rows, length, images_per_row):
    """What was counted, forward and of a step, before the tower and after each part."""
    vision, llm, reduced = get_vision_config(model), get_llm_config(model), resolve_reduction(model)
    images, marks = rows * images_per_row, [(0, 0)]
    if images:
        walk.passes("vision/patch_embed", positions=images * vision.grid**2)
        walk.passes("vision/class_token", "vision/position_embed", "vision/pre_norm")
        tokens = vision.grid**2 + vision.class_token
        for _ in range(max(tapped_blocks(model.fusion, vision.layers))):
            product = 2 * images * tokens**2 * vision.width
            walk.block("vision/blocks", vision.layers, images * tokens, product, (("up",), ("down",)))
        if reduced.name == "visionzip":
            walk.product(images * _zipping(model, vision, reduced.keep))
    marks.append((walk.forward, walk.step))
    if model.cells:
        walk.passes("cells/scores", positions=images * vision.grid**2)
        return marks + [(walk.forward, walk.step)] * 3
    if images:
        patches = images * (reduced.keep if reduced.name in ("random", "visionzip") else vision.grid**2)
        walk.passes("fusion/mbtf/first", positions=patches)
        walk.passes("fusion/mbtf/second", positions=patches)
        _TOKENS.get(model.fusion.fusion, _each_token)(walk, _Places.of(model, vision.grid, images))
    marks.append((walk.forward, walk.step))
    walk.passes("llm/embedding")
    fewer = images_per_row * reduced.dropped
    for layer in range(llm.layers):
        read = length if layer < FULL_LAYERS else length - fewer
        product = rows * read**2 * llm.heads * llm.head_dim  # 2·T²/2
        walk.block("llm/blocks", llm.layers, rows * read, product, (("gate", "up"), ("down",)))
    if fewer:
        walk.product(2 * rows * length * llm.heads * llm.head_dim)
    walk.passes("llm/norm")
    marks.append((walk.forward, walk.step))
    if llm.tied:
        walk.product(2 * rows * length * llm.vocab * llm.width, walk.alive, "llm/embedding" in walk.learned)
    else:
        walk.passes("llm/head", positions=rows * length)
    marks.append((walk.forward, walk.step))
    return marks


def _zipping(model, vision, keep):
    """FLOPs of VisionZip's own products for an image."""
    patches, targets = vision.grid**2, contextual_tokens(keep)
    tokens, others = patches + vision.class_token, patches - keep
    asking = 1 if vision.class_token else tokens
    received = 2 * (asking + tokens) * vision.width**2 + 2 * asking * tokens * vision.width
    taps = len(tapped_blocks(model.fusion, vision.layers))
    return received + 2 * others * targets * (vision.width // vision.heads + taps * vision.width)


@dataclasses.dataclass(frozen=True)
class _Places:
    """How many there are in a batch."""

    images: int
    patches: int
    padded: int  # patches, filled up to whole windows
    tokens: int

    @classmethod
    def of(cls, model, grid, images):
        kernel = model.fusion.kernel
        padded = (math.ceil(grid / kernel) * kernel) ** 2
        return cls(images, images * grid**2, images * padded, images * slots_per_image(model))


def _each_token(walk, places):
    for layer in ("conv", "mix", "out", "first", "second", "projector/first", "projector/second"):
        walk.passes(f"fusion/tokens/{layer}", positions=places.tokens)


def _ldp_v2(walk, places):
    walk.passes("fusion/tokens/projector/first", positions=places.padded)
    walk.passes("fusion/tokens/projector/second", positions=places.padded)
    walk.passes("fusion/tokens/position", positions=places.tokens)


def _c_abstractor(walk, places):
    walk.passes("fusion/tokens/position_embed")
    for name, all_of_it in (("fusion/tokens/before", places.padded), ("fusion/tokens/after", places.tokens)):
        layers = len(walk.shapes[f"{name}/first/kernel"])
        for _ in range(layers):
            for layer in ("first", "depthwise", "squeeze", "excite", "last"):
                positions = places.images if layer in ("squeeze", "excite") else all_of_it
                walk.passes(f"{name}/{layer}", positions=positions, layers=layers)
                walk.passes(f"{name}/{layer}_norm")
    _each_token(walk, places)


def _resampler(walk, places):
    name, below = "fusion/tokens/blocks", walk.alive
    walk.passes("fusion/tokens/enter", positions=places.patches)
    entered, walk.alive = walk.alive, below
    walk.passes("fusion/tokens/queries")
    layers, width = walk.shapes[f"{name}/query_norm/scale"].shape
    seen = places.tokens + places.patches
    for _ in range(layers):
        walk.passes(f"{name}/query_norm")
        both = walk.alive or entered or walk.learns(f"{name}/patch_norm")
        product = 2 * places.tokens * (seen // places.images) * width
        reads = ((walk.alive, places.tokens), (both, seen), (both, seen))
        walk.attention(f"{name}/attention", layers, product, *reads)
        walk.passes(f"{name}/mlp_norm")
        walk.passes(f"{name}/gate", f"{name}/up", positions=places.tokens, layers=layers)
        walk.passes(f"{name}/hidden_norm")
        walk.passes(f"{name}/down", positions=places.tokens, layers=layers)
    walk.passes("fusion/tokens/exit", positions=places.tokens)


def _token_packer(walk, places):
    below, reads = walk.alive, []
    for layers, norm, positions in (
        (("coarse",), "query_norm", places.tokens),
        (("keys/first", "keys/second"), "key_norm", places.padded),
        (("values/first", "values/second"), "value_norm", places.padded),
    ):
        walk.alive = below
        for layer in layers:
            walk.passes(f"fusion/tokens/{layer}", positions=positions)
        walk.passes(f"fusion/tokens/{norm}")
        reads.append((walk.alive, positions))
    (width,) = walk.shapes["fusion/tokens/query_norm/scale"].shape
    walk.attention("fusion/tokens/attention", 1, 2 * places.padded * width, *reads)
    _each_token(walk, places)


_TOKENS = {  # the others are layers at each token
    "ldp_v2": _ldp_v2,
    "c_abstractor": _c_abstractor,
    "resampler": _resampler,
    "token_packer": _token_packer,
}


class _Walk:
    """Goes up a model product by product, and knows whether anything below learns (``alive``)."""

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct], learned: Collection[str]):
        self.shapes, self.learned = shapes, learned
        self.alive, self.forward, self.step = False, 0, 0

    def product(self, flops: int, *gradients: bool) -> None:
        """Counts a product, and again for each of its factors that needs a gradient."""
        self.forward += flops
        self.step += flops * (1 + sum(gradients))

    def learns(self, *modules: str) -> bool:
        return any(path == module or path.startswith(f"{module}/") for path in self.learned for module in modules)

    def passes(self, *modules: str, positions: int = 0, layers: int = 1) -> None:
        """Modules side by side, which all read the same; those with a kernel at so many positions, one of its layers.

        A module that the model does not have changes nothing.
        """
        for module in modules:
            kernel = f"{module}/kernel"
            if kernel in self.shapes:
                size = math.prod(self.shapes[kernel].shape) // layers
                self.product(2 * size * positions, self.alive, kernel in self.learned)
        self.alive = self.alive or self.learns(*modules)

    def block(self, name: str, layers: int, positions: int, product: int, mlp: tuple[tuple[str, ...], ...]) -> None:
        """A layer of a transformer; each of attention's two products is ``product``."""
        self.passes(f"{name}/attention_norm")
        self.attention(f"{name}/attention", layers, product, *[(self.alive, positions)] * 3)
        self.passes(f"{name}/mlp_norm")
        for modules in mlp:
            self.passes(*(f"{name}/mlp/{module}" for module in modules), positions=positions, layers=layers)

    def attention(self, name: str, layers: int, product: int, *reads: tuple[bool, int]) -> None:
        """Query, key and value read so many positions each, below which something learns or not."""
        learned = []
        for head, (below, positions) in zip(("query", "key", "value"), reads, strict=True):
            self.alive = below
            self.passes(f"{name}/{head}", f"{name}/{head}_norm", positions=positions, layers=layers)
            learned.append(self.alive)
        query, key, value = learned
        self.product(product, query, key)  # scores
        self.product(product, query or key, value)
        self.alive = any(learned)
        self.passes(f"{name}/out", positions=reads[0][1], layers=layers)
