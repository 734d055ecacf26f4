"""Opens images safely and resizes them to the tower's size (the device normalizes them, models/towers/vit.py)."""

import contextlib
import io
import os
import posixpath
import re
import stat
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from etils import epath

from stf_jax.config import shorten
from stf_jax.data.records import BadRow, Embedded, name_image
from stf_jax.files import in_bucket

if TYPE_CHECKING:  # prepare's workers open images and need neither jax nor flax
    from stf_jax.models.towers.base import VisionConfig

# Detected from the content, not the suffix. Other formats are for documents and design; some can run programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # a quarter of a GiB in RGB: where Pillow begins to warn of decompression bombs
MAX_ASPECT_RATIO = 200  # of the long side to the short one
MAX_FILE_BYTES = 2**28
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)  # it is refused instead
_URL = re.compile(r"\s*(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TRUNCATED = ("truncated", "unexpected end", "not enough image data", "premature")


def read_image(folder: epath.Path | None, image: str | Embedded) -> bytes:
    """Reads the file of an image: embedded in its row, or below a folder.

    A path is relative to the folder, or an absolute path in it. Links in the folder may lead anywhere.

    Args:
      folder: None if there is none, because all images are embedded.
      image: its path, or the image itself.

    Raises:
      BadRow: ``url`` if the name is not a path, ``outside`` if it leaves the folder, ``missing``, or ``too_large`` for
        more than :data:`MAX_FILE_BYTES`.
    """
    with _open_file(folder, image) as (file, name):
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise BadRow("too_large", f"Image {shorten(name)} has over {MAX_FILE_BYTES:,} bytes.", name_image(image))
    return content


def read_size(folder: epath.Path | None, image: str | Embedded) -> tuple[int, int]:
    """Reads the width and height that :func:`open_image` gives an image, from its header alone.

    Args:
      folder, image: as for :func:`read_image`.

    Raises:
      BadRow: as :func:`read_image` and :func:`open_image`.
    """
    with _open_file(folder, image) as (file, name), _as_bad_row(name):
        header = _open_header(file)
        # A PNG whose EXIF data follow its pixels would have to be decoded to know them.
        has_exif = header.format != "PNG" or not header.info.keys().isdisjoint(("exif", "Raw profile type exif"))
        orientation = header.getexif().get(PIL.ExifTags.Base.Orientation) if has_exif else None
        return header.size[::-1] if orientation in _SIDEWAYS else header.size


@contextlib.contextmanager
def _open_file(folder: epath.Path | None, image: str | Embedded) -> Iterator[tuple[IO[bytes], str]]:
    """Opens the file of an image; also gives the name that messages call it. Raises BadRow as :func:`read_image`."""
    if isinstance(image, Embedded):
        content = image.read()
        if content is not None:
            yield io.BytesIO(content), image.name
            return
        if not image.path:
            raise BadRow("missing", f"Image {shorten(image.name)} is empty.", image.name)
    name = image.path if isinstance(image, Embedded) else image
    if folder is None:
        raise BadRow("missing", f"Image {shorten(name)!r} is a path, but no image folder is given.", name)
    path = folder / _relative(os.fspath(folder), name)
    short_name = shorten(os.fspath(path))
    try:
        if not in_bucket(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")  # opening a named pipe would block
        with path.open("rb") as file:
            yield file, os.fspath(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRow("missing", f"Image {short_name} cannot be opened: {reason}.", name) from None


def _relative(folder: str, name: str) -> str:
    """Returns an image's path relative to the folder."""
    if in_bucket(folder) and name.startswith(folder.rstrip("/") + "/"):
        name = name[len(folder.rstrip("/")) + 1 :]
    short_name = repr(shorten(name))
    if url := _URL.match(name):
        kind = "a data: URI" if url[1].lower() == "data:" else "a URL"
        raise BadRow("url", f"Image {short_name} is {kind}, not a path: save it as a file in {folder}.", name)
    if "\0" in name:
        raise BadRow("missing", f"Image {short_name} cannot be opened: its name contains NUL.", name)
    relative = posixpath.normpath(name)
    if posixpath.isabs(relative) and not in_bucket(folder):
        for parent in (os.path.abspath(folder), os.path.realpath(folder)):
            if relative.startswith(parent.rstrip("/") + "/"):
                return posixpath.relpath(relative, parent)
    if posixpath.isabs(relative) or relative.split("/")[0] == "..":
        raise BadRow("outside", f"Image path {short_name} leaves the folder {folder}.", name)
    return relative


def open_image(content: bytes, name: str) -> PIL.Image.Image:
    """Decodes an image file: its first frame, rotated as its EXIF data say.

    The rotation is that of ``transformers.image_utils.load_image``. The mode is kept.

    Raises:
      BadRow: ``corrupt``, ``truncated``, or ``too_large``: more than :data:`MAX_PIXELS`, or one side more than
        :data:`MAX_ASPECT_RATIO` times the other.
    """
    with _as_bad_row(name):
        image = _open_header(io.BytesIO(content))
        image.load()
        with contextlib.suppress(Exception):  # the pixels are good even if the EXIF data are broken
            PIL.ImageOps.exif_transpose(image, in_place=True)
        return image


def _open_header(file: IO[bytes]) -> PIL.Image.Image:
    image = PIL.Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PIL.Image.DecompressionBombError(f"it has {width}x{height} pixels")
    return image


@contextlib.contextmanager
def _as_bad_row(name: str) -> Iterator[None]:
    """Raises what a decoder raises as a BadRow of the image with this name."""
    short_name = shorten(name)
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        raise BadRow("too_large", f"Image {short_name} cannot be opened: {_reason(error)}.", name) from None
    except PIL.UnidentifiedImageError:
        raise BadRow(
            "corrupt", f"Image {short_name} cannot be opened: its format is none of {', '.join(FORMATS)}.", name
        ) from None
    except Exception as error:  # broken files make decoders raise many types
        truncated = any(words in str(error).lower() for words in _TRUNCATED)
        reason = "truncated" if truncated else "corrupt"
        raise BadRow(reason, f"Image {short_name} cannot be opened: {_reason(error)}.", name) from None


def _reason(error: Exception) -> str:
    """Returns a decoder's message without a full stop."""
    return str(error).strip(" .") or type(error).__name__


def open_image_file(file: epath.Path) -> PIL.Image.Image:
    """Reads and decodes an image file. Raises BadRow as :func:`read_image` and :func:`open_image` do."""
    return open_image(read_image(file.parent, file.name), os.fspath(file))


def to_square(image: PIL.Image.Image, config: "VisionConfig", aspect: str) -> np.ndarray:
    """Resizes an image to the tower's input size with Pillow's bicubic filter, like transformers' processors.

    ``square`` is the tower's own processor: CLIP's resizes the short side to the tower's size and crops the center;
    SigLIP's resizes both sides. ``pad`` is LLaVA-1.5's stage 2: it first centers the image on a square of the tower's
    mean color. Transparent pixels become white. Large squares are reduced by another library: about one value in
    100,000 then differs from Pillow's by 2, all others by at most 1.

    Returns:
      uint8 [H, W, 3] with H = W = ``config.image_size``.
    """
    image, size = to_rgb(image), config.image_size
    if aspect == "pad" and image.width != image.height:
        # Truncated, not rounded, as LLaVA does: (122, 116, 104) for CLIP.
        return np.asarray(_pad(image, size, tuple(int(value * 255) for value in config.mean)))
    if not config.crops:
        return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))
    short = min(image.size)
    if short != size:
        # Resize all of the image, not only the center: Pillow's values depend on which side it resizes first, which
        # depends on the full size.
        sides = [max(size, size * side // short) for side in image.size]
        image = image.resize(sides, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts an image of any mode to RGB; transparent pixels become white."""
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Pillow resizes one side after the other and rounds in between. The other library does the same four times as fast, but
# its 16-bit coefficients round a few values differently. For a reduction by at least this factor no source pixel has
# more than half the weight, so values stay within 1 of Pillow's, except for about one in 100,000, where two rounding
# differences add up to 2.
_MIN_FAST_REDUCTION = 1.75


def _pad(image: PIL.Image.Image, size: int, color: tuple[int, ...]) -> PIL.Image.Image:
    side = max(image.size)
    fast = side >= _MIN_FAST_REDUCTION * size
    width = height = side
    if fast and image.width == side:  # padding above and below is one color, so the width can be reduced first
        image, width = _reduce(image, (size, image.height)), size
    elif fast and side * side > MAX_PIXELS:  # gigabytes; reducing the height first rounds a few more values differently
        image, height = _reduce(image, (image.width, size)), size
    canvas = PIL.Image.new("RGB", (width, height), color)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    if not fast:
        return canvas.resize((size, size), PIL.Image.Resampling.BICUBIC)
    return _reduce(_reduce(canvas, (size, height)), (size, size))


def _reduce(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    if image.size == size:
        return image
    # Here, because benchmarks/device_check.py runs without it.
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

    result = PIL.Image.new("RGB", size)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)
    Resizer().resize_pil(image, result, options)
    return result
