"""The training command: the files of a run, and error messages for invalid input."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from etils import epath
from make_llava import make
from tiny import tiny

from stf_jax.cli import run_command
from stf_jax.config import from_json
from stf_jax.main import main
from stf_jax.runs import profiler
from stf_jax.training import loop
from stf_jax.training.flops import step_flops
from stf_jax.training.stages import run_stages

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT}/tests/tiny.py"
PRETRAIN = f"--config={ROOT}/configs/pretrain.py"


INVALID = {
    "no annotations": (
        [PRETRAIN, "--config.mesh.fsdp=8"],
        ["annotations", "--config.data.annotations=PATH", "configs/demo.py"],
    ),
    "no images": (
        [PRETRAIN, f"--config.data.annotations={ROOT}/LICENSE"],
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


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_reported_in_one_sentence(case, tmp_path, capsys):
    argv, parts = INVALID[case]
    assert run_command(main, [*argv, f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_each_stage_has_a_folder_for_its_results(tmp_path, monkeypatch):
    """That of the last one with benchmarks is the run's."""
    evaluated = tiny(**{"eval.benchmarks": ("scenes",)})
    stages = [dataclasses.replace(evaluated, name=name) for name in ("a", "b")]
    stages.append(dataclasses.replace(tiny(), name="c"))
    monkeypatch.setattr(loop, "train", lambda stage, workdir, results_dir: results_dir.relative_to(tmp_path))
    folders = [str(results) for _, results in run_stages(stages, epath.Path(tmp_path))]
    assert folders == ["a", ".", "c"]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail():
        raise OSError("No space left on device")

    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", fail)
    profile = profiler.Profile(epath.Path(tmp_path), 2, 1)
    profile.before_step(2)
    profile.after_step(2, jax.numpy.zeros(()))
    assert "The profile cannot be written (No space left on device); the run continues." in caplog.text


def test_the_recipe_without_data_reports_what_to_provide(tmp_path):
    """As a user runs it, in a separate process; prints no traceback."""
    command = [sys.executable, "-m", "stf_jax.main", "--config=configs/pretrain.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: The annotations of the training data are missing")
    assert "configs/demo.py" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run of five steps on two devices that profiles steps 2 and 3."""
    workdir = tmp_path_factory.mktemp("new") / "deeper" / "run"
    options = ["--config.log_every_steps=2", "--config.mesh.data=2", "--config.mesh.fsdp=1"]
    options += ["--config.profile.first_step=2", "--config.profile.steps=2"]
    assert run_command(main, [f"{TINY}:steps=5", f"--workdir={workdir}", *options]) == 0
    return workdir


def test_a_run_writes_config_metrics_checkpoints_and_tensorboard(workdir):
    config = from_json(json.loads((workdir / "config.json").read_text()))
    profile = {"profile.first_step": 2, "profile.steps": 2}
    assert config == tiny(steps=5, log_every_steps=2, **{"mesh.data": 2, "mesh.fsdp": 1}, **profile)
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


def test_metrics_include_throughput_and_goodput(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    flops = step_flops(tiny().model, tiny().rules, 8, 192, 1)
    for line in lines:
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"] / 2
        assert line["model_flops_per_second"] * line["seconds_per_step"] == pytest.approx(flops / 2)
        assert 0 <= line["data_wait"] < 1
        assert 0 < line["goodput"] < 1
        assert not line.keys() & {"mfu", "device_memory_bytes"}  # not available on CPUs
    # One program, whose compilation is part of the time until the first line.
    assert [name for line in lines for name in line if name == "compile_seconds"] == ["compile_seconds"]
    assert 0 < lines[0]["compile_seconds"] < lines[0]["seconds"]


def test_a_profile_has_scopes_for_the_parts_of_the_model(workdir):
    (file,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")  # where TensorBoard looks
    names = set(re.findall(rb"jit\(train_step\)/[ -~]+", file.read_bytes()))
    for scopes in (b"vision.*/attention", b"vision.*/mlp", b"fusion", b"llm.*/attention", b"llm.*/mlp", b"loss"):
        assert any(re.search(rb"jvp\(" + scopes, name) for name in names), scopes
    assert any(b"transpose(jvp(llm))" in name for name in names)
    assert any(b"/update/" in name for name in names)


@pytest.mark.slow  # it compiles for several shapes of batch
def test_the_recipe_for_few_rows_reduces_the_loss(tmp_path):
    """48 rows, about seven of them unusable, and an untrained model, which needs the higher learning rate."""
    make(tmp_path, captions=1, conversations=48)
    workdir, overrides = (
        tmp_path / "run",
        {
            "init_missing": "('.*',)",
            "model.precision": "float32",
            "data.tokenizer": "miniature",
            "data.annotations": tmp_path / "llava_v1_5_mix665k.json",
            "data.images": tmp_path / "images",
            "data.max_length": 192,
            "optimizer.learning_rate": 3e-3,
            "mesh.data": 1,
        },
    )
    options = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = f"--config={ROOT}/configs/small.py:vision=clip-tiny,llm=llama-tiny,fusion=mlp"
    assert run_command(main, [config, f"--workdir={workdir}", *options]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 4  # three epochs of 56 rows, 16 per step
    epochs = [lines[start : start + 4] for start in (0, 4, 8)]  # with the same rows
    first, second, third = (sum(line["loss"] * line["learned_tokens"] for line in epoch) for epoch in epochs)
    assert first > second > third


def test_the_demo_needs_only_the_first_part_of_the_requirements():
    """`make demo` installs only that part, which no other test checks."""
    rest = (ROOT / "requirements.txt").read_text().partition("# ---- The rest")[2]
    packages = [name.replace("-", "_") for name in re.findall(r"^([\w-]+)==", rest, re.MULTILINE)]
    assert "tensorflow_datasets" in packages
    modules = [
        "main",
        "training.loop",
        "evals.registry",
        "evals.runner",
        "convert",
        "weights.exports",
        "weights.export_hf",
    ]
    code = f"import importlib, sys\nsys.modules.update(dict.fromkeys({packages}))\n"
    code += "".join(f"importlib.import_module('stf_jax.{name}')\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
