"""What a study asks for, what it is refused for, and which runs it takes for done."""

import json
import pathlib

import make_study
import pytest

from stf_jax.config import UserError, flatten, resolve, to_json
from stf_jax.runtime import cli
from stf_jax.studies.study import cells, read_study

ROOT = pathlib.Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.py"))


@pytest.fixture
def made(tmp_path):
    """Cells of a study that is done."""
    made = cells(make_study.study(), tmp_path)
    for cell in made:
        make_study.finish(cell)
    return made


def edit(file, change):
    """A JSON file, changed."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_our_own_studies_are_ones(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(cli.parse([f"--config={file}:seeds=2"], "", workdir=False)[1])
    assert study.seeds == (0, 1)
    assert study.question
    trained = [variant for variant in study.variants if not variant.of and not variant.repeats]
    resolved = [tuple(json.dumps(to_json(stage)) for stage in study.stages(variant, 0)) for variant in trained]
    assert len(set(resolved)) == len(trained)  # none by another's name
    for variant in study.variants:  # seeds differ in nothing else
        first, second = (flatten(to_json(study.stages(variant, seed)[-1])) for seed in study.seeds)
        assert {key for key in first if first[key] != second[key]} == {"seed"}


def test_a_cells_command_is_what_main_takes(tmp_path):
    study = make_study.study()
    for cell in cells(study, tmp_path / "a folder"):
        if cell.needs is None:
            assert cell.command[1:3] == ["-m", "stf_jax.main"]
            workdir, config = cli.parse(cell.command[3:], "")
            assert (
                pathlib.Path(workdir) == cell.folder == tmp_path / "a folder" / cell.variant.name / f"seed_{cell.seed}"
            )
            assert resolve(config) == study.stages(cell.variant, cell.seed)
            last = resolve(config)[-1]
            assert (last.seed, last.model.fusion.fusion, last.steps) == (cell.seed, cell.variant.name, 2)


def test_a_cell_that_asks_names_the_runs_last_stage(tmp_path):
    common = ("eval.limit=7", "stages.finetune.eval.batch=5")
    cell = cells(make_study.study(common=common), tmp_path)[-1]
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
    alone = cells(make_study.study(common=("run=('finetune',)",)), tmp_path)[-1]
    assert alone.checkpoint == tmp_path / "mlp" / "seed_1"


def test_a_repeated_variant_differs_in_its_seed_alone(tmp_path):
    study = make_study.study(repeated=(("again", ("stf",)),))
    first, other = (study.stages(study.variant(name), 1)[-1] for name in ("stf", "again"))
    differing = {key for key, value in flatten(to_json(first)).items() if flatten(to_json(other))[key] != value}
    assert differing == {"seed"}
    assert other.seed == 1001
    every = [cell for cell in cells(study, tmp_path) if cell.variant.name == "again"]
    assert [cell.folder for cell in every] == [tmp_path / "again" / f"seed_{seed}" for seed in (0, 1)]
    assert all("--config.seed=100" in " ".join(cell.command) for cell in every)
    make_study.finish(every[0])
    assert every[0].done


def test_cells_come_seed_by_seed(tmp_path):
    every = cells(make_study.study(), tmp_path)
    assert [cell.name for cell in every] == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("mlp", "stf", "fastv")
    ]


def test_a_variant_may_be_the_base_as_it_is():
    study = make_study.study(common=(), variants=(("mlp", ()),))
    assert study.stages(study.variant("mlp"), 0)[0].model.fusion.fusion == "mbtf_stf"


MLP = ("mlp", ("model.fusion.fusion=mlp",))
REFUSED = {
    "unknown key": ({"seed": (0,)}, "Unknown key 'seed' of a study: did you mean 'seeds'?"),
    "no title": ({"title": ""}, "title is ''"),
    "no seeds": ({"seeds": ()}, "seeds are ()"),
    "a seed twice": ({"seeds": (0, 1, 0)}, "each once"),
    "seeds that are none": ({"seeds": ("0",)}, "they should be numbers"),
    "a seed below nought": ({"seeds": (0, -1)}, "Config key seed is -1"),
    "baseline misspelt": ({"baseline": "mpl"}, "baseline is 'mpl': did you mean 'mlp'?"),
    "no variants": ({"variants": (), "asked": ()}, "baseline is 'mlp': known: none."),
    "unknown config key": (
        {"variants": (MLP, ("odd", ("model.fusion.kernle=3",)))},
        "Variant 'odd': Unknown config key 'model.fusion.kernle': did you mean 'model.fusion.kernel'?",
    ),
    "a value that is refused": ({"variants": (MLP, ("odd", ("model.fusion.init=odd",)))}, "Variant 'odd': Config key"),
    "overrides that are a text": ({"variants": (MLP, ("odd", "steps=3"))}, "variants should be pairs"),
    "overrides that are none": ({"variants": (MLP, ("odd", (3,)))}, "it should be a tuple of texts"),
    "common that is none": ({"common": (3,)}, "The study's common is (3,)"),
    "no pair": ({"variants": (MLP, ("odd",))}, "variants should be pairs"),
    "two of one name": ({"variants": (MLP, MLP)}, "variant 'mlp' should have a name of its own"),
    "asked by a trained one's name": ({"asked": (("stf", ("mlp", "--reduce=fastv")),)}, "variant 'stf' should have"),
    "a path for a name": ({"variants": (MLP, ("a/b", ("model.fusion.fusion=stf",)))}, "variant 'a/b' should have"),
    "the folder above": ({"variants": (MLP, ("..", ("model.fusion.fusion=stf",)))}, "variant '..' should have"),
    "no name": ({"variants": (MLP, ("", ("model.fusion.fusion=stf",)))}, "variant '' should have"),
    "asked of nobody": ({"asked": (("fastv", ("mpl", "--reduce=fastv")),)}, "runs of 'mpl': did you mean 'mlp'?"),
    "asked of none": ({"asked": (("fastv", ()),)}, "asks the runs of ''"),
    "asked of one that asks": (
        {"asked": (("fastv", ("mlp", "--reduce=fastv")), ("again", ("fastv", "--reduce=fastv")))},
        "'again' asks the runs of 'fastv'",
    ),
    "asked in no way": ({"asked": (("fastv", ("mlp", "--reduce=fastvv")),)}, "Variant 'fastv': Argument --reduce"),
    "asked elsewhere": ({"asked": (("fastv", ("mlp", "--out=elsewhere")),)}, "Variant 'fastv': Unrecognized"),
    "repeating nobody": ({"repeated": (("again", ("mpl",)),)}, "repeats 'mpl': did you mean 'mlp'?"),
    "repeated as a text": ({"repeated": (("again", "mlp"),)}, "repeated should be pairs"),
    "no margin": ({"margin": 0}, "margin and kind_margin are (0.0, 5.0); they should be points above 0"),
    "its own seed": ({"variants": (MLP, ("odd", ("seed=5",)))}, "Variant 'odd' sets its seed"),
    "not measured": ({"common": ("stages.finetune.eval.benchmarks=()",)}, "Variant 'mlp' is not measured"),
    "other questions": (
        {"variants": (MLP, ("odd", ("eval.limit=9",)))},
        "Variants 'mlp' and 'odd' are asked other questions",
    ),
    "no base": ({"base": "configs/none.py"}, "Variant 'mlp': The config file cannot be loaded"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_study_is_refused(changes, says):
    config = make_study.config(**changes)
    with pytest.raises(UserError) as refused:
        read_study(config)
    assert says in str(refused.value)
    assert "?." not in str(refused.value)


def test_a_config_that_lacks_keys_is_refused():
    config = make_study.config()
    del config.seeds
    with pytest.raises(UserError, match="The study lacks seeds; let get_config begin with default_study"):
        read_study(config)


def test_cells_are_done_when_their_results_are_there(made):
    assert all(cell.done for cell in made)
    for cell in made[:3]:
        (cell.folder / "results.json").unlink()
    assert [cell.done for cell in made] == [False] * 3 + [True] * 3


def test_a_run_from_before_a_key_was_there_is_still_done(made):
    file = made[0].folder / "pretrain" / "config.json"
    edit(file, lambda saved: saved["model"].pop("attention"))
    edit(file, lambda saved: saved.pop("wandb"))
    assert made[0].done


def test_the_first_stage_decides_what_the_second_starts_from(made):
    second = made[0].folder / "finetune" / "config.json"
    edit(second, lambda saved: saved.update(init_from=str(made[0].folder / "pretrain")))
    assert made[0].done
    edit(made[0].folder / "pretrain" / "config.json", lambda saved: saved.update(init_from="others"))
    with pytest.raises(UserError, match="in init_from: choose"):
        made[0].done  # noqa: B018


@pytest.mark.parametrize(
    ("stage", "change", "says"),
    [
        ("finetune", {"steps": 3, "seed": 9}, "in seed, steps: choose another --cells, or remove it"),
        ("pretrain", {"seed": 9}, "in seed: choose"),
        ("finetune", {"stepz": 3}, "stepz"),
    ],
)
def test_a_run_of_another_config_is_not_taken(made, stage, change, says):
    edit(made[1].folder / stage / "config.json", lambda saved: saved.update(change))
    with pytest.raises(UserError, match=says):
        made[1].done  # noqa: B018


def test_a_run_whose_config_is_not_there_is_not_taken(made):
    (made[1].folder / "pretrain" / "config.json").unlink()
    with pytest.raises(UserError, match=r"pretrain/config\.json cannot be read"):
        made[1].done  # noqa: B018


def test_answers_of_another_asking_are_not_taken(made):
    fastv = made[2]
    make_study.put(fastv.folder / "asked.json", ["--reduce=visionzip"])
    with pytest.raises(UserError, match=r"in asked\.json"):
        fastv.done  # noqa: B018


@pytest.mark.parametrize("key", ["weights", "questions"])
def test_answers_of_other_weights_or_to_other_questions_are_not_taken(made, key):
    def change(results):
        (results["protocol"]["asking"] if key == "weights" else results["protocol"])[key] = "others"

    edit(made[2].folder / "results.json", change)
    with pytest.raises(UserError, match="in weights or questions"):
        made[2].done  # noqa: B018
    edit(made[2].folder / "results.json", lambda results: results["protocol"]["asking"].update(precision="bfloat16"))
    if key == "weights":  # which are not comparable then
        assert made[2].done


def test_answers_of_a_run_that_is_not_there_are_not_taken(made):
    (made[0].folder / "results.json").unlink()
    with pytest.raises(UserError, match="in weights or questions"):
        made[2].done  # noqa: B018


def test_studies_share_cells_that_are_equal(made, tmp_path):
    other = make_study.study(
        title="Another",
        seeds=(1, 2),
        variants=(("stf", ("model.fusion.fusion=stf",)), ("avg_pool", ("model.fusion.fusion=avg_pool",))),
        asked=(),
        baseline="stf",
    )
    assert [(cell.name, cell.done) for cell in cells(other, tmp_path)] == [
        ("stf, seed 1", True),
        ("avg_pool, seed 1", False),
        ("stf, seed 2", False),
        ("avg_pool, seed 2", False),
    ]
