"""A model of several budgets answers at each of them, in every command."""

import json
import pathlib

import pytest
from make_evals import make_model

import stf_jax
from stf_jax import chat, evaluate, main
from stf_jax.cli import run_command
from stf_jax.models.spec import resolve_model
from stf_jax.web.server import list_methods

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model whose fusion keeps all 16 tokens, and the same model with budgets."""
    root, mlp = tmp_path_factory.mktemp("budgets"), {"model.fusion.fusion": "mlp"}
    make_model(root / "plain", 1, **mlp)
    make_model(root / "budgets", 1, **mlp, **{"model.fusion.budgets": (16, 4, 1)})
    return root


def test_evaluate_asks_at_a_budget(folders, tmp_path):
    """Pools of the projected tokens are also what the reducer `pool` makes."""

    def ask(name, *options):
        out = tmp_path / f"{name}{''.join(options)}"
        argv = [f"--checkpoint={folders / name}", "--benchmark=scenes", "--limit=4", f"--out={out}"]
        assert run_command(evaluate.main, [*argv, "--precision=float32", *options]) == 0
        answers = [json.loads(line)["text"] for line in (out / "answers.jsonl").read_text().splitlines()]
        return answers, json.loads((out / "results.json").read_text())["protocol"]["asking"]

    pooled, _ = ask("plain", "--reduce=pool", "--keep=4")
    found, asking = ask("budgets", "--tokens=4")
    assert found == pooled
    assert (asking["tokens"], asking["image_tokens"]) == (4, 4)


def test_the_api_and_the_page_offer_budgets(folders):
    model = stf_jax.load(folders / "budgets", tokens=1)
    assert model.tokens_per_image == 1
    spec = resolve_model(model._generator.model)
    assert list_methods(spec)[""] == [16, 4, 1]
    assert spec.reduction.keep == 1  # what the page shows first
    assert model._generator.with_reduction("", 0, 4).slots == 4


def test_other_numbers_of_tokens_are_explained(folders, tmp_path, capsys):
    own = {evaluate.main: ["--benchmark=scenes", f"--out={tmp_path / 'out'}"], chat.main: ["--prompt=What is it?"]}
    for command, options in own.items():
        for name, made in (("budgets", "16, 4, 1"), ("plain", "16")):
            assert run_command(command, [f"--checkpoint={folders / name}", "--tokens=5", *options]) == 2
            sentence = f"error: tokens=5 is not a budget of the model: mlp makes {made} per image."
            assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["fusion.budgets=(16,9)"], "mlp cannot make 9 tokens of 4×4 patches; the nearest that it can are 16 and 4."),
        (["fusion.budgets=(4,16)"], "model.fusion.budgets=(4, 16) must be distinct numbers in descending order."),
        (["fusion.budgets=(16,4)", "tokens=4"], "model.tokens=4 is for inference only: train with"),
    ],
)
def test_training_explains_budgets_that_cannot_be(options, sentence, tmp_path, capsys):
    argv = [f"--config={ROOT}/tests/tiny.py:fusion=mlp", f"--workdir={tmp_path / 'run'}"]
    assert run_command(main.main, [*argv, *(f"--config.model.{option}" for option in options)]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()
