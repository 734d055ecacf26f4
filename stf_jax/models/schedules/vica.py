"""ViCA (arXiv 2602.07574): image tokens are keys and values of a few layers, and are never updated.

In those layers text sees keys and values made of the fusion's tokens by the layer's own norm and kernels; in all other
layers it sees text only. Image tokens are in no row: they pass no MLP and get nothing from attention. Positions are
those of the complete row, so text after an image stays as far from text before it.

- ``layers`` lists the layers that see images, from 0, as ``layers=0+1+7+8``. The authors found their layers by a search
  on a trained LLaVA-1.5: ``vica_7b`` and ``vica_13b`` have them. For another decoder they must be found again; by
  default ``vica`` takes those of 7B in proportion to the depth, a quarter of the layers of a deep decoder.
- ``vica_7b`` is as in the authors' program also in that text before the image, the system prompt, gets nothing from
  attention, in any layer, but passes each MLP. In ``vica_13b`` and ``vica`` it attends as usual.

Axis letters: L decoder layers, N image tokens per image.
"""

import functools

from stf_jax.models.schedules.base import Schedule
from stf_jax.models.stages import Stage

_LAYERS_7B = 0, 1, 7, 8, 9, 10, 11, 14  # of 32
_LAYERS_13B = 0, 6, 8, 9, 10, 13, 14, 16  # of 40


def vica(*, layers: tuple[int, ...] = ()) -> Schedule:
    """ViCA in which these layers see images; none: those of 7B, in proportion to the depth."""
    return Schedule(functools.partial(_plan, layers))


def _plan(seeing: tuple[int, ...], layers: int, tokens: int) -> list[Stage]:
    seeing = seeing or tuple(sorted({layer * layers // 32 for layer in _LAYERS_7B}))
    if beyond := [layer for layer in seeing if layer >= layers]:
        raise ValueError(f"layers contains {beyond[0]}, but the language model's layers are 0 to {layers - 1}.")
    sees = [layer in seeing for layer in range(layers)]
    changes = [layer for layer in range(layers) if layer == 0 or sees[layer] != sees[layer - 1]]
    return [Stage(layer, tokens if sees[layer] else 0, beside=sees[layer]) for layer in changes]


COMPONENTS = {
    "vica": vica,
    "vica_7b": Schedule(functools.partial(_plan, _LAYERS_7B), silent_prefix=True),
    "vica_13b": Schedule(functools.partial(_plan, _LAYERS_13B)),
}
