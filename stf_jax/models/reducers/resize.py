"""A smaller image: the tower itself makes fewer patches (the baseline of VTC-Bench, ACL 2026).

The square image that the tower would get is reduced by bicubic interpolation with antialiasing to ``keep`` patches, for
144 of 576 from 336 to 168 pixels, and the position embeddings are interpolated as transformers does with
``interpolate_pos_encoding=True``. The image was already reduced to the tower's size once; reducing the original in one
go would give slightly other pixels.

``keep`` must be the number of patches of a grid, as for :func:`stf_jax.models.reducers.base.grid_of`. If it is not
square (192 = 12×16, 128 = 8×16), the image loses more of its height than of its width; prefer a square number near it
(196, 121) where a table allows it.

It acts before the tower, needs neither attention nor the question, and is the only reducer that spares the tower too.

Axis letters: B images, C tower width.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from stf_jax.config import FusionConfig, UserError
from stf_jax.models.reducers.base import PatchReducer, grid_of
from stf_jax.models.towers.base import VisionConfig, find_tower_class
from stf_jax.models.towers.vit import VisionTower


def resize(
    tower: VisionTower, images: UInt8[Array, "B H W 3"], taps: tuple[int, ...], dtype: DTypeLike, keep: int
) -> tuple[Float[Array, "B {keep} C"], ...]:
    """Like the tower's call, for images of ``keep`` patches."""
    rows, columns = grid_of(keep, tower.config.grid)
    with jax.named_scope("vision"), jax.named_scope("resize"):
        images = resize_images(images, rows * tower.config.patch_size, columns * tower.config.patch_size)
    return tower(images, taps, dtype)


def resize_images(images: UInt8[Array, "B H W 3"], height: int, width: int) -> UInt8[Array, "B {height} {width} 3"]:
    """Images of another size, unchanged if it is the same."""
    shape = (len(images), height, width, 3)
    if images.shape == shape:
        return images
    # The default precision of a TPU has eight significant bits, as a pixel has.
    pixels = jax.image.resize(images.astype(jnp.float32), shape, "cubic", precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def check_tower(config: FusionConfig, vision: VisionConfig, keep: int) -> None:
    """Raises UserError if ``keep`` patches do not form a grid, or the tower cannot read images of another size."""
    del config
    grid_of(keep, vision.grid)
    if not issubclass(find_tower_class(vision), VisionTower):
        raise UserError(f"reduce=resize interpolates the positions of a VisionTower, which {vision.family} is not.")


COMPONENTS = {"resize": PatchReducer(resize, check_tower)}
