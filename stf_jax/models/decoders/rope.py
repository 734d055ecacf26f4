"""Rotary positions as transformers' configs describe them, in both directions."""

import math
from collections.abc import Mapping
from typing import Any

from stf_jax.config import UserError
from stf_jax.models.decoders.base import RopeScaling

_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_USED = {"default": (), "linear": ("factor",), "llama3": tuple(_KEYS)}  # by rope_type


def read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and the scaling of transformers' ``rope_parameters``. Raises UserError for an unsupported type."""
    theta, kind = _positive_number(values, "rope_theta"), values["rope_type"]
    if kind not in _USED:
        raise UserError(f"The rotary positions have type {kind!r}: supported: {', '.join(_USED)}.")
    if kind == "default":
        return theta, None
    numbers: dict[str, Any] = {name: _positive_number(values, _KEYS[name]) for name in _USED[kind]}
    if "original_length" in numbers:
        numbers["original_length"] = int(numbers["original_length"])
    return theta, RopeScaling(kind, **numbers)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns transformers' keys of rotary positions, for transformers 5 and for earlier releases."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind} | {_KEYS[name]: getattr(scaling, name) for name in _USED[scaling.kind]}
    earlier = {} if scaling is None else {"rope_scaling": rope}
    return {**earlier, "rope_theta": theta, "rope_parameters": {**rope, "rope_theta": theta}}


def _positive_number(values: Mapping[str, Any], key: str) -> float:
    try:
        number = float(values[key])
    except (KeyError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"config.json gives rotary positions the {key} {values.get(key)!r}, which is not a positive number."
        )
    return number
