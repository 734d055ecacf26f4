"""The rehearsal of docs/reproduce.md, run as documented, in a clean environment."""

import json
import pathlib
import re
import subprocess

import docs_environment
import pytest

pytestmark = pytest.mark.slow  # two minutes
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder in which the documented commands ran, and their output."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("configs", "stf_jax", "tests"):  # as in a clone; the commands write only to the folder
        (folder / name).symlink_to(ROOT / name)
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(), re.DOTALL)[0]
    script = ["bash", "-c", f"set -e\n{commands}"]
    done = subprocess.run(script, cwd=folder, env=docs_environment.make_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "rehearsal", done.stdout


def _epoch_losses(run):
    """The mean loss per epoch, over all target tokens; epochs contain the same rows."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 12  # of 192 rows, 16 per step
    epochs = [lines[start : start + 12] for start in (0, 12, 24)]
    assert len({sum(line["learned_tokens"] for line in epoch) for epoch in epochs}) == 1
    return [
        sum(line["loss"] * line["learned_tokens"] for line in epoch) / sum(line["learned_tokens"] for line in epoch)
        for epoch in epochs
    ]


def test_both_stages_reduce_the_loss(rehearsal):
    folder, _ = rehearsal
    for stage in ("pretrain", "finetune"):
        first, second, third = _epoch_losses(folder / stage)
        assert first > second > third, stage
        assert third < {"pretrain": 0.8, "finetune": 0.6}[stage] * first, stage  # the page gives the figures


def test_the_report_lists_the_dropped_rows(rehearsal):
    folder, output = rehearsal
    report = json.loads((folder / "mix665k" / "report.json").read_text())
    assert (report["rows_read"], report["rows_kept"]) == (200, 192)
    assert len(report["rows_dropped"]) == 8
    assert "200 rows read, 192 kept" in output


def test_the_trained_model_was_exported(rehearsal):
    folder, _ = rehearsal
    assert json.loads((folder / "export" / "config.json").read_text())["image_aspect_ratio"] == "pad"
