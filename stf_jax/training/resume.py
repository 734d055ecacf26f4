"""Which config keys may change between two starts of one run, and which would make it another run."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from stf_jax.config import TrainConfig, UserError, flatten, to_json

# The model, the data and their order are fixed, except for how they are computed and where they are stored. The paths
# of data and tokenizer may change, but not their contents, which data/pipeline.py checks.
_FIXED = "seed", "global_batch_size", "objective", "rules", "model.", "data."
_CHANGEABLE = (
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "data.threads",
    "data.annotations",
    "data.images",
    "data.records",
    "data.tokenizer",
)
_CHANGES_MOMENTS = "optimizer.clip_norm"  # switching between 0 and another value changes the tree of moments

_log = logging.getLogger(__name__)


def check_changes(config: TrainConfig, workdir: epath.Path) -> dict[str, tuple[Any, Any]]:
    """Keys that differ from the config of the run's last start, with their old and new values.

    Raises:
      UserError: a changed key would change the model or the stream of data of the checkpoint.
    """
    try:
        before = flatten(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError, AttributeError):  # or not an object
        _log.warning("%s cannot be read, so changes of the config are not detected.", workdir / "config.json")
        return {}
    default, now = (flatten(json.loads(json.dumps(to_json(each)))) for each in (TrainConfig(), config))
    changed = {key: (was, now[key]) for key in now if (was := before.get(key, default[key])) != now[key]}
    fixed = {key: values for key, values in changed.items() if _is_fixed(key, *values)}
    if fixed:
        raise UserError(
            f"The run in {workdir} cannot resume with a changed {_format_changes(fixed)}: use the values in its "
            "config.json, or start in another --workdir with init_from."
        )
    if changed and jax.process_index() == 0:
        _log.info("The run resumes with a changed %s.", _format_changes(changed))
    return changed


def _is_fixed(key: str, was: Any, now: Any) -> bool:
    if key == _CHANGES_MOMENTS:
        return bool(was) != bool(now)
    return key.startswith(_FIXED) and key not in _CHANGEABLE


def _format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} (was {was!r}, now {now!r})" for key, (was, now) in changed.items())
