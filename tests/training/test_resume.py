"""A run that is killed and restarted ends bit-identical to one that was never killed."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from make_containers import make_rows, write_pairs, write_tars
from make_llava import make
from run_process import ROOT, Run, metric_lines, read_events, saved_steps, start_hosts
from tiny import Setup, make_preprocessor

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.cli import run_command
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.main import main
from stf_jax.runs.lock import LOCK_NAME

STEPS, EVERY, KILL_AFTER, STOP_AFTER = 32, 4, 13, 22
CHANGES = {
    "mesh.data": 1,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 16,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
}
DATA = {
    "packed scenes": {
        "data.packing": True,
        "data.images_per_row": 3,
        "data.max_length": 384,
        "global_batch_size": 2,
        "mesh.fsdp": 2,
    },
    "drawn budgets": {
        "model.fusion.budgets": (16, 4, 1),
        "budgets_per_step": "one",
        "data.packing": True,
        "data.images_per_row": 3,
        "data.max_length": 384,
        "global_batch_size": 2,
        "mesh.fsdp": 2,
    },
    # LLaVA's files, of whose 32 rows seven are bad (tests/make_llava.py), Parquet files and tars; two epochs.
    "a mixture of files, grouped": {
        "data.source": "llava",
        "data.annotations": "llava_v1_5_mix665k.json,pairs,tars",
        "data.images": "images",
        "data.images_per_row": 2,
        "data.max_length": 192,
        "global_batch_size": 4,
    },
}
REPLACED = {"packed scenes": 0, "drawn budgets": 0, "a mixture of files, grouped": 2 * 7}


def _arguments(kind):
    options = [f"--config.{key}={value}" for key, value in (CHANGES | DATA[kind]).items()]
    return [f"--config={ROOT}/tests/tiny.py:steps={STEPS}", *options]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The workdirs of an uninterrupted run, and of one that was killed, terminated by SIGTERM, and resumed after each.

    Attributes:
      killed: workdir of the second run.
      lines, saved: its log lines and checkpoints after the kill.
      terminated: the exit status, lines and checkpoints after SIGTERM.
    """

    kind: str
    uninterrupted: pathlib.Path
    killed: pathlib.Path
    lines: list[str]
    saved: list[int]
    terminated: tuple[int, list[str], list[int]]


DRAWN, MIXTURE = (pytest.param(kind, marks=pytest.mark.slow) for kind in list(DATA)[1:])  # two minutes each


@pytest.fixture(scope="module", params=["packed scenes", DRAWN, MIXTURE])
def runs(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    if "data.source" in DATA[kind]:
        make(folder, captions=1, conversations=24)
        for write in (write_pairs, write_tars):  # 16 rows with images: a batch of bad rows alone would have a loss of 0
            write(folder, [row for row in make_rows(24) if row[0]])
    uninterrupted, killed, arguments = folder / "uninterrupted", folder / "killed", _arguments(kind)
    with Run(uninterrupted, *arguments, devices=2) as other:
        with Run(killed, *arguments, devices=2) as run:
            run.wait_for_steps(KILL_AFTER)
            run.kill()
        after_kill = metric_lines(killed), saved_steps(killed)
        with Run(killed, *arguments, devices=2) as run:
            # By then, later lines have been dropped.
            run.wait_for(lambda: (killed / "events.jsonl").read_text().count("begin") == 2)
            run.wait_for_steps(STOP_AFTER)
            run.process.terminate()
            terminated = run.wait(), metric_lines(killed), saved_steps(killed)
        with Run(killed, *arguments, devices=2) as run:
            assert run.wait() == 0, run.output()
        assert other.wait() == 0, other.output()
    return Runs(kind, uninterrupted, killed, *after_kill, terminated)


def test_kill_is_between_checkpoints(runs):
    reached = json.loads(runs.lines[-1])["step"]
    assert KILL_AFTER <= reached < STEPS - EVERY
    # Some steps had to be repeated, but not all.
    assert EVERY <= runs.saved[-1] <= reached


def test_sigterm_ends_the_run_after_a_saved_step(runs):
    status, before, kept = runs.terminated
    assert status == 143
    last = json.loads(before[-1])["step"]
    assert STOP_AFTER <= last < STEPS
    assert kept[-1] == last
    began = [event for event in read_events(runs.killed) if event["event"] == "begin"]
    assert [(event["step"], event["resumed"]) for event in began] == [(0, False), (runs.saved[-1], True), (last, True)]
    assert [(event["step"], event["status"]) for event in read_events(runs.killed) if event["event"] == "stopped"] == [
        (last, 143)
    ]


def test_losses_are_bit_identical(runs):
    expected, resumed = (
        [json.loads(line) for line in metric_lines(workdir)] for workdir in (runs.uninterrupted, runs.killed)
    )
    assert [line["step"] for line in expected] == [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    assert len({line["loss"] for line in expected}) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"]
    assert expected[-1]["rows_replaced"] == REPLACED[runs.kind]


def test_run_resumes_from_its_last_checkpoint(runs):
    """Lines up to the restored step are unchanged, times included, and the clock continues."""
    before, last, after = runs.lines, runs.saved[-1], metric_lines(runs.killed)
    assert after[:last] == before[:last]
    assert all(new != old for new, old in zip(after[last:], before[last:], strict=False))
    seconds = [json.loads(line)["seconds"] for line in after]
    assert seconds == sorted(seconds)


def _restore(workdir, kind):
    paths = {
        key: ",".join(str(workdir.parent / name) for name in DATA[kind][key].split(","))
        for key in ("data.annotations", "data.images") & DATA[kind].keys()
    }
    setup = Setup.of(steps=STEPS, **(CHANGES | DATA[kind] | paths))
    records = load_training_records(setup.config)
    iterator = Batches(setup.config, records, make_preprocessor(setup.config), host=0, hosts=1)
    checkpoints = Checkpoints(workdir, setup.config.checkpoint)
    arrays, position, _ = checkpoints.restore(STEPS, setup.layout)
    iterator.set_state(position)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(arrays)}, iterator


def test_final_state_is_bit_identical(runs):
    (expected, iterator), (resumed, other) = (
        _restore(workdir, runs.kind) for workdir in (runs.uninterrupted, runs.killed)
    )
    assert expected.keys() == resumed.keys()
    # Parameters, two moments of the trainable ones, counts of Adam and schedule.
    assert len(expected) == 40 + 2 * 19 + 2
    for path, value in expected.items():
        assert resumed[path].dtype == value.dtype
        assert resumed[path].tobytes() == value.tobytes(), path
    # The next batch is also identical.
    assert other.get_state() == iterator.get_state()
    jax.tree.map(np.testing.assert_array_equal, next(other), next(iterator))


@pytest.mark.parametrize("runs", [MIXTURE], indirect=True)  # the case with epochs and bad rows
def test_two_hosts_resume_the_run_of_one(runs, tmp_path):
    """From the middle checkpoint, with the same rows at each step, each host reading half of them."""
    workdir = tmp_path / "run"
    shutil.copytree(runs.uninterrupted / "checkpoints" / "16", workdir / "checkpoints" / "16")
    shutil.copy(runs.uninterrupted / "metrics.jsonl", workdir)
    with contextlib.ExitStack() as stack:
        hosts = start_hosts(
            workdir, 2, *_arguments(runs.kind), "--config.mesh.fsdp=2", folder=runs.uninterrupted.parent
        )
        hosts = [stack.enter_context(host) for host in hosts]
        assert [host.wait() for host in hosts] == [0, 0], hosts[0].output()
    expected, resumed = (
        [json.loads(line) for line in metric_lines(folder)] for folder in (runs.uninterrupted, workdir)
    )
    assert resumed[:16] == expected[:16]
    for key in ("step", "learned_tokens", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            [line[key] for line in resumed], [line[key] for line in expected], rtol=1e-4, err_msg=key
        )
    # The times differ, so the steps were really repeated.
    assert all(new["seconds"] != old["seconds"] for new, old in zip(resumed[16:], expected[16:], strict=True))


def test_newest_checkpoints_and_every_sixteenth_are_kept(runs):
    assert saved_steps(runs.uninterrupted) == saved_steps(runs.killed) == [16, 28, 32]
    assert len(runs.saved) <= 3
    unfinished = [folder.name for folder in (runs.killed / "checkpoints").iterdir() if not folder.name.isdigit()]
    assert not unfinished


def test_finished_run_changes_nothing(runs, monkeypatch):
    uninterrupted = runs.uninterrupted
    monkeypatch.chdir(uninterrupted.parent)
    (uninterrupted / "results.json").write_text('{"benchmark": "kept"}')

    def contents():
        files = [
            file
            for file in uninterrupted.rglob("*")
            if file.is_file() and not {"tensorboard", LOCK_NAME} & set(file.parts)
        ]
        return {file: (file.read_bytes(), file.parent == uninterrupted or file.stat().st_mtime_ns) for file in files}

    before = contents()
    assert any("checkpoints" in file.parts for file in before)
    assert run_command(main, [*_arguments(runs.kind), f"--workdir={uninterrupted}"]) == 0
    assert contents() == before
