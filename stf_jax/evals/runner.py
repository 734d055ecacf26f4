"""A benchmark run: questions asked and answers kept as they come, then scored, with the protocol beside the numbers."""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from stf_jax.config import UserError, flatten
from stf_jax.evals.answers import answer_line, match_answers, read_answers
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.files import RESULTS, sha256
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import GREEDY, Generator
from stf_jax.runtime.files import AppendOnlyFile, as_user_error, make_folder, parse_json, write_json
from stf_jax.runtime.hosts import run_on_host0
from stf_jax.runtime.table import format_table

ANSWERS, PROTOCOL = "answers.jsonl", "protocol.json"
Results = dict[str, Any]
_LISTED = 20  # label files


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
    """Asks all questions and scores the answers. All hosts of a run take part; the first one writes, and has results.

    Answers that ``out`` holds already are kept, but for a last batch or two: asked again in the same company, their
    questions get the very same answers. So a run that was interrupted ends in the files that it would have ended in.

    Args:
      out: folder for ``answers.jsonl``, ``protocol.json``, ``results.json`` and what is submitted.
      model: what the answers and the results call the model.
      origin: what else tells it from others; goes into the protocol.
      rows: questions at once.
      overwrite: whether answers in ``out`` that another protocol made give way; without, they are refused.
      between: is called after each batch, on all hosts; what it raises ends the run there.

    Raises:
      UserError: an image cannot be opened; ``out`` holds another run's answers, or cannot be made.
    """
    active = jax.process_index() == 0
    protocol = _scoring(benchmark) | {"asking": generator.protocol(benchmark.questions[0].record())}
    protocol["asking"] |= {"decoding": _decoding(benchmark, sampling), "rows": rows, "model": origin}
    questions, kept = benchmark.questions, []
    if active:
        make_folder(out)
        kept = _kept(benchmark, out, model, protocol, overwrite)
        if len(kept) < len(questions):
            # Whole batches, and so many that what is left makes one: a smaller one is another program, which may round
            # otherwise.
            kept = kept[: min(len(kept), len(questions) - rows) // rows * rows]
        with as_user_error(out):
            write_json(out / PROTOCOL, protocol)
    done = int(multihost_utils.broadcast_one_to_all(np.int32(len(kept))))
    records = [question.record() for question in questions[done:]]
    said = _interrupted(generator.generate(records, benchmark.max_new_tokens, rows, sampling), rows, on_batch_end)
    said = tqdm.tqdm(
        said, benchmark.name, len(questions), initial=done, unit="question", disable=not active, mininterval=0.5
    )
    if not active:
        collections.deque(said, maxlen=0)
        return {}
    with as_user_error(out / ANSWERS), contextlib.closing(AppendOnlyFile(out / ANSWERS, kept)) as file:
        for place, text in enumerate(said, start=done):
            kept.append(answer_line(questions[place], place, text, model))
            file.append(kept[-1])
    return _report(benchmark, [json.loads(line)["text"] for line in kept], out, model, protocol)


def check_images(benchmarks: Sequence[Benchmark]) -> None:
    """Opens every image that will be asked about. The first host does that for all, and all raise its UserError."""
    run_on_host0(lambda: [benchmark.check_images() for benchmark in benchmarks])


def evaluate_all(
    benchmarks: Sequence[Benchmark],
    generator: Generator,
    params: Mapping[str, jax.Array],
    out: epath.Path,
    model: str,
    origin: dict[str, Any],
    *,
    rows: int,
    on_batch_end: Callable[[], None] = lambda: None,
) -> list[Results]:
    """:func:`evaluate` of a run's parameters by each benchmark, of one in ``out`` itself, of several below it."""
    if not benchmarks:
        return []
    generator.load_params(params.items())
    folders = [out / benchmark.name if len(benchmarks) > 1 else out for benchmark in benchmarks]
    results = [
        evaluate(benchmark, generator, folder, model, origin, rows=rows, overwrite=True, on_batch_end=on_batch_end)
        for benchmark, folder in zip(benchmarks, folders, strict=True)
    ]
    generator.load_params(())  # training wants the memory
    if len(benchmarks) > 1 and jax.process_index() == 0:
        with as_user_error(out / RESULTS):
            write_json(out / RESULTS, results)
    return results


def _interrupted(said, rows, between):
    for place, text in enumerate(said):
        yield text
        if (place + 1) % rows == 0:
            between()


def score(benchmark: Benchmark, answers: epath.Path, out: epath.Path) -> Results:
    """Scores an answer file made anywhere; writes ``results.json`` and what is submitted.

    Raises:
      UserError: the file is none, or does not fit the questions; there are neither labels nor a submission.
    """
    rows = read_answers(answers)
    texts = match_answers(benchmark, rows, answers)
    models = sorted({str(row["model_id"]) for row in rows if row.get("model_id")})
    make_folder(out)
    protocol = _scoring(benchmark) | {"answers": {"file": str(answers), "sha256": sha256(answers)}}
    return _report(benchmark, texts, out, ", ".join(models) or answers.name, protocol)


def flatten_metrics(results: Results) -> dict[str, float]:
    """The metrics of a benchmark as flat names and numbers: ``pope/random/f1``."""
    flat = flatten(results["metrics"]) if results else {}
    return {
        f"{results['benchmark']}/{key.replace('.', '/')}": value
        for key, value in flat.items()
        if not key.endswith("questions")
    }


def format_results(results: Results) -> str:
    """The results for people to read: shares in percent, MME's scores in its points."""
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
    lines = [f"{results['benchmark']}, {results['questions']} questions: {results['model']}"]
    lines.append(format_table(rows) if results["metrics"] else "Its labels are not here, so there is no metric.")
    lines += [f"written beside: {file}" for file in results["submission"]]
    return "\n".join(lines)


_POINTS = ("perception", "cognition", "score")  # MME's sums; all others are shares


def in_display_units(metric: str, value: float) -> float:
    """A metric in the unit people know it in: shares in percent, MME's scores as they are."""
    return value if metric.split("/")[-1] in _POINTS else 100 * value


def format_metric(metric: str, value: Any) -> Any:
    """The same as text; what is no float stays as it is."""
    if not isinstance(value, float):
        return value
    unit = "" if metric.split("/")[-1] in _POINTS else "%"
    return f"{in_display_units(metric, value):.1f}{unit}"


def _scoring(benchmark):
    """What of the protocol is the benchmark's."""
    return {
        "benchmark": benchmark.name,
        "questions": len(benchmark.questions),
        "rule": benchmark.rule,
        "labels": _hashes(benchmark.labels),
    }


def _hashes(files):
    """Files with their hashes; of very many (MME's, one an image), the number and one hash of all hashes."""
    hashes = {str(file): sha256(file) for file in files}
    if len(files) > _LISTED:
        together = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
        return [{"files": len(files), "first": str(files[0]), "sha256": together}]
    return [{"file": file, "sha256": value} for file, value in hashes.items()]


def _decoding(benchmark, sampling):
    return {"max_new_tokens": benchmark.max_new_tokens, **dataclasses.asdict(sampling)}


def _kept(benchmark, out, model, protocol, overwrite):
    """Lines of answers in ``out`` to go on from."""
    if not (out / ANSWERS).exists():
        return []
    try:
        before, now = parse_json((out / PROTOCOL).read_bytes()), json.loads(json.dumps(protocol))
        if before | {"labels": now["labels"]} != now:  # labels may come later
            raise ValueError
        lines = []
        written = (out / ANSWERS).read_bytes().split(b"\n")[:-1]  # but for a line that was cut
        for line, question in zip(map(bytes.decode, written), benchmark.questions, strict=False):
            row = parse_json(line)
            if line != answer_line(question, len(lines), row["text"], model):
                raise ValueError
            lines.append(line)
        return lines
    except (OSError, ValueError, KeyError, TypeError):
        if overwrite:
            (out / ANSWERS).unlink()  # before the new protocol is there, which they might be taken to be of
            return []
        raise UserError(
            f"{out} holds answers to other questions, of another model or of another protocol (see {PROTOCOL} there); "
            "choose another --out, or remove them."
        ) from None


def _report(benchmark, texts, out, model, protocol):
    with as_user_error(out):
        files = benchmark.write_submission(texts, out)
    results = {
        "benchmark": benchmark.name,
        "metrics": benchmark.metrics(texts) if benchmark.scored else {},
        "questions": benchmark.count,
        "model": model,
        "submission": [str(file.relative_to(out)) for file in files],
        "protocol": protocol,
    }
    with as_user_error(out):
        write_json(out / RESULTS, results)
    return results
