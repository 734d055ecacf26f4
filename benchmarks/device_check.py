"""What one GPU shows in ten minutes: ``python -m benchmarks.device_check [--tiny] [--out=FILE]``, in a clone.

Parts run in the order of their worth, each in a process of its own and until its deadline. Every figure is printed as
one JSON line as soon as it is known, so that a failure, or the end of the machine's time, costs only what comes after.
docs/BENCHMARKS.md says what the lines mean. Weights are random, and nothing is read but this repository. It runs
without the packages for configs and data (ml_collections, grain).
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import TEXT as PROMPT_TEXT
from benchmarks.decode import time_answers
from benchmarks.recipes import LEARNING_RATE, TEXT, make_stage
from benchmarks.timing import time_torch_steps
from stf_jax.accounting.chips import CHIPS, Chip, find_chip
from stf_jax.checkpointing.checksum import checksum
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, Remat, TrainConfig
from stf_jax.inference.decoding import Weights, split_layers
from stf_jax.inference.generator import bucket_length
from stf_jax.models.attention import Mask, attention, reference_attention
from stf_jax.models.blueprint import Params, blueprint
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.spec import LLM, VISION, ModelSpec, resolve_model
from stf_jax.models.towers.base import VisionConfig
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.planning.program import make_program
from stf_jax.planning.report import ATTAINED, trace_cost
from stf_jax.training.flops import step_flops
from stf_jax.training.state import learning_rate_factors
from stf_jax.training.timing import make_batch, time_train_steps

Line = dict[str, Any]
Case = tuple[str, Callable[[], Line]]
_GIB = 2**30
_TARGETS = {  # least figure on one H100 or H200
    "MFU, stage 1": 0.5,
    "speed, relative to compiled torch": 1.2,
    "prefill speed, 144 tokens relative to 576": 2.5,
    "speed per position, packed relative to unpacked": 0.9,
    "attention cases within their limit": 1.0,
    "deterministic runs that are equal": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured on a GPU, or in miniature."""

    vision: VisionConfig
    llm: LLMConfig
    rows_by_stage: Mapping[str, int]
    text: Mapping[str, int]  # tokens per row, by stage
    layers: int  # decoder layers of the shape that remat, packing, torch and determinism share
    rows: int
    positions: int
    remat: tuple[Remat, ...]
    steps: int
    batches: tuple[int, ...]  # of prompts
    new_tokens: int
    # attention: positions, heads, kv heads, head size, causal, packed
    shapes: tuple[tuple[int, int, int, int, bool, bool], ...]
    chip: Chip | None = None  # in place of the device's


# The policies are in order of memory, so that each raises the peak of the process.
_FULL = Size(
    vision=VISION["clip-l-14-336"],
    llm=LLM["vicuna-7b"],
    rows_by_stage={"pretrain": 32, "finetune": 8},
    text=TEXT,
    layers=8,
    rows=4,
    positions=2048,
    remat=("full", "attention", "mlp", "dots", "none", "offload"),
    steps=5,
    batches=(8, 1, 32),
    new_tokens=64,
    shapes=(
        (577, 16, 16, 64, False, False),
        (2048, 32, 32, 128, True, False),
        (2048, 32, 32, 128, True, True),
        (1024, 32, 8, 128, True, False),
        (1024, 32, 8, 128, True, True),
        (729, 16, 16, 72, False, False),
        (729, 32, 8, 64, True, False),
        (577, 32, 32, 128, True, False),
        (577, 16, 16, 72, True, True),
        (1024, 32, 32, 80, True, False),
    ),
)
_TINY = Size(
    vision=dataclasses.replace(VISION["clip-mini-16-96"], image_size=64, width=32, layers=2, heads=4, mlp=64),
    llm=dataclasses.replace(LLM["llama-mini"], width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64),
    rows_by_stage={"pretrain": 2, "finetune": 2},
    text={"pretrain": 16, "finetune": 16},
    layers=2,
    rows=2,
    positions=20,
    remat=("full",),
    steps=1,
    batches=(2,),
    new_tokens=4,
    shapes=((37, 2, 2, 64, False, False), (129, 4, 2, 72, True, True)),
    chip=CHIPS["h200"],  # so that what depends on the chip runs too; its figures mean nothing
)


def _device(size: Size) -> Iterator[Case]:
    yield "device", _describe_device


def _describe_device() -> Line:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "jax": jax.__version__,
        "memory_gib": _bytes_limit() / _GIB,
    }


def _bytes_limit() -> int:
    """Bytes that the device gives this process, 0 if it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


# ---- Attention -------------------------------------------------------------------------------------------------------

# Of the norm of the difference, relative to the reference's. bfloat16 alone rounds by 0.002. On a CPU the XLA path of
# the shapes above differs by up to 0.002 in values and 0.0045 in gradients; GPUs also round the weights of the softmax.
_LIMITS = {"values": 0.01, "gradients": 0.02}


def _attention(size: Size) -> Iterator[Case]:
    for shape in size.shapes:
        length, heads, kv_heads, head_dim, causal, packed = shape
        kind = f"{'causal ' * causal}{'packed ' * packed}{length} × {heads}/{kv_heads} × {head_dim}"
        for implementation in ("auto", "xla"):  # also what is used where cuDNN refuses
            for quantity in _LIMITS:
                call = functools.partial(_compare_attention, shape, implementation, quantity)
                yield f"{kind}, {implementation}, {quantity}", call


def _compare_attention(
    shape: tuple[int, int, int, int, bool, bool], implementation: str, quantity: str
) -> dict[str, Any]:
    length, heads, kv_heads, head_dim, causal, packed = shape
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.standard_normal((2, length, count, head_dim)), jnp.bfloat16)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    segments = jnp.asarray(np.sort(rng.integers(1, 5, (2, length))), jnp.int32) if packed else None

    def values(call: Callable[..., jax.Array], mask: Mask, weight: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        return (call(*qkv, mask),)

    def gradients(
        call: Callable[..., jax.Array], mask: Mask, weight: jax.Array, *qkv: jax.Array
    ) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: (call(*x, mask).astype(jnp.float32) * weight).sum(), (0, 1, 2))(*qkv)

    compute = {"values": values, "gradients": gradients}[quantity]
    chosen = functools.partial(attention, implementation=implementation)
    inputs = Mask(causal, segments), weight, q, k, v
    with compute_context(make_mesh(MeshConfig(1, 1, 1)), "bfloat16"):
        program = jax.jit(functools.partial(compute, chosen)).lower(*inputs).compile()
        results, references = program(*inputs), jax.jit(functools.partial(compute, reference_attention))(*inputs)
    differences = [_relative_difference(x, y) for x, y in zip(results, references, strict=True)]
    limit = _LIMITS[quantity]
    return {
        "kernel": "cudnn" if "__cudnn" in (program.as_text() or "") else "xla",
        "differences": differences,
        "limit": limit,
        "within": max(differences) <= limit,  # False for NaN
    }


def _relative_difference(x: jax.Array, reference: jax.Array) -> float:
    x64, reference64 = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x64 - reference64) / np.linalg.norm(reference64))


# ---- Training --------------------------------------------------------------------------------------------------------


def _model(size: Size, fusion: str, layers: int = 0, remat: Remat = "full") -> ModelSpec:
    """A model with that many decoder layers; 0: all."""
    config = ModelConfig(fusion=FusionConfig(fusion), precision="bfloat16", remat=remat)
    return resolve_model(config, size.vision, dataclasses.replace(size.llm, layers=layers or size.llm.layers))


def _stage1(size: Size) -> Iterator[Case]:
    for fusion in ("mbtf_stf", "mlp"):  # in order of memory
        config = make_stage(_model(size, fusion), "pretrain", size.rows_by_stage["pretrain"], size.text["pretrain"])
        yield fusion, functools.partial(_time_steps, size, config)


def _stage2(size: Size) -> Iterator[Case]:
    yield "mbtf_stf", lambda: _time_steps(size, _largest_stage2(size))


def _largest_stage2(size: Size) -> TrainConfig:
    """Stage 2 with as many decoder layers as fit."""
    full = size.llm.layers

    def config(layers: int) -> TrainConfig:
        model = _model(size, "mbtf_stf", layers)
        return make_stage(model, "finetune", size.rows_by_stage["finetune"], size.text["finetune"])

    def state_bytes(layers: int) -> int:
        """Bytes of weights, gradients and moments."""
        plan = blueprint(config(layers).model)
        trained = learning_rate_factors(config(layers).rules, plan)
        return sum(leaf.size * (16 if path in trained else 2) for path, leaf in plan.shapes.items())

    limit = 0.9 * _bytes_limit()  # leaves a tenth for activations
    if not limit:
        return config(full)
    one, per_layer = state_bytes(1), state_bytes(2) - state_bytes(1)
    return config(max(1, min(full, 1 + int((limit - one) / per_layer))))


def _shared_shape(size: Size, remat: Remat = "full") -> TrainConfig:
    """Stage 2 with few layers on long rows: the shape of remat, packing and determinism."""
    model = _model(size, "mbtf_stf", size.layers, remat)
    return make_stage(model, "finetune", size.rows, size.positions - model.slots)


def _remat(size: Size) -> Iterator[Case]:
    for policy in size.remat:
        yield policy, functools.partial(_time_steps, size, _shared_shape(size, policy))


def _packing(size: Size) -> Iterator[Case]:
    config = _shared_shape(size)
    packed = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=True))
    yield "packed", functools.partial(_time_steps, size, packed)


def _deterministic(size: Size) -> Iterator[Case]:
    config = dataclasses.replace(_shared_shape(size), deterministic=True)
    yield "mbtf_stf", functools.partial(_time_steps, size, config)


def _decoder_alone(size: Size) -> Iterator[Case]:
    """Rows of text, for comparison with torch."""
    config = make_stage(_model(size, "mlp", size.layers, "none"), "finetune", size.rows, 0)
    config = dataclasses.replace(
        config,
        rules=(("llm/.*", "train"), (".*", "freeze")),
        data=dataclasses.replace(config.data, images_per_row=0, max_length=size.positions),
    )
    yield "ours", functools.partial(_time_steps, size, config)


def _time_steps(size: Size, config: TrainConfig) -> Line:
    devices, earlier = jax.devices()[:1], _peak_bytes()
    model = resolve_model(config.model)
    assert model.llm_shape is not None  # resolved with one
    timing = time_train_steps(config, _random_params, make_batch(config), size.steps)
    rows, positions, seconds = config.global_batch_size, config.data.max_length, statistics.median(timing.seconds)
    line = {
        "layers": model.llm_shape.layers,
        "rows": rows,
        "positions": positions,
        "remat": config.model.remat,
        "step_seconds": seconds,
        "positions_per_second": rows * positions / seconds,
        "compile_seconds": timing.compile_seconds,
        "planned_gib": timing.planned_bytes / _GIB,
        # The device reports the peak of the process: that of these steps only if it is the highest so far.
        "peak_gib": timing.peak_bytes / _GIB if 0 <= earlier < timing.peak_bytes else None,
        "losses": timing.losses,
        "checksum": int(_checksum_state((timing.state.trainable, timing.state.moments))),
    }
    chip = size.chip or find_chip(devices[0])
    if chip is not None:
        flops = step_flops(model, config.rules, rows, positions, config.data.images_per_row)
        line["mfu"] = flops / seconds / chip.flops
        line |= _roofline_shares(config, "train", rows, seconds, chip)
    return line


def _roofline_shares(config: TrainConfig, kind: str, rows: int, seconds: float, chip: Chip) -> dict[str, float]:
    """The seconds at the chip's peak figures, by plan's counts, relative to those measured."""
    devices = jax.devices()[:1]
    work = trace_cost(config, kind, devices).work(config, make_program(config, kind, devices, rows))
    return {
        "compute_share": work.executed_flops / chip.flops / seconds,
        "memory_share": work.memory_bytes / chip.bandwidth / seconds,
    }


def _peak_bytes() -> int:
    """The device's peak memory in this process; -1 if it does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", -1)


@jax.jit
def _checksum_state(tree: Any) -> jax.Array:
    return sum((checksum(leaf) for leaf in jax.tree.leaves(tree)), jnp.uint32(0))


def _random_params(layout: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Random values for all parameters, made on the device from one million numbers."""

    def fill(noise: jax.Array, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = jnp.broadcast_to(noise, (-(-leaf.size // noise.size), noise.size)).reshape(-1)[: leaf.size]
        return (0.02 * values.reshape(leaf.shape) + path.endswith("scale")).astype(leaf.dtype)

    shardings = {path: leaf.sharding for path, leaf in layout.items()}
    make = jax.jit(
        lambda noise: {path: fill(noise, path, leaf) for path, leaf in layout.items()}, out_shardings=shardings
    )
    return make(jax.random.normal(jax.random.key(0), (2**20,)))


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _torch(size: Size) -> Iterator[Case]:
    yield "torch", lambda: _time_torch(size)


def _time_torch(size: Size) -> Line:
    """Steps of transformers' Llama of the shape of :func:`_decoder_alone`: float32 weights, bfloat16 autocast, sdpa."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device, shape = "cuda" if torch.cuda.is_available() else "cpu", size.llm
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
        ids = torch.randint(3, 500, (size.rows, size.positions))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=device == "cuda")
    compiled = device == "cuda"  # a compiler for CPUs may be missing
    call = torch.compile(model) if compiled else model

    def compute_loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return call(input_ids=ids, labels=ids, use_cache=False).loss

    begin = time.perf_counter()
    losses, seconds = time_torch_steps(compute_loss, optimizer, size.steps)
    return {
        "torch": torch.__version__,
        "compiled": compiled,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_seconds": statistics.median(seconds),
        "compile_seconds": time.perf_counter() - begin - sum(seconds),
        "losses": losses,
        "peak_gib": torch.cuda.max_memory_allocated() / _GIB if device == "cuda" else None,
    }


# ---- Answers ---------------------------------------------------------------------------------------------------------


def _answers(size: Size) -> Iterator[Case]:
    """All fusions at one batch size before the next. The weights of one fusion are in memory at a time."""
    for batch in size.batches:
        for fusion in ("mlp", "mbtf_stf", "avg_pool"):
            yield f"{fusion}, batch {batch}", functools.partial(_time_answers, size, fusion, batch)


def _time_answers(size: Size, fusion: str, batch: int) -> Line:
    model = _model(size, fusion, remat="none")
    figures = time_answers(model, _random_weights(model), batch, size.new_tokens)
    line = {"fusion": fusion, "batch": batch, "slots": model.slots} | figures
    chip = size.chip or find_chip(jax.devices()[0])
    if chip is not None:
        config = make_stage(model, "finetune", batch, PROMPT_TEXT)
        length = bucket_length(config.data.max_length)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length))
        line |= _roofline_shares(config, "decode", batch, batch / figures["tokens_per_second"], chip)
    return line


def _random_weights(model: ModelConfig) -> Weights:
    plan, mesh = blueprint(model), make_mesh(MeshConfig(1, 1, 1))
    dtype, shardings = jnp.dtype(model.precision), plan.shardings(mesh)
    layout = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path]) for path, leaf in plan.shapes.items()
    }
    params = _random_params(layout)
    # One by one, because a stack of layers and its parts are in memory together.
    return {path: split_layers(path, params.pop(path), dtype, mesh, shardings[path].spec)[0] for path in layout}


# ---- All parts -------------------------------------------------------------------------------------------------------

# Name, cases, and seconds. A part that ends early leaves its seconds to those after it.
_PARTS: tuple[tuple[str, Callable[[Size], Iterator[Case]], float], ...] = (
    ("device", _device, 60),
    ("attention", _attention, 80),
    ("stage 1", _stage1, 90),
    ("stage 2", _stage2, 60),
    ("remat", _remat, 90),
    ("packing", _packing, 30),
    ("decoder", _decoder_alone, 30),
    ("torch", _torch, 60),
    ("deterministic", _deterministic, 25),
    ("deterministic, again", _deterministic, 25),
    ("answers", _answers, 80),
)


def main(argv: Sequence[str]) -> int:
    """Runs all parts; returns 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="in miniature, to try the script on a CPU")
    parser.add_argument("--out", help="file for the lines, in addition to standard output")
    options = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")  # as in launch/
    size, begin, lines = _TINY if options.tiny else _FULL, time.monotonic(), []
    jax.config.update("jax_disable_most_optimizations", options.tiny)  # compiles faster
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(options.out, "w")) if options.out else None
        except OSError as error:
            parser.error(f"--out={options.out}: {error.strerror}.")
        budget = 0.0
        for name, cases, seconds in _PARTS:
            budget += seconds
            for line in _run_part(cases, size, begin + budget):
                lines.append({"part": name} | line)
                _write(lines[-1], file)
            if not options.tiny and lines[0].get("platform", "gpu") != "gpu":  # unknown if the part failed
                parser.error("jax finds no GPU here; --tiny runs in miniature on a CPU.")
        for line in _summarize(lines, size):
            _write(line, file)
    return int(any("failed" in line for line in lines))


def _write(line: Line, file: TextIO | None) -> None:
    text = json.dumps({key: round(x, 6) if isinstance(x, float) else x for key, x in line.items()}, ensure_ascii=False)
    print(text, flush=True)
    if file is not None:
        print(text, file=file, flush=True)


def _run_part(cases: Callable[[Size], Iterator[Case]], size: Size, deadline: float) -> Iterator[Line]:
    """Yields a line for each case of a part, and one that says why the part ended before its last case."""
    # Forked, with everything imported. jax has not looked for devices yet, so each process starts with an empty GPU,
    # whatever became of the one before it.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_cases, args=(cases, size, sender))
    process.start()
    sender.close()
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            yield receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode:
                yield {"failed": f"the process ended with status {process.exitcode}"}
            return
    process.kill()
    process.join()
    yield {"skipped": "the rest, because the part's time is over"}


def _run_cases(cases: Callable[[Size], Iterator[Case]], size: Size, sender: Connection) -> None:
    for name, measure in cases(size):
        begin = time.perf_counter()
        try:
            line = measure()
        except Exception as error:  # the next case may still succeed
            traceback.print_exc()
            line = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        gc.collect()  # cycles keep arrays on the device
        sender.send({"case": name} | line | {"case_seconds": time.perf_counter() - begin})


# ---- Summary ---------------------------------------------------------------------------------------------------------


def _summarize(lines: Sequence[Line], size: Size) -> Iterator[Line]:
    """Yields what the lines say about the targets and about plan's assumptions; a figure without its lines is None."""
    by_case = {(line["part"], line.get("case")): line for line in lines if "failed" not in line}

    def get(part: str, case: str, key: str) -> Any:
        return by_case.get((part, case), {}).get(key)

    def ratio(numerator: float | None, denominator: float | None) -> float | None:
        return numerator / denominator if numerator and denominator else None

    checksums = [get(part, "mbtf_stf", "checksum") for part in ("deterministic", "deterministic, again")]
    compared = [line for line in lines if line["part"] == "attention" and "case" in line]
    within = [line.get("within", False) for line in compared]
    mlp, mbtf_stf = (get("answers", f"{name}, batch {size.batches[0]}", "prefill_ms") for name in ("mlp", "mbtf_stf"))
    measured = {
        "MFU, stage 1": get("stage 1", "mbtf_stf", "mfu"),
        "speed, relative to compiled torch": ratio(
            get("torch", "torch", "step_seconds"), get("decoder", "ours", "step_seconds")
        ),
        "prefill speed, 144 tokens relative to 576": ratio(mlp, mbtf_stf),
        "speed per position, packed relative to unpacked": ratio(
            get("packing", "packed", "positions_per_second"), get("remat", "full", "positions_per_second")
        ),
        "attention cases within their limit": statistics.mean(within) if within else None,
        "deterministic runs that are equal": None if None in checksums else float(checksums[0] == checksums[1]),
    }
    for name, figure in measured.items():
        met = None if figure is None else figure >= _TARGETS[name]
        yield {"part": "targets", "case": name, "figure": figure, "target": _TARGETS[name], "met": met}
    cost = ratio(get("deterministic", "mbtf_stf", "step_seconds"), get("remat", "full", "step_seconds"))
    yield {"part": "summary", "case": "step time with deterministic, relative to without", "figure": cost}
    for kind, other in (("compute", "memory"), ("memory", "compute")):
        shares = [
            line[f"{kind}_share"] for line in lines if line.get(f"{kind}_share", 0) > line.get(f"{other}_share", 0)
        ]
        yield {
            "part": "summary",
            "case": f"planning.report.ATTAINED[{kind!r}]",
            "assumed": ATTAINED[kind],
            "least": min(shares, default=None),
            "figure": statistics.median(shares) if shares else None,
            "most": max(shares, default=None),
        }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
