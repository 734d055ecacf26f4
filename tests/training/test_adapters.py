"""LoRA and rates per group: the forward pass, gradients, what trains, resuming, meshes and merging."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from etils import epath
from tiny import Setup, batches, random_params, tiny, train_and_save

from stf_jax.checkpointing.adapted import merge_params
from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import SavedParams
from stf_jax.checkpointing.rules import decide
from stf_jax.config import CheckpointConfig, OptimizerConfig, UserError, to_json
from stf_jax.models.adapters.base import find_adapter
from stf_jax.models.blueprint import blueprint
from stf_jax.parallel.mesh import compute_context
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import training_blueprint
from stf_jax.training.step import make_train_step
from stf_jax.weights.folder import load_params, open_params

LORA = (
    ("llm/.*", "lora:rank=4,alpha=6.5"),
    ("vision/blocks/(attention|mlp/up)/.*", "lora:rank=3,alpha=2,scaling=rslora*0.5"),
    ("vision/.*", "freeze"),
    ("fusion/.*", "train"),
)
KERNELS = {f"llm/blocks/{layer}" for layer in ("attention/query", "attention/key", "attention/value", "attention/out")}
KERNELS |= {f"llm/blocks/mlp/{layer}" for layer in ("gate", "up", "down")}
VISION = {f"vision/blocks/{layer}" for layer in ("attention/query", "attention/key", "attention/value")}
VISION |= {"vision/blocks/attention/out", "vision/blocks/mlp/up"}
SCALES = {"llm": 6.5 / 4, "vision": 2 / 3**0.5}


def _setup(rules=LORA, mesh=(1, 1, 1), **changes):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    return Setup.of(**{"rules": rules, "optimizer.warmup_ratio": 0.0, "optimizer.eps": 1e-4}, **axes, **changes)


@functools.cache
def _data():
    return batches(_setup().config, 4)


def _copy(tree):
    return jax.tree.map(np.array, tree)


# ---- What LoRA computes ----------------------------------------------------------------------------------------------


def _value_and_grad(plan):
    """Loss, logits and gradients of all parameters."""

    def loss(params, batch):
        logits = plan.merge(params)(batch.tokens, batch.positions, None, batch.image_slots, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.where(batch.loss_mask, losses, 0).sum() / batch.loss_mask.sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_logits_and_gradients_equal_those_of_merged_kernels():
    """The gradients of A and B follow from those of the merged kernels by the chain rule, in float64."""
    config = tiny().model
    plan, base, batch = training_blueprint(dataclasses.replace(tiny(), rules=LORA)), blueprint(config), _data()[0]
    assert set(plan.adapters) == {f"{layer}/kernel" for layer in KERNELS | VISION}
    params = random_params(plan.shapes)
    merged = {path: value for path, value in params.items() if path not in plan.adapted}
    change = {}
    for layer in KERNELS | VISION:
        a, b = (np.float64(params[f"{layer}/adapter/{name}"]) for name in "ab")
        rank = a.shape[-1]
        a, b = a.reshape(len(a), -1, rank), b.reshape(len(b), rank, -1)
        change[layer] = a, b, SCALES[layer.split("/")[0]]
        kernel = merged[f"{layer}/kernel"]
        merged[f"{layer}/kernel"] = np.float32(kernel + (change[layer][2] * a @ b).reshape(kernel.shape))
    (_, expected), kernel_gradients = _value_and_grad(base)(merged, batch)
    (_, logits), gradients = _value_and_grad(plan)(params, batch)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for layer, (a, b, scale) in change.items():
        of_kernel = scale * np.float64(kernel_gradients[f"{layer}/kernel"]).reshape(len(a), a.shape[1], b.shape[2])
        for name, value in (("a", of_kernel @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ of_kernel)):
            found = np.asarray(gradients[f"{layer}/adapter/{name}"]).reshape(value.shape)
            np.testing.assert_allclose(found, value, atol=1e-5 * np.abs(value).max(), err_msg=f"{layer}/{name}")
    # Merging is the same in the package: on devices, and layer by layer on the host.
    for path, value in merge_params(jax.tree.map(jnp.asarray, params), plan):
        np.testing.assert_allclose(value, merged.pop(path), atol=1e-6, err_msg=path)
    assert not merged


# ---- What trains -----------------------------------------------------------------------------------------------------


def test_train_times_1_is_the_program_of_train():
    plain, other = ((("vision/.*", f"train{factor}"), (".*", f"train{factor}")) for factor in ("", "*1"))
    texts = []
    for setup in (_setup(plain), _setup(other)):
        step = make_train_step(setup.config, setup.plan, setup.tx, setup.layout)
        with compute_context(setup.mesh, "float32"):
            texts.append(step.lower(setup.layout, jax.eval_shape(lambda: _data()[0])).as_text())
    assert texts[0] == texts[1]
    assert "stablehlo.dot_general" in texts[0]


def test_factors_are_the_rates_of_torchs_parameter_groups():
    rng, factors = np.random.default_rng(0), {"vision/kernel": (0.1,), "llm/blocks/kernel": (0.5, 1.0, 2.0)}
    params = {path: rng.standard_normal((3, 4), np.float32) for path in (*factors, "fusion/kernel")}
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0, schedule="constant", warmup_ratio=0)
    tx = make_optimizer(config, 10, factors)
    rows = {path: torch.tensor(value).unbind() for path, value in params.items()}
    rows = {path: [row.clone().requires_grad_() for row in values] for path, values in rows.items()}
    groups = [
        {"params": [row], "lr": 0.01 * factor}
        for path, values in rows.items()
        for row, factor in zip(values, np.broadcast_to(factors.get(path, 1.0), 3), strict=True)
    ]
    reference, moments = torch.optim.AdamW(groups, weight_decay=0.1), tx.init(params)
    for _ in range(3):
        gradients = {path: rng.standard_normal((3, 4), np.float32) for path in params}
        updates, moments = tx.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        for path, values in rows.items():
            for row, gradient in zip(values, gradients[path], strict=True):
                row.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([row for values in rows.values() for row in values], 1.0)
        reference.step()
    for path, values in rows.items():
        np.testing.assert_allclose(params[path], torch.stack(values).detach(), rtol=1e-5, err_msg=path)


def test_a_range_of_layers_freezes_the_others():
    """To the bit; and the norm of the gradient is without them."""
    rules = (("vision/blocks[1:2]/.*", "train*0.25"), ("vision/.*", "freeze"), ("llm/.*", "train*2"), (".*", "train"))
    setup = _setup(rules, **{"optimizer.weight_decay": 0.1})
    state = setup.state()
    before = _copy(state)
    state, metrics = setup.step()(state, _data()[0])
    first, total = optax.tree_utils.tree_get(state.moments, "mu"), 0.0
    assert {path.split("/")[1] for path in state.trainable if path.startswith("vision/")} == {"blocks"}
    for path, value in state.trainable.items():
        total += np.sum(np.square(np.float64(first[path]) / 0.1))
        if path.startswith("vision/"):
            others, moved = np.asarray(value)[[0, 2]], np.asarray(value)[1]
            assert others.tobytes() == before.trainable[path][[0, 2]].tobytes(), path
            assert not np.asarray(first[path])[[0, 2]].any()
            assert not np.array_equal(moved, before.trainable[path][1]) or path.endswith("key/bias")
    np.testing.assert_allclose(metrics["gradient_norm"], total**0.5, rtol=1e-5)


# ---- Rules -----------------------------------------------------------------------------------------------------------

PATHS = {"fusion/kernel": None, "llm/embedding": None, "llm/blocks/up/kernel": 4, "llm/blocks/norm/scale": 4}


def test_each_layer_follows_the_first_rule_that_covers_it():
    rules = (("llm/blocks[2:]/.*", "lora:rank=2*0.5"), ("llm/blocks[:1]/.*", "lora:rank=2"), ("llm/.*", "freeze"))
    found = decide((*rules, (".*", "train*3")), PATHS, {"llm/blocks/up/kernel"})
    assert {path: decision.factors for path, decision in found.items()} == {
        "fusion/kernel": (3.0,),
        "llm/embedding": (0.0,),
        "llm/blocks/up/kernel": (1.0, 0.0, 0.5, 0.5),
        "llm/blocks/norm/scale": (0.0,) * 4,
    }
    assert {path for path, decision in found.items() if decision.adapter} == {"llm/blocks/up/kernel"}
    assert found["llm/blocks/up/kernel"].adapter == find_adapter("lora:rank=2")


@pytest.mark.parametrize(
    ("pattern", "action", "message"),
    [
        ("llm/.*", "train*0", "must be 'freeze', or 'train' or an adapter times a positive number"),
        ("llm/.*", "train*nan", "must be 'freeze', or 'train' or an adapter times a positive number"),
        ("llm/.*", "train*", "must be 'freeze', or 'train' or an adapter times a positive number"),
        ("llm/.*", "freeze*2", "must be 'freeze', or 'train' or an adapter times a positive number"),
        ("llm/.*", "lora@int4", "can only freeze kernels, in int8 or nf4: write 'freeze@int8' or 'lora@nf4'"),
        ("llm/.*", "train@nf4", "can only freeze kernels, in int8 or nf4"),
        (
            "llm/emb.*",
            "freeze@int8",
            "'llm/emb.*' quantizes nothing: it decides on no kernel of a linear layer in blocks",
        ),
        ("llm/blocks[2:]/.*", "freeze@int8", "can be quantized only together; give all of them '@int8' or '@nf4'"),
        ("llm/.*", "lara", "must say 'train' or 'freeze', or name an adapter; did you mean 'lora'?"),
        ("llm/.*", "lora:rank=0", "adapter=lora:rank=0: rank must be at least 1"),
        ("llm/.*", "lora:rank=1.5", "rank=1.5 must be a whole number"),
        ("llm/.*", "lora:alpha=nan", "alpha=nan must be a number"),
        ("llm/.*", "lora:alpha=-1", "alpha must not be negative"),
        ("llm/.*", "lora:alpha=much", "alpha=much must be a number"),
        ("llm/.*", "lora:dropout=1", "dropout must be at least 0, and less than 1"),
        ("llm/.*", "lora:scaling=rs", "scaling=rs must be one of lora, rslora"),
        ("llm/.*", "lora:ranks=8", "unknown option 'ranks'; did you mean 'rank'?"),
        ("llm/.*", "stf_jax.models.adapters.lora:LoRA", "is not an object with the methods build and change"),
        ("lm/.*", "lora", "'lm/.*' covers no parameter"),
        (
            "llm/emb.*",
            "lora",
            "('llm/emb.*', 'lora') adapts nothing: it decides on no kernel of a linear layer in blocks",
        ),
        ("fusion/.*", "lora", "adapts nothing"),
        ("llm/blocks[2:9]/.*", "train", "names layers that 'llm/blocks/up/kernel' lacks; it has 0 to 3"),
        ("llm/blocks[2:2]/.*", "train", "names layers that 'llm/blocks/up/kernel' lacks; it has 0 to 3"),
        ("llm[0:2]/.*", "train", "names layers, but 'llm/embedding' is not in a block"),
        ("llm/blocks[2:]/.*", "lora", "those that are not frozen must all train, or all have the same adapter"),
    ],
)
def test_rules_that_cannot_be_followed_are_rejected(pattern, action, message):
    with pytest.raises(UserError) as raised:
        decide(((pattern, action), (".*", "train")), PATHS, {"llm/blocks/up/kernel"})
    assert message in str(raised.value)


# ---- Resuming, meshes, microbatches ----------------------------------------------------------------------------------

DROPOUT = (("llm/.*", "lora:rank=4,dropout=0.3"), ("vision/.*", "lora:rank=2,dropout=0.1"), (".*", "train*0.5"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that saved its second step, and the state and losses of four steps."""
    workdir = epath.Path(tmp_path_factory.mktemp("lora"))
    setup = _setup(DROPOUT)
    return workdir, setup, *train_and_save(workdir, setup, setup.state(), _data())


def test_steps_move_adapters_and_fusion_and_no_frozen_bit(run):
    _, setup, _, state, _ = run
    adapted = KERNELS | VISION | {"vision/blocks/mlp/down"}
    assert {path for path in state.trainable if not path.startswith("fusion/")} == {
        f"{layer}/adapter/{name}" for layer in adapted for name in "ab"
    }
    before = _copy(setup.state())
    for path, old in before.frozen.items():
        assert state.frozen[path].tobytes() == old.tobytes(), path
    assert not [path for path, old in before.trainable.items() if np.array_equal(old, state.trainable[path])]
    assert optax.tree_utils.tree_get(state.moments, "nu").keys() == state.trainable.keys()


def test_a_resumed_run_ends_with_the_same_bits(run):
    workdir, setup, step, expected, losses = run
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        arrays, _, _ = checkpoints.restore(2, setup.layout)
    state = dataclasses.replace(setup.state(), step=jax.device_put(np.int32(2), setup.layout.step.sharding), **arrays)
    resumed = []
    for batch in _data()[2:]:
        state, metrics = step(state, batch)
        resumed.append(float(metrics["loss"]))
    assert resumed == losses[2:]
    assert jax.tree.map(lambda x: x.tobytes(), _copy(state)) == jax.tree.map(lambda x: x.tobytes(), expected)
    # Each step has its own dropout.
    other = dataclasses.replace(setup.state(), step=jax.device_put(np.int32(1), setup.layout.step.sharding))
    assert abs(float(step(other, _data()[0])[1]["loss"]) - losses[0]) > 1e-3


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_losses_are_the_same_on_every_mesh_and_with_microbatches(run, mesh):
    setup = _setup(DROPOUT, mesh, **{"optimizer.accumulation_steps": 2 if mesh == (2, 2, 2) else 1})
    state, step = setup.state(), setup.step()
    losses = []
    for batch in _data()[:2]:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, run[4][:2], atol=1e-5)


def test_a_run_is_opened_with_its_adapters_merged(run):
    """One by one on the host, onto devices, and as the start of another run."""
    workdir, setup, *_ = run
    raw, opened, base = SavedParams(workdir), open_params(workdir), blueprint(setup.config.model)
    assert {path: leaf.shape for path, leaf in opened.shapes.items()} == {p: x.shape for p, x in base.shapes.items()}
    params = {path: jnp.asarray(raw.read(path)) for path in raw.shapes}
    expected = dict(merge_params(params, setup.plan))
    changed = {path for path in expected if not np.array_equal(expected[path], params[path])}
    assert changed == {f"{layer}/kernel" for layer in KERNELS | VISION | {"vision/blocks/mlp/down"}}
    plain = _setup(mesh=(2, 2, 2), rules=((".*", "train"),))
    restored, loaded = (
        dict(opened.restore(base.shardings(plain.mesh))),
        load_params(str(workdir), plain.layout.params, ()),
    )
    for path, value in expected.items():
        np.testing.assert_allclose(opened.read(path), value, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(restored[path], value, atol=1e-6, err_msg=path)
        np.testing.assert_array_equal(loaded[path], restored[path])


def test_a_run_whose_config_lacks_its_adapters_is_rejected(run, tmp_path):
    for name in ("checkpoints", "frozen"):
        (tmp_path / name).symlink_to(run[0] / name)
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny())))
    with pytest.raises(UserError, match=r"config.json name no adapter of .*/kernel, but the run has one"):
        open_params(epath.Path(tmp_path))
