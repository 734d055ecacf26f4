"""Accuracy of a vision tower trained on cell labels (models/cells.py) on held-out images of the embedded world."""

import argparse
import collections
from typing import Any

import jax
import numpy as np
from etils import epath

from stf_jax.config import MeshConfig, UserError
from stf_jax.data import world
from stf_jax.data.world_labels import CELLS, label_cells
from stf_jax.evals.benchmarks.scenes import SEED
from stf_jax.models.blueprint import Params, blueprint
from stf_jax.models.cells import split_scores
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.weights.model import open_model

_LABEL_KINDS = ("color", "shape", "character")
_BATCH = 50  # images


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the fraction of cells labeled correctly, by color, shape and character, and of characters by height.

    Raises UserError for fewer than one image, or a checkpoint without a head for cells.
    """
    if options.images < 1:
        raise UserError("--images must be at least 1.")
    saved = open_model(epath.Path(options.checkpoint))
    if not saved.config.cells:
        raise UserError(
            f"--checkpoint={options.checkpoint} has no head for cells: give a run trained with model.cells."
        )
    plan, mesh = blueprint(saved.config), make_mesh(MeshConfig(1, 1, 1))
    params = dict(saved.restore(plan.shardings(mesh)))

    @jax.jit
    def predict(params: Params, images: jax.Array) -> list[jax.Array]:
        return [scores.argmax(-1) for scores in split_scores(plan.merge(params).cell_scores(images))]

    correct: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for begin in range(0, options.images, _BATCH):
        indices = range(begin, min(begin + _BATCH, options.images))
        scenes = [world.make_scene(SEED, index, held_out=True) for index in indices]
        images = np.stack([np.asarray(world.draw(*pair)) for pair in zip(scenes, indices, strict=True)])
        with compute_context(mesh, plan.precision):
            predictions = [np.asarray(x) for x in predict(params, images[:, None])]
        for i, scene in enumerate(scenes):
            labels = label_cells(scene)
            heights = _heights(scene, labels[..., 2] > 0)
            for kind, (name, predicted) in enumerate(zip(_LABEL_KINDS, predictions, strict=True)):
                is_correct = predicted[i] == labels[..., kind]
                correct[name].append(is_correct[labels[..., kind] > 0])
                if name == "character":
                    for height in np.unique(heights[heights > 0]):
                        correct[f"character of {height:2} pixels"].append(is_correct[heights == height])
                    correct["no character"].append(is_correct[labels[..., kind] == 0])
    rows = {name: np.concatenate(parts) for name, parts in sorted(correct.items())}
    return [{"what": name, "cells": len(row), "right": float(row.mean())} for name, row in rows.items()]


def _heights(scene: world.Scene, printed: np.ndarray) -> np.ndarray:
    """The height of capital letters in each cell, in pixels; 0 without text."""
    heights = np.zeros((CELLS, CELLS), int)
    for item in scene.prints:
        text_cells = label_cells(world.Scene(scene.background, prints=(item,)))[..., 2]
        heights[text_cells > 0] = item.height
    for layout in (scene.chart, scene.form):
        if layout is not None:
            heights[printed] = layout.height
    return heights
