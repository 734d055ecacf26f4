"""Training a vision tower on labels of cells: the loss against numpy, on every mesh, and from the command line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Setup, batches

from stf_jax import bench
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.pipeline import load_training_records
from stf_jax.data.world import make_scene
from stf_jax.data.world_labels import label_cells
from stf_jax.evals.benchmarks.scenes import SEED
from stf_jax.main import main
from stf_jax.models.cells import CLASSES
from stf_jax.models.spec import VISION
from stf_jax.models.vlm import VLM
from stf_jax.planning.program import make_program
from stf_jax.training.objectives.cells import labels_loss_sum

VISION["clip-tiny-96"] = tiny.dataclasses.replace(VISION["clip-tiny"], image_size=96)
CHANGES = {
    "model.vision": "clip-tiny-96",
    "model.cells": 4,
    "model.fusion.fusion": "mlp",
    "data.scenes.task": "cells",
    "data.scenes.edition": 2,
    "rules": (("(vision|cells)/.*", "train"), (".*", "freeze")),
    "optimizer.warmup_ratio": 0.0,
    "optimizer.eps": 1e-4,
}


def _setup(**mesh):
    return Setup.of(**CHANGES, **{f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()})


@functools.cache
def _one_device():
    return _setup()


@functools.cache
def _data():
    return batches(_one_device().config, 2)


def _expected_loss(scores, labels):
    """The mean over cells of the weighted loss of their three labels, in float64."""
    total, begin = 0.0, 0
    for kind_index, (classes, weight) in enumerate(zip(CLASSES, (1, 1, 2), strict=True)):
        part, label = scores[..., begin : begin + classes].astype(np.float64), labels[..., kind_index].astype(int)
        exp_scores = np.exp(part - part.max(-1, keepdims=True))
        target_probability = np.take_along_axis(exp_scores / exp_scores.sum(-1, keepdims=True), label[..., None], -1)
        total += weight * (-np.log(target_probability[..., 0]) * np.where(label > 0, 1, 0.1)).sum()
        begin += classes
    return total


def test_labels_loss_equals_numpy():
    rng = np.random.default_rng(0)
    scores = 3 * rng.standard_normal((2, 4, 4, sum(CLASSES)), np.float32)
    labels = np.stack([rng.integers(0, classes, (2, 4, 4)) for classes in CLASSES], -1).astype(np.uint8)
    labels[0, :2] = 0
    np.testing.assert_allclose(
        labels_loss_sum(jnp.asarray(scores), jnp.asarray(labels)), _expected_loss(scores, labels), rtol=1e-6
    )


def test_patch_scores_only_its_own_cells():
    """Changing one patch's state changes only the scores of its own cells."""
    setup = _one_device()
    head = setup.plan.merge(jax.tree.map(jnp.asarray, tiny.random_params(setup.plan.shapes))).cells
    states = jnp.zeros((1, head.grid**2, 32)).at[0, head.grid + 2].set(1)  # the second row's third patch
    changed = np.nonzero(np.abs(head(states) - head(0 * states)).max(-1)[0])
    rows, columns = (range(i * head.cells_per_side, (i + 1) * head.cells_per_side) for i in (1, 2))
    assert {*zip(*(axis.tolist() for axis in changed), strict=True)} == {(r, c) for r in rows for c in columns}
    assert head(states).shape == (1, 24, 24, sum(CLASSES))


@functools.cache
def _trained():
    return _steps(_one_device())


def _steps(setup):
    state, step, losses = setup.state(), setup.step(), []
    for batch in _data():
        state, metrics = step(state, batch)
        losses.append({name: float(value) for name, value in metrics.items()})
    return state, losses


def test_first_loss_is_the_mean_over_cells():
    setup, batch = _one_device(), _data()[0]
    score = jax.jit(lambda params, images: setup.plan.merge(params).cell_scores(images))
    scores = score(setup.state().params, batch.images)
    assert batch.labels.shape == (8, 1, 24, 24, 3)
    expected = _expected_loss(np.asarray(scores), batch.labels[:, 0]) / batch.labels[..., 0].size
    first = _trained()[1][0]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["learned_tokens"] == batch.labels[..., 0].size
    assert not first["skipped"]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_mesh_takes_the_same_steps(mesh):
    state, losses = _steps(_setup(**mesh))
    expected, expected_losses = _trained()
    np.testing.assert_allclose([x["loss"] for x in losses], [x["loss"] for x in expected_losses], rtol=1e-5)
    for path, value in expected.trainable.items():
        np.testing.assert_allclose(state.trainable[path], value, rtol=1e-3, atol=2e-5, err_msg=path)
    moved = {path.split("/")[0] for path in expected.trainable}
    assert moved == {"vision", "cells"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.cells": 0}, "go together"),
        ({"data.scenes.task": "captions"}, "go together"),
        ({"data.scenes.edition": 1}, "task=cells needs the world's second edition"),
        ({"model.cells": 0, "data.scenes.task": "cues", "data.scenes.edition": 1}, "task=cues needs"),
        ({"model.vision": "clip-tiny"}, "24×24 cells"),
    ],
)
def test_cell_labels_need_a_cell_head(changes, message):
    with pytest.raises(UserError, match=message):
        load_training_records(tiny.tiny(**CHANGES | changes))


def test_plan_compiles_the_step():
    config = tiny.tiny(**CHANGES)
    program = make_program(config, "train", jax.devices()[:1])
    assert program.compile().memory_analysis().temp_size_in_bytes > 0
    assert {path.split("/")[0] for path in program.arguments[0].trainable} == {"vision", "cells"}


def test_run_starts_from_a_tower_trained_on_cells(tmp_path, capsys, monkeypatch):
    """Runs the commands of a user, one stage after the other."""
    flags = [f"--config.{key}={value}" for key, value in CHANGES.items() if key != "rules"]
    config = f"--config={tiny.__file__}:steps=3,fusion=mlp"
    rules = "--config.rules=(('(vision|cells)/.*', 'train'), ('.*', 'freeze'))"
    assert run_command(main, [config, *flags, rules, f"--workdir={tmp_path / 'cells'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "cells" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    labels = np.stack([label_cells(make_scene(SEED, index, held_out=True)) for index in range(60)])
    # Constant scores: always the first color, no shape, the first character.
    scores = np.zeros(sum(CLASSES), np.float32)
    scores[[1, CLASSES[0], sum(CLASSES[:2]) + 1]] = 1

    def constant_scores(self, images):
        # XLA takes a minute to compile a program that does not depend on its arguments, because it evaluates it.
        return jnp.broadcast_to(scores, (len(images), 24, 24, scores.size)) + 0.0 * images.astype(jnp.float32).sum()

    monkeypatch.setattr(VLM, "cell_scores", constant_scores)
    arguments = ["backbone", f"--checkpoint={tmp_path / 'cells'}", "--images=60", f"--json={tmp_path / 'seen.json'}"]
    assert run_command(bench.main, arguments) == 0
    monkeypatch.undo()
    seen = {row["what"]: row for row in json.loads((tmp_path / "seen.json").read_text())}
    for kind_index, (what, constant_answer) in enumerate((("color", 1), ("shape", 0), ("character", 1))):
        labeled = labels[..., kind_index][labels[..., kind_index] > 0]
        assert seen[what]["cells"] == labeled.size
        assert seen[what]["right"] == pytest.approx((labeled == constant_answer).mean())
    assert seen["no character"] == {"what": "no character", "cells": (labels[..., 2] == 0).sum(), "right": 0}
    by_height = [row["cells"] for what, row in seen.items() if what.endswith("pixels")]
    assert 0.98 < sum(by_height) / seen["character"]["cells"] <= 1  # touching characters may share a cell
    next_flags = [
        f"--config.init_from={tmp_path / 'cells'}",
        "--config.init_missing=('cells/.*',)",
        "--config.model.vision=clip-tiny-96",
        "--config.data.scenes.edition=2",
        f"--workdir={tmp_path / 'answers'}",
    ]
    config = f"--config={tiny.__file__}:steps=2,fusion=mlp"
    assert run_command(main, [config, "--config.data.max_length=512", *next_flags]) == 0
    assert run_command(bench.main, ["backbone", f"--checkpoint={tmp_path / 'answers'}"]) == 2
    assert "no head for cells" in capsys.readouterr().err
    assert run_command(bench.main, ["backbone", f"--checkpoint={tmp_path / 'cells'}", "--images=0"]) == 2
    assert "--images must be at least 1." in capsys.readouterr().err
