"""The train step: loss and gradients against independent computations, on every mesh, accumulated and packed."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from tiny import Setup, batches, load_recipe, make_preprocessor, random_params

from stf_jax.config import OptimizerConfig, UserError
from stf_jax.data.packing import Batch, to_batch, to_row
from stf_jax.data.pipeline import load_training_records
from stf_jax.training.objectives.next_token import NextToken
from stf_jax.training.optimizer import check_steps, has_weight_decay, learning_rate, make_optimizer

# No warm-up, and an eps at which nearly zero gradients do not become steps of ± the learning rate.
CHANGES = {"optimizer.warmup_ratio": 0.0, "optimizer.weight_decay": 0.1, "optimizer.eps": 1e-4}


def _setup(data=1, fsdp=1, tensor=1, **changes):
    return Setup.of(**CHANGES, **{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}, **changes)


@functools.cache
def _one_device():
    return _setup()


@functools.cache
def _data():
    """Three batches of the tiny config."""
    return batches(_one_device().config, 3)


@functools.cache
def _uneven_batch():
    """A batch whose rows differ in target tokens: rows 3 and 7 have none, the others a few or all."""
    batch = _data()[0]
    mask = batch.loss_mask.copy()
    for row, keep in enumerate((99, 2, 5, 0, 99, 3, 9, 0)):
        mask[row] &= np.cumsum(mask[row]) <= keep
    return dataclasses.replace(batch, loss_mask=mask)


@functools.cache
def _forward():
    """Logits of numpy parameters, for batches of eight rows."""
    plan = _one_device().plan
    run = jax.jit(lambda params, b: plan.merge(params)(b.tokens, b.positions, b.segment_ids, b.image_slots, b.images))
    return lambda params, batch: np.asarray(run(params, batch), np.float64)


def _row_sums(logits, batch):
    """Cross-entropy in nats of each row's target tokens, summed, in float64."""
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    losses = log_sum - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return np.where(batch.loss_mask, losses, 0).sum(1)


@functools.cache
def _three_steps():
    """The state before three steps on one device, their metrics, the state after them, and the step."""
    setup = _one_device()
    state, step = setup.state(), setup.step()
    before, losses = jax.tree.map(np.array, state), []
    for batch in _data():
        state, metrics = step(state, batch)
        losses.append(jax.tree.map(np.asarray, metrics))
    return before, losses, jax.tree.map(np.array, state), step


# ---- Loss and gradients ----------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_target_tokens_of_the_batch():
    before, metrics, _, _ = _three_steps()
    batch = _data()[0]
    counts = batch.loss_mask.sum(1)
    sums = _row_sums(_forward()(before.params, batch), batch)
    assert metrics[0]["learned_tokens"] == counts.sum()
    np.testing.assert_allclose(metrics[0]["loss"], sums.sum() / counts.sum(), rtol=1e-6)
    # The loss is neither the mean of the rows' means nor the mean over all positions.
    assert abs((sums / counts).mean() - metrics[0]["loss"]) > 1e-3
    assert batch.loss_mask.mean() < 0.5


def test_gradients_equal_finite_differences():
    """Central differences in float64 of float32 logits, against Adam's first moment after a step."""
    setup, batch, step = _one_device(), _uneven_batch(), _three_steps()[3]
    state, metrics = step(setup.state(), batch)
    gradients = {path: np.asarray(m) / 0.1 for path, m in optax.tree_utils.tree_get(state.moments, "mu").items()}
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    params = random_params(setup.plan.shapes)
    target_count = batch.loss_mask.sum()

    def loss(direction, distance):
        moved = {path: np.float32(params[path] + distance * d) for path, d in direction.items()}
        return _row_sums(_forward()(params | moved, batch), batch).sum() / target_count

    def finite_difference(direction, h):
        # Richardson extrapolation cancels the error of order h².
        coarse, fine = ((loss(direction, d) - loss(direction, -d)) / (2 * d) for d in (h, h / 2))
        return (4 * fine - coarse) / 3

    for path in (
        "fusion/connector/mbtf/first/kernel",
        "fusion/connector/stf/conv/kernel",
        "fusion/connector/stf/out/bias",
        "llm/embedding",
        "llm/blocks/attention/query/kernel",
        "llm/blocks/mlp/down/kernel",
        "llm/norm/scale",
    ):
        # The element with the largest gradient, and a direction that is half random, half the gradient.
        gradient = np.float64(gradients[path])
        element = np.zeros(gradient.shape)
        element[np.unravel_index(np.abs(gradient).argmax(), gradient.shape)] = 1
        noise = np.random.default_rng(len(path)).standard_normal(gradient.shape)
        mixed = gradient / np.linalg.norm(gradient) + noise / np.linalg.norm(noise)
        for direction, h in ((element, 2e-2), (mixed, 2e-2)):
            expected = np.sum(gradient * direction)
            np.testing.assert_allclose(finite_difference({path: direction}, h), expected, rtol=2e-3, err_msg=path)


def test_batch_without_target_tokens_changes_nothing():
    """Weight decay is not applied either."""
    batch = dataclasses.replace(_data()[0], loss_mask=np.zeros_like(_data()[0].loss_mask))
    before = _one_device().state()
    kept = jax.tree.map(np.array, before)
    state, metrics = _three_steps()[3](before, batch)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 0.0,
        "gradient_norm": 0.0,
        "learned_tokens": 0.0,
        "skipped": 1.0,
    }
    for name in ("trainable", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(kept, name))


# ---- Meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_losses_are_the_same_on_every_mesh(mesh):
    before, expected, after, _ = _three_steps()
    setup = _setup(*mesh)
    state, step = setup.state(), setup.step()
    losses = []
    for batch in _data():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(state.trainable["llm/embedding"].sharding.device_set) == 8
    np.testing.assert_allclose(losses, [float(m["loss"]) for m in expected], rtol=0, atol=1e-5)
    for path, value in state.trainable.items():
        np.testing.assert_allclose(np.asarray(value), after.trainable[path], rtol=0, atol=1e-5, err_msg=path)
        assert not np.array_equal(after.trainable[path], before.trainable[path])
    for path, value in state.frozen.items():
        np.testing.assert_array_equal(np.asarray(value), before.frozen[path], err_msg=path)


# ---- Accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_four_microbatches_equal_one_batch(mesh):
    """The microbatches have unequal numbers of target tokens, one of them none."""
    batch = _uneven_batch()
    full, expected = _three_steps()[3](_one_device().state(), batch)
    setup = _setup(*mesh, **{"optimizer.accumulation_steps": 4})
    state, metrics = setup.step()(setup.state(), batch)
    counts, sums = batch.loss_mask.sum(1), _row_sums(_forward()(random_params(setup.plan.shapes), batch), batch)
    # Rows are assigned round-robin: row 0 with row 4, and so on.
    parts = [(sums[i::4].sum(), counts[i::4].sum()) for i in range(4)]
    assert len({count for _, count in parts}) == 4
    assert parts[3][1] == 0
    mean_of_means = np.mean([total / count for total, count in parts[:3]])
    assert abs(mean_of_means - expected["loss"]) > 1e-2
    assert metrics["learned_tokens"] == counts.sum()
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=1e-5)
    for path, value in full.trainable.items():
        np.testing.assert_allclose(state.trainable[path], value, rtol=0, atol=1e-6, err_msg=path)
    for name in ("mu", "nu"):
        one, four = (optax.tree_utils.tree_get(s.moments, name) for s in (full, state))
        for path, value in one.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(four[path], value, rtol=0, atol=1e-5 * scale, err_msg=path)


# ---- Packing ---------------------------------------------------------------------------------------------------------


@functools.cache
def _packed_and_not():
    """A packed batch from the pipeline, and a batch of its conversations, one per row."""
    config = _setup(
        **{
            "data.packing": True,
            "data.images_per_row": 3,
            "data.max_length": 512,
            "data.scenes.size": 40,
            "global_batch_size": 2,
        }
    ).config
    packed = batches(config, 1)[0]
    records, prepare = load_training_records(config), make_preprocessor(config)
    examples = {bytes(e.tokens): e for e in (prepare(records[i]) for i in range(len(records)))}
    side, slots = prepare.layout.vision.image_size, prepare.layout.tokens
    rows = [
        to_row([examples[bytes(tokens[segments == segment])]], 256, 1, side, slots)
        for tokens, segments in zip(packed.tokens, packed.segment_ids, strict=True)
        for segment in range(1, segments.max() + 1)
    ]
    return packed, to_batch({key: np.stack([row[key] for row in rows]) for key in rows[0]})


@functools.cache
def _gradients_of(which) -> tuple[float, dict[str, np.ndarray]]:
    setup, batch = _one_device(), _packed_and_not()[which]
    values = random_params(setup.plan.shapes)
    trainable, frozen = (
        {path: values[path] for path in tree} for tree in (setup.layout.trainable, setup.layout.frozen)
    )

    @jax.jit
    def run(trainable, frozen, batch: Batch):
        def loss(trainable):
            return (
                NextToken().loss_sum(setup.plan.merge(trainable, frozen), batch, packed=which == 0)
                / batch.loss_mask.sum()
            )

        return jax.value_and_grad(loss)(trainable)

    loss, gradients = run(trainable, frozen, batch)
    return float(loss), jax.tree.map(np.asarray, gradients)


def test_packed_rows_have_the_gradients_of_their_conversations():
    packed, unpacked = _packed_and_not()
    # Rows have several conversations, each with its own image.
    assert packed.segment_ids.max(1).min() >= 2
    assert packed.loss_mask.sum() == unpacked.loss_mask.sum()
    assert (packed.image_slots >= 0).sum() == (unpacked.image_slots >= 0).sum() == 4 * len(unpacked.tokens)
    (loss, gradients), (expected, expected_gradients) = _gradients_of(0), _gradients_of(1)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-5)
    for path, value in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=path)


# ---- Optimizer -------------------------------------------------------------------------------------------------------

SHAPES = {
    "llm/embedding": (6, 4),
    "llm/blocks/mlp/up/kernel": (2, 4, 8),
    "llm/blocks/mlp_norm/scale": (2, 4),
    "fusion/connector/mbtf/first/kernel": (8, 4),
    "fusion/connector/mbtf/first/bias": (4,),
}
NO_DECAY = {"llm/blocks/mlp_norm/scale", "fusion/connector/mbtf/first/bias"}


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_optimizer_equals_torch_adamw_with_hugging_face_schedule(clip_norm):
    steps, warmup = 12, 3
    config = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.25, weight_decay=0.1, b2=0.95, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
    torch_params = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in params.items()}
    groups = [
        {"params": [torch_params[path] for path in SHAPES if path not in NO_DECAY], "weight_decay": 0.1},
        {"params": [torch_params[path] for path in SHAPES if path in NO_DECAY], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, warmup, steps)
    tx = make_optimizer(config, steps)
    ours = jax.tree.map(jnp.asarray, params)
    moments, update = tx.init(ours), jax.jit(tx.update)
    clipped = 0
    for step in range(steps):
        # Norms both below and above the limit.
        size = 0.02 + 0.4 * (step % 3)
        gradients = {path: size * rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
        for path, parameter in torch_params.items():
            parameter.grad = torch.tensor(gradients[path])
        if clip_norm:
            clipped += float(torch.nn.utils.clip_grad_norm_(torch_params.values(), clip_norm)) > clip_norm
        adamw.step()
        schedule.step()
        updates, moments = update(gradients, moments, ours)
        ours = optax.apply_updates(ours, updates)
        for path, parameter in torch_params.items():
            np.testing.assert_allclose(ours[path], parameter.detach().numpy(), rtol=1e-5, atol=2e-6, err_msg=path)
    assert clipped == (8 if clip_norm else 0)
    moved = np.abs(ours["llm/embedding"] - params["llm/embedding"])
    assert moved.max() > 1e-2


def test_weight_decay_excludes_biases_and_norms():
    paths = _one_device().plan.shapes
    excluded = {path for path in paths if not has_weight_decay(path)}
    assert excluded == {path for path in paths if path.endswith("/bias") or "norm/" in path}
    assert {
        "llm/embedding",
        "vision/class_token",
        "vision/position_embed",
        "fusion/connector/stf/out/kernel",
    }.isdisjoint(excluded)
    # Without a gradient, decay is all that moves a parameter.
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_ratio=0), 10)
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, value in updates.items():
        np.testing.assert_allclose(value, 0 if path in NO_DECAY else -0.05, rtol=1e-6)


@pytest.mark.parametrize(("steps", "ratio"), [(2181, 0.03), (100, 0.03), (40, 0.1), (10, 0.0), (6, 0.03)])
def test_learning_rate_equals_hugging_face(steps, ratio):
    """The number of warm-up steps is also rounded up as there."""
    # A complete TrainingArguments needs accelerate; the method reads only one attribute.
    arguments = types.SimpleNamespace(warmup_steps=ratio)
    warmup = transformers.TrainingArguments.get_warmup_steps(arguments, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    expected_rate = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps).lr_lambdas[0]
    ours = learning_rate(OptimizerConfig(learning_rate=2e-5, warmup_ratio=ratio), steps)
    counts = np.arange(steps + 1)
    rates = np.asarray(jax.vmap(ours)(counts))
    np.testing.assert_allclose(rates, [2e-5 * expected_rate(int(c)) for c in counts], rtol=1e-4, atol=2e-5 * 1e-6)
    assert rates[warmup] == np.float32(2e-5)
    assert rates[steps] < 2e-5 * 1e-6


@pytest.mark.parametrize("steps", [0, 1])
def test_single_update_with_learning_rate_0_is_rejected(steps):
    config = load_recipe("finetune.py", f"--config.steps={steps}")
    with pytest.raises(
        UserError, match=r"learn nothing: it has 1 update of global_batch_size=128 \(.*learning rate 0"
    ) as error:
        check_steps(config, 1, rows=30)
    for key in ("global_batch_size", "epochs", "steps", "optimizer.warmup_ratio=0", "configs/small.py"):
        assert key in str(error.value)


def test_few_updates_give_a_warning():
    config = load_recipe("finetune.py")
    warnings = [check_steps(config, steps, rows=30) for steps in (2, 9, 10)]
    warnings.append(check_steps(load_recipe("finetune.py", "--config.optimizer.warmup_ratio=0"), 1, rows=30))
    assert [line.split(",")[0] for line in warnings] == [
        "The run has only 2 updates of global_batch_size=128 (30 rows",
        "The run has only 9 updates of global_batch_size=128 (30 rows",
        "",
        "The run has only 1 update of global_batch_size=128 (30 rows",
    ]


def test_constant_schedule_stays_at_its_peak():
    rate = learning_rate(OptimizerConfig(learning_rate=3e-4, warmup_ratio=0.1, schedule="constant"), 50)
    np.testing.assert_allclose(
        [rate(i) for i in (0, 1, 4, 5, 30, 49)], np.array([0, 0.6, 2.4, 3, 3, 3]) * 1e-4, rtol=1e-6
    )
