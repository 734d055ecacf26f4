"""docs/reproduce.md's rehearsal, run as it stands there, in a reader's environment."""

import json
import pathlib
import re
import subprocess

import pytest
import reader

pytestmark = pytest.mark.slow  # two minutes
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder in which the commands of the document ran."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("configs", "stf_jax", "tests"):  # as in a clone; what the commands write stays here
        (folder / name).symlink_to(ROOT / name)
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "reproduce.md").read_text(), re.DOTALL)[0]
    script = ["bash", "-c", f"set -e\n{commands}"]
    done = subprocess.run(script, cwd=folder, env=reader.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "rehearsal", done.stdout


def _epochs(run):
    """The loss of each epoch, over all tokens that it learned; epochs hold the same rows."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 12  # of 192 rows, 16 a step
    epochs = [lines[start : start + 12] for start in (0, 12, 24)]
    assert len({sum(line["learned_tokens"] for line in epoch) for epoch in epochs}) == 1
    return [
        sum(line["loss"] * line["learned_tokens"] for line in epoch) / sum(line["learned_tokens"] for line in epoch)
        for epoch in epochs
    ]


def test_both_stages_learn_from_llavas_files(rehearsal):
    folder, _ = rehearsal
    for stage in ("pretrain", "finetune"):
        first, second, third = _epochs(folder / stage)
        assert first > second > third, stage
        assert third < {"pretrain": 0.8, "finetune": 0.6}[stage] * first, stage  # the document has the figures


def test_the_report_names_what_was_left_out(rehearsal):
    folder, said = rehearsal
    report = json.loads((folder / "mix665k" / "report.json").read_text())
    assert (report["rows_read"], report["rows_kept"]) == (200, 192)
    assert len(report["rows_dropped"]) == 8
    assert "200 rows read, 192 kept" in said


def test_the_trained_model_was_exported(rehearsal):
    folder, _ = rehearsal
    assert json.loads((folder / "export" / "config.json").read_text())["image_aspect_ratio"] == "pad"
