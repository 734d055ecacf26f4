"""Studies whose runs nobody trained: configs, and folders as runs leave them."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from stf_jax.config import to_json
from stf_jax.data.scenes import KINDS
from stf_jax.studies.runner import Slot, run
from stf_jax.studies.study import Cell, Study, cells, default_study, read_study

DEMO = pathlib.Path(__file__).parent.parent / "configs" / "demo.py"
VALUES = {
    "title": "Two <fusions> & a rival",
    "question": "Who is `better`?",
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
    """A study's config: two fusions and a rival that asks, from two seeds, changed."""
    made = default_study().unlock()
    made.update(VALUES | changes)
    return made


def study(**changes) -> Study:
    """The same, read."""
    return read_study(config(**changes))


def write(file: pathlib.Path, **changes) -> str:
    """The same as a config file; its option."""
    file.write_text(
        "from stf_jax.studies.study import default_study\n\n\ndef get_config(arg=None):\n"
        f"    config = default_study().unlock()\n    config.update({VALUES | changes!r})\n    return config\n"
    )
    return f"--config={file}"


def put(file: pathlib.Path, value) -> None:
    """A JSON file, in folders that are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def answers(right: Mapping[str, Sequence[bool]], blank: Sequence[bool]) -> str:
    """Lines of ``answers.jsonl`` of scenes: of each kind, and of blank images, which are right."""
    groups = {(kind, "scene"): hits for kind, hits in right.items()} | {("count", "blank"): blank}
    lines = []
    for (kind, image), hits in groups.items():
        for index, hit in enumerate(hits):
            about = {"kind": kind, "shown": image, "truth": "Ring"}
            line = {"question_id": f"{index}/{kind}/{image}", "text": "ring" if hit else "cross", "metadata": about}
            lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def finish(cell: Cell, folder: pathlib.Path | None = None, share: float = 0.5, questions: int = 20) -> pathlib.Path:
    """Leaves what a cell's run leaves, in its folder or another.

    Args:
      share: of right answers to images; of blank ones it is a third.
      questions: of each kind.
    """
    folder = folder or cell.folder
    rng = np.random.default_rng([cell.seed, int(1000 * share)])
    right = {kind: (rng.random(questions) < share).tolist() for kind in KINDS}
    accuracy = float(np.mean(list(right.values())))
    asking = {"weights": f"{cell.study.trained(cell.variant).name} {cell.seed}", "precision": "float32"}
    put(
        folder / "results.json",
        {
            "benchmark": "scenes",
            "metrics": {"accuracy": accuracy, "blank_image_accuracy": 0.3},
            "questions": questions * len(KINDS),
            "protocol": {"benchmark": "scenes", "questions": 2 * questions * len(KINDS), "asking": asking},
        },
    )
    (folder / "answers.jsonl").write_text(answers(right, rng.random(questions) < 1 / 3))
    put(folder / "cost.json", {key: COST[key] for key in COST if cell.needs is None or not key.startswith("step")})
    if cell.needs is None:
        for stage in cell.study.stages(cell.variant, cell.seed):
            put(folder / stage.name / "config.json", to_json(stage))
            put(folder / stage.name / "metrics.jsonl", {"step": 2, "seconds": 60.0})
    else:
        put(folder / "asked.json", list(cell.variant.asked))
    return folder


# Instead of a run: notes when and where it is, does as the plan says of this try, and leaves what a run leaves.
CHILD = """
import json, os, shutil, signal, sys, time
name, plan, journal, prepared, folder = sys.argv[1:]
plan = json.loads(plan)
tries = sum(json.loads(line)["name"] == name for line in open(journal)) if os.path.exists(journal) else 0
status, seconds = plan[min(tries, len(plan) - 1)]
asked = os.path.exists(os.path.join(folder, "asked.json"))
def note(**what):
    with open(journal, "a") as file:
        file.write(json.dumps({"name": name, "time": time.monotonic(), **what}) + "\\n")
def stop(*_):
    with open(journal + ".stopped", "a") as file:
        file.write(name + "\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
note(pid=os.getpid(), processors=sorted(os.sched_getaffinity(0)), environment=dict(os.environ), asked=asked)
time.sleep(seconds)
print("It began.")
if status:
    print("error: it cannot be.", flush=True)
    sys.exit(status)
shutil.copytree(prepared, folder, dirs_exist_ok=True)
with open(journal + ".ended", "a") as file:
    file.write(json.dumps([name, time.monotonic()]) + "\\n")
"""


class World:
    """A study whose cells run a script for their commands.

    Attributes:
      plan: of a cell, by name, what each of its tries does, the last one what all further do: exit status, seconds.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.plan = folder, {}
        self.option = write(folder / "study.py")
        self.study = study()
        self.cells = cells(self.study, folder / "cells")
        self.journal = folder / "journal"
        (folder / "child.py").write_text(CHILD)
        for cell in self.cells:
            finish(cell, self.prepared(cell))

    def prepared(self, cell):
        return self.folder / "prepared" / cell.name

    def command(self, cell):
        plan = json.dumps(self.plan.get(cell.name, [[0, 0]]))
        arguments = [cell.name, plan, str(self.journal), str(self.prepared(cell)), str(cell.folder)]
        return [sys.executable, "-I", "-S", str(self.folder / "child.py"), *arguments]

    def begun(self):
        """What children noted, in order."""
        return list(map(json.loads, self.journal.read_text().splitlines())) if self.journal.exists() else []

    def ended(self):
        """When cells that were done ended."""
        return dict(map(json.loads, pathlib.Path(f"{self.journal}.ended").read_text().splitlines()))

    def run(self, *shares):
        return run(self.cells, shares or [Slot(frozenset(os.sched_getaffinity(0)), {})] * 2, self.folder / "programs")
