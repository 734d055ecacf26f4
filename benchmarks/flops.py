"""Model FLOPs with each fusion, by part, compared with published figures."""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.arguments import LLAVA
from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.models.fusions.base import FUSIONS
from stf_jax.models.spec import resolve_model
from stf_jax.training.flops import decode_flops, prefill_flops

# Published TFLOPs of LLaVA-1.5 7B with CLIP-L/14-336: source, a fusion with the same number of image tokens, TFLOPs.
_PUBLISHED = (
    ("the paper's bound (arXiv 2506.07138)", "mbtf_stf", 1.9),
    ("LLaVA-Mini's table 6 (arXiv 2501.03895)", "mlp", 8.55),
    ("LLaVA-Mini's table 6 (arXiv 2501.03895)", "mbtf_stf", 2.85),
)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Counts FLOPs of one image and a text; a multiply-add is 2, causal attention half of T² (accounting/flops.py).

    Returns:
      For each fusion and text length: image ``tokens``, GFLOPs of the vision tower and the fusion, TFLOPs of
      ``prefill`` (decoder, and head at the last position) and of ``all`` three, and GFLOPs of a ``decoded`` token.
      With the default models also each ``published`` figure, in TFLOPs: FLOPs of the decoder for the image tokens
      alone, and the text length at which the decoder, or all parts, reach the figure, and at which the decoder does
      if the figure counts a multiply-add as 1. None if no text length does.
    """
    try:
        texts = [int(text) for text in options.text.split(",")]
    except ValueError:
        raise UserError(f"--text={options.text} must be comma-separated integers.") from None
    if min(texts) < 0:
        raise UserError("--text must not be negative.")
    rows = [_make_row(_model(options, fusion), text) for fusion, text in itertools.product(FUSIONS.known, texts)]
    if (options.vision, options.llm) == LLAVA:
        rows += [_compare(source, _model(options, fusion), published) for source, fusion, published in _PUBLISHED]
    return rows


def _model(options: argparse.Namespace, fusion: str) -> ModelConfig:
    return ModelConfig(options.vision, options.llm, FusionConfig(fusion))


def prompt_flops(model: ModelConfig, text: int) -> dict[str, int]:
    """FLOPs of prefill for one image and ``text`` tokens, with the head only at the last position."""
    return prefill_flops(model, 1, resolve_model(model).slots + text, 1)


def _make_row(model: ModelConfig, text: int) -> dict[str, Any]:
    flops, tokens = prompt_flops(model, text), resolve_model(model).slots
    return {
        "what": f"{model.fusion.fusion}, {text} of text",
        "tokens": tokens,
        "tower_gflop": flops["vision"] / 1e9,
        "fusion_gflop": flops["fusion"] / 1e9,
        "prefill_tflop": (flops["llm"] + flops["head"]) / 1e12,
        "all_tflop": sum(flops.values()) / 1e12,
        "decoded_gflop": decode_flops(model, 1, tokens + text + 1) / 1e9,
    }


def _compare(source: str, model: ModelConfig, published: float) -> dict[str, Any]:
    samples = [prompt_flops(model, text) for text in range(3)]
    decoder, total = [flops["llm"] + flops["head"] for flops in samples], [sum(flops.values()) for flops in samples]
    return {
        "what": source,
        "tokens": resolve_model(model).slots,
        "published": published,
        "decoder_tflop": decoder[0] / 1e12,
        "text_decoder": _matching_text(decoder, 1e12 * published),
        "text_all": _matching_text(total, 1e12 * published),
        "text_in_macs": _matching_text(decoder, 2e12 * published),
    }


def _matching_text(flops: Sequence[float], target: float) -> int | None:
    """The fewest text tokens that reach the target; None if no text already exceeds it.

    ``flops`` are those of 0, 1 and 2 tokens; because of attention they grow quadratically.
    """
    zero, one, two = flops
    if zero > target:
        return None
    square = (two - 2 * one + zero) / 2
    slope = one - zero - square
    return math.ceil(2 * (target - zero) / (slope + math.sqrt(slope**2 + 4 * square * (target - zero))))
