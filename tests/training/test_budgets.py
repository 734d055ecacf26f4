"""One model at several budgets of image tokens: rows, the loss, gradients, what it costs, resuming; the chooser."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
from etils import epath
from tiny import TOKENIZER, Setup, batches, large_params, make_preprocessor, tiny, train_and_save

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import CheckpointConfig, UserError
from stf_jax.data.packing import to_batch, to_row
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.training.budgets import change_slots, count_tokens
from stf_jax.training.flops import prefill_flops, step_flops
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.objectives.choose import FLOOR, QUANTILE, find_answers, image_divergences
from stf_jax.training.objectives.next_token import NextToken
from stf_jax.training.state import TrainState

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


# ---- The chooser -----------------------------------------------------------------------------------------------------

CHOOSE = M3 | PACKED | {"model.chooser": True, "model.fusion.budgets": (16, 4, 1), "data.max_length": 560}
ALONE = {"rules": (("chooser/.*", "train"), (".*", "freeze")), "optimizer.warmup_ratio": 0.0}


@functools.cache
def _compared():
    """A batch at three budgets, the model's weights, and what the objective computes of them."""
    (batch,) = batches(tiny(**CHOOSE), 1)
    setup = Setup.of(**CHOOSE, **ALONE)
    params = large_params(setup.plan.shapes, 2)

    @jax.jit
    def compute(params, batch):
        model = setup.plan.merge(params)
        answers, states = find_answers(batch), model.tower_states(batch.images, model.taps)
        return image_divergences(model, batch, answers, True, states), states

    return batch, params, *map(jax.device_get, compute(params, batch))


def _by_definition(batch, params):
    """KL(16 ‖ budget) of each image [B, M, 2], from logits of separate passes; nan where nothing is answered."""
    answers, logs = [], []
    for tokens, length in batch.budgets:
        plan = blueprint(tiny(**M3 | {"model.fusion.budgets": (tokens,)}).model)
        rows, _ = change_slots(batch, 16, tokens, length)
        arguments = rows.tokens, rows.positions, rows.segment_ids, rows.image_slots, rows.images
        own = {path: x for path, x in params.items() if not path.startswith("chooser/")}
        logits = np.float64(jax.jit(lambda own, *rows, plan=plan: plan.merge(own)(*rows))(own, *arguments))
        logs.append(logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)))
        logs[-1] -= logits.max(-1, keepdims=True)
        answers.append(rows)
    result = np.full((*batch.images.shape[:2], 2), np.nan)
    for row in range(len(batch.tokens)):
        numbers = [np.asarray(rows.segment_ids[row]) for rows in answers]
        slots = np.asarray(answers[0].image_slots[row])
        for image in range(batch.images.shape[1]):
            if not (slots == 16 * image).any():
                continue
            segment = numbers[0][slots == 16 * image][0]
            # The answers of a conversation are in the same order at all budgets.
            chosen = [
                log[row, (number == segment) & np.asarray(rows.loss_mask[row])]
                for log, number, rows in zip(logs, numbers, answers, strict=True)
            ]
            full = chosen[0]
            assert {len(each) for each in chosen} == {len(full)}
            if len(full):
                result[row, image] = [(np.exp(full) * (full - other)).sum(-1).mean() for other in chosen[1:]]
    return result


def test_targets_are_divergences_of_separate_passes():
    batch, params, found, _ = _compared()
    expected = _by_definition(batch, params)
    has_answers = ~np.isnan(expected[..., 0])
    assert has_answers.sum() > 12  # images of several conversations per row
    assert (~has_answers).any()
    np.testing.assert_array_equal(find_answers(batch).any(-1), has_answers)
    np.testing.assert_allclose(found[has_answers], expected[has_answers], rtol=1e-4, atol=1e-6)
    assert np.quantile(expected[has_answers], 0.1) > 10 * FLOOR


def _expect(params, states):
    """The chooser's predictions by numpy, in float64."""
    own = {path.removeprefix("chooser/"): np.float64(x) for path, x in params.items() if path.startswith("chooser/")}
    pooled = np.stack([pool for x in np.float64(list(states.values())) for pool in (x.mean(1), x.max(1))], 1)
    centered = pooled - pooled.mean(-1, keepdims=True)
    normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * own["norm/scale"] + own["norm/bias"]
    hidden = normal.reshape(len(normal), -1) @ own["hidden/kernel"] + own["hidden/bias"]
    hidden *= (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
    return hidden @ own["out/kernel"] + own["out/bias"]


def test_the_chooser_learns_alone_a_quantile_of_divergences():
    batch, params, found, states = _compared()
    setup = Setup.of(**CHOOSE, rules=((".*", "train"),))
    objective = find_objective("", setup.config.model)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        return objective.loss_sum(setup.plan.merge(params), batch, packed=True)

    value, gradients = loss(params, batch)
    has_answers, expected = find_answers(batch).any(-1), _expect(params, states).reshape(found.shape)
    excess = np.log(np.maximum(np.float64(found), FLOOR)) - expected
    each = np.where(excess > 0, QUANTILE * excess, (QUANTILE - 1) * excess).mean(-1)
    np.testing.assert_allclose(value, each[has_answers].sum(), rtol=1e-5)
    assert objective.count_terms(batch) == has_answers.sum()
    learned = {path.split("/")[0] for path, gradient in gradients.items() if np.any(gradient)}
    assert learned == {"chooser"}


def test_choosing_resumes_exactly_and_is_the_same_on_a_mesh(tmp_path):
    workdir, setup, data = epath.Path(tmp_path), Setup.of(**CHOOSE, **ALONE), batches(tiny(**CHOOSE), 3)
    step, expected, losses = train_and_save(workdir, setup, setup.state(), data)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        arrays, _, _ = checkpoints.restore(2, setup.layout, None)
    state = TrainState(step=jax.device_put(np.int32(2), setup.layout.step.sharding), **arrays)
    state, metrics = step(state, data[2])
    assert float(metrics["loss"]) == losses[2]
    assert jax.tree.map(lambda x: np.array(x).tobytes(), state) == jax.tree.map(lambda x: x.tobytes(), expected)
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "optimizer.accumulation_steps": 2}
    other = Setup.of(**CHOOSE, **ALONE, **mesh)
    _, metrics = other.step()(other.state(), data[0])
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=1e-5)


def test_choosing_counts_one_tower_and_a_pass_for_each_budget():
    config, budgets = tiny(**CHOOSE, **ALONE), _compared()[0].budgets
    found = step_flops(config.model, config.rules, 8, 560, 3, budgets=budgets)
    alone = [tiny(**M3 | {"model.fusion.budgets": (tokens,)}).model for tokens, _ in budgets]
    parts = [prefill_flops(model, 8, length, 3) for model, (_, length) in zip(alone, budgets, strict=True)]
    head = 8 * 560 * 2 * 32 * 512
    chooser = 3 * 8 * 3 * 2 * (2 * 32 * 256 + 256 * 2)  # forward, and both gradients
    passes = sum(part["llm"] for part in parts)
    assert found == parts[0]["vision"] + parts[0]["fusion"] + passes + 2 * 2 * head + chooser


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.chooser": False, "objective": "choose"}, "objective=choose trains the head that model.chooser=True"),
        ({"budgets_per_step": "one"}, "objective=choose compares all budgets in each step: set budgets_per_step=all."),
        ({"model.fusion.budgets": (16,)}, r"model.chooser chooses among model.fusion.budgets, but they are \(16,\)."),
    ],
)
def test_what_cannot_choose_is_explained(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Setup.of(**CHOOSE | changes)
