"""Reads what lmms-eval writes with ``--log_samples``: ``DATE_samples_TASK.jsonl`` next to ``DATE_results.json``."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stf_jax.comparisons.runs import Run, ScoredBenchmark, make_benchmark, read_cost
from stf_jax.config import UserError, shorten
from stf_jax.evals.files import COST_FILE, read_jsonl
from stf_jax.files import read_json

TOOL = "lmms-eval"
SAMPLES = "_samples_"
# The keys of a sample that are not metrics. ("doc_hash" differs between runs: it covers images' memory addresses.)
_NO_METRICS = {
    "doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "token_counts", "doc_hash",
    "input_media", "submission",
}  # fmt: skip
_PROTOCOL = ("generation_kwargs", "lmms_eval_specific_kwargs", "test_split")  # keys of a task's config


def find_samples(place: epath.Path) -> list[epath.Path]:
    """Returns the sample files that a path means: itself, or those in a folder or in the model's folder below it."""
    if place.is_dir():
        found = sorted(place.glob(f"*{SAMPLES}*.jsonl"))
        return found or sorted(place.glob(f"*/*{SAMPLES}*.jsonl"))
    return [place] if SAMPLES in place.name else []


def read_samples(place: epath.Path, files: Sequence[epath.Path]) -> Run:
    """Reads the sample files of one model.

    Raises:
      UserError: two files are of one task, a results file is missing, or a file is malformed.
    """
    benchmarks: dict[str, ScoredBenchmark] = {}
    for file in files:
        date, _, task = file.name.removesuffix(".jsonl").partition(SAMPLES)
        if task in benchmarks:
            raise UserError(f"{place} has several sample files of {task}; name one of them, such as {file}.")
        results = file.parent / f"{date}_results.json"
        if not results.exists():
            raise UserError(f"{results} is missing; lmms-eval writes it next to {file.name}.")
        benchmarks[task] = _read_task(file, task, read_json(results))
    return Run(TOOL, str(place), benchmarks, read_cost(files[0].parent / COST_FILE))


def _read_task(file: epath.Path, task: str, results: Any) -> ScoredBenchmark:
    try:
        reported, config = results["results"][task], results["configs"][task]
        numbers = {key: value for key, value in reported.items() if type(value) in (int, float)}
        metrics = {key: value for key, value in numbers.items() if "," in key and "_stderr" not in key}
        protocol = {"version": results["versions"][task], "fewshot": results["n-shot"][task]}
        protocol |= {key: config.get(key) for key in _PROTOCOL}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"The results file next to {file} has no results of {task}.") from None
    samples: dict[int, dict[str, Any]] = {}
    for number, sample in read_jsonl(file):
        if not isinstance(sample, dict) or not {"doc_id", "target", "filtered_resps"} <= sample.keys():
            raise UserError(f"{file}, line {number} is no sample: it needs doc_id, target and filtered_resps.")
        if sample["doc_id"] in samples:
            raise UserError(f"{file}, line {number}: a second sample of question {shorten(repr(sample['doc_id']))}.")
        samples[sample["doc_id"]] = sample
    if not samples:
        raise UserError(f"{file} contains no samples.")
    rows = list(samples.values())
    metric, scores, mean_of = _find_scores(file, rows, metrics)
    cluster_key = config.get("cluster_key") or "question_id"
    return make_benchmark(
        [(str(row["doc_id"]), f"{row.get('input')}\n{row['target']}") for row in rows],
        scores,
        [_flatten_answers(row["filtered_resps"]) for row in rows],
        [_find_image(row, cluster_key) for row in rows],
        f"{metric}, {mean_of}",
        protocol=protocol,
        details={},
        metrics=metrics,
    )


def _find_scores(
    file: epath.Path, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]
) -> tuple[str, list[float], str]:
    """Returns a metric that has a number for each sample, in 0..1, and what the mean of these is.

    A metric whose mean lmms-eval reports comes first. Others, such as MME's, whose sums are no means of the scores of
    questions, count only if their scores are 0 and 1.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key not in _NO_METRICS))
    candidates, binary = [], []
    for name in names:
        found = [value for row in rows if (value := _read_score(row.get(name))) is not None]
        binary += [name] if set(found) <= {0.0, 1.0} else []
        if len(found) < len(rows) or not 0 <= min(found) <= max(found) <= 1:
            continue
        reported = [value for key, value in metrics.items() if key.split(",")[0] == name]
        for scale in (1.0, 100.0):  # some tasks report percent
            if any(np.isclose(scale * np.mean(found), value, rtol=1e-9, atol=1e-12) for value in reported):
                return name, found, "whose mean lmms-eval reports"
        candidates += [(name, found)] if name in binary else []
    # MME's samples have one of two such metrics.
    split = [next((x for name in binary if (x := _read_score(row.get(name))) is not None), None) for row in rows]
    candidates += [] if None in split else [("score", [value for value in split if value is not None])]
    if candidates:
        return *candidates[0], "as a share of questions; lmms-eval reports another figure"
    raise UserError(
        f"{file} has no metric with a number for each question; it has {', '.join(names) or 'none'}. Such a task "
        "cannot be compared question by question."
    )


def _read_score(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _flatten_answers(value: Any) -> list[str]:
    if isinstance(value, list):
        return [answer for one in value for answer in _flatten_answers(one)]
    return [str(value)]


def _find_image(row: Mapping[str, Any], key: str) -> Hashable:
    """Returns what identifies the image in this sample file, or the question itself if the file does not say."""
    for value in row.values():
        if isinstance(value, Mapping) and isinstance(value.get(key), str | int):
            return key, str(value[key])
    media = row.get("input_media")
    return tuple(map(str, media)) if isinstance(media, list) and media else ("doc_id", row["doc_id"])
