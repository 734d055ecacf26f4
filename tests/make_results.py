"""Result folders as ``stf_jax.evaluate`` leaves them, with given scores."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

ASKING = {"template": "v1", "image_tokens": 576, "decoding": {"max_new_tokens": 128, "temperature": 0.0, "seed": 0}}


def results(name: str, scores: Sequence[float], **changes: Any) -> dict[str, Any]:
    """Returns the results of a benchmark; ``changes`` replace keys of the protocol."""
    protocol = {"benchmark": name, "questions": len(scores), "rule": "Yes is correct.", "labels": []}
    metrics = {"accuracy": sum(scores) / len(scores)}
    return {"benchmark": name, "metrics": metrics, "protocol": protocol | {"asking": ASKING} | changes}


def write(
    folder: pathlib.Path,
    scores: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    images: Sequence[int | None] | None = None,
    answers: Sequence[str] | None = None,
    blank: Sequence[float] = (),
    cost: Mapping[str, Any] | None = None,
    **changes: Any,
) -> pathlib.Path:
    """Writes results with the score of each question, of ``pope`` or of several benchmarks by name.

    Args:
      folder: the folder; it is created.
      scores: in 0..1.
      images: the number of each question's image; by default each has its own.
      answers: by default yes for each score above one half, and no for the others.
      blank: the scores of questions about blank images.
      cost: the content of ``cost.json``.
      **changes: of the protocol.
    """
    several = scores if isinstance(scores, Mapping) else {"pope": scores}
    for name, values in several.items():
        place = folder / name if isinstance(scores, Mapping) else folder
        place.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "question_id": str(index),
                "prompt": f"Is it {index}?",
                "image": index if images is None else images[index],
                "answers": [("yes" if score > 0.5 else "no") if answers is None else answers[index]],
                "score": score,
                "blank": False,
            }
            for index, score in enumerate(values)
        ]
        rows += [
            rows[0] | {"question_id": f"blank {i}", "score": score, "blank": True} for i, score in enumerate(blank)
        ]
        (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "results.json").write_text(json.dumps(results(name, values, **changes)))
    if isinstance(scores, Mapping):
        file = folder / "results.json"
        file.write_text(json.dumps([results(name, values, **changes) for name, values in several.items()]))
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(cost))
    return folder
