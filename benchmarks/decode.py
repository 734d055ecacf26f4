"""Decoding here and with ``generate`` of transformers in PyTorch, on the same exported weights in the same run."""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.process import measure_process
from benchmarks.synthetic import make_export
from benchmarks.timing import median_figures, median_seconds
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, Precision, UserError
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling, TokenRules, Weights, split_layers
from stf_jax.inference.generator import bucket_length
from stf_jax.models.blueprint import blueprint
from stf_jax.models.fusions.base import tokens_per_image
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.weights.model import open_model

_FUSIONS = ("mlp", "avg_pool", "mbtf_stf")
TEXT = 60  # text tokens per prompt


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each fusion, batch size and program in a separate process; one row each."""
    try:
        batches = [int(size) for size in options.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches={options.batches} must be comma-separated integers.") from None
    if min(batches) < 1 or options.tokens < 2:
        raise UserError("--batches must be at least 1 and --tokens at least 2.")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for fusion in _FUSIONS:
            config = ModelConfig(options.vision, options.llm, FusionConfig(fusion), options.precision, remat="none")
            export = pathlib.Path(scratch) / fusion
            make_export(config, pathlib.Path(scratch) / f"{fusion}-made", export)
            for batch in batches:
                results = {}
                for program in ("ours", "transformers"):
                    task = [program, str(export), str(batch), str(options.tokens), options.precision]
                    name = f"{fusion} ({resolve_model(config).slots}), batch {batch}, {program}"
                    results[program] = measure_process(name, ["-m", "benchmarks.decode", *task])
                    del results[program]["seconds"]  # of the entire process
                for row in results.values():
                    row["times_transformers"] = row["tokens_per_second"] / results["transformers"]["tokens_per_second"]
                    rows.append({key: row[key] for key in ("what", *_FIGURES)})
    return rows


_FIGURES = ("image_ms", "prefill_ms", "first_token_ms", "tokens_per_second", "times_transformers", "gib")


def _measure(
    encode_images: Callable[[], object],
    generate: Callable[[], tuple[float, float, float]],
    decoded_tokens: int,
    gib: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Measures both functions; ``generate`` returns the times of its start, its first token and its last token."""

    def time_generation() -> tuple[float, ...]:
        begin, first, last = generate()
        return first - begin, last - first

    image, (first, rest) = median_seconds(encode_images), median_figures(time_generation)
    figures = {"image_ms": 1e3 * image, "prefill_ms": 1e3 * (first - image), "first_token_ms": 1e3 * first}
    figures["tokens_per_second"] = decoded_tokens / rest
    return figures | ({"gib": gib()} if gib else {})


def _ours(export: str, batch: int, count: int, precision: Precision) -> dict[str, float]:
    saved = open_model(epath.Path(export))
    config = dataclasses.replace(saved.config, precision=precision, remat="none")
    plan, mesh = blueprint(config), make_mesh(MeshConfig(1, 1, 1))
    shardings = plan.shardings(mesh)
    weights = {
        path: split_layers(path, x, jnp.dtype(precision), mesh, shardings[path].spec)[0]
        for path, x in saved.restore(shardings)
    }
    return time_answers(config, weights, batch, count)


def time_answers(config: ModelConfig, weights: Weights, batch: int, count: int) -> dict[str, float]:
    """Times answers of ``count`` tokens to prompts of one image and some text, on one device.

    Returns:
      ``image_ms`` of tower and fusion, ``prefill_ms`` of the rest up to the first tokens, ``first_token_ms`` of both,
      ``tokens_per_second`` of decoding, and ``gib``, where the device reports its peak memory.
    """
    spec, plan, mesh = resolve_model(config), blueprint(config), make_mesh(MeshConfig(1, 1, 1))
    assert spec.vision_shape is not None  # only complete models are timed
    slots, side = spec.slots, spec.vision_shape.image_size
    images = np.random.default_rng(2).integers(0, 256, (batch, 1, side, side, 3), np.uint8)
    lengths = np.full(batch, slots + TEXT, np.int32)
    prompt = (*_prompt(batch, slots, bucket_length(slots + TEXT)), lengths, images, Sampling())
    no_stops = TokenRules(stops=(-1,), suppressed_tokens=())  # so that all answers have the same length
    prefill = jax.jit(functools.partial(decoding.prefill, no_stops, plan, count))
    extend = jax.jit(functools.partial(decoding.extend, no_stops, plan), donate_argnums=1)
    encode = jax.jit(lambda weights, images: decoding.merge_weights(plan, weights).image_tokens(images))

    def generate() -> tuple[float, float, float]:
        begin = time.perf_counter()
        state = prefill(weights, *prompt)
        int(state.output_ids[0, 0])
        first = time.perf_counter()
        np.asarray(extend(weights, state, count, Sampling()).output_ids)
        return begin, first, time.perf_counter()

    stats = jax.devices()[0].memory_stats  # None on CPUs
    gib = (lambda: stats()["peak_bytes_in_use"] / 2**30) if stats() else None
    with compute_context(mesh, config.precision):
        return _measure(lambda: encode(weights, images).block_until_ready(), generate, batch * (count - 1), gib)


def _transformers(export: str, batch: int, count: int, precision: Precision) -> dict[str, float]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(export, trust_remote_code=True, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(
        export, dtype=getattr(torch, precision), trust_remote_code=True, local_files_only=True
    ).to(device)  # type: ignore[arg-type]  # transformers' decorator hides that this is a method
    model.generation_config.eos_token_id = model.generation_config.suppress_tokens = None
    slots, image_token = _slots(export), getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.tensor(_prompt(batch, slots, slots + TEXT)[0].astype(np.int64))
    ids[:, :slots] = image_token
    side = config.vision_config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    prompt = {name: value.to(device) for name, value in prompt.items()}
    prompt["pixel_values"] = prompt["pixel_values"].to(model.dtype)

    def generate() -> tuple[float, float, float]:
        times = [time.perf_counter()]

        def record_time(
            ids: torch.Tensor, scores: torch.Tensor, **_: Any
        ) -> torch.Tensor:  # called after each token to decide whether to stop
            ids[0, -1].item()
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(**prompt, max_new_tokens=count, do_sample=False, stopping_criteria=[record_time])
        return times[0], times[1], times[-1]

    def encode_images() -> None:
        for features in _as_tensors(model.get_image_features(prompt["pixel_values"])):
            features.cpu()

    gib = (lambda: torch.cuda.max_memory_allocated() / 2**30) if device == "cuda" else None
    with torch.no_grad():
        return _measure(encode_images, generate, batch * (count - 1), gib)


def _as_tensors(features: Any) -> list[Any]:
    """Features as a list of tensors; for its own LLaVA transformers 5 returns an output object."""
    return [features] if hasattr(features, "cpu") else list(features.pooler_output)


def _slots(export: str) -> int:
    saved = open_model(epath.Path(export))
    assert saved.description.vision is not None  # as make_export writes it
    return tokens_per_image(saved.config.fusion, saved.description.vision.grid)


def _prompt(batch: int, slots: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [B, T], image slots first, and the image token of each slot (-1 for text)."""
    tokens = np.random.default_rng(1).integers(3, 500, (batch, length)).astype(np.int32)
    image_slots = np.where(np.arange(length) < slots, np.arange(length), -1)
    return tokens, np.tile(image_slots, (batch, 1)).astype(np.int32)


if __name__ == "__main__":
    program, export, batch, count, precision = sys.argv[1:]
    call: Callable[..., dict[str, float]] = {"ours": _ours, "transformers": _transformers}[program]
    print(json.dumps(call(export, int(batch), int(count), precision)))
