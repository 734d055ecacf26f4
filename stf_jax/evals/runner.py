"""Evaluation runs: asks a benchmark's questions, saves answers as they arrive, and scores them with their protocol."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from stf_jax.config import UserError, flatten
from stf_jax.evals.answers import answer_line, match_answers, read_answers
from stf_jax.evals.benchmark import Benchmark, Question
from stf_jax.evals.files import ANSWERS, RESULTS, sha256
from stf_jax.evals.scores import SCORES, write_scores
from stf_jax.files import AppendOnlyFile, as_user_error, make_folder, parse_json, write_json
from stf_jax.inference.choosing import WINDOW, ChoosingGenerator
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import GREEDY, Generator
from stf_jax.parallel.hosts import run_on_host0
from stf_jax.table import format_table

PROTOCOL = "protocol.json"
Results = dict[str, Any]
_MAX_LISTED_FILES = 20  # label files that the protocol lists one by one


def evaluate(
    benchmark: Benchmark,
    generator: Generator,
    out: epath.Path,
    model: str,
    origin: dict[str, Any],
    *,
    rows: int,
    sampling: Sampling = GREEDY,
    overwrite: bool = False,
    on_batch_end: Callable[[], None] = lambda: None,
) -> Results:
    """Asks all questions and scores the answers. All hosts take part; only host 0 writes and returns results.

    Answers already in ``out`` are kept, except for the last one or two batches. Those are asked again in the same
    batches, so they get exactly the same answers: an interrupted run ends with the same files as an uninterrupted one.

    Args:
      out: the folder for ``answers.jsonl``, ``protocol.json``, ``results.json``, ``scores.jsonl`` and the submission.
      model: the model's name in the answers and results.
      origin: what else identifies the model; recorded in the protocol.
      rows: the number of questions per batch.
      overwrite: replace answers in ``out`` that have another protocol; by default they raise UserError.
      on_batch_end: called after each batch, on all hosts; an exception from it ends the run.

    Raises:
      UserError: an image cannot be opened; ``out`` contains another run's answers, or cannot be created.
    """
    active = jax.process_index() == 0
    protocol = _scoring_protocol(benchmark) | {"asking": generator.protocol(benchmark.questions[0].to_record())}
    protocol["asking"] |= {"decoding": _decoding_protocol(benchmark, sampling), "rows": rows, "model": origin}
    if benchmark.blank:
        protocol["asking"]["images"] = "blank"
    questions, lines = benchmark.questions, []
    together = WINDOW * rows if isinstance(generator, ChoosingGenerator) else rows
    if active:
        make_folder(out)
        lines = _read_kept_lines(benchmark, out, model, protocol, overwrite)
        if len(lines) < len(questions):
            # Keep what was asked together, and leave at least one full batch: a smaller one is another program, which
            # may round differently.
            lines = lines[: min(len(lines), len(questions) - rows) // together * together]
        with as_user_error(out):
            write_json(out / PROTOCOL, protocol)
    done = int(multihost_utils.broadcast_one_to_all(np.int32(len(lines))))
    records = [question.to_record() for question in questions]
    chosen = generator.choose(records, rows) if isinstance(generator, ChoosingGenerator) else []
    options: dict[str, Any] = {"chosen": chosen[done:]} if chosen else {}
    texts = generator.generate(records[done:], benchmark.max_new_tokens, rows, sampling, **options)
    texts = _call_after_batches(texts, rows, on_batch_end)
    texts = tqdm.tqdm(
        texts, benchmark.name, len(questions), initial=done, unit="question", disable=not active, mininterval=0.5
    )
    if not active:
        collections.deque(texts, maxlen=0)
        return {}
    with as_user_error(out / ANSWERS), contextlib.closing(AppendOnlyFile(out / ANSWERS, lines)) as file:
        for index, text in enumerate(texts, start=done):
            lines.append(answer_line(questions[index], index, text, model))
            file.append(lines[-1])
    found = {"image_tokens": _count_chosen(questions, chosen)} if chosen else {}
    return _write_results(benchmark, [json.loads(line)["text"] for line in lines], out, model, protocol, found)


def check_images(benchmarks: Sequence[Benchmark]) -> None:
    """Opens every image of the benchmarks. Host 0 does this for all hosts, and all raise its UserError."""

    def check() -> None:
        for benchmark in benchmarks:
            benchmark.check_images()

    run_on_host0(check)


def evaluate_all(
    benchmarks: Sequence[Benchmark],
    generator: Generator,
    params: Iterable[tuple[str, jax.Array]],
    out: epath.Path,
    model: str,
    origin: dict[str, Any],
    *,
    rows: int,
    on_batch_end: Callable[[], None] = lambda: None,
) -> list[Results]:
    """Runs :func:`evaluate` on a training run's parameters for each benchmark.

    A single benchmark writes to ``out``; several write to one folder each below it.
    """
    if not benchmarks:
        return []
    generator.load_params(params)
    folders = [out / benchmark.name if len(benchmarks) > 1 else out for benchmark in benchmarks]
    results = [
        evaluate(benchmark, generator, folder, model, origin, rows=rows, overwrite=True, on_batch_end=on_batch_end)
        for benchmark, folder in zip(benchmarks, folders, strict=True)
    ]
    generator.load_params(())  # frees the memory for training
    if len(benchmarks) > 1 and jax.process_index() == 0:
        with as_user_error(out / RESULTS):
            write_json(out / RESULTS, results)
    return results


def _call_after_batches(texts: Iterable[str], rows: int, on_batch_end: Callable[[], None]) -> Iterator[str]:
    for index, text in enumerate(texts):
        yield text
        if (index + 1) % rows == 0:
            on_batch_end()


def score(benchmark: Benchmark, answers: epath.Path, out: epath.Path) -> Results:
    """Scores any answer file; writes ``results.json``, ``scores.jsonl`` and the submission.

    Raises:
      UserError: the file is malformed or does not match the questions.
    """
    rows = read_answers(answers)
    texts = match_answers(benchmark, rows, answers)
    models = sorted({str(row["model_id"]) for row in rows if row.get("model_id")})
    make_folder(out)
    protocol = _scoring_protocol(benchmark) | {"answers": {"file": str(answers), "sha256": sha256(answers)}}
    return _write_results(benchmark, texts, out, ", ".join(models) or answers.name, protocol)


def flatten_metrics(results: Results) -> dict[str, float]:
    """Flattens a benchmark's metrics to names such as ``pope/random/f1``."""
    flat = flatten(results["metrics"]) if results else {}
    return {
        f"{results['benchmark']}/{key.replace('.', '/')}": value
        for key, value in flat.items()
        if not key.endswith("questions")
    }


def format_results(results: Results) -> str:
    """Formats results as a table: shares in percent, MME's scores in its points."""
    rows, groups = [{"what": "all"}], []
    for key, value in results["metrics"].items():
        if not isinstance(value, dict):
            rows[0][key] = format_metric(key, value)
        elif all(isinstance(inner, dict) for inner in value.values()):
            groups += [{"what": name, **inner} for name, inner in value.items()]
        elif any(isinstance(inner, float) and name in rows[0] for name, inner in value.items()):
            groups.append({"what": key, **value})
        else:
            groups += [{"what": name, "accuracy": inner} for name, inner in value.items()]
    rows[0]["questions"] = results["questions"]
    rows += [{key: format_metric(key, value) for key, value in row.items()} for row in groups]
    blank = ", blank images" if results.get("images") == "blank" else ""
    lines = [f"{results['benchmark']}, {results['questions']} questions{blank}: {results['model']}"]
    lines[0] += _format_reduction(results.get("protocol", {}).get("asking", {}))
    if chosen := results.get("image_tokens"):
        shares = ", ".join(f"{share:.0%} with {tokens}" for tokens, share in chosen["shares"].items())
        lines[0] += f"; {chosen['mean']} tokens per image: {shares}"
    lines.append(format_table(rows) if results["metrics"] else "There are no labels here, so there are no metrics.")
    lines += [f"also written: {file}" for file in results["submission"]]
    return "\n".join(lines)


def _format_reduction(asking: Mapping[str, Any]) -> str:
    """Formats what a reducer left, with the average over layers where the decoder drops tokens."""
    if not asking.get("reduce"):
        return ""
    average = f", {asking['average_image_tokens']:.4g} on average" if "average_image_tokens" in asking else ""
    return f"; {asking['reduce']} keeps {asking['keep']} tokens per image{average}"


_POINTS = ("perception", "cognition", "score")  # MME's sums; all other metrics are shares


def in_display_units(metric: str, value: float) -> float:
    """Converts a metric to its usual unit: shares to percent, MME's scores unchanged."""
    return value if metric.split("/")[-1] in _POINTS else 100 * value


def format_metric(metric: str, value: Any) -> Any:
    """Formats a metric in its usual unit; a value that is not a float is returned unchanged."""
    if not isinstance(value, float):
        return value
    unit = "" if metric.split("/")[-1] in _POINTS else "%"
    return f"{in_display_units(metric, value):.1f}{unit}"


def _scoring_protocol(benchmark: Benchmark) -> dict[str, Any]:
    """Returns the benchmark's part of the protocol."""
    return {
        "benchmark": benchmark.name,
        "questions": len(benchmark.questions),
        "rule": benchmark.rule,
        "labels": _hash_files(benchmark.labels),
    }


def _hash_files(files: Sequence[epath.Path]) -> list[dict[str, Any]]:
    """Lists files with their hashes; many files (MME has one per image) become a count and one hash of all hashes."""
    hashes = {str(file): sha256(file) for file in files}
    if len(files) > _MAX_LISTED_FILES:
        combined = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
        return [{"files": len(files), "first": str(files[0]), "sha256": combined}]
    return [{"file": file, "sha256": value} for file, value in hashes.items()]


def _decoding_protocol(benchmark: Benchmark, sampling: Sampling) -> dict[str, Any]:
    return {"max_new_tokens": benchmark.max_new_tokens, **dataclasses.asdict(sampling)}


def _read_kept_lines(
    benchmark: Benchmark, out: epath.Path, model: str, protocol: Mapping[str, Any], overwrite: bool
) -> list[str]:
    """Returns the answer lines in ``out`` from which the run can resume."""
    if not (out / ANSWERS).exists():
        return []
    try:
        saved, wanted = parse_json((out / PROTOCOL).read_bytes()), json.loads(json.dumps(protocol))
        if saved | {"labels": wanted["labels"]} != wanted:  # labels may be added later
            raise ValueError
        lines: list[str] = []
        complete = (out / ANSWERS).read_bytes().split(b"\n")[:-1]  # without a truncated last line
        for line, question in zip(map(bytes.decode, complete), benchmark.questions, strict=False):
            row = parse_json(line)
            if line != answer_line(question, len(lines), row["text"], model):
                raise ValueError
            lines.append(line)
        return lines
    except (OSError, ValueError, KeyError, TypeError):
        if overwrite:
            (out / ANSWERS).unlink()  # before the new protocol is written, or they might be taken for its answers
            return []
        raise UserError(
            f"{out} contains answers to other questions, or from another model or protocol (see {PROTOCOL} there); "
            "choose another --out, or delete them."
        ) from None


def _count_chosen(questions: Sequence[Question], chosen: Sequence[int]) -> dict[str, Any]:
    """Counts the tokens of the images that were asked about: their mean, and the share of images with each number.

    A blank image that a benchmark shows beside every image is left out.
    """
    blank = [question.metadata.get("shown") == "blank" for question in questions]
    counts = collections.Counter(
        tokens
        for question, hidden, tokens in zip(questions, blank, chosen, strict=True)
        if question.image is not None and (all(blank) or not hidden)
    )
    total = max(counts.total(), 1)
    return {
        "mean": round(sum(tokens * count for tokens, count in counts.items()) / total, 2),
        "shares": {str(tokens): count / total for tokens, count in sorted(counts.items(), reverse=True)},
    }


def _write_results(
    benchmark: Benchmark,
    texts: Sequence[str],
    out: epath.Path,
    model: str,
    protocol: Mapping[str, Any],
    found: Mapping[str, Any] = types.MappingProxyType({}),
) -> Results:
    with as_user_error(out):
        files = benchmark.write_submission(texts, out)
        write_scores(benchmark, texts, out / SCORES)
    results = {
        "benchmark": benchmark.name,
        "metrics": benchmark.metrics(texts) if benchmark.scored else {},
        "questions": benchmark.count,
        "model": model,
        "submission": [str(file.relative_to(out)) for file in files],
        "protocol": protocol,
        **found,
    }
    if benchmark.blank:
        results["images"] = "blank"
    with as_user_error(out):
        write_json(out / RESULTS, results)
    return results
