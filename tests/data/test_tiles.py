"""Tests tiles against transformers' LLaVA-NeXT: grids, pixels, the order of tokens and their number."""

import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import make_preprocessor, random_params, tiny
from transformers import LlavaNextConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from stf_jax.config import MeshConfig, UserError
from stf_jax.data.pipeline import Batches, load_training_records
from stf_jax.data.records import make_question
from stf_jax.data.tiles import (
    NEWLINE,
    ImageLayout,
    Tiles,
    choose_grid,
    cut_tiles,
    find_tiles,
    order_tokens,
    place_slots,
)
from stf_jax.inference.loading import load_generator
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import VISION
from stf_jax.parallel.mesh import make_mesh
from stf_jax.studies import cost
from stf_jax.training.loop import train
from stf_jax.weights.folder import load_params
from stf_jax.weights.origin import complete_config

SIDE, PATCH = 24, 4  # of a tile and of the patch of one token, in pixels
RELEASED = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # the grids of LLaVA-1.6's releases
SIZES = [(1, 1), (23, 24), (47, 48), (48, 25), (49, 49), (72, 24), (101, 37), (37, 101), (5, 900), (900, 5), (333, 250)]
sides = st.integers(1, 400)


def pinpoints(grids, side=SIDE):
    """transformers' form of grids: heights and widths in pixels."""
    return [[rows * side, columns * side] for rows, columns in grids]


def grids_of(most):
    return find_tiles(tiny(**{"data.aspect": "tiles", "data.tiles.most": most}).data).grids


def test_grids_are_all_with_2_to_most_tiles():
    assert set(grids_of(4)) == {*RELEASED, (1, 4), (4, 1)}
    assert set(grids_of(2)) == {(1, 2), (2, 1)}
    assert find_tiles(tiny(**{"data.aspect": "pad"}).data) is None


@given(sides, sides, st.sampled_from([2, 4, 6, 9]))
@settings(max_examples=40, deadline=None)
def test_the_grid_is_llava_nexts(width, height, most):
    rows, columns = choose_grid((width, height), grids_of(most), SIDE)
    expected = select_best_resolution((height, width), pinpoints(grids_of(most)))
    assert (rows * SIDE, columns * SIDE) == tuple(expected)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_llava_nexts(size):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=pinpoints(RELEASED),
        do_rescale=False,
        do_normalize=False,
    )
    (expected,) = processor(image, return_tensors="np")["pixel_values"]
    tiles = cut_tiles(image, choose_grid(size, RELEASED, SIDE), SIDE)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), expected)


def packed(size, grid, grids):
    """The order of an image's tokens in transformers, which packs their numbers."""
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH},
        image_grid_pinpoints=pinpoints(grids),
    )
    count = (SIDE // PATCH) ** 2
    features = torch.arange((1 + grid[0] * grid[1]) * count).reshape(-1, count, 1)
    newline = torch.tensor([NEWLINE])
    pack = LlavaNextModel.pack_image_features
    tokens, _ = pack(types.SimpleNamespace(config=config), [features], [size[::-1]], "default", newline)
    return (tokens[0] if isinstance(tokens, (list, tuple)) else tokens).flatten().tolist()


@given(sides, sides, st.sampled_from([RELEASED, grids_of(6)]))
@settings(max_examples=40, deadline=None)
def test_the_order_of_tokens_is_llava_nexts(width, height, grids):
    grid = choose_grid((width, height), grids, SIDE)
    tokens = order_tokens((width, height), grid, (SIDE // PATCH) ** 2, "newline")
    assert tokens.tolist() == packed((width, height), grid, grids)


def test_slots_of_several_images_index_their_places_one_after_another():
    vision, tokens = VISION["clip-tiny"], 4
    layout = ImageLayout(vision, "tiles", tokens, Tiles(grids_of(4), "newline"))
    sizes = [(128, 64), (64, 192), (128, 128)]
    slots, first = layout.slots(sizes), 0
    for size, own in zip(sizes, slots, strict=True):
        grid = choose_grid(size, grids_of(4), vision.image_size)
        alone = order_tokens(size, grid, tokens, "newline")
        assert np.array_equal(own == NEWLINE, alone == NEWLINE)
        assert np.array_equal(own[own != NEWLINE] - first, alone[alone != NEWLINE])
        first += (1 + grid[0] * grid[1]) * tokens
    assert first == layout.count_places(sizes) * tokens
    placed = place_slots(np.concatenate([[-1], *slots, [-1]]), 100, 999)
    assert sorted(set(placed.tolist()) - {-1, 999}) == list(range(100, 100 + first))  # none is padded
    assert (placed == 999).sum() == (np.concatenate(slots) == NEWLINE).sum() == sum(len(s) for s in slots) - first


def test_without_marks_all_tokens_follow_each_other():
    layout = ImageLayout(VISION["clip-tiny"], "tiles", 4, Tiles(grids_of(4), "none"))
    sizes = [(130, 10), (64, 64)]
    assert np.concatenate(layout.slots(sizes)).tolist() == list(range(4 * layout.count_places(sizes)))


# ---- In batches ------------------------------------------------------------------------------------------------------

IMAGES = {0: [], 1: [(130, 61)], 2: [(33, 190), (70, 64)]}  # of a row, by its number modulo 3


@pytest.fixture(scope="module")
def rows_of_images(tmp_path_factory):
    """Annotations of 18 rows with up to two images of odd sizes, and the folder of the images."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = []
    for number in range(18):
        names = [f"{number}-{i}.png" for i in range(len(IMAGES[number % 3]))]
        for name, size in zip(names, IMAGES[number % 3], strict=True):
            pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name)
        question = "<image>\n" * len(names) + "What is " + "very " * number + "far?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A hill."}]
        rows.append({"id": str(number), "image": names, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def tiled(folder, **changes):
    """A config of these rows, in tiles of at most four."""
    data = {"source": "llava", "annotations": str(folder / "rows.json"), "images": str(folder), "aspect": "tiles"}
    values = {f"data.{key}": value for key, value in data.items()}
    shape = {"data.max_length": 320, "data.images_per_row": 2, "data.tiles.most": 4, "global_batch_size": 4}
    return complete_config(tiny(**values | shape | changes))


@pytest.mark.parametrize("changes", [{"data.packing": True}, {"data.buckets": 3}, {"data.tiles.marks": "none"}])
def test_an_epoch_of_tiles_is_exact_and_resumes(rows_of_images, changes):
    config = tiled(rows_of_images, **changes)
    preprocess, records = make_preprocessor(config), load_training_records(config)
    lengths, places = preprocess.measure(records.sets[0], log=False)
    examples = [preprocess(records[i]) for i in range(len(records))]
    assert lengths.tolist() == [len(example.tokens) for example in examples]
    assert places.tolist() == [len(example.images) for example in examples]

    def start():
        return Batches(config, records, preprocess, host=0, hosts=1)

    stream, steps = start(), None
    steps = stream.plan.steps(1)
    made, states = [], []
    for _ in range(steps):
        made.append(next(stream))
        states.append(stream.get_state())
    assert stream.replaced == 0
    ids = [one for step in range(steps) for row in stream.record_ids(step + 1) for one in row]
    assert sorted(map(int, ids)) == list(range(18))
    resumed = start()
    resumed.set_state(states[0])
    for batch, again in zip(made[1:], resumed, strict=False):
        for name in ("tokens", "image_slots", "images", "segment_ids"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(again, name))
    newline = made[0].images.shape[1] * preprocess.layout.tokens
    marks = sum((batch.image_slots == newline).sum() for batch in made)
    assert (marks > 0) == (config.data.tiles.marks == "newline")
    assert max(batch.image_slots.max() for batch in made) <= newline
    stream.close()
    resumed.close()


def test_an_image_that_has_grown_is_left_out_and_counted(rows_of_images, tmp_path):
    shutil.copytree(rows_of_images, tmp_path / "copy")
    config = tiled(tmp_path / "copy", **{"data.packing": True, "data.max_length": 128})
    stream = Batches(config, load_training_records(config), make_preprocessor(config), host=0, hosts=1)
    for number in range(1, 18, 3):
        PIL.Image.new("RGB", (700, 700)).save(tmp_path / "copy" / f"{number}-0.png")
    batches = [next(stream) for _ in range(stream.plan.steps(1))]
    assert 0 < stream.replaced <= 6
    assert sum(batch.segment_ids.max(1).sum() for batch in batches) == 18 - stream.replaced
    stream.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.tiles.most": 0}, "data.tiles.most is 0; it must be between 2 and 64"),
        ({"data.tiles.marks": "dots"}, "data.tiles.marks is 'dots'"),
        ({"model.fusion.fusion": "resampler"}, "the tokens of model.fusion.fusion=resampler are none"),
        ({"model.fusion.fusion": "mlp", "model.reduce": "resize"}, "reduce=resize leaves none"),
        ({"model.fusion.fusion": "mlp", "model.reduce": "fastv:after=1"}, "a method that does not act in the decoder"),
        ({"model.schedule": "pyramiddrop"}, "model.schedule=pyramiddrop drops the same number"),
        ({"model.fusion.budgets": (4, 1)}, "model.fusion.budgets are for square images"),
        ({"model.cells": 2}, "labels of square images"),
    ],
)
def test_what_tiles_cannot_do_is_refused(rows_of_images, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiled(rows_of_images, **changes)


def test_fusions_without_a_grid_take_tiles_without_marks(rows_of_images):
    assert not tiled(rows_of_images, **{"model.fusion.fusion": "resampler", "data.tiles.marks": "none"}).model.newline


# ---- In a run --------------------------------------------------------------------------------------------------------


def test_a_run_with_tiles_trains_its_newline_and_answers_with_tiles(rows_of_images, tmp_path, monkeypatch):
    changes = {"mesh.data": 1, "steps": 2, "init_from": str(tmp_path / "start"), "init_missing": ()}
    changes |= {"eval.benchmarks": ("scenes",), "eval.limit": 2, "eval.batch": 2}
    config, workdir = tiled(rows_of_images, **changes), epath.Path(tmp_path / "run")
    start = random_params(blueprint(config.model).shapes)
    (tmp_path / "start").mkdir()
    save_file(start, tmp_path / "start" / "model.safetensors")
    train(config, workdir, workdir)
    generator, saved = load_generator(workdir, make_mesh(MeshConfig(1, 1, 1)))
    assert saved.description.tiles == generator.tiles == find_tiles(config.data)
    newline = saved.read("fusion/newline")
    assert np.abs(newline - start["fusion/newline"]).min() > 0

    images = [PIL.Image.open(rows_of_images / name) for name in ("1-0.png", "2-0.png", "2-1.png")]
    tokens = generator.image_tokens(images[0])
    (slots,) = ImageLayout(config.model.vision_shape, "tiles", generator.slots, generator.tiles).slots([images[0].size])
    assert len(tokens) == len(slots)
    np.testing.assert_array_equal(tokens[slots == NEWLINE], np.broadcast_to(newline, ((slots == NEWLINE).sum(), 32)))

    records = [make_question("a", [images[0].copy], "Far?"), make_question("b", [i.copy for i in images[1:]], "Far?")]
    together = list(generator.generate(records, 1, 2))
    assert together[1:] == list(generator.generate(records[1:], 1, 1))

    for name in ("_STEPS", "_REPEATS"):
        monkeypatch.setattr(cost, name, 1)
    (slots,) = generator._layout.slots([(96, 96)])
    assert cost._measure(pathlib.Path(workdir), [])["image_tokens"] == len(slots)


@pytest.mark.parametrize(
    ("aspect", "weights", "message"),
    [("tiles", "square", "without tiles \\(name fusion/newline"), ("square", "tiles", "with tiles \\(set data.aspect")],
)
def test_weights_of_another_aspect_are_refused(rows_of_images, tmp_path, aspect, weights, message):
    shapes = blueprint(tiled(rows_of_images, **{"data.aspect": weights}).model).shapes
    save_file({path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}, tmp_path / "model.safetensors")
    plan, mesh = blueprint(tiled(rows_of_images, **{"data.aspect": aspect}).model), make_mesh(MeshConfig(1, 1, 1))
    places = plan.shardings(mesh)
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path]) for path, x in plan.shapes.items()}
    with pytest.raises(UserError, match=message):
        load_params(str(tmp_path), layout, ())
