"""Answering, here and by transformers' ``generate`` in PyTorch, on the same exported weights in the same run."""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.benches.process import measured
from stf_jax.benches.synthetic import make_export
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, UserError
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Rules, Sampling, layerwise
from stf_jax.inference.generator import bucket
from stf_jax.models.fusion import tokens_per_image
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.model import open_model

_FUSIONS = ("mlp", "avg_pool", "mbtf_stf")
_TEXT = 60  # tokens of a prompt beside its image
_TIMES, _LONG = 3, 5.0  # a measurement is made so often, and the median counts; once if it takes so many seconds


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each fusion, batch size and program; each is a process of its own."""
    try:
        batches = [int(size) for size in options.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches={options.batches} should be numbers with commas between.") from None
    if min(batches) < 1 or options.tokens < 2:
        raise UserError("--batches must be at least 1 and --tokens at least 2.")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for fusion in _FUSIONS:
            config = ModelConfig(options.vision, options.llm, FusionConfig(fusion), options.precision, remat="none")
            export = pathlib.Path(scratch) / fusion
            make_export(config, pathlib.Path(scratch) / f"{fusion}-made", export)
            for batch in batches:
                pair = {}
                for program in ("ours", "transformers"):
                    task = [program, str(export), str(batch), str(options.tokens), options.precision]
                    what = f"{fusion} ({slots_per_image(config)}), batch {batch}, {program}"
                    pair[program] = measured(what, ["-m", "stf_jax.benches.decode", *task])
                    del pair[program]["seconds"]  # of the whole process
                for row in pair.values():
                    row["times_transformers"] = row["tokens_per_second"] / pair["transformers"]["tokens_per_second"]
                    rows.append({key: row[key] for key in ("what", *_FIGURES)})
    return rows


_FIGURES = ("image_ms", "prefill_ms", "first_token_ms", "tokens_per_second", "times_transformers", "gib")


def _median(measure):
    """Medians of the figures that a measurement gives, after one that compiles and wakes threads."""
    measure()
    found = []
    while len(found) < _TIMES and sum(map(sum, found)) < _LONG:
        found.append(measure())
    return tuple(map(statistics.median, zip(*found, strict=True)))


def _figures(look, answer, said, gib=None):
    """Of a function that encodes the images, and one that answers and gives when: begun, first token, last token."""

    def image():
        begin = time.perf_counter()
        look()
        return (time.perf_counter() - begin,)

    def parts():
        begin, first, last = answer()
        return first - begin, last - first

    (image,), (first, rest) = _median(image), _median(parts)
    figures = {"image_ms": 1e3 * image, "prefill_ms": 1e3 * (first - image), "first_token_ms": 1e3 * first}
    figures["tokens_per_second"] = said / rest
    return figures | ({"gib": gib()} if gib else {})


def _ours(export, batch, count, precision):
    saved = open_model(epath.Path(export))
    config = dataclasses.replace(saved.config, precision=precision, remat="none")
    plan, mesh = blueprint(config), make_mesh(MeshConfig(1, 1, 1))
    places = plan.shardings(mesh)
    weights = {
        path: layerwise(path, x, jnp.dtype(precision), mesh, places[path].spec)[0] for path, x in saved.restore(places)
    }
    slots, side = _slots(export), saved.description.vision.image_size
    images = np.random.default_rng(2).integers(0, 256, (batch, 1, side, side, 3), np.uint8)
    lengths = np.full(batch, slots + _TEXT, np.int32)
    prompt = (*_prompt(batch, slots, bucket(slots + _TEXT)), lengths, images, Sampling())
    never = Rules(stops=(-1,), unsayable=())  # so that all say as many tokens
    prefill = jax.jit(functools.partial(decoding.prefill, never, plan, count))
    extend = jax.jit(functools.partial(decoding.extend, never, plan), donate_argnums=1)
    encode = jax.jit(lambda weights, images: decoding.merged(plan, weights).image_tokens(images))

    def answer():
        begin = time.perf_counter()
        state = prefill(weights, *prompt)
        int(state.said[0, 0])
        first = time.perf_counter()
        np.asarray(extend(weights, state, count, Sampling()).said)
        return begin, first, time.perf_counter()

    stats = jax.devices()[0].memory_stats  # None of a CPU
    gib = (lambda: stats()["peak_bytes_in_use"] / 2**30) if stats() else None
    with computing(mesh, precision):
        return _figures(lambda: encode(weights, images).block_until_ready(), answer, batch * (count - 1), gib)


def _transformers(export, batch, count, precision):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"trust_remote_code": True, "local_files_only": True}
    config = AutoConfig.from_pretrained(export, **how)
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=getattr(torch, precision), **how).to(device)
    model.generation_config.eos_token_id = model.generation_config.suppress_tokens = None
    slots, mark = _slots(export), getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.tensor(_prompt(batch, slots, slots + _TEXT)[0].astype(np.int64))
    ids[:, :slots] = mark
    side = config.vision_config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    prompt = {name: value.to(device) for name, value in prompt.items()}
    prompt["pixel_values"] = prompt["pixel_values"].to(model.dtype)

    def answer():
        times = [time.perf_counter()]

        def tell(ids, scores, **_):  # is asked after each token whether to stop
            ids[0, -1].item()
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(**prompt, max_new_tokens=count, do_sample=False, stopping_criteria=[tell])
        return times[0], times[1], times[-1]

    def look():
        for features in _tensors(model.get_image_features(prompt["pixel_values"])):
            features.cpu()

    gib = (lambda: torch.cuda.max_memory_allocated() / 2**30) if device == "cuda" else None
    with torch.no_grad():
        return _figures(look, answer, batch * (count - 1), gib)


def _tensors(features):
    """transformers 5 gives an output object for its own LLaVA."""
    return [features] if hasattr(features, "cpu") else list(features.pooler_output)


def _slots(export):
    saved = open_model(epath.Path(export))
    return tokens_per_image(saved.config.fusion, saved.description.vision.grid)


def _prompt(batch, slots, length):
    """Ids int32 [B, T], the image's places first, and which image token each of these takes."""
    tokens = np.random.default_rng(1).integers(3, 500, (batch, length)).astype(np.int32)
    taken = np.where(np.arange(length) < slots, np.arange(length), -1)
    return tokens, np.tile(taken, (batch, 1)).astype(np.int32)


if __name__ == "__main__":
    program, export, batch, count, precision = sys.argv[1:]
    call = {"ours": _ours, "transformers": _transformers}[program]
    print(json.dumps(call(export, int(batch), int(count), precision)))
