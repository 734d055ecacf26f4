"""The study's door: what it is told, what it says, and a study from end to end."""

import json
import os
import re
import shlex

import make_study
import pytest

from stf_jax import ablate
from stf_jax.runtime.cli import run_command
from stf_jax.studies import plots
from stf_jax.studies.study import Cell

FILES = ("report.md", "report.html", "report.json", "quality.png", "kinds.png", "differences.png", "cost.png")


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = make_study.World(tmp_path)
    monkeypatch.setattr(Cell, "command", property(made.command))
    return made


def test_help(capsys):
    for argv in (["--help"], [], ["--config=x", "--help"]):
        with pytest.raises(SystemExit) as left:
            run_command(ablate.main, argv)
        assert left.value.code == 0
    said = capsys.readouterr().out
    assert said == 3 * ablate.HELP
    for option in ("--config=FILE", "--config.KEY=VALUE", "--out=DIR", "--cells=DIR", "--jobs=N"):
        assert re.search(rf"^  {re.escape(option)} +\w", said, re.MULTILINE)
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{study}"], "--out is missing; see --help."),
        (["{study}", "--out={here}/o", "--jobs=-1"], "--jobs=-1 should be at least 1, or left out."),
        (["{study}", "--out={here}/o", "--jobs=many"], "Argument --jobs: invalid int value: 'many'; see --help."),
        (["{study}", "--out={here}/o", "--jobs=100000"], "--jobs=100000 is more than this machine has devices for"),
        (["{study}", "--out={here}/o", "more"], "Unexpected argument 'more'; see --help."),
        (["{study}", "--out={here}/o", "--job=1"], "Unknown command line flag 'job'"),
        (["{study}", "--out={here}/study.py"], "The folder {here}/study.py"),
        (["--config={here}/none.py", "--out={here}/o"], "The config file cannot be loaded"),
        (["{study}", "--out={here}/o", "--config.baseline=mpl"], "baseline is 'mpl': did you mean 'mlp'?"),
        (["{study}", "--out={here}/o", "--config.seeds=(0,0)"], "each once"),
        (["{study}", "--out={here}/o", "--config.sedes=(0,)"], "sedes"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(tmp_path, capsys, argv, says):
    places = {"here": str(tmp_path), "study": make_study.write(tmp_path / "study.py")}
    assert run_command(ablate.main, [word.format(**places) for word in argv]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert says.format(**places) in said
    assert not (tmp_path / "o").exists()


def test_a_study_from_end_to_end(world, tmp_path, capsys, monkeypatch):
    argv = [world.option, f"--out={tmp_path / 'out'}", f"--cells={tmp_path / 'cells'}"]
    assert run_command(ablate.main, argv) == 0
    said = capsys.readouterr().out
    assert "6 runs, 0 of them done before" in said
    assert "stf and mlp are equal within 2 points: +0.0" in said
    assert re.search(r"^fastv against mlp: .*, within noise\.$|^fastv and mlp are equal within 2 points", said, re.M)
    assert "**" not in said
    assert f"are in {tmp_path / 'out'}" in said
    written = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    assert shlex.join(["python", "-m", "stf_jax.ablate", *argv]) in written["report.md"].decode()
    figures = json.loads(written["report.json"])
    assert list(figures["quality"]) == ["mlp", "stf", "fastv"]
    assert figures["cost"]["stf"]["step_ms"] == make_study.COST["step_ms"]
    # Again: no run, and the same report.
    assert run_command(ablate.main, argv) == 0
    assert "6 runs, 6 of them done before" in capsys.readouterr().out
    assert len(world.begun()) == 6
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == written
    # A study of other seeds shares the cells.
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    assert run_command(ablate.main, [world.option, "--config.seeds=(1,)", f"--out={tmp_path / 'b'}", argv[-1]]) == 0
    assert "3 runs, 3 of them done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "report.json").read_text())["seeds"] == [1]


@pytest.fixture
def undrawn(monkeypatch):
    """Images take a second."""
    monkeypatch.setattr(plots, "draw", lambda *_: {})


def test_a_study_some_of_whose_runs_fail_is_reported_all_the_same(world, undrawn, tmp_path, capsys):
    world.plan = {"stf, seed 1": [[2, 0]]}
    assert run_command(ablate.main, [world.option, f"--out={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "error: 1 of 6 runs failed, the first of them stf, seed 1: see above"
    assert "stf, seed 1: ended with status 2" in said.out
    figures = json.loads((tmp_path / "report.json").read_text())
    assert list(figures["quality"]) == ["mlp", "fastv"]
    # What is mended goes on.
    world.plan = {}
    assert run_command(ablate.main, [world.option, f"--out={tmp_path}"]) == 0
    assert len(world.begun()) == 7
    assert list(json.loads((tmp_path / "report.json").read_text())["quality"]) == ["mlp", "stf", "fastv"]


def test_a_study_all_of_whose_runs_fail_has_no_report(world, tmp_path, capsys):
    world.plan = {cell.name: [[2, 0]] for cell in world.cells}
    assert run_command(ablate.main, [world.option, f"--out={tmp_path}"]) == 1
    assert "6 of 6 runs failed" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_runs_of_another_config_are_not_taken(world, undrawn, tmp_path, capsys):
    assert run_command(ablate.main, [world.option, f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    argv = [world.option, f"--out={tmp_path}", "--config.common=('stages.pretrain.steps=3',)"]
    assert run_command(ablate.main, argv) == 2
    said = capsys.readouterr().err
    assert "cells/mlp/seed_0 holds a run that differs from what the study asks for, in steps: choose another" in said


@pytest.mark.slow
def test_a_real_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    common = (*make_study.VALUES["common"], "data.scenes.size=64", "eval.limit=8")
    option = make_study.write(tmp_path / "study.py", common=common, seeds=(3,))
    argv = [option, f"--out={tmp_path / 'out'}"]
    assert run_command(ablate.main, argv) == 0, capsys.readouterr()
    assert "3 runs, 0 of them done before" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    for name, tokens in (("mlp", 36), ("stf", 9), ("fastv", 9)):
        folder = tmp_path / "out" / "cells" / name / "seed_3"
        accuracy = json.loads((folder / "results.json").read_text())["metrics"]["accuracy"]
        assert figures["quality"][name]["all"]["value"] == pytest.approx(accuracy)
        assert figures["cost"][name]["image_tokens"] == tokens
        assert figures["cost"][name]["first_token_ms"] > 0
        assert ("step_ms" in figures["cost"][name]) == (name != "fastv")
    assert figures["cost"]["stf"]["prefill_gflops"] < figures["cost"]["mlp"]["prefill_gflops"]
    assert all((tmp_path / "out" / name).exists() for name in FILES)

    def times():
        kept = (tmp_path / "out" / "cells").rglob("*")
        return {path: os.stat(path).st_mtime_ns for path in kept if path.is_file()}

    before = times()
    assert run_command(ablate.main, argv) == 0
    assert "3 runs, 3 of them done before" in capsys.readouterr().out
    assert times() == before
