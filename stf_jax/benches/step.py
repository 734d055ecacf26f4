"""Training steps, here and of the export in PyTorch, on the same weights and rows in the same run."""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from stf_jax.benches.process import measured
from stf_jax.benches.synthetic import make_batch, make_export
from stf_jax.benches.timing import time_train_steps
from stf_jax.config import (
    DataConfig,
    FusionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    UserError,
)
from stf_jax.models.presets import vision_preset
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.chips import chip_of
from stf_jax.runtime.cost import step_flops

_RATE = 1e-3
_LEARN = {"pretrain": "freeze", "finetune": "train"}  # the language model, in each stage


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides do."""

    folder: str  # of imported weights
    export: str  # the same weights, for PyTorch
    stage: str  # pretrain: the fusion learns | finetune: it and the language model
    rows: int
    text: int  # tokens of a row behind its image's
    steps: int
    precision: str
    remat: str  # full | none, gradient checkpointing


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each stage and program: medians over the rounds, each of which is a process of its own.

    A round times the programs one after the other, so that what slows the machine for minutes slows them alike.
    ``times_torch`` is the median of the rounds' ratios, ``least`` and ``most`` are their ends.
    """
    if min(options.rows, options.text - 1, options.steps, options.rounds) < 1:
        raise UserError("--rows, --steps and --rounds must be at least 1, and --text at least 2.")
    config = ModelConfig(options.vision, options.llm, FusionConfig(options.fusion), options.precision)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, export = pathlib.Path(scratch) / "made", pathlib.Path(scratch) / "export"
        make_export(config, folder, export)
        same = (options.rows, options.text, options.steps, options.precision, options.remat)
        for stage in _LEARN:
            task = json.dumps(dataclasses.asdict(Task(str(folder), str(export), stage, *same)))
            rounds = []
            for _ in range(options.rounds):
                calls = {program: ["-m", "stf_jax.benches.step", program, task] for program in _PROGRAMS}
                rounds.append({p: measured(f"{stage}, {p}", call, **_PROGRAMS[p]) for p, call in calls.items()})
            rows += [_over(program, rounds) for program in _PROGRAMS]
    return rows


_PROGRAMS = {  # and what their environment has besides
    # As launch/local.sh and studies start runs. On a CPU a step takes its temporaries from the C library and gives them
    # back, and touching these anew in pages of 4 KiB costs a seventh to a third of it. PyTorch does not gain by larger
    # ones.
    "ours": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "ours, small pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
    "torch": {},
    "torch, compiled": {},
}
_FIGURES = ("step_ms", "tokens_per_second", "mfu", "gib")


def _over(program, rounds):
    ratios = [found["torch"]["step_ms"] / found[program]["step_ms"] for found in rounds]
    own = [found[program] for found in rounds]
    ends = {"times_torch": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"what": own[0]["what"]} | ends | {k: statistics.median(x[k] for x in own) for k in _FIGURES if k in own[0]}


def _config(task):
    # On a CPU layers are written out, as in configs/ that are for one.
    how = {"remat": task.remat, "scan_layers": jax.default_backend() != "cpu"}
    model = ModelConfig(task.folder, task.folder, _fusion(task.folder), task.precision, **how)
    return TrainConfig(
        global_batch_size=task.rows,
        rules=(("fusion/.*", "train"), ("vision/.*", "freeze"), ("llm/.*", _LEARN[task.stage])),
        model=model,
        data=DataConfig(max_length=slots_per_image(model) + task.text),
        optimizer=OptimizerConfig(learning_rate=_RATE, schedule="constant", warmup_ratio=0.0),
        mesh=MeshConfig(1, 1, 1),
    )


def _fusion(folder):
    return FusionConfig(**json.loads((pathlib.Path(folder) / "model.json").read_text())["fusion"])


def _told(config, losses, seconds):
    """Figures of the steps: ``losses`` before each and after the last, and how long each took."""
    step = statistics.median(seconds)
    shape = config.global_batch_size, config.data.max_length
    figures = {"step_ms": 1e3 * step, "tokens_per_second": shape[0] * shape[1] / step, "losses": losses}
    chip = chip_of(jax.devices()[0])
    if chip is not None:
        figures["mfu"] = step_flops(config.model, config.rules, *shape, 1).step / step / chip.flops
    return figures


def ours(task: Task) -> dict[str, Any]:
    """Steps as training takes them, compiled before."""
    config = _config(task)
    losses, seconds, held = time_train_steps(config, task.folder, make_batch(config), task.steps)
    # Of a CPU the whole process is measured, as of the other program.
    return _told(config, losses, seconds) | ({} if jax.default_backend() == "cpu" else {"gib": held / 2**30})


def in_torch(task: Task, compiled: bool = False) -> dict[str, Any]:
    """The same of the export: sdpa, weights that learn in float32, autocast where the precision is bfloat16."""
    import torch
    from transformers import AutoModelForImageTextToText

    config, device = _config(task), "cuda" if torch.cuda.is_available() else "cpu"
    batch, slots = make_batch(config), slots_per_image(config.model)
    how = {"trust_remote_code": True, "local_files_only": True, "attn_implementation": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(task.export, dtype=torch.float32, **how).to(device)
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
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, _RATE, weight_decay=0.0, fused=device == "cuda")
    call = torch.compile(model) if compiled else model
    losses, seconds = [], []
    for _ in range(task.steps + 1):
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=task.precision == "bfloat16"):
            loss = call(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    memory = {"gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
    return _told(config, losses, seconds[1:]) | memory


if __name__ == "__main__":
    program, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    print(json.dumps(ours(task) if "ours" in program else in_torch(task, compiled="compiled" in program)))
