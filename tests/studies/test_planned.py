"""Hours and cost of the training runs of a study that are not done: each stage is planned once, without any data."""

import make_study
import pytest

from stf_jax import ablate, cli
from stf_jax.cli import run_command
from stf_jax.config import flatten, resolve, to_json
from stf_jax.planning.batches import count_steps
from stf_jax.studies import planned
from stf_jax.studies.study import make_cells, read_study


@pytest.fixture
def reports(monkeypatch):
    """Replaces plans, which take a minute each: an hour per thousand steps; records their configs."""
    configs = []

    def make_report(config, kind, devices):
        assert kind == "train"
        configs.append(config)
        steps = count_steps(config)
        hours = steps and steps / 1000
        fits = config.model.fusion.fusion != "stf"
        return {"fits": fits, "hours": hours, "step_seconds_estimate": 3.6, "bound": "compute"}

    monkeypatch.setattr(planned, "make_report", make_report)
    return configs


def plan(study, cells, price=0.0):
    stages = []
    rows = planned.plan_study(study, cells, [None] * 4, price, lambda name, report: stages.append(name))
    return {row["what"]: row for row in rows}, stages


def test_hours_are_of_the_runs_not_done(reports, tmp_path):
    common = ("stages.pretrain.steps=500", "stages.finetune.steps=1500")
    study = make_study.study(common=common, repeated=(("again", ("stf",)),))
    cells = make_cells(study, tmp_path)
    make_study.finish(cells[0])
    rows, stages = plan(study, cells, price=3)
    assert stages == ["mlp, pretrain", "mlp, finetune", "stf, pretrain", "stf, finetune"]  # "again" is like stf
    assert rows["mlp"] == {
        "what": "mlp", "runs": 2, "done": 1, "fits": True, "hours": 2.0, "chip_hours": 8.0, "cost": 24.0
    }  # fmt: skip
    assert (rows["stf"]["fits"], rows["stf"]["chip_hours"], rows["again"]) == (
        False,
        16,
        rows["stf"] | {"what": "again"},
    )
    assert rows["all"] == {
        "what": "all", "runs": 6, "done": 1, "fits": False, "hours": None, "chip_hours": 40.0, "cost": 120.0
    }  # fmt: skip
    assert "fastv" not in rows  # trains nothing
    # The tower and language model are those of the weights that the first stage starts from.
    assert {(config.model.vision, config.model.llm) for config in reports} == {("clip-mini-8-96", "llama-mini-6")}


def test_hours_that_depend_on_the_data_are_not_known(reports, tmp_path):
    study = make_study.study(common=("stages.finetune.steps=0", "stages.pretrain.steps=2"))  # packed rows
    rows, _ = plan(study, make_cells(study, tmp_path), price=3)
    assert rows["mlp"]["hours"] is rows["mlp"]["cost"] is rows["all"]["chip_hours"] is None


def test_the_study_at_full_size_plans_the_recipes(reports, tmp_path):
    study = read_study(cli.parse(["--config=configs/ablations/paper7b.py"], "", workdir=False)[1])
    fused = {"mlp", "mbtf", "mbtf_stf", "stf", "avg_pool", "mbtf_stf_64", "stf_64", "avg_pool_64"}
    assert {variant.name for variant in study.variants if not variant.source} == fused
    rows, _ = plan(study, make_cells(study, tmp_path))
    assert rows.keys() == fused | {"all"}
    assert rows["mlp"]["hours"] == pytest.approx((2181 + 5198) / 1000)
    (pretrain,), (finetune,) = (
        resolve(cli.parse([f"--config=configs/{name}.py"], "", workdir=False)[1]) for name in ("pretrain", "finetune")
    )
    by_stage = {config.name: config for config in reports if config.model.fusion == pretrain.model.fusion}
    for own in (pretrain, finetune):
        first, second = (flatten(to_json(config)) for config in (own, by_stage[own.name]))
        differing = {key for key in first if first[key] != second[key]}
        assert differing <= {"init_from", "eval.benchmarks", "eval.data", "model.vision", "model.llm"}
    assert (by_stage["finetune"].model.vision, by_stage["finetune"].model.llm) == ("clip-l-14-336", "vicuna-7b")


def test_the_command_runs_nothing(reports, tmp_path, capsys):
    option = make_study.write(tmp_path / "study.py")
    assert run_command(ablate.main, [option, "--topology=h100:1", "--price-per-chip-hour=3"]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("mlp, pretrain: 3.60 s per step, bound by compute\n")
    header, mlp, *_ = output.out.splitlines()
    assert header.split() == ["runs", "done", "fits", "hours", "chip", "hours", "cost"]
    assert mlp.split() == ["mlp", "2", "0", "True", "0.00", "0.01", "0.02"]
    assert "2 evaluations that train nothing are not included, nor those at the end of runs." in output.out
    assert [file.name for file in tmp_path.iterdir()] == ["study.py"]
    for argv, message in (
        (["--topology=h1000:1"], "unknown device 'h1000'"),
        (["--topology=h100:1", "--price-per-chip-hour=-1"], "--price-per-chip-hour must be finite and at least 0"),
        (["--price-per-chip-hour=1", f"--out={tmp_path}"], "--price-per-chip-hour has no effect without --topology"),
    ):
        assert run_command(ablate.main, [option, *argv]) == 2
        assert message in capsys.readouterr().err
