"""Pictures to squares, against transformers' own processors of CLIP and of LLaVA."""

import dataclasses

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from stf_jax.data.image import to_square
from stf_jax.models.presets import VISION

CLIP = VISION["clip-l-14-336"]
SMALL = dataclasses.replace(CLIP, image_size=57)  # odd, so that halves are rounded
SIZES = [
    (501, 333),
    (333, 501),
    (57, 57),
    (58, 57),
    (57, 58),
    (56, 57),
    (17, 23),
    (23, 17),
    (300, 3),
    (97, 1),
    (640, 480),
]


def noise(mode, size, seed=0):
    """A picture of that mode with something different everywhere."""
    width, height = size
    rng = np.random.default_rng(seed)
    if mode == "P":
        indexed = PIL.Image.fromarray(rng.integers(0, 200, (height, width), dtype=np.uint8))
        indexed.putpalette(rng.integers(0, 256, 600, dtype=np.uint8).tobytes())
        return indexed
    if mode == "1":
        return PIL.Image.fromarray(rng.random((height, width)) < 0.5)
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode=mode)


def theirs(processor, picture, config):
    size = config.image_size
    processor = processor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=PIL.Image.Resampling.BICUBIC,
        do_normalize=False,
        do_pad=processor is LlavaImageProcessorPil,
    )
    (pixels,) = processor(picture, return_tensors="np")["pixel_values"]
    return pixels.transpose(1, 2, 0) * 255


PROCESSORS = {"square": CLIPImageProcessorPil, "pad": LlavaImageProcessorPil}


@pytest.mark.parametrize("aspect", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_geometry(aspect, size):
    picture = noise("RGB", size)
    ours = to_square(picture, SMALL, aspect)
    assert (ours.shape, ours.dtype) == ((57, 57, 3), np.uint8)
    np.testing.assert_allclose(ours, theirs(PROCESSORS[aspect], picture, SMALL), atol=1)


@pytest.mark.parametrize("aspect", PROCESSORS)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_modes(aspect, mode):
    """LLaVA opens a picture by convert("RGB"), which drops transparency; transformers 5 would lay it on white."""
    picture = noise(mode, (83, 61))
    opaque = picture.convert("RGB") if "A" in mode else picture
    ours = to_square(picture, SMALL, aspect)
    np.testing.assert_allclose(ours, theirs(PROCESSORS[aspect], opaque, SMALL), atol=1)
    if mode in ("L", "1", "LA") and aspect == "square":
        assert (ours == ours[..., :1]).all()


def test_at_clip_size():
    picture = noise("RGB", (640, 427))
    for aspect, processor in PROCESSORS.items():
        ours = to_square(picture, CLIP, aspect)
        assert ours.shape == (336, 336, 3)
        np.testing.assert_allclose(ours, theirs(processor, picture, CLIP), atol=1)


def test_a_picture_of_the_right_size_is_left_alone():
    picture = noise("RGB", (57, 57))
    for aspect in PROCESSORS:
        assert np.array_equal(to_square(picture, SMALL, aspect), np.asarray(picture))


def test_the_picture_given_is_not_changed():
    picture = noise("RGB", (60, 80))
    before = picture.copy()
    for aspect in PROCESSORS:
        to_square(picture, SMALL, aspect)
    assert picture.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("size", "left", "top"), [((57, 40), 0, 8), ((40, 57), 8, 0), ((57, 56), 0, 0), ((1, 57), 28, 0)]
)
def test_padding(size, left, top):
    """A side of 57 is not resized, so every pixel can be told."""
    picture = noise("RGB", size)
    square = to_square(picture, SMALL, "pad")
    region = (slice(top, top + size[1]), slice(left, left + size[0]))
    assert np.array_equal(square[region], np.asarray(picture))
    around = np.ones((57, 57), bool)
    around[region] = False
    assert around.sum() == 57 * 57 - size[0] * size[1]
    assert (square[around] == (122, 116, 104)).all()


def test_padding_has_the_color_of_the_tower():
    """SigLIP's mean is one half: 127, cut off and not rounded."""
    config = dataclasses.replace(VISION["siglip-b-16-256"], image_size=40)
    assert to_square(noise("RGB", (40, 20)), config, "pad")[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_square_keeps_the_middle_and_pad_keeps_all(size):
    picture = PIL.Image.new("RGB", size, "red")
    width, height = size
    middle = (width // 2 - 50, height // 2 - 50, width // 2 + 49, height // 2 + 49)
    PIL.ImageDraw.Draw(picture).rectangle(middle, fill="blue")
    square, padded = (to_square(picture, SMALL, aspect) for aspect in PROCESSORS)
    red = (padded == (255, 0, 0)).all(axis=-1).mean()
    assert (square[1:-1, 1:-1] == (0, 0, 255)).all()
    assert 0.2 < red < 0.3
    assert 0.2 < (padded == (0, 0, 255)).all(axis=-1).mean() < 0.3
