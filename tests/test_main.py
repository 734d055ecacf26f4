"""The training door: what a run leaves behind, and what it says to input that it cannot use."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from tiny import tiny

from stf_jax.config import from_json
from stf_jax.main import main
from stf_jax.runtime.cli import door

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT}/tests/tiny.py"
PRETRAIN = f"--config={ROOT}/configs/pretrain.py"


@pytest.fixture(autouse=True)
def _quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


UNUSABLE = {
    "no annotations": (
        [PRETRAIN, "--config.mesh.fsdp=8"],
        ["annotations", "--config.data.annotations=PATH", "configs/demo.py"],
    ),
    "no pictures": (
        [PRETRAIN, f"--config.data.annotations={ROOT}/pytest.ini"],
        ["images", "--config.data.images=PATH", "configs/demo.py"],
    ),
    "no tokenizer": (
        [TINY, "--config.data.tokenizer="],
        ["tokenizer", "--config.data.tokenizer=DIR", "configs/demo.py"],
    ),
    "unknown tower": ([TINY, "--config.model.vision=clip-tinny"], ["model.vision='clip-tinny'", "'clip-tiny'"]),
    "unknown language model": ([TINY, "--config.model.llm=vicuna-70b"], ["model.llm='vicuna-70b'", "'vicuna-7b'"]),
    "unknown fusion": ([f"{TINY}:fusion=mbtf_sft"], ["model.fusion.fusion", "'mbtf_sft'", "'mbtf_stf'"]),
    "mesh larger than the machine": ([TINY, "--config.mesh.tensor=16"], ["16", "8 cpu device(s)", "mesh.tensor"]),
    "mesh that does not divide the model": (
        [TINY, "--config.mesh.tensor=8"],
        ["mesh.tensor=8 does not divide", "heads", "which is"],
    ),
    "mesh that does not divide the batch": (
        [TINY, "--config.global_batch_size=12"],
        ["global_batch_size=12 is not a multiple of 8", "mesh.data 8"],
    ),
    "microbatches that do not divide the batch": (
        [TINY, "--config.optimizer.accumulation_steps=2"],
        ["global_batch_size=8 is not a multiple of 16", "optimizer.accumulation_steps 2"],
    ),
    "unknown benchmark": (
        [TINY, "--config.eval.benchmarks=('scene',)"],
        ["benchmark 'scene'", "did you mean 'scenes'?"],
    ),
    "benchmark without its files": (
        [TINY, "--config.eval.benchmarks=('scenes', 'gqa')"],
        ["Benchmark gqa needs", "config.eval.data"],
    ),
    "weights that are not there": ([TINY, "--config.init_from=absent"], ["init_from names absent"]),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_input_that_cannot_be_used_ends_in_one_sentence(case, tmp_path, capsys):
    argv, says = UNUSABLE[case]
    assert door(main, [*argv, f"--workdir={tmp_path / 'run'}"]) == 2
    spoken = capsys.readouterr().err.strip()
    assert spoken.startswith("error: ")
    assert "\n" not in spoken
    for part in says:
        assert part in spoken


def test_the_recipe_without_data_says_what_to_provide(tmp_path):
    """As a user meets it: a process of its own, without a traceback."""
    command = [sys.executable, "-m", "stf_jax.main", "--config=configs/pretrain.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: The annotations of the training data are missing")
    assert "configs/demo.py" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_config_metrics_checkpoints_and_tensorboard(tmp_path):
    workdir = tmp_path / "new" / "run"
    options = ["--config.log_every_steps=2", "--config.mesh.data=1"]
    assert door(main, [f"{TINY}:steps=5", f"--workdir={workdir}", *options]) == 0
    config = from_json(json.loads((workdir / "config.json").read_text()))
    assert config == tiny(steps=5, log_every_steps=2, **{"mesh.data": 1})
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # Every second step, and the last.
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line.keys() >= {"step", "loss", "learning_rate", "tokens_per_second", "gradient_norm", "seconds"}
        assert 0 < line["loss"] < 10
        assert line["tokens_per_second"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(folder.name for folder in (workdir / "checkpoints").iterdir()) == ["4", "5"]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
