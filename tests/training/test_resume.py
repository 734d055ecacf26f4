"""A run that is killed and started again ends, to the bit, as if it had never been killed."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from make_llava import make
from started import ROOT, Run, events, lines, saved, together
from tiny import Setup, preparation

from stf_jax.data.pipeline import Batches, training_records
from stf_jax.main import main
from stf_jax.runtime.checkpoint import Checkpoints
from stf_jax.runtime.cli import door
from stf_jax.runtime.hold import NAME

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
    # Seven of its 32 rows cannot be used (tests/make_llava.py); four epochs.
    "LLaVA's files, grouped": {
        "data.source": "llava",
        "data.annotations": "llava_v1_5_mix665k.json",
        "data.images": "images",
        "data.max_length": 192,
        "global_batch_size": 4,
    },
}
REPLACED = {"packed scenes": 0, "LLaVA's files, grouped": 4 * 7}


def _arguments(kind):
    options = [f"--config.{key}={value}" for key, value in (CHANGES | DATA[kind]).items()]
    return [f"--config={ROOT}/tests/tiny.py:steps={STEPS}", *options]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The workdirs of a whole run, and of one that was killed, told to end by SIGTERM, and resumed after each.

    Attributes:
      killed: of the second.
      lines, saved: its lines and checkpoints that the kill left.
      stopped: the exit status, lines and checkpoints of its end by SIGTERM.
    """

    kind: str
    whole: pathlib.Path
    killed: pathlib.Path
    lines: list[str]
    saved: list[int]
    stopped: tuple[int, list[str], list[int]]


GROUPED = pytest.param("LLaVA's files, grouped", marks=pytest.mark.slow)  # two minutes


@pytest.fixture(scope="module", params=["packed scenes", GROUPED])
def runs(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    if kind != "packed scenes":
        make(folder, captions=1, conversations=24)
    whole, killed, arguments = folder / "whole", folder / "killed", _arguments(kind)
    with Run(whole, *arguments, devices=2) as other:
        with Run(killed, *arguments, devices=2) as run:
            run.wait_for_lines(KILL_AFTER)
            run.kill()
        left = lines(killed), saved(killed)
        with Run(killed, *arguments, devices=2) as run:
            run.wait_for(lambda: (killed / "events.jsonl").read_text().count("begin") == 2)  # and later lines dropped
            run.wait_for_lines(STOP_AFTER)
            run.process.terminate()
            stopped = run.ends(), lines(killed), saved(killed)
        with Run(killed, *arguments, devices=2) as run:
            assert run.ends() == 0, run.said()
        assert other.ends() == 0, other.said()
    return Runs(kind, whole, killed, *left, stopped)


def test_the_kill_landed_in_the_middle(runs):
    reached = json.loads(runs.lines[-1])["step"]
    assert KILL_AFTER <= reached < STEPS - EVERY
    # Work was lost that had to be done again, but not all of it.
    assert EVERY <= runs.saved[-1] <= reached


def test_sigterm_ends_the_run_after_a_step_that_issaved(runs):
    status, before, kept = runs.stopped
    assert status == 143
    last = json.loads(before[-1])["step"]
    assert STOP_AFTER <= last < STEPS
    assert kept[-1] == last
    began = [event for event in events(runs.killed) if event["event"] == "begin"]
    assert [(event["step"], event["resumed"]) for event in began] == [(0, False), (runs.saved[-1], True), (last, True)]
    assert [(event["step"], event["status"]) for event in events(runs.killed) if event["event"] == "stopped"] == [
        (last, 143)
    ]


def test_losses_are_bit_identical_after_the_kill(runs):
    expected, resumed = ([json.loads(line) for line in lines(workdir)] for workdir in (runs.whole, runs.killed))
    assert [line["step"] for line in expected] == [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "gradient_norm", "learned_tokens", "learning_rate", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    assert len({line["loss"] for line in expected}) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"]
    assert expected[-1]["rows_replaced"] == REPLACED[runs.kind]


def test_the_run_goes_on_from_its_last_checkpoint(runs):
    """Lines up to the restored step stay as they were, times included; the clock goes on."""
    before, last, after = runs.lines, runs.saved[-1], lines(runs.killed)
    assert after[:last] == before[:last]
    assert all(new != old for new, old in zip(after[last:], before[last:], strict=False))
    seconds = [json.loads(line)["seconds"] for line in after]
    assert seconds == sorted(seconds)


def _restored(workdir, kind):
    paths = {
        key: str(workdir.parent / DATA[kind][key]) for key in ("data.annotations", "data.images") & DATA[kind].keys()
    }
    setup = Setup.of(steps=STEPS, **(CHANGES | DATA[kind] | paths))
    records = training_records(setup.config)
    iterator = Batches(setup.config, records, preparation(setup.config), host=0, hosts=1)
    checkpoints = Checkpoints(workdir, setup.config.checkpoint)
    arrays, position, _ = checkpoints.restore(STEPS, setup.layout)
    iterator.set_state(position)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(arrays)}, iterator


def test_final_state_is_bit_identical(runs):
    (expected, iterator), (resumed, other) = (_restored(workdir, runs.kind) for workdir in (runs.whole, runs.killed))
    assert expected.keys() == resumed.keys()
    assert (
        len(expected) == 40 + 2 * 19 + 2
    )  # parameters, two moments of the trainable ones, counts of Adam and schedule
    for path, value in expected.items():
        assert resumed[path].dtype == value.dtype
        assert resumed[path].tobytes() == value.tobytes(), path
    # And so is what would be read next.
    assert other.get_state() == iterator.get_state()
    jax.tree.map(np.testing.assert_array_equal, next(other), next(iterator))


@pytest.mark.parametrize("runs", [GROUPED], indirect=True)  # which have all that this is about
def test_two_hosts_go_on_where_one_stopped(runs, tmp_path):
    """From the checkpoint half-way, with the same rows at each step, each host reading half of them."""
    workdir = tmp_path / "run"
    shutil.copytree(runs.whole / "checkpoints" / "16", workdir / "checkpoints" / "16")
    shutil.copy(runs.whole / "metrics.jsonl", workdir)
    with contextlib.ExitStack() as ends:
        hosts = together(workdir, 2, *_arguments(runs.kind), "--config.mesh.fsdp=2", folder=runs.whole.parent)
        hosts = [ends.enter_context(host) for host in hosts]
        assert [host.ends() for host in hosts] == [0, 0], hosts[0].said()
    expected, resumed = ([json.loads(line) for line in lines(folder)] for folder in (runs.whole, workdir))
    assert resumed[:16] == expected[:16]
    for key in ("step", "learned_tokens", "tokens", "rows_replaced"):
        assert [line[key] for line in resumed] == [line[key] for line in expected], key
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            [line[key] for line in resumed], [line[key] for line in expected], rtol=1e-4, err_msg=key
        )
    # It did run anew: the times are its own.
    assert all(new["seconds"] != old["seconds"] for new, old in zip(resumed[16:], expected[16:], strict=True))


def test_the_newest_checkpoints_and_each_sixteenth_are_kept(runs):
    assert saved(runs.whole) == saved(runs.killed) == [16, 28, 32]
    assert len(runs.saved) <= 3
    unfinished = [folder.name for folder in (runs.killed / "checkpoints").iterdir() if not folder.name.isdigit()]
    assert not unfinished


def test_a_finished_run_does_nothing_more(runs, monkeypatch):
    whole = runs.whole
    monkeypatch.chdir(whole.parent)
    (whole / "results.json").write_text('{"benchmark": "kept"}')

    def contents():
        files = [file for file in whole.rglob("*") if file.is_file() and not {"tensorboard", NAME} & set(file.parts)]
        return {file: (file.read_bytes(), file.parent == whole or file.stat().st_mtime_ns) for file in files}

    before = contents()
    assert any("checkpoints" in file.parts for file in before)
    assert door(main, [*_arguments(runs.kind), f"--workdir={whole}"]) == 0
    assert contents() == before
