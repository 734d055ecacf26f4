"""One model at several budgets of image tokens: rows, the loss and its gradients, what it costs, resuming."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny import TOKENIZER, Setup, make_preprocessor, tiny

from stf_jax.config import UserError
from stf_jax.data.packing import to_batch, to_row
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.training.budgets import change_slots, count_tokens
from stf_jax.training.flops import prefill_flops, step_flops
from stf_jax.training.objectives.next_token import NextToken

M3 = {"model.fusion.fusion": "mlp", "model.fusion.budgets": (16, 1)}
PACKED = {"data.packing": True, "data.images_per_row": 3, "data.max_length": 288, "data.scenes.size": 64}


def _batches(**changes):
    config = tiny(**M3, **PACKED, **changes)
    return Batches(config, load_training_records(config), make_preprocessor(config), host=0, hosts=1)


@functools.cache
def _laid_out():
    """A batch, and its rows as the pipeline makes them with the slots and lengths of each budget."""
    stream = _batches()
    batch, records, model = next(stream), stream._records, resolve_model(tiny().model)
    rows, side = [], model.vision_shape.image_size
    for tokens, length in batch.budgets:
        preprocess = Preprocessor(tiny(**PACKED).data, TOKENIZER, model.vision_shape, tokens)
        made = [
            to_row([preprocess(records[i]) for i in stream.plan[row].members], length, 3, side, tokens)
            for row in stream.plan.batch_rows(0)
        ]
        rows.append(to_batch({key: np.stack([row[key] for row in made]) for key in made[0]}))
    return batch, rows


def test_rows_are_those_of_the_pipeline():
    batch, expected = _laid_out()
    assert [tuple(budget) for budget in batch.budgets] == [(16, 288), (1, 248)]
    for budget, rows in zip(batch.budgets, expected, strict=True):
        found, _ = jax.jit(change_slots, static_argnums=(1, 2, 3))(batch, 16, *budget)
        for field in dataclasses.fields(rows):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(rows, field.name), err_msg=field.name)
    assert count_tokens(batch, 16) == sum((rows.segment_ids > 0).sum() for rows in expected)


def test_the_loss_is_the_mean_of_models_of_one_budget():
    """A step on eight devices, with microbatches, against a model for each budget, on one."""
    batch, rows = _laid_out()
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "optimizer.accumulation_steps": 2}
    setup = Setup.of(**M3, **PACKED, **mesh)
    state, alone = setup.state(), [blueprint(tiny(**M3 | {"model.fusion.budgets": (n,)}).model) for n in (16, 1)]
    trainable, frozen = (jax.tree.map(np.asarray, tree) for tree in (state.trainable, state.frozen))

    @jax.jit
    @jax.value_and_grad
    def expected(trainable, frozen, rows):
        losses = [
            NextToken().loss_sum(plan.merge(trainable, frozen), each, packed=True) / each.loss_mask.sum()
            for plan, each in zip(alone, rows, strict=True)
        ]
        return sum(losses) / 2

    loss, gradients = expected(trainable, frozen, rows)
    state, metrics = setup.step()(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    first_moments = optax.tree_utils.tree_get(state.moments, "mu")
    for path, gradient in gradients.items():
        np.testing.assert_allclose(first_moments[path] / 0.1, gradient, atol=1e-6, err_msg=path)


def test_the_tower_and_the_projector_are_counted_once():
    config, budgets = tiny(**M3), _laid_out()[0].budgets
    together = step_flops(config.model, config.rules, 8, 288, 3, budgets=budgets)
    alone = [
        step_flops(tiny(**M3 | {"model.fusion.budgets": (tokens,)}).model, config.rules, 8, length, 3)
        for tokens, length in budgets
    ]
    products = 2 * 32 * 32 + 3 * 32 * 32  # of a patch: the input of the first layer needs no gradient
    shared = prefill_flops(config.model, 8, 288, 3)["vision"] + 8 * 3 * 16 * 2 * products
    assert together == sum(alone) - shared


def test_drawn_budgets_depend_on_the_seed_and_the_step():
    stream = _batches(budgets_per_step="one")
    drawn = [stream.plan.batch_budgets(step) for step in range(60)]
    assert {len(budgets) for budgets in drawn} == {1}
    counts = [sum(budgets[0].tokens == tokens for budgets in drawn) for tokens in (16, 1)]
    assert min(counts) > 15
    for _ in range(5):
        next(stream)
    resumed = _batches(budgets_per_step="one")
    resumed.set_state(stream.get_state())
    assert [next(resumed).budgets for _ in range(5)] == drawn[5:10]
    with pytest.raises(UserError, match="order"):
        resumed.set_state(_batches().get_state())
    other = _batches(budgets_per_step="one", seed=1).plan
    assert [other.batch_budgets(step) for step in range(60)] != drawn
