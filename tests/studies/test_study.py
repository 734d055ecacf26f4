"""Studies: the commands of their cells, invalid configs, and which runs count as done."""

import functools
import json
import pathlib

import make_study
import pytest

from stf_jax import cli
from stf_jax.config import UserError, flatten, resolve, to_json
from stf_jax.models.reducers.base import REDUCERS
from stf_jax.studies.study import make_cells, read_study

ROOT = pathlib.Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.py"))


@pytest.fixture
def cells(tmp_path):
    """The cells of a finished study."""
    cells = make_cells(make_study.study(), tmp_path)
    for cell in cells:
        make_study.finish(cell)
    return cells


def edit(file, change):
    """Changes the value in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@functools.cache
def read_file(file):
    """Reads one of our own studies, which takes seconds."""
    return read_study(cli.parse([f"--config={file}:seeds=2"], "", workdir=False)[1])


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_our_own_studies_are_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_file(file)
    assert study.seeds == (0, 1)
    assert study.question
    trained = [variant for variant in study.variants if not variant.source and not variant.repeats]
    resolved = [tuple(json.dumps(to_json(stage)) for stage in study.resolve_stages(variant, 0)) for variant in trained]
    assert len(set(resolved)) == len(trained)  # no duplicates
    for variant in study.variants:  # seeds change nothing else
        first, second = (flatten(to_json(study.resolve_stages(variant, seed)[-1])) for seed in study.seeds)
        assert {key for key in first if first[key] != second[key]} == {"seed"}


def test_the_study_of_reducers_uses_the_runs_of_the_study_of_fusions(monkeypatch):
    monkeypatch.chdir(ROOT)
    fusions, reducers = (read_file(ROOT / "configs" / "ablations" / f"{name}.py") for name in ("fusions", "reducers"))
    shared = [variant for variant in fusions.variants if not variant.source and variant.name != "one_token"]
    assert len(shared) == 12
    for variant in shared:
        assert reducers.resolve_stages(reducers.get_variant(variant.name), 0) == fusions.resolve_stages(variant, 0)
    # All reducers at all budgets.
    assert {variant.name for variant in reducers.variants if variant.source} == {
        f"{name}_{keep}" for name in REDUCERS.known for keep in (72, 36, 16)
    }


def test_the_study_of_the_teacher_uses_the_runs_of_the_study_of_fusions(monkeypatch):
    monkeypatch.chdir(ROOT)
    fusions, taught = (read_file(ROOT / "configs" / "ablations" / f"{name}.py") for name in ("fusions", "teacher"))
    without, same = (study.resolve_stages(study.get_variant("mbtf_stf"), 1) for study in (taught, fusions))
    assert without == same
    stages = taught.resolve_stages(taught.get_variant("mbtf_stf_taught"), 1)
    objective = "distill:teacher=runs/fusions/cells/mlp/seed_0/{},temperature=2,weight=0.5"
    assert [stage.objective for stage in stages] == [objective.format(stage.name) for stage in stages]


def test_main_accepts_a_cells_command(tmp_path):
    study = make_study.study()
    for cell in make_cells(study, tmp_path / "a folder"):
        if cell.source_run is None:
            assert cell.command[1:3] == ["-m", "stf_jax.main"]
            workdir, config = cli.parse(cell.command[3:], "")
            assert (
                pathlib.Path(workdir) == cell.folder == tmp_path / "a folder" / cell.variant.name / f"seed_{cell.seed}"
            )
            assert resolve(config) == study.resolve_stages(cell.variant, cell.seed)
            last = resolve(config)[-1]
            assert (last.seed, last.model.fusion.fusion, last.steps) == (cell.seed, cell.variant.name, 2)


def test_an_evaluated_cell_uses_the_source_runs_last_stage(tmp_path):
    common = ("eval.limit=7", "stages.finetune.eval.batch=5")
    cell = make_cells(make_study.study(common=common), tmp_path)[-1]
    assert cell.command[1:] == [
        "-m",
        "stf_jax.evaluate",
        f"--checkpoint={tmp_path}/mlp/seed_1/finetune",
        "--benchmark=scenes",
        "--limit=7",
        "--batch=5",
        f"--out={tmp_path}/fastv/seed_1",
        "--reduce=fastv",
    ]
    single_stage = make_cells(make_study.study(common=("run=('finetune',)",)), tmp_path)[-1]
    assert single_stage.checkpoint == tmp_path / "mlp" / "seed_1"


def test_a_repeated_variant_differs_only_in_its_seed(tmp_path):
    study = make_study.study(repeated=(("again", ("stf",)),))
    first, other = (study.resolve_stages(study.get_variant(name), 1)[-1] for name in ("stf", "again"))
    differing = {key for key, value in flatten(to_json(first)).items() if flatten(to_json(other))[key] != value}
    assert differing == {"seed"}
    assert other.seed == 1001
    repeated = [cell for cell in make_cells(study, tmp_path) if cell.variant.name == "again"]
    assert [cell.folder for cell in repeated] == [tmp_path / "again" / f"seed_{seed}" for seed in (0, 1)]
    assert all("--config.seed=100" in " ".join(cell.command) for cell in repeated)
    make_study.finish(repeated[0])
    assert repeated[0].done


def test_cells_are_ordered_seed_by_seed(tmp_path):
    cells = make_cells(make_study.study(), tmp_path)
    assert [cell.name for cell in cells] == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("mlp", "stf", "fastv")
    ]


def test_a_variant_may_be_the_unchanged_base():
    study = make_study.study(common=(), variants=(("mlp", ()),))
    assert study.resolve_stages(study.get_variant("mlp"), 0)[0].model.fusion.fusion == "mbtf_stf"


MLP = ("mlp", ("model.fusion.fusion=mlp",))
INVALID = {
    "unknown key": ({"seed": (0,)}, "Unknown study key 'seed': did you mean 'seeds'?"),
    "no title": ({"title": ""}, "title is ''"),
    "no seeds": ({"seeds": ()}, "seeds are ()"),
    "a repeated seed": ({"seeds": (0, 1, 0)}, "they must be distinct integers"),
    "seeds that are strings": ({"seeds": ("0",)}, "they must be distinct integers"),
    "a negative seed": ({"seeds": (0, -1)}, "Config key seed is -1"),
    "misspelled baseline": ({"baseline": "mpl"}, "baseline is 'mpl': did you mean 'mlp'?"),
    "no variants": ({"variants": (), "asked": ()}, "baseline is 'mlp': known: none."),
    "unknown config key": (
        {"variants": (MLP, ("odd", ("model.fusion.kernle=3",)))},
        "Variant 'odd': Unknown config key 'model.fusion.kernle': did you mean 'model.fusion.kernel'?",
    ),
    "an invalid value": ({"variants": (MLP, ("odd", ("model.fusion.init=odd",)))}, "Variant 'odd': Config key"),
    "an unknown data source": (
        {"variants": (MLP, ("odd", ("data.source=scene",)))},
        "Variant 'odd': Unknown data.source 'scene'; did you mean 'scenes'?",
    ),
    "overrides that are a string": ({"variants": (MLP, ("odd", "steps=3"))}, "variants must be pairs"),
    "overrides that are not strings": ({"variants": (MLP, ("odd", (3,)))}, "it must be a tuple of strings"),
    "common that is not strings": ({"common": (3,)}, "The study's common is (3,)"),
    "not a pair": ({"variants": (MLP, ("odd",))}, "variants must be pairs"),
    "two variants of one name": ({"variants": (MLP, MLP)}, "variant 'mlp' needs a unique name"),
    "an evaluated variant with a trained one's name": (
        {"asked": (("stf", ("mlp", "--reduce=fastv")),)},
        "variant 'stf' needs a unique name",
    ),
    "a path as name": ({"variants": (MLP, ("a/b", ("model.fusion.fusion=stf",)))}, "variant 'a/b' needs a unique name"),
    "the parent folder as name": (
        {"variants": (MLP, ("..", ("model.fusion.fusion=stf",)))},
        "variant '..' needs a unique name",
    ),
    "no name": ({"variants": (MLP, ("", ("model.fusion.fusion=stf",)))}, "variant '' needs a unique name"),
    "an unknown source": ({"asked": (("fastv", ("mpl", "--reduce=fastv")),)}, "runs of 'mpl': did you mean 'mlp'?"),
    "no source": ({"asked": (("fastv", ()),)}, "evaluates the runs of ''"),
    "a source that does not train": (
        {"asked": (("fastv", ("mlp", "--reduce=fastv")), ("again", ("fastv", "--reduce=fastv")))},
        "'again' evaluates the runs of 'fastv'",
    ),
    "an invalid evaluation option": (
        {"asked": (("fastv", ("mlp", "--reduce=fastvv")),)},
        "Variant 'fastv': Unknown model.reduce 'fastvv'; did you mean 'fastv'?",
    ),
    "an evaluation option that is not the model's": (
        {"asked": (("fastv", ("mlp", "--out=elsewhere")),)},
        "Variant 'fastv': Unrecognized",
    ),
    "tokens that the model chooses": (
        {"asked": (("auto", ("mlp", "--tokens=auto")),)},
        "Variant 'auto': a study cannot evaluate with --tokens=auto",
    ),
    "an unknown repeated variant": ({"repeated": (("again", ("mpl",)),)}, "repeats 'mpl': did you mean 'mlp'?"),
    "repeated as a string": ({"repeated": (("again", "mlp"),)}, "repeated must be pairs"),
    "no margin": ({"margin": 0}, "margin and kind_margin are (0.0, 5.0); they must be above 0 points"),
    "a seed override": ({"variants": (MLP, ("odd", ("seed=5",)))}, "Variant 'odd' sets its seed"),
    "not evaluated": ({"common": ("stages.finetune.eval.benchmarks=()",)}, "Variant 'mlp' is not evaluated"),
    "other questions": (
        {"variants": (MLP, ("odd", ("eval.limit=9",)))},
        "Variants 'mlp' and 'odd' are evaluated on different questions",
    ),
    "no base": ({"base": "configs/none.py"}, "Variant 'mlp': The config file cannot be loaded"),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_invalid_studies_are_refused(changes, message):
    config = make_study.config(**changes)
    with pytest.raises(UserError) as error:
        read_study(config)
    assert message in str(error.value)
    assert "?." not in str(error.value)


def test_a_config_with_missing_keys_is_refused():
    config = make_study.config()
    del config.seeds
    with pytest.raises(UserError, match="The study lacks seeds; get_config must start from default_study"):
        read_study(config)


def test_cells_are_done_if_their_results_exist(cells):
    assert all(cell.done for cell in cells)
    for cell in cells[:3]:
        (cell.folder / "results.json").unlink()
    assert [cell.done for cell in cells] == [False] * 3 + [True] * 3


def test_a_run_from_before_a_config_key_existed_is_done(cells):
    file = cells[0].folder / "pretrain" / "config.json"
    edit(file, lambda saved: saved["model"].pop("attention"))
    edit(file, lambda saved: saved.pop("wandb"))
    assert cells[0].done


def test_what_a_run_recomputes_is_its_own_choice(tmp_path):
    common = (*make_study.VALUES["common"], "model.remat=auto")
    cell, *_ = make_cells(make_study.study(common=common), tmp_path)
    file = make_study.finish(cell) / "pretrain" / "config.json"
    edit(file, lambda saved: saved["model"].update(remat="attention"))
    assert cell.done
    edit(file, lambda saved: saved["model"].update(scan_layers=True))
    with pytest.raises(UserError, match=r"in model\.scan_layers: choose"):
        cell.done  # noqa: B018


def test_the_second_stages_init_from_is_ignored_but_not_the_firsts(cells):
    second = cells[0].folder / "finetune" / "config.json"
    edit(second, lambda saved: saved.update(init_from=str(cells[0].folder / "pretrain")))
    assert cells[0].done
    edit(cells[0].folder / "pretrain" / "config.json", lambda saved: saved.update(init_from="others"))
    with pytest.raises(UserError, match="in init_from: choose"):
        cells[0].done  # noqa: B018


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("finetune", {"steps": 3, "seed": 9}, "in seed, steps: choose another --cells, or delete it"),
        ("pretrain", {"seed": 9}, "in seed: choose"),
        ("finetune", {"stepz": 3}, "stepz"),
    ],
)
def test_a_run_with_another_config_is_refused(cells, stage, change, message):
    edit(cells[1].folder / stage / "config.json", lambda saved: saved.update(change))
    with pytest.raises(UserError, match=message):
        cells[1].done  # noqa: B018


def test_a_run_without_a_config_is_refused(cells):
    (cells[1].folder / "pretrain" / "config.json").unlink()
    with pytest.raises(UserError, match=r"pretrain/config\.json cannot be read"):
        cells[1].done  # noqa: B018


def test_an_evaluation_with_other_options_is_refused(cells):
    fastv = cells[2]
    make_study.put(fastv.folder / "asked.json", ["--reduce=visionzip"])
    with pytest.raises(UserError, match=r"in asked\.json"):
        fastv.done  # noqa: B018


@pytest.mark.parametrize("key", ["weights", "questions"])
def test_an_evaluation_of_other_weights_or_questions_is_refused(cells, key):
    def change(results):
        (results["protocol"]["asking"] if key == "weights" else results["protocol"])[key] = "others"

    edit(cells[2].folder / "results.json", change)
    with pytest.raises(UserError, match="in weights or questions"):
        cells[2].done  # noqa: B018
    edit(cells[2].folder / "results.json", lambda results: results["protocol"]["asking"].update(precision="bfloat16"))
    if key == "weights":  # fingerprints of different precisions are not compared
        assert cells[2].done


def test_an_evaluation_without_its_source_run_is_refused(cells):
    (cells[0].folder / "results.json").unlink()
    with pytest.raises(UserError, match="in weights or questions"):
        cells[2].done  # noqa: B018


def test_studies_share_equal_cells(cells, tmp_path):
    other = make_study.study(
        title="Another",
        seeds=(1, 2),
        variants=(("stf", ("model.fusion.fusion=stf",)), ("avg_pool", ("model.fusion.fusion=avg_pool",))),
        asked=(),
        baseline="stf",
    )
    assert [(cell.name, cell.done) for cell in make_cells(other, tmp_path)] == [
        ("stf, seed 1", True),
        ("avg_pool, seed 1", False),
        ("stf, seed 2", False),
        ("avg_pool, seed 2", False),
    ]
