"""Objectives by name: those of the package, and one of tests/plugins."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from tiny import Setup, batches, random_params, tiny

from stf_jax.config import UserError
from stf_jax.planning.report import trace_cost
from stf_jax.training.flops import step_flops
from stf_jax.training.objectives.base import OBJECTIVES, find_objective

PLUGINS = pathlib.Path(__file__).parents[1] / "plugins"
Z_LOSS = "z_loss:Z_LOSS"


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)


def test_the_default_is_what_the_data_demand():
    model = tiny().model
    assert find_objective("", model) is OBJECTIVES.find("next_token")
    assert find_objective("", tiny(**{"model.cells": 2}).model) is OBJECTIVES.find("cells")


def test_one_of_your_own_is_minimized():
    """tests/test_plugins.py trains with it."""
    (batch,), setup = batches(tiny(), 1), Setup.of(**{"mesh.data": 1})
    params = jax.tree.map(jnp.asarray, random_params(setup.plan.shapes))

    def loss(name):
        model, objective = setup.plan.merge(params), find_objective(name, setup.config.model)
        arrays = jax.tree.map(jnp.asarray, batch)
        return float(objective.loss_sum(model, arrays, packed=False) / objective.count_terms(arrays))

    # log(512)² · 1e-4 = 0.004 for uniform logits
    assert 0.003 < loss(Z_LOSS) - loss("") < 0.02


def test_its_flops_are_counted():
    """It computes the same products, with the logits in memory."""
    config = tiny()
    counts = [step_flops(config.model, config.rules, 8, 192, 1, name) for name in ("", Z_LOSS)]
    assert counts[0] == counts[1]
    assert trace_cost(tiny(objective=Z_LOSS), "train", jax.devices()).flops_per_row > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("next_tokens", "Unknown objective 'next_tokens'; did you mean 'next_token'?"),
        ("z_loss:ZLoss", "objective=z_loss:ZLoss is not an object with the methods loss_sum and count_terms."),
        ("z_loss:jnp", "is not an object with the methods"),
    ],
)
def test_wrong_names_are_explained(name, reason):
    with pytest.raises(UserError) as error:
        find_objective(name, tiny().model)
    assert reason in str(error.value)
