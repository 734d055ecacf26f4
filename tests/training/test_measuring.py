"""Evaluation during training: training is bit-identical, metrics are logged beside the loss, no answer is repeated."""

import contextlib
import json
import pathlib
import types

import numpy as np
import PIL.Image
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stf_jax import evaluate
from stf_jax.checkpointing.params import SavedParams
from stf_jax.cli import run_command
from stf_jax.inference.generator import Generator
from stf_jax.main import main
from stf_jax.runs.telemetry import Telemetry
from stf_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
MEASURED = ["--config.eval.benchmarks=('scenes',)", "--config.eval.limit=3", "--config.eval.every_steps=2"]
RATE = [
    "--config.optimizer.schedule=constant",
    "--config.optimizer.learning_rate=3e-4",
]  # so that answers keep changing
STEPS = (2, 4, 5)
RESULTS = {2: "evals/step_2/results.json", 4: "evals/step_4/results.json", 5: "results.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of five steps with evaluations, and one without."""
    folder = tmp_path_factory.mktemp("runs")
    waiting_for, was_waiting = [], []

    def train(name, *more):
        # Without evaluations only the fifth step is logged.
        options = ["--config.mesh.data=1", "--config.log_every_steps=5", *RATE, *more]
        return run_command(main, [f"--config={ROOT}/tests/tiny.py:steps=5", f"--workdir={folder / name}", *options])

    def evaluate_all(*args, **kwargs):
        was_waiting.append(waiting_for == ["measure"])
        return original(*args, **kwargs)

    class RecordingTelemetry(Telemetry):
        @contextlib.contextmanager
        def time_waiting(self, what):
            with super().time_waiting(what):
                waiting_for.append(what)
                yield
                waiting_for.pop()

    original = loop.evaluate_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_all", evaluate_all)
        patch.setattr(loop, "Telemetry", RecordingTelemetry)
        assert train("measured", *MEASURED) == 0
    assert train("plain") == 0
    return types.SimpleNamespace(folder=folder, train=train, workdir=folder / "measured", was_waiting=was_waiting)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def texts(folder):
    return [json.loads(line)["text"] for line in (folder / "answers.jsonl").read_bytes().splitlines()]


def test_training_is_bit_identical_with_evaluations(runs):
    measured, plain = (SavedParams(epath.Path(runs.folder / name)) for name in ("measured", "plain"))
    assert measured.shapes.keys() == plain.shapes.keys()
    for path in plain.shapes:
        assert measured.read(path).tobytes() == plain.read(path).tobytes(), path
    (last,) = lines(runs.folder / "plain")
    for key in ("loss", "gradient_norm", "tokens", "learning_rate"):
        assert lines(runs.workdir)[-1][key] == last[key], key


def test_metrics_are_in_the_log_in_results_and_in_tensorboard(runs):
    assert [line["step"] for line in lines(runs.workdir)] == list(STEPS)
    assert sorted(path.name for path in (runs.workdir / "evals").iterdir()) == ["step_2", "step_4"]
    board = EventAccumulator(str(runs.workdir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    for name in ("accuracy", "blank_image_accuracy"):
        events = board.Tensors(f"scenes/{name}")
        assert [event.step for event in events] == list(STEPS)
        for line, event in zip(lines(runs.workdir), events, strict=True):
            results = json.loads((runs.workdir / RESULTS[line["step"]]).read_text())
            assert line[f"scenes/{name}"] == results["metrics"][name]
            assert event.tensor_proto.float_val[0] == np.float32(results["metrics"][name])
    for line in lines(runs.workdir):
        assert line["loss"] > 0
        assert "scenes/by_kind/count/accuracy" in line
        assert not any("questions" in key for key in line)
    assert not any("scenes" in key for line in lines(runs.folder / "plain") for key in line)
    assert not (runs.folder / "plain" / "results.json").exists()


def test_results_name_their_step_and_answers_change(runs):
    folders = {step: (runs.workdir / file).parent for step, file in RESULTS.items()}
    for step, folder in folders.items():
        results = json.loads((folder / "results.json").read_text())
        assert (results["benchmark"], results["questions"], results["model"]) == ("scenes", 3, "measured")
        asking = results["protocol"]["asking"]
        assert asking["model"] == {"workdir": str(runs.workdir), "step": step}
        assert (asking["precision"], asking["rows"], asking["template"]) == ("float32", 16, "v1")
        assert len(texts(folder)) == 6  # three questions, each of a scene and of a blank image
        with PIL.Image.open(folder / "contact_sheet.png") as sheet:
            assert min(sheet.size) > 500
    assert len({tuple(texts(folder)) for folder in folders.values()}) == 3
    assert len(set(texts(runs.workdir))) > 2


def test_evaluate_command_repeats_the_results_of_the_run(runs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--checkpoint={runs.workdir}", "--benchmark=scenes", "--limit=3", f"--out={out}"]
    assert run_command(evaluate.main, arguments) == 0
    assert (out / "answers.jsonl").read_bytes() == (runs.workdir / "answers.jsonl").read_bytes()
    command_results, run_results = (json.loads((folder / "results.json").read_text()) for folder in (out, runs.workdir))
    assert command_results["protocol"]["asking"].pop("model") == {"checkpoint": str(runs.workdir), "step": 5}
    run_results["protocol"]["asking"].pop("model")
    assert command_results == run_results
    assert "scenes, 3 questions: measured" in capsys.readouterr().out


def test_finished_run_is_scored_again_without_generating(runs, monkeypatch, capsys):
    asked_counts, generate = [], Generator.generate

    def counting_generate(self, records, *args, **kwargs):
        asked_counts.append(len(records))
        return generate(self, records, *args, **kwargs)

    monkeypatch.setattr(Generator, "generate", counting_generate)
    kept = {name: (runs.workdir / name).read_bytes() for name in ("answers.jsonl", "results.json", "metrics.jsonl")}
    (runs.workdir / "results.json").unlink()
    assert runs.train("measured", *MEASURED) == 0
    assert asked_counts == [0]
    assert {name: (runs.workdir / name).read_bytes() for name in kept} == kept
    assert "scenes, 3 questions: measured" in capsys.readouterr().out


# ---- Speed -----------------------------------------------------------------------------------------------------------


def test_evaluations_are_excluded_from_the_speed(runs):
    assert runs.was_waiting == [True] * len(STEPS)
