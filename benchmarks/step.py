"""Training steps here and of the export in PyTorch, on the same weights and rows in the same run."""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.process import measure_process
from benchmarks.recipes import LEARNING_RATE, LLM_RULE, make_stage
from benchmarks.synthetic import make_export
from benchmarks.timing import time_torch_steps
from stf_jax.accounting.chips import find_chip
from stf_jax.config import FusionConfig, ModelConfig, Precision, Remat, TrainConfig, UserError, fusion_from_json
from stf_jax.models.spec import resolve_model, vision_preset
from stf_jax.training.flops import step_flops
from stf_jax.training.timing import make_batch, time_train_steps
from stf_jax.weights.folder import load_params


@dataclasses.dataclass(frozen=True)
class Task:
    """What both programs run."""

    folder: str  # of imported weights
    export: str  # the same weights, for PyTorch
    stage: str  # pretrain: trains the fusion | finetune: trains the fusion and the language model
    rows: int
    text: int  # text tokens per row, after the image
    steps: int
    precision: Precision
    remat: Remat  # gradient checkpointing: full | none


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each stage and program; one row each, with medians over the rounds.

    A round runs the programs one after another, each in a separate process, so that anything that slows the machine for
    minutes affects all of them equally. ``times_torch`` is the median of the ratios of the rounds, ``least`` and
    ``most`` are their minimum and maximum.
    """
    if min(options.rows, options.text - 1, options.steps, options.rounds) < 1:
        raise UserError("--rows, --steps and --rounds must be at least 1, and --text at least 2.")
    config = ModelConfig(options.vision, options.llm, FusionConfig(options.fusion), options.precision)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, export = pathlib.Path(scratch) / "imported", pathlib.Path(scratch) / "export"
        make_export(config, folder, export)
        settings = (options.rows, options.text, options.steps, options.precision, options.remat)
        for stage in LLM_RULE:
            task = json.dumps(dataclasses.asdict(Task(str(folder), str(export), stage, *settings)))
            rounds = []
            for _ in range(options.rounds):
                calls = {program: ["-m", "benchmarks.step", program, task] for program in _PROGRAMS}
                rounds.append({p: measure_process(f"{stage}, {p}", call, _PROGRAMS[p]) for p, call in calls.items()})
            rows += [_summarize(program, rounds) for program in _PROGRAMS]
    return rows


_PROGRAMS: dict[str, dict[str, str]] = {  # with additional environment variables
    # As launch/local.sh and studies start runs. On CPUs a step allocates and frees temporaries in the C library, and
    # page faults of 4 KiB pages cost a seventh to a third of its time. PyTorch does not benefit from larger pages.
    "ours": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "ours, small pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
    "torch": {},
    "torch, compiled": {},
}
_FIGURES = ("step_ms", "tokens_per_second", "mfu", "gib")


def _summarize(program: str, rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    ratios = [results["torch"]["step_ms"] / results[program]["step_ms"] for results in rounds]
    own = [results[program] for results in rounds]
    speedup = {"times_torch": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    medians = {key: statistics.median(figures[key] for figures in own) for key in _FIGURES if key in own[0]}
    return {"what": own[0]["what"]} | speedup | medians


def _make_config(task: Task) -> TrainConfig:
    model = ModelConfig(
        task.folder,
        task.folder,
        _read_fusion(task.folder),
        task.precision,
        remat=task.remat,
        scan_layers=jax.default_backend() != "cpu",  # on CPUs layers are unrolled, as in configs/demo.py
    )
    return make_stage(model, task.stage, task.rows, task.text)


def _read_fusion(folder: str) -> FusionConfig:
    return fusion_from_json(json.loads((pathlib.Path(folder) / "model.json").read_text())["fusion"])


def _make_figures(config: TrainConfig, losses: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Figures of the steps from the losses before each and after the last, and the seconds of each."""
    step = statistics.median(seconds)
    shape = config.global_batch_size, config.data.max_length
    figures: dict[str, Any] = {"step_ms": 1e3 * step, "tokens_per_second": shape[0] * shape[1] / step, "losses": losses}
    chip = find_chip(jax.devices()[0])
    if chip is not None:
        figures["mfu"] = step_flops(config.model, config.rules, *shape, 1) / step / chip.flops
    return figures


def ours(task: Task) -> dict[str, Any]:
    """Times training steps of this program."""
    config = _make_config(task)
    load = functools.partial(load_params, task.folder, fresh=())
    timing = time_train_steps(config, load, make_batch(config), task.steps)
    # On CPUs the memory of the process is measured, as for the other program.
    memory = {} if jax.default_backend() == "cpu" else {"gib": timing.peak_bytes / 2**30}
    return _make_figures(config, timing.losses, timing.seconds) | memory


def in_torch(task: Task, compiled: bool = False) -> dict[str, Any]:
    """Times training steps of the export: sdpa, float32 trainable weights, autocast if the precision is bfloat16."""
    import torch
    from transformers import AutoModelForImageTextToText

    config, device = _make_config(task), "cuda" if torch.cuda.is_available() else "cpu"
    batch, slots = make_batch(config), resolve_model(config.model).slots
    model = AutoModelForImageTextToText.from_pretrained(
        task.export,
        dtype=torch.float32,
        trust_remote_code=True,
        local_files_only=True,
        attn_implementation="sdpa",
    ).to(device)  # type: ignore[arg-type]  # transformers' decorator hides that this is a method
    for name, parameter in model.named_parameters():
        frozen = "vision_tower" in name or (task.stage == "pretrain" and "projector" not in name)
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.data = parameter.data.to(getattr(torch, task.precision))
    if task.remat == "full":
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids = torch.tensor(batch.tokens.astype(np.int64), device=device)
    labels = ids.masked_fill(torch.arange(ids.shape[1], device=device) < slots, -100)
    ids[:, :slots] = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    vision = vision_preset(task.folder)
    pixels = torch.tensor(batch.images[:, 0].transpose(0, 3, 1, 2), device=device) / 255
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (vision.mean, vision.std))
    pixels = ((pixels - mean) / std).to(getattr(torch, task.precision))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, weight_decay=0.0, fused=device == "cuda")
    call = torch.compile(model) if compiled else model

    def compute_loss() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=task.precision == "bfloat16"):
            return call(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss

    losses, seconds = time_torch_steps(compute_loss, optimizer, task.steps)
    memory = {"gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
    return _make_figures(config, losses, seconds) | memory


if __name__ == "__main__":
    program, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    print(json.dumps(ours(task) if "ours" in program else in_torch(task, compiled="compiled" in program)))
