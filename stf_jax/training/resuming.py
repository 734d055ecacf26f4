"""What may change of a config between two starts of one run, and what would make another run of it."""

import json
import logging
from typing import Any

import jax
from etils import epath

from stf_jax.config import TrainConfig, UserError, flatten, to_json

# Of the model, the data or their order, but for how they are computed and where they lie. The paths of data and
# tokenizer may change: what they hold may not, which the stream of batches sees to (data/pipeline.py).
_FIXED = "seed", "global_batch_size", "rules", "model.", "data."
_FREE = (
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "data.threads",
    "data.annotations",
    "data.images",
    "data.records",
    "data.tokenizer",
)
_NEW_OPTIMIZER = "optimizer.clip_norm"  # 0 or not: another tree of moments

_log = logging.getLogger(__name__)


def changes(config: TrainConfig, workdir: epath.Path) -> dict[str, tuple[Any, Any]]:
    """Keys that differ from the config that a run began with or last went on with, with what they were and are.

    Raises:
      UserError: one of them would make another model, or another stream of data, of what the checkpoint holds.
    """
    try:
        before = flatten(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError, AttributeError):  # or no object
        _log.warning("%s cannot be read, so changes of the config are not seen.", workdir / "config.json")
        return {}
    default, now = (flatten(json.loads(json.dumps(to_json(one)))) for one in (TrainConfig(), config))
    changed = {key: (was, now[key]) for key in now if (was := before.get(key, default[key])) != now[key]}
    fixed = {key: values for key, values in changed.items() if _fixed(key, *values)}
    if fixed:
        raise UserError(
            f"The run in {workdir} cannot go on with a changed {_told(fixed)}: continue with what its config.json "
            "says, or start in another --workdir with init_from."
        )
    if changed and jax.process_index() == 0:
        _log.info("The run goes on with a changed %s.", _told(changed))
    return changed


def _fixed(key, was, now):
    if key == _NEW_OPTIMIZER:
        return bool(was) != bool(now)
    return key.startswith(_FIXED) and key not in _FREE


def _told(changed):
    return ", ".join(f"{key} (was {was!r}, now {now!r})" for key, (was, now) in changed.items())
