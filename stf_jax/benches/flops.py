"""What each fusion leaves to compute: model FLOPs part by part, and beside them figures that papers give."""

import argparse
import itertools
import math
from typing import Any

from stf_jax.benches.arguments import LLAVA
from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.models.fusion import FUSIONS
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.cost import Flops, decode_flops, prefill_flops

# TFLOPs that papers give for LLaVA-1.5 of 7B with CLIP-L/14-336: whose, a fusion with as many vision tokens, how many.
_PUBLISHED = (
    ("the paper's bound (arXiv 2506.07138)", "mbtf_stf", 1.9),
    ("LLaVA-Mini's table 6 (arXiv 2501.03895)", "mlp", 8.55),
    ("LLaVA-Mini's table 6 (arXiv 2501.03895)", "mbtf_stf", 2.85),
)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One image and a text; a multiply-add is 2, causal attention half of T² (runtime/cost.py).

    Returns:
      For each fusion and length of text ``tokens`` of the image, GFLOPs of the tower and the fusion, TFLOPs of
      ``prefill`` (decoder, and head at the last position) and of ``all`` three, and GFLOPs of a ``decoded`` token.
      With the default models then each figure that a paper ``published``, in TFLOPs, beside the decoder's for the
      vision tokens alone, and the text with which the decoder alone, or all parts, come to it; and, should the figure
      count a multiply-add once, the decoder with that. None where no text does.
    """
    try:
        texts = [int(text) for text in options.text.split(",")]
    except ValueError:
        raise UserError(f"--text={options.text} should be numbers with commas between.") from None
    if min(texts) < 0:
        raise UserError("--text should not be negative.")
    rows = [_row(_model(options, fusion), text) for fusion, text in itertools.product(FUSIONS, texts)]
    if (options.vision, options.llm) == LLAVA:
        rows += [_beside(what, _model(options, fusion), published) for what, fusion, published in _PUBLISHED]
    return rows


def _model(options, fusion):
    return ModelConfig(options.vision, options.llm, FusionConfig(fusion))


def prompt_flops(model: ModelConfig, text: int) -> Flops:
    """Of reading a prompt: one image and so many tokens, the head at the last of them alone."""
    return prefill_flops(model, 1, slots_per_image(model) + text, 1)


def _row(model, text):
    found, tokens = prompt_flops(model, text), slots_per_image(model)
    return {
        "what": f"{model.fusion.fusion}, {text} of text",
        "tokens": tokens,
        "tower_gflop": found.vision / 1e9,
        "fusion_gflop": found.fusion / 1e9,
        "prefill_tflop": (found.llm + found.head) / 1e12,
        "all_tflop": found.forward / 1e12,
        "decoded_gflop": decode_flops(model, 1, tokens + text + 1) / 1e9,
    }


def _beside(what, model, published):
    first = [prompt_flops(model, text) for text in range(3)]
    decoder, everything = [found.llm + found.head for found in first], [found.forward for found in first]
    return {
        "what": what,
        "tokens": slots_per_image(model),
        "published": published,
        "decoder_tflop": decoder[0] / 1e12,
        "text_decoder": _matching(decoder, 1e12 * published),
        "text_all": _matching(everything, 1e12 * published),
        "text_in_macs": _matching(decoder, 2e12 * published),
    }


def _matching(flops, wanted):
    """The fewest tokens of text with which it comes to that; None where it is more without any.

    Of none, one and two tokens it takes ``flops``; with attention they grow by a square.
    """
    none, one, two = flops
    if none > wanted:
        return None
    square = (two - 2 * one + none) / 2
    slope = one - none - square
    return math.ceil(2 * (wanted - none) / (slope + math.sqrt(slope**2 + 4 * square * (wanted - none))))
