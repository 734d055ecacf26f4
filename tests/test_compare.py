"""The command: its files and output, and what it refuses without writing anything."""

import json
import subprocess
import sys

import make_results
import pytest

from stf_jax import compare
from stf_jax.cli import run_command


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the command in a folder with results; returns status, output and error."""
    monkeypatch.chdir(tmp_path)
    make_results.write(tmp_path / "full", [1, 1, 1, 0] * 20, blank=[0, 1], cost={"image_tokens": 576})
    make_results.write(tmp_path / "half", [1, 1, 0, 0] * 20, cost={"image_tokens": 192})
    dark = make_results.ASKING | {"images": "blank"}
    make_results.write(tmp_path / "dark", [1, 0, 0, 0] * 20, asking=dark)
    reduced = make_results.ASKING | {"reduce": "visionzip", "keep": 192}
    make_results.write(tmp_path / "resize", [1, 0, 0, 0] * 20, cost={"image_tokens": 192}, asking=reduced)

    def run(*argv):
        status = run_command(compare.main, list(argv))
        return status, *capsys.readouterr()

    return run


def test_files_and_output(run, tmp_path):
    status, output, _ = run("full", "half", "resize", "--resized=resize", "--blank=half=dark", "--out=out")
    assert status == 0
    assert output.splitlines() == [
        "half is worse than full: -25.0 points (-34.7 to -15.3).",
        "resize is worse than full: -50.0 points (-61.2 to -38.8).",
        "compare.md, compare.html, compare.json and the plots are in out",
    ]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"compare.md", "compare.html", "compare.json", "image_tokens_pope.svg"}
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (found["baseline"], found["questions"]) == ("full", {"pope": 80})
    assert found["hard_questions"] == {"pope": {"hard": 60, "group_a": 40, "group_b": 20}}
    half = found["results"]["pope"]["half"]
    assert half["accuracy"]["value"] == half["group_a"]["value"] == 50
    assert (half["difference"]["verdict"], half["agreement"], half["blank"]) == ("worse", 75, 25)
    assert found["methods"]["half"]["fewer_tokens_percent"] == 66.7
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| half | 50.0 (38.8 to 61.2) | -25.0 (-34.7 to -15.3) worse | 192 | 66.7% | 1 | 75.0 | 25.0 |" in text
    assert "| **full** | 75.0 (65.3 to 84.7) | – | 576 | 0.0% | 1 | – | 50.0 |" in text
    assert "| half | – | 192 |\n| resize | visionzip, keep=192 | 192 |\n" in text
    assert "Not measured in any of these folders: GFLOP per prompt, ms to first tokens" in text


def test_equal_results_give_equal_files(run, tmp_path):
    for _ in range(2):
        assert run("full", "half", "--out=out")[0] == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert run("full", "half", "--out=out")[0] == 0
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_a_small_margin_is_not_shown_to_be_equal(run, tmp_path):
    make_results.write(tmp_path / "same", [1, 1, 1, 0] * 20)
    assert run("full", "same", "--out=out")[1].startswith("same and full are equal within 1 point: +0.0 points")
    noisy = [1, 1, 1, 0] * 20
    noisy[3:5] = [1, 0]
    make_results.write(tmp_path / "noisy", noisy)
    assert run("full", "noisy", "--out=out")[1].startswith("noisy vs. full: +0.0 points (-3.5 to +3.5), within noise")
    assert run("full", "noisy", "--margin=4", "--out=out")[1].startswith("noisy and full are equal within 4 points")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["full"], "--out"),
        (["--out=out"], "RESULTS"),
        (["full", "nowhere", "--out=out"], "nowhere has no results"),
        (["full", "few", "--out=out"], "full and few answered different questions of pope: 80 and 2."),
        (["full", "half", "--baseline=none", "--out=out"], "--baseline names no result 'none'"),
        (["full", "half", "--blank=half", "--out=out"], "write --blank=NAME=PATH"),
        (["full", "half", "--blank=none=half", "--out=out"], "--blank names no result 'none'"),
        (["full", "half", "--blank=half=few", "--out=out"], "half and its blank run few answered different questions"),
        (["full", "half", "--margin=0", "--out=out"], "--margin must be above 0 points."),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(run, tmp_path, argv, message):
    make_results.write(tmp_path / "few", [1, 0])
    status, output, error = run(*argv)
    assert (status, output) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_it_needs_no_jax(tmp_path):
    make_results.write(tmp_path / "full", [1, 1, 1, 0])
    program = (
        "import sys; from stf_jax import compare; compare.main(sys.argv[1:]); "
        "sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    )
    arguments = [str(tmp_path / "full"), f"--out={tmp_path / 'out'}"]
    assert subprocess.run([sys.executable, "-c", program, *arguments]).returncode == 0
