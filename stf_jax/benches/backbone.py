"""What a tower trained on cell labels (models/cells.py) sees in held-out images of the embedded world."""

import argparse
import collections
from typing import Any

import jax
import numpy as np
from etils import epath

from stf_jax.config import MeshConfig, UserError
from stf_jax.data import world
from stf_jax.data.world_labels import CELLS, label
from stf_jax.evals.scenes import SEED
from stf_jax.models.cells import split_scores
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.model import open_model

_SORTS = ("color", "shape", "character")
_ROWS = 50  # images at once


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of cells that the head labels right, by color, shape and character, and of characters by height.

    Raises UserError for fewer images than one, or a checkpoint without such a head.
    """
    if options.images < 1:
        raise UserError("--images must be at least 1.")
    saved = open_model(epath.Path(options.checkpoint))
    if not saved.config.cells:
        raise UserError(
            f"--checkpoint={options.checkpoint} has no head that labels cells: give a run trained with model.cells."
        )
    plan, mesh = blueprint(saved.config), make_mesh(MeshConfig(1, 1, 1))
    params = dict(saved.restore(plan.shardings(mesh)))
    score = jax.jit(lambda params, images: [x.argmax(-1) for x in split_scores(plan.merge(params).cell_scores(images))])
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for begin in range(0, options.images, _ROWS):
        indices = range(begin, min(begin + _ROWS, options.images))
        scenes = [world.make_scene(SEED, index, held_out=True) for index in indices]
        images = np.stack([np.asarray(world.draw(*pair)) for pair in zip(scenes, indices, strict=True)])
        with computing(mesh, plan.precision):
            said = [np.asarray(x) for x in score(params, images[:, None])]
        for i, scene in enumerate(scenes):
            labels = label(scene)
            heights = _heights(scene, labels[..., 2] > 0)
            for sort, (name, answer) in enumerate(zip(_SORTS, said, strict=True)):
                right = answer[i] == labels[..., sort]
                found[name].append(right[labels[..., sort] > 0])
                if name == "character":
                    for height in np.unique(heights[heights > 0]):
                        found[f"character of {height:2} pixels"].append(right[heights == height])
                    found["no character"].append(right[labels[..., sort] == 0])
    rows = {name: np.concatenate(parts) for name, parts in sorted(found.items())}
    return [{"what": name, "cells": len(right), "right": float(right.mean())} for name, right in rows.items()]


def _heights(scene, printed):
    """The height of the capitals in each cell, 0 where nothing is printed."""
    heights = np.zeros((CELLS, CELLS), int)
    for item in scene.prints:
        alone = label(world.Scene(scene.background, prints=(item,)))[..., 2]
        heights[alone > 0] = item.height
    for laid_out in (scene.chart, scene.form):
        if laid_out is not None:
            heights[printed] = laid_out.height
    return heights
