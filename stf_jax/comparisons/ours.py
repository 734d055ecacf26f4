"""Reads result folders of ``stf_jax.evaluate``, ``main`` and ``ablate``."""

import json
import statistics
from typing import Any

from etils import epath

from stf_jax.comparisons.runs import Run, ScoredBenchmark, make_benchmark, read_cost
from stf_jax.config import UserError, flatten
from stf_jax.evals.answers import match_answers, read_answers
from stf_jax.evals.files import ANSWERS, COST_FILE, RESULTS
from stf_jax.evals.registry import BENCHMARKS
from stf_jax.evals.scores import SCORES, ScoredQuestion, read_scores, score_questions
from stf_jax.files import read_json

TOOL = "stf_jax.evaluate"
_DETAILS = ("vision", "llm", "template", "image_aspect_ratio", "precision")


def read_folder(folder: epath.Path) -> Run:
    """Reads a folder with ``results.json``, of one benchmark or of several in folders below it.

    Raises:
      UserError: it has no scores of single questions, or is malformed.
    """
    values = read_json(folder / RESULTS)
    several = values if isinstance(values, list) else [values]
    benchmarks: dict[str, ScoredBenchmark] = {}
    cost: dict[str, Any] = {}
    found: list[float] = []  # image tokens
    unscored: list[str] = []
    reduced, blank, chooses = "", False, False
    for results in several:
        try:
            name, protocol = results["benchmark"], results["protocol"]
            place = folder / name if isinstance(values, list) else folder
            if (benchmark := _read_benchmark(place, results)) is None:
                unscored.append(name)
                continue
            benchmarks[name] = benchmark
            asking = protocol.get("asking", {})
            blank = blank or asking.get("images") == "blank"
            reduced = reduced or _describe_reduction(asking)
            if chosen := results.get("image_tokens"):  # for each image
                chooses = True
                found.append(chosen["mean"])
            elif "tiles" not in asking:  # with tiles they depend on the image's size
                keys = ("average_image_tokens", "keep", "image_tokens")
                found += [asking[key] for key in keys if asking.get(key)][:1]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / RESULTS} is not a file of results; evaluate again to replace it.") from None
    if not benchmarks:
        raise UserError(f"{folder} has no scores, because the labels of {', '.join(unscored)} are not public.")
    if found:
        cost["image_tokens"] = statistics.fmean(found) if chooses else found[-1]
    cost |= read_cost(folder / COST_FILE)
    return Run(TOOL, str(folder), benchmarks, cost, blank, chooses, reduced, tuple(unscored))


def _describe_reduction(asking: dict[str, Any]) -> str:
    """Returns the reducer and the schedule of a protocol, and what each leaves."""
    found = [f"{asking['reduce']}, keep={asking['keep']}"] if asking.get("reduce") else []
    found += [asking["schedule"]] if asking.get("schedule") else []
    stages = ", ".join(f"{keep} after layer {layer}" for layer, keep in asking.get("kept_after_layer", {}).items())
    return " and ".join(found) + (f" ({stages})" if stages else "")


def _score_again(folder: epath.Path, results: dict[str, Any]) -> list[ScoredQuestion]:
    """Scores the answers in a folder that an earlier version made, if their benchmark needs no files for it."""
    kind = BENCHMARKS.known.get(results["benchmark"])
    if kind is None or kind.folders or not (folder / ANSWERS).exists():
        return []
    benchmark = kind(epath.Path())
    if len(benchmark.questions) != results["protocol"]["questions"]:
        return []
    return score_questions(benchmark, match_answers(benchmark, read_answers(folder / ANSWERS), folder / ANSWERS))


def _read_benchmark(folder: epath.Path, results: dict[str, Any]) -> ScoredBenchmark | None:
    """Reads a benchmark's scores; None if its labels are not public."""
    name, protocol = results["benchmark"], results["protocol"]
    file = folder / SCORES
    rows = read_scores(file) if file.exists() else _score_again(folder, results)
    if not rows:
        if not results["metrics"]:
            return None
        raise UserError(
            f"{folder} has no {SCORES}: an earlier version made it, or {name} cannot score single questions. Score its "
            f"answers again (python -m stf_jax.evaluate --answers={folder / ANSWERS} --benchmark={name} "
            "--data=… --out=…)."
        )
    # Papers leave out questions without an image too (ScienceQA): no way of reading images changes them.
    shown = [row for row in rows if not row.blank and row.image is not None]
    blank = [row.score for row in rows if row.blank]
    if not shown:
        raise UserError(f"{file} has no questions about images.")
    asking = protocol.get("asking", {})
    # Unknown if existing answers were scored. Seeds of methods may differ, so that of sampling may too.
    decoding = {key: value for key, value in asking.get("decoding", {}).items() if key != "seed"}
    return make_benchmark(
        [(row.question_id, row.prompt) for row in shown],
        [row.score for row in shown],
        [row.answers for row in shown],
        [row.image for row in shown],
        "mean score of the questions",
        protocol={
            "rule": protocol["rule"],
            "labels": json.dumps([entry["sha256"] for entry in protocol["labels"]]),
        }
        | ({"decoding": decoding} if decoding else {}),
        details={key: asking[key] for key in _DETAILS if key in asking},
        metrics={key: value for key, value in flatten(results["metrics"]).items() if isinstance(value, float)},
        blank=100 * sum(blank) / len(blank) if blank else None,
    )
