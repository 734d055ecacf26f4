"""Models that read tiles, in transformers: exports and imports, compared logit by logit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from make_models import load, make, make_image, to_uint8, turn
from reference import TEXT, VISION, make_model, normalize, to_hub_names, to_original_names, write
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from stf_jax.config import FusionConfig, MeshConfig, UserError
from stf_jax.data.records import make_question
from stf_jax.data.tiles import ImageLayout, Tiles, place_slots
from stf_jax.inference.loading import load_generator
from stf_jax.models.blueprint import blueprint
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model

pytestmark = pytest.mark.usefixtures("torch_setup")

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CASES = {
    "mlp": (FusionConfig("mlp"), "clip", "llama", "newline"),
    "mbtf_stf": (FusionConfig("mbtf_stf"), "clip", "llama", "newline"),
    "resampler": (FusionConfig("resampler", kernel=3, depth=2), "siglip", "llama", "none"),
}
IMAGES = [make_image(1, (50, 41)), make_image(2, (36, 101)), make_image(3, (95, 30))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a function from a case to the folders of the model and of its export."""

    @functools.cache
    def export(case):
        *parts, marks = CASES[case]
        root = tmp_path_factory.mktemp("case")
        folder = make(root / "model", *parts, aspect="tiles", tiles=Tiles(GRIDS, marks))
        export_hf(folder, root / "export")
        return folder, root / "export"

    return export


def open_generator(folder):
    return load_generator(folder, make_mesh(MeshConfig(1, 1, 1)), "float32")[0]


def our_logits(generator, prompt, squares):
    """Our logits of a prompt, with squares uint8 [M, H, W, 3] of all its images."""
    length = len(prompt.tokens)
    slots = place_slots(prompt.image_slots, 0, len(squares) * generator.slots)

    def run(model, tokens, slots, images):
        return model(tokens, jnp.arange(length)[None], None, slots, images)

    return np.asarray(generator.apply(run, prompt.tokens[None], slots[None], squares[None]))[0]


@pytest.mark.parametrize("case", CASES)
def test_exports_answer_as_we_do(exported, case):
    folder, export = exported(case)
    model, processor = load(export)
    assert isinstance(model, LlavaNextForConditionalGeneration) == case.startswith("mlp")
    generator = open_generator(folder)
    inputs = processor.apply_chat_template(
        [turn("Which of them is red?", *IMAGES)],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    prompt = generator.prompt(make_question("a", [image.copy for image in IMAGES], "Which of them is red?"))
    ids = inputs["input_ids"][0].numpy()
    assert ids.tolist() == np.where(prompt.is_image, processor.image_token_id, prompt.tokens).tolist()
    vision, squares = generator.model.vision_shape, []
    for image, pixels in zip(IMAGES, inputs["pixel_values"], strict=True):
        own = generator.squares(image)
        found = to_uint8({"pixel_values": pixels[: len(own)]}, vision)
        np.testing.assert_allclose(found.astype(int), own, atol=2)  # torchvision's resizing rounds differently
        assert not pixels[len(own) :].any()
        squares.append(found)
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()[:, : generator.model.llm_shape.vocab]
    np.testing.assert_allclose(logits, our_logits(generator, prompt, np.concatenate(squares)), atol=1e-4)


def test_an_export_is_read_as_the_model_it_was_made_from(exported):
    for case in ("mlp", "mbtf_stf", "resampler"):
        folder, export = exported(case)
        before, after = open_model(folder), open_model(export)
        assert after.description.tiles == before.description.tiles
        assert after.description.aspect == "tiles"
        assert after.shapes.keys() == before.shapes.keys()
        for path in ("fusion/newline",) * (case != "resampler"):
            np.testing.assert_array_equal(after.read(path), before.read(path))


def test_servers_and_beams_get_the_tokens_of_each_image(exported):
    model, processor = load(exported("mbtf_stf")[1])
    texts = ["USER: <image>\n<image>\nWhich? ASSISTANT:", "USER: <image>\nWhat? ASSISTANT:"]
    inputs = processor(text=texts, images=IMAGES, padding=True, return_tensors="pt")
    counts = processor._get_num_multimodal_tokens([image.size[::-1] for image in IMAGES])["num_image_tokens"]
    own = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert own == [counts[0] + counts[1], counts[2]]
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert [len(tokens) for tokens in features] == counts
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    _, kwargs = model._expand_inputs_for_generation(
        2, False, inputs["input_ids"], pixel_values=pixels, image_sizes=sizes
    )
    order = [0, 1, 0, 1, 2, 2]
    assert torch.equal(kwargs["image_sizes"], sizes[order])
    assert torch.equal(kwargs["pixel_values"], pixels[order])
    with torch.no_grad():
        assert len(model.generate(**inputs, max_new_tokens=2, num_beams=2)) == 2


def test_what_other_programs_cannot_do_is_refused(tmp_path):
    folder = make(tmp_path / "model", FusionConfig("mlp"), "clip", "llama", aspect="tiles", tiles=Tiles(GRIDS, "none"))
    with pytest.raises(UserError, match=r"no class for mlp with data\.tiles\.marks=none"):
        export_hf(folder, tmp_path / "export")


# ---- Imports ---------------------------------------------------------------------------------------------------------

SIDE = VISION["image_size"]
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]


@functools.cache
def llava_next():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=60,
        vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return make_model(LlavaNextForConditionalGeneration, config)


def original_config(**changes):
    """LLaVA-NeXT's own config, with widths and heights of grids."""
    return LlamaConfig(**TEXT).to_dict() | {
        "model_type": "llava_llama",
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [pinpoint[::-1] for pinpoint in PINPOINTS],
    } | changes  # fmt: skip


COMPILED = {}  # by the model's shapes


def forward(config):
    """A compiled function to the logits of an imported model."""
    plan = blueprint(dataclasses.replace(config, precision="float32", remat="none"))

    def run(params, tokens, slots, images):
        return plan.merge(params)(tokens, jnp.arange(tokens.shape[1])[None], None, slots, images)

    return COMPILED.setdefault((config.vision_shape, config.llm_shape), jax.jit(run))


@pytest.mark.parametrize("layout", ["saved", "hub", "original"])
def test_logits_of_llava_next_match(layout, tmp_path):
    state, source = llava_next().state_dict(), tmp_path / "source"
    if layout == "saved":
        llava_next().save_pretrained(source)
    elif layout == "hub":
        write(source, to_hub_names(state), llava_next().config.to_dict())
    else:
        renamed = to_original_names(state)
        renamed["model.image_newline"] = renamed.pop("image_newline")
        write(source, renamed, original_config())
    import_weights(str(source), tmp_path / "imported")
    if layout == "original":  # the epsilon of its norms defaults to CLIP's
        description = open_model(tmp_path / "imported").description
        vision = dataclasses.replace(description.vision, norm_eps=1e-3)
        dataclasses.replace(description, vision=vision).save(tmp_path / "imported")
    saved = open_model(tmp_path / "imported")
    assert saved.description.tiles == Tiles(GRIDS, "newline")
    layout_of_images = ImageLayout(saved.description.vision, "tiles", 16, saved.description.tiles)
    sizes = [image.size for image in IMAGES]
    slots = np.concatenate([[-1] * 3, *layout_of_images.slots(sizes), [-1] * 5])
    squares = [layout_of_images.squares(image) for image in IMAGES]
    ids = np.where(slots == -1, np.arange(len(slots)) % 60, 60)

    params = {path: saved.read(path) for path in saved.shapes}
    pixels, placed = np.concatenate(squares), place_slots(slots, 0, 16 * sum(map(len, squares)))

    with compute_context(make_mesh(MeshConfig(1, 1, 1)), "float32"):
        actual = np.asarray(forward(saved.config)(params, ids[None].astype(np.int32), placed[None], pixels[None]))
    values = torch.zeros(3, 5, 3, SIDE, SIDE)
    for i, own in enumerate(squares):
        values[i, : len(own)] = normalize(own)
    inputs = {"pixel_values": values, "image_sizes": torch.tensor([size[::-1] for size in sizes])}
    with torch.no_grad():
        expected = llava_next()(torch.from_numpy(ids[None]).long(), **inputs).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_patch_merge_type": "spatial"}, "says mm_patch_merge_type 'spatial'"),
        ({"image_grid_pinpoints": [[30, 56]]}, "squares of 28 pixels"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "squares of 28 pixels"),
        ({}, "image_newline .* is missing"),
    ],
)
def test_tiles_of_other_kinds_are_refused(changes, message, tmp_path):
    renamed = to_original_names(llava_next().state_dict())
    del renamed["image_newline"]
    write(tmp_path / "source", renamed, original_config(**changes))
    with pytest.raises(UserError, match=message):
        import_weights(str(tmp_path / "source"), tmp_path / "imported")
