"""Tests resizing against transformers' processors of CLIP, SigLIP and LLaVA, and opening good and bad files."""

import dataclasses
import io
import os
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from etils import epath
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from stf_jax.data import image
from stf_jax.data.image import open_image, read_image, read_size, to_rgb, to_square
from stf_jax.data.records import BadRow
from stf_jax.models.spec import VISION

CLIP = VISION["clip-l-14-336"]
SMALL = dataclasses.replace(CLIP, image_size=57)  # odd, to test rounding
SIGLIP = dataclasses.replace(VISION["siglip-b-16-256"], image_size=57)
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
    """Makes a noise image of a mode; ``P transparent`` is P with transparent colors."""
    width, height = size
    rng = np.random.default_rng(seed)
    if mode.startswith("P"):
        indexed = PIL.Image.fromarray(rng.integers(0, 200, (height, width), dtype=np.uint8))
        indexed.putpalette(rng.integers(0, 256, 600, dtype=np.uint8).tobytes())
        if mode != "P":
            indexed.info["transparency"] = bytes([0, 100, 255] * 60)
        return indexed
    if mode == "1":
        return PIL.Image.fromarray(rng.random((height, width)) < 0.5)
    if mode == "I;16":
        return PIL.Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode=mode)


def reference(processor, image, config):
    size = config.image_size
    square = {"height": size, "width": size}
    options = {"size": square}
    if processor is not SiglipImageProcessorPil:
        options = {"size": {"shortest_edge": size}, "crop_size": square, "do_pad": processor is LlavaImageProcessorPil}
    # The mean is only used for padding.
    options |= {"resample": PIL.Image.Resampling.BICUBIC, "do_normalize": False, "image_mean": config.mean}
    (pixels,) = processor(**options)(image, return_tensors="np")["pixel_values"]
    return pixels.transpose(1, 2, 0) * 255


PROCESSORS = {"square": CLIPImageProcessorPil, "pad": LlavaImageProcessorPil}
CASES = {  # tower, aspect, transformers' processor
    "clip square": (SMALL, "square", CLIPImageProcessorPil),
    "clip pad": (SMALL, "pad", LlavaImageProcessorPil),
    "siglip square": (SIGLIP, "square", SiglipImageProcessorPil),
    "siglip pad": (SIGLIP, "pad", LlavaImageProcessorPil),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_geometry(case, size):
    config, aspect, processor = CASES[case]
    image = noise("RGB", size)
    result = to_square(image, config, aspect)
    assert (result.shape, result.dtype) == ((57, 57, 3), np.uint8)
    np.testing.assert_allclose(result, reference(processor, image, config), atol=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["L", "P", "P transparent", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_modes(case, mode):
    config, aspect, processor = CASES[case]
    image = noise(mode, (83, 61))
    result = to_square(image, config, aspect)
    np.testing.assert_allclose(result, reference(processor, image, config), atol=1)
    if mode in ("L", "1", "LA", "I;16") and aspect == "square":
        assert (result == result[..., :1]).all()


def test_transparent_pixels_become_white():
    image = PIL.Image.new("RGBA", (2, 1), (200, 0, 100, 0))
    image.putpixel((1, 0), (200, 0, 100, 255))
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [200, 0, 100]]]


def test_at_clip_size():
    image = noise("RGB", (640, 427))
    for aspect, processor in PROCESSORS.items():
        result = to_square(image, CLIP, aspect)
        assert result.shape == (336, 336, 3)
        np.testing.assert_allclose(result, reference(processor, image, CLIP), atol=1)


def test_an_image_of_the_right_size_is_unchanged():
    image = noise("RGB", (57, 57))
    for aspect in PROCESSORS:
        assert np.array_equal(to_square(image, SMALL, aspect), np.asarray(image))


def test_the_input_image_is_not_modified():
    image = noise("RGB", (60, 80))
    before = image.copy()
    for aspect in PROCESSORS:
        to_square(image, SMALL, aspect)
    assert image.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("size", "left", "top"), [((57, 40), 0, 8), ((40, 57), 8, 0), ((57, 56), 0, 0), ((1, 57), 28, 0)]
)
def test_padding(size, left, top):
    """A side of 57 is not resized, so every pixel can be compared."""
    image = noise("RGB", size)
    square = to_square(image, SMALL, "pad")
    region = (slice(top, top + size[1]), slice(left, left + size[0]))
    assert np.array_equal(square[region], np.asarray(image))
    around = np.ones((57, 57), bool)
    around[region] = False
    assert around.sum() == 57 * 57 - size[0] * size[1]
    assert (square[around] == (122, 116, 104)).all()


def test_padding_has_the_color_of_the_tower():
    """SigLIP's mean is one half: 127, truncated and not rounded."""
    config = dataclasses.replace(VISION["siglip-b-16-256"], image_size=40)
    assert to_square(noise("RGB", (40, 20)), config, "pad")[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("size", [(12, 1999), (1999, 12)])
def test_padding_a_long_image_needs_little_memory(size, monkeypatch):
    """The square of a file of 670x133000 pixels would take 66 GiB."""
    make, long_image, canvases = PIL.Image.new, noise("RGB", size), []
    expected = reference(LlavaImageProcessorPil, long_image, SMALL)
    monkeypatch.setattr(image, "MAX_PIXELS", 200_000)
    monkeypatch.setattr(PIL.Image, "new", lambda mode, size, *args: canvases.append(size) or make(mode, size, *args))
    square = to_square(long_image, SMALL, "pad")
    assert max(width * height for width, height in canvases) < image.MAX_PIXELS
    np.testing.assert_allclose(square, expected, atol=1)


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_square_crops_the_center_and_pad_keeps_everything(size):
    image = PIL.Image.new("RGB", size, "red")
    width, height = size
    middle = (width // 2 - 50, height // 2 - 50, width // 2 + 49, height // 2 + 49)
    PIL.ImageDraw.Draw(image).rectangle(middle, fill="blue")
    square, padded = (to_square(image, SMALL, aspect) for aspect in PROCESSORS)
    red = (padded == (255, 0, 0)).all(axis=-1).mean()
    assert (square[1:-1, 1:-1] == (0, 0, 255)).all()
    assert 0.2 < red < 0.3
    assert 0.2 < (padded == (0, 0, 255)).all(axis=-1).mean() < 0.3


# ---- Files -----------------------------------------------------------------------------------------------------------


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, data, depth=8, color=2):
    """Makes a PNG without a library; ``color`` 2 is RGB."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return epath.Path(tmp_path / "images")


EXACT = {"PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"}  # lossless, as saved here


@pytest.mark.parametrize("kind", ["JPEG", *sorted(EXACT)])
def test_formats_are_detected_from_the_content(folder, kind):
    image = noise("P", (40, 30)) if kind == "GIF" else noise("RGB", (40, 30))
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    for suffix in (f".{kind.lower()}", ".jpg", ""):
        name = f"deep/{kind}{suffix}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(saved(image, kind, **options))
        opened = open_image(read_image(folder, name), name)
        assert (opened.format, opened.size) == (kind, (40, 30))
        expected = PIL.Image.open(str(folder / name)).convert("RGB")
        assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(expected))
        if kind in EXACT:
            assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_used(kind):
    frames = [PIL.Image.new("RGB", (20, 10), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options), "moving.jpg")
    assert (np.asarray(to_rgb(opened)) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("case", CASES)
def test_images_are_rotated_by_their_exif_orientation(tmp_path, case, orientation):
    config, aspect, processor = CASES[case]
    image = PIL.Image.new("RGB", (90, 61), "white")
    PIL.ImageDraw.Draw(image).polygon([(0, 0), (80, 0), (0, 50)], fill="red")
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(saved(image, "JPEG", exif=exif))
    opened = open_image((tmp_path / "a.jpg").read_bytes(), "a.jpg")
    assert opened.size == ((90, 61) if orientation < 5 else (61, 90)) == read_size(epath.Path(tmp_path), "a.jpg")
    expected = load_image(str(tmp_path / "a.jpg"))
    assert np.array_equal(np.asarray(opened), np.asarray(expected))
    np.testing.assert_allclose(to_square(opened, config, aspect), reference(processor, expected, config), atol=1)


def test_16_bit_and_cmyk_images():
    """Images with 16 bits per channel, gray and in color, and a CMYK JPEG."""
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (30, 40, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    files = {
        "color": png(40, 30, rows, depth=16),
        "gray": saved(noise("I;16", (40, 30)), "PNG"),
        "print": saved(noise("CMYK", (40, 30)), "JPEG"),
    }
    for name, content in files.items():
        opened = open_image(content, name)
        for config, aspect, processor in CASES.values():
            given = PIL.Image.open(io.BytesIO(content))
            np.testing.assert_allclose(to_square(opened, config, aspect), reference(processor, given, config), atol=1)
    assert open_image(files["print"], "print").mode == "CMYK"
    assert open_image(files["gray"], "gray").mode == "I;16"
    seen = np.asarray(to_rgb(open_image(files["color"], "color"))).astype(int)
    assert abs(seen - deep / 257).max() <= 1


def test_broken_exif_is_ignored():
    image = noise("RGB", (40, 30))
    for exif in (b"Exif\0\0", b"Exif\0\0garbage" * 9, b"Exif\0\0II*\0\xff\xff\xff\xff"):
        opened = open_image(saved(image, "JPEG", exif=exif), "a.jpg")
        assert opened.size == (40, 30)


def reason(content):
    with pytest.raises(BadRow, match=r"^Image some/a\.jpg cannot be opened: .+\.$") as e:
        open_image(content, "some/a.jpg")
    assert e.value.image == "some/a.jpg"
    return e.value.reason


GARBAGE = np.random.default_rng(0).bytes(3000)
CORRUPT = {
    "empty": b"",
    "text": b"<html><body>404 Not Found</body></html>",
    "garbage": GARBAGE,
    "JPEG, then garbage": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + GARBAGE,
    "PNG, then garbage": b"\x89PNG\r\n\x1a\n" + GARBAGE,
    "PNG with a header, then garbage": png(40, 30, b"")[:33] + GARBAGE,
    "PNG of garbage": png(40, 30, b"")[:33] + struct.pack(">I", 3000) + b"IDAT" + GARBAGE + b"\0\0\0\0",
    "GIF, then garbage": b"GIF89a" + GARBAGE,
    "EPS": saved(noise("RGB", (40, 30)), "EPS"),
    "PDF": saved(noise("RGB", (40, 30)), "PDF"),
    "ICO": saved(noise("RGB", (40, 30)), "ICO"),
    "a PNG without pixels": png(0, 0, b""),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_file_that_is_not_an_image_is_corrupt(name):
    assert reason(CORRUPT[name]) == "corrupt"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_cut_file_is_truncated(kind, share):
    content = saved(noise("RGB", (80, 60)), kind)
    open_image(content, "complete")
    assert reason(content[: int(share * len(content))]) == "truncated"


def test_images_that_are_too_large_are_refused_without_decoding():
    assert reason(png(60000, 50000, b"")) == "too_large"
    assert reason(png(2**31 - 1, 2**31 - 1, b"")) == "too_large"
    assert reason(saved(PIL.Image.new("1", (60000, 1)), "PNG")) == "too_large"
    assert reason(saved(PIL.Image.new("1", (1, 201)), "PNG")) == "too_large"
    assert open_image(saved(PIL.Image.new("1", (1, 200)), "PNG"), "long").size == (1, 200)


def test_maximum_file_size(folder, monkeypatch):
    content = saved(noise("RGB", (40, 30)), "PNG")
    (folder / "a.png").write_bytes(content)
    monkeypatch.setattr(image, "MAX_FILE_BYTES", len(content))
    assert read_image(folder, "a.png") == content
    monkeypatch.setattr(image, "MAX_FILE_BYTES", len(content) - 1)
    with pytest.raises(BadRow, match=f"over {len(content) - 1:,} bytes") as e:
        read_image(folder, "a.png")
    assert (e.value.reason, e.value.image) == ("too_large", "a.png")


@pytest.mark.parametrize(
    ("name", "reason", "clause"),
    [
        ("..", "outside", "leaves the folder"),
        ("../secret.png", "outside", "leaves the folder"),
        ("a/../../secret.png", "outside", "leaves the folder"),
        ("/etc/hostname", "outside", "leaves the folder"),
        ("http://a.org/b.jpg", "url", "is a URL, not a path: save it as a file in"),
        ("gs://a/b", "url", "is a URL"),
        ("file:///etc/hostname", "url", "is a URL"),
        (" DATA:image/png;base64,iVBO", "url", "is a data: URI"),
        ("a\0.png", "missing", "its name contains NUL"),
    ],
)
def test_paths_outside_the_folder_are_refused(folder, name, reason, clause):
    (folder.parent / "secret.png").write_bytes(saved(noise("RGB", (4, 3)), "PNG"))
    with pytest.raises(BadRow, match=clause) as e:
        read_image(folder, name)
    assert (e.value.reason, e.value.image) == (reason, name)


def test_any_path_within_the_folder_is_accepted(folder):
    (folder / "deep").mkdir()
    (folder / "b.png").write_bytes(b"b")
    (folder.parent / "elsewhere").write_bytes(b"c")
    os.symlink(folder.parent / "elsewhere", folder / "link.png")
    assert [read_image(folder, name) for name in ("b.png", "./b.png", "deep/../b.png", "..b/../b.png")] == [b"b"] * 4
    assert read_image(folder, "link.png") == b"c"


@pytest.mark.parametrize("name", ["nowhere.png", "deep/nowhere.png", "b.png/c.png", "", ".", "deep"])
def test_a_missing_file_is_reported(folder, name):
    (folder / "deep").mkdir()
    (folder / "b.png").write_bytes(b"b")
    with pytest.raises(BadRow, match=rf"^Image {folder}.* cannot be opened: .+\.$") as e:
        read_image(folder, name)
    assert (e.value.reason, e.value.image) == ("missing", name)
