"""Studies with fake runs: configs, and folders as runs leave them."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from stf_jax.config import to_json
from stf_jax.data.scenes import KINDS
from stf_jax.studies.runner import Slot, run_cells
from stf_jax.studies.study import Cell, Study, default_study, make_cells, read_study
from stf_jax.training.stages import stage_workdir

DEMO = pathlib.Path(__file__).parent.parent / "configs" / "demo.py"
VALUES = {
    "title": "Two <fusions> & a baseline",
    "question": "Which is `better`?",
    "base": str(DEMO),
    "baseline": "mlp",
    "common": ("stages.pretrain.steps=2", "stages.finetune.steps=2"),
    "seeds": (0, 1),
    "variants": (("mlp", ("model.fusion.fusion=mlp",)), ("stf", ("model.fusion.fusion=stf",))),
    "asked": (("fastv", ("mlp", "--reduce=fastv")),),
}
COST = {
    "image_tokens": 36,
    "fusion_parameters": 33024,
    "first_token_ms": 800.5,
    "first_token_rows": 64,
    "prefill_gflops": 0.26,
    "step_ms": 900.5,
    "step_rows": 8,
    "step_gflops": 9.8,
    "step_mib": 185.4,
    "device": "cpu",
}


def config(**changes) -> ml_collections.ConfigDict:
    """Returns a study's config with two fusions and one evaluated variant, two seeds, and changes."""
    values = default_study().unlock()
    values.update(VALUES | changes)
    return values


def study(**changes) -> Study:
    """Returns the study of this config."""
    return read_study(config(**changes))


def write(file: pathlib.Path, **changes) -> str:
    """Writes this config as a file; returns its command-line option."""
    file.write_text(
        "from stf_jax.studies.study import default_study\n\n\ndef get_config(arg=None):\n"
        f"    config = default_study().unlock()\n    config.update({VALUES | changes!r})\n    return config\n"
    )
    return f"--config={file}"


def put(file: pathlib.Path, value) -> None:
    """Writes a JSON file, and creates its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def answers(correct: Mapping[str, Sequence[bool]], blank: Sequence[bool]) -> str:
    """Returns lines of ``answers.jsonl`` of scenes, correct or not for each kind and for blank images."""
    groups = {(kind, "scene"): hits for kind, hits in correct.items()} | {("count", "blank"): blank}
    lines = []
    for (kind, image), hits in groups.items():
        for index, hit in enumerate(hits):
            metadata = {"kind": kind, "shown": image, "truth": "Ring"}
            line = {"question_id": f"{index}/{kind}/{image}", "text": "ring" if hit else "cross", "metadata": metadata}
            lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def finish(cell: Cell, folder: pathlib.Path | None = None, share: float = 0.5, questions: int = 20) -> pathlib.Path:
    """Writes the files of a cell's run to its folder or another.

    Args:
      share: the share of correct answers about images; for blank images it is a third.
      questions: the number of questions of each kind.
    """
    folder = folder or cell.folder
    rng = np.random.default_rng([cell.seed, int(1000 * share)])
    correct = {kind: (rng.random(questions) < share).tolist() for kind in KINDS}
    accuracy = float(np.mean(list(correct.values())))
    asking = {"weights": f"{cell.study.get_trained(cell.variant).name} {cell.seed}", "precision": "float32"}
    put(
        folder / "results.json",
        {
            "benchmark": "scenes",
            "metrics": {"accuracy": accuracy, "blank_image_accuracy": 0.3},
            "questions": questions * len(KINDS),
            "protocol": {"benchmark": "scenes", "questions": 2 * questions * len(KINDS), "asking": asking},
        },
    )
    (folder / "answers.jsonl").write_text(answers(correct, rng.random(questions) < 1 / 3))
    put(folder / "cost.json", {key: COST[key] for key in COST if cell.source_run is None or not key.startswith("step")})
    if cell.source_run is None:
        stages = cell.study.resolve_stages(cell.variant, cell.seed)
        for stage in stages:
            workdir = stage_workdir(folder, stages, stage)
            put(workdir / "config.json", to_json(stage))
            put(workdir / "metrics.jsonl", {"step": 2, "seconds": 60.0, "loss": 1.5 + cell.seed})
    else:
        put(folder / "asked.json", list(cell.variant.eval_options))
    return folder


# A fake run: logs its start, follows the plan for this try, and copies a run's files.
CHILD = """
import json, os, shutil, signal, sys, time
name, plan, log, prepared, folder = sys.argv[1:]
plan = json.loads(plan)
lines = list(open(log)) if os.path.exists(log) else []
tries = sum(json.loads(line)["name"] == name for line in lines if line.endswith("\\n"))  # others may be writing
status, seconds = plan[min(tries, len(plan) - 1)]
evaluates = os.path.exists(os.path.join(folder, "asked.json"))
def log_start(**values):
    with open(log, "a") as file:
        file.write(json.dumps({"name": name, "time": time.monotonic(), **values}) + "\\n")
def stop(*_):
    with open(log + ".stopped", "a") as file:
        file.write(name + "\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
log_start(pid=os.getpid(), cpus=sorted(os.sched_getaffinity(0)), environment=dict(os.environ), evaluates=evaluates)
time.sleep(seconds)
print("It began.")
if status:
    print("error: a fake failure.", flush=True)
    sys.exit(status)
shutil.copytree(prepared, folder, dirs_exist_ok=True)
with open(log + ".ended", "a") as file:
    file.write(json.dumps([name, time.monotonic()]) + "\\n")
"""


class FakeStudy:
    """A study whose cells run a script as their command.

    Attributes:
      plan: the [exit status, seconds] of each try of a cell, by the cell's name; the last one repeats.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.plan = folder, {}
        self.option = write(folder / "study.py")
        self.study = study()
        self.cells = make_cells(self.study, folder / "cells")
        self.log = folder / "log"
        (folder / "child.py").write_text(CHILD)
        for cell in self.cells:
            finish(cell, self.prepared(cell))

    def prepared(self, cell):
        return self.folder / "prepared" / cell.name

    def command(self, cell):
        plan = json.dumps(self.plan.get(cell.name, [[0, 0]]))
        arguments = [cell.name, plan, str(self.log), str(self.prepared(cell)), str(cell.folder)]
        return [sys.executable, "-I", "-S", str(self.folder / "child.py"), *arguments]

    def starts(self):
        """What the processes logged at their start, in order."""
        return list(map(json.loads, self.log.read_text().splitlines())) if self.log.exists() else []

    def ends(self):
        """The times at which cells finished, by name."""
        return dict(map(json.loads, pathlib.Path(f"{self.log}.ended").read_text().splitlines()))

    def run(self, *slots):
        slots = slots or [Slot(frozenset(os.sched_getaffinity(0)), {})] * 2
        return run_cells(self.cells, slots, self.folder / "programs")
