"""Images: opened safely, and made uint8 squares of the tower's size (normalised on the device, models/vit.py)."""

import contextlib
import io
import os
import posixpath
import re
import stat
import warnings
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps
from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer
from etils import epath

from stf_jax.config import shorten
from stf_jax.data.records import BadRow
from stf_jax.runtime.files import in_bucket

if TYPE_CHECKING:  # prepare's workers open images and need neither jax nor flax
    from stf_jax.models.vit import VisionConfig

# Told by content, whatever the suffix says. Others are for documents and designers, and some run programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MOST_PIXELS = 89_478_485  # a quarter of a GiB in RGB: where Pillow begins to warn of decompression bombs
MOST_RATIO = 200  # of the long side to the short one
MOST_BYTES = 2**28  # of a file
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)  # it is refused instead
_URL = re.compile(r"\s*(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_CUT = ("truncated", "unexpected end", "not enough image data", "premature")


def read_image(folder: epath.Path, name: str) -> bytes:
    """The file of that name below the folder: a path from there, or an absolute one that leads there.

    Links within the folder may lead anywhere.

    Raises:
      BadRow: ``url`` for what is no path, ``outside`` for a path that leaves the folder, ``missing``, ``too_large`` for
        absurdly many bytes.
    """
    path = folder / _relative(os.fspath(folder), name)
    shown = shorten(os.fspath(path))
    try:
        if not in_bucket(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")  # a named pipe would be waited for
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRow("missing", f"Image {shown} cannot be opened: {reason}.", name) from None
    if len(content) > MOST_BYTES:
        raise BadRow("too_large", f"Image {shown} has over {MOST_BYTES:,} bytes.", name)
    return content


def _relative(folder: str, name: str) -> str:
    """The path from the folder on of an image's name."""
    if in_bucket(folder) and name.startswith(folder.rstrip("/") + "/"):
        name = name[len(folder.rstrip("/")) + 1 :]
    shown = repr(shorten(name))
    if url := _URL.match(name):
        kind = "a data: URI" if url[1].lower() == "data:" else "a URL"
        raise BadRow("url", f"Image {shown} is {kind}, not a path: save it as a file in {folder}.", name)
    if "\0" in name:
        raise BadRow("missing", f"Image {shown} cannot be opened: no file has NUL in its name.", name)
    relative = posixpath.normpath(name)
    if posixpath.isabs(relative) and not in_bucket(folder):
        for parent in (os.path.abspath(folder), os.path.realpath(folder)):
            if relative.startswith(parent.rstrip("/") + "/"):
                return posixpath.relpath(relative, parent)
    if posixpath.isabs(relative) or relative.split("/")[0] == "..":
        raise BadRow("outside", f"Image path {shown} leaves the folder {folder}.", name)
    return relative


def open_image(content: bytes, name: str) -> PIL.Image.Image:
    """Decodes an image file, its first frame where it has several, upright where its EXIF says how.

    That is how ``transformers.image_utils.load_image`` turns it. Modes are left as they are.

    Raises:
      BadRow: ``corrupt``, ``truncated``, or ``too_large``: more than :data:`MOST_PIXELS`, or a side over
        :data:`MOST_RATIO` times the other.
    """
    shown = shorten(name)
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS or max(width, height) > MOST_RATIO * min(width, height):
            raise PIL.Image.DecompressionBombError(f"it has {width}x{height} pixels")
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF says nothing of the pixels
            PIL.ImageOps.exif_transpose(image, in_place=True)
        return image
    except PIL.Image.DecompressionBombError as error:
        raise BadRow("too_large", f"Image {shown} cannot be opened: {_reason(error)}.", name) from None
    except PIL.UnidentifiedImageError:
        raise BadRow("corrupt", f"Image {shown} cannot be opened: no format of {', '.join(FORMATS)}.", name) from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        cut = any(words in str(error).lower() for words in _CUT)
        what = "truncated" if cut else "corrupt"
        raise BadRow(what, f"Image {shown} cannot be opened: {_reason(error)}.", name) from None


def _reason(error):
    """What a decoder said, without the full stop that some end with."""
    return str(error).strip(" .") or type(error).__name__


def open_file(file: epath.Path) -> PIL.Image.Image:
    """Reads and decodes an image file. Raises BadRow as :func:`read_image` and :func:`open_image` do."""
    return open_image(read_image(file.parent, file.name), os.fspath(file))


def to_square(image: PIL.Image.Image, config: "VisionConfig", aspect: str) -> np.ndarray:
    """An image as the tower takes it, by Pillow's bicubic filter, as transformers' processors give it.

    ``square`` is the tower's own processor: CLIP's takes the short side to the tower's size, then the centre; SigLIP's
    squeezes both sides. ``pad`` is LLaVA-1.5's stage 2: first to a square on the tower's mean colour, the image in
    its middle. What is transparent is laid on white. A large square is reduced by another library: about one value in
    100,000 then differs from Pillow's by 2, all others by 1 at most.

    Returns:
      uint8 [H, W, 3] with H = W = ``config.image_size``.
    """
    image, size = to_rgb(image), config.image_size
    if aspect == "pad" and image.width != image.height:
        # Truncated, not rounded, as LLaVA does: (122, 116, 104) for CLIP.
        return np.asarray(_padded(image, size, tuple(int(value * 255) for value in config.mean)))
    if not config.crops:
        return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))
    short = min(image.size)
    if short != size:
        # All of it, though the middle is wanted: Pillow's values depend on which side it begins with, and that on this.
        sides = [max(size, size * side // short) for side in image.size]
        image = image.resize(sides, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any mode in RGB, what is transparent laid on white."""
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# To resize a square, Pillow takes one side after the other, with whole values between. The other library does that four
# times as fast; its 16-bit coefficients turn a few roundings. In a reduction like this no value has more than half the
# weight, so they stay within 1 of Pillow's, but for about one value in 100,000, where two roundings add up to 2.
_REDUCTION = 1.75


def _padded(image, size, color):
    side = max(image.size)
    fast = side >= _REDUCTION * size
    width = height = side
    if fast and image.width == side:  # above and below will be one colour, so the width can go first
        image, width = _reduced(image, (size, image.height)), size
    elif fast and side * side > MOST_PIXELS:  # gigabytes; with the height first, a few more roundings turn
        image, height = _reduced(image, (image.width, size)), size
    canvas = PIL.Image.new("RGB", (width, height), color)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    if not fast:
        return canvas.resize((size, size), PIL.Image.Resampling.BICUBIC)
    return _reduced(_reduced(canvas, (size, height)), (size, size))


def _reduced(image, size):
    if image.size == size:
        return image
    result = PIL.Image.new("RGB", size)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)
    Resizer().resize_pil(image, result, options)
    return result
