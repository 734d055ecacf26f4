"""Pictures to uint8 squares of the tower's size; normalisation happens on the device (models/vit.py)."""

import numpy as np
import PIL.Image

from stf_jax.models.vit import VisionConfig


def to_square(image: PIL.Image.Image, config: VisionConfig, aspect: str) -> np.ndarray:
    """A picture as the tower takes it, resized by Pillow's bicubic filter.

    ``square`` is CLIP's own processor: the short side to the tower's size, then the centre. ``pad`` is LLaVA-1.5's
    stage 2: first to a square on the tower's mean colour, the picture in its middle.

    Returns:
      uint8 [H, W, 3] with H = W = ``config.image_size``.
    """
    image = image.convert("RGB")
    size = config.image_size
    if aspect == "pad" and image.width != image.height:
        side = max(image.size)
        # Truncated, not rounded, as LLaVA does: (122, 116, 104) for CLIP.
        canvas = PIL.Image.new("RGB", (side, side), tuple(int(value * 255) for value in config.mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    short = min(image.size)
    if short != size:
        image = image.resize(
            (max(size, size * image.width // short), max(size, size * image.height // short)),
            PIL.Image.Resampling.BICUBIC,
        )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
