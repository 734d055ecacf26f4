"""POPE: questions whether an object is in the image, for present and absent objects (Li et al., 2023)."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark
from stf_jax.evals.files import read_jsonl

_SPLITS = ("random", "popular", "adversarial")
_METRICS = ("f1", "accuracy", "precision", "recall", "yes_ratio")
_Key = tuple[str, str]  # of a label: the image and the question


class POPE(Benchmark):
    """LLaVA's ``llava_pope_test.jsonl`` with POPE's ``coco/coco_pope_{random,popular,adversarial}.json``.

    Labels are matched by image and question. POPE's newer files have other questions and another order; matching by
    position, as LLaVA's script does, would silently give wrong scores.
    """

    name = "pope"
    folders = ("pope",)
    groups = ("paper",)
    rule = (
        "An answer is cut at its first full stop, and its commas are removed. It is no if No, no or not is among its "
        "words, which are separated by spaces; otherwise it is yes. F1, precision and recall are for yes; yes_ratio is "
        "the share of answers that are yes. The means are over the splits."
    )

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        question_file = self.find("llava_pope_test.jsonl")
        rows = self.read_rows(question_file)
        self.questions = [self.make_question(row, "val2014") for row in rows]
        by_split: dict[str, list[_Key]] = {}
        for row in rows:
            split = row.get("category")
            if split not in _SPLITS:
                hint = did_you_mean(str(split), _SPLITS)
                raise UserError(f"{question_file}, question {row['question_id']}: unknown category {split!r}; {hint}")
            by_split.setdefault(split, []).append(_make_key(row))
        files = {split: self.find(f"coco/coco_pope_{split}.json") for split in by_split}
        labels = {split: _read_labels(files[split], keys) for split, keys in by_split.items()}
        self.labels = tuple(files.values())
        self._labels = [(row["category"], labels[row["category"]][_make_key(row)]) for row in rows]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        pairs: dict[str, list[tuple[bool, bool]]] = {split: [] for split in _SPLITS}
        for (split, gold), text in zip(self._labels[: len(self.questions)], texts, strict=True):
            pairs[split].append((is_yes(text), gold))
        splits = {split: _score_pairs(split_pairs) for split, split_pairs in pairs.items() if split_pairs}
        # Papers report the mean F1 of the splits (LLaVA-1.5-7B: 85.9), not the F1 of all answers.
        return {metric: statistics.fmean(scores[metric] for scores in splits.values()) for metric in _METRICS} | splits


def is_yes(text: str) -> bool:
    """Returns whether an answer counts as yes, exactly by LLaVA's rule: even ``NO`` is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _make_key(row: Mapping[str, Any]) -> _Key:
    return row["image"], row["text"].removesuffix(SHORT_ANSWER_SUFFIX).strip()


def _read_labels(file: epath.Path, keys: Sequence[_Key]) -> dict[_Key, bool]:
    labels: dict[_Key, bool] = {}
    for number, row in read_jsonl(file):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("image"), str)
            or not isinstance(row.get("text"), str)
            or row.get("label") not in ("yes", "no")
        ):
            raise UserError(f"{file}, line {number}: a label needs image, text, and a label of yes or no.")
        gold = row["label"] == "yes"
        if labels.setdefault(_make_key(row), gold) != gold:
            raise UserError(
                f"{file}, line {number}: {_format_key(_make_key(row))} is labeled both yes and no; use POPE's own file."
            )
    missing = [key for key in keys if key not in labels]
    if missing:
        raise UserError(
            f"{file} does not match the questions: {len(missing):,} of {len(keys):,} have no label, such as "
            f"{_format_key(missing[0])}; use the file that LLaVA names (POPE's repository at commit e3e39262)."
        )
    return labels


def _format_key(key: _Key) -> str:
    image, question = key
    return f"{question!r} on {image}"


def _score_pairs(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Computes the scores of (predicted, gold) pairs; True is yes."""
    predicted, gold = sum(yes for yes, _ in pairs), sum(yes for _, yes in pairs)
    both = sum(yes and true for yes, true in pairs)
    precision, recall = _divide(both, predicted), _divide(both, gold)
    return {
        "f1": _divide(2 * precision * recall, precision + recall),
        "accuracy": statistics.fmean(yes == true for yes, true in pairs),
        "precision": precision,
        "recall": recall,
        "yes_ratio": predicted / len(pairs),
        "questions": len(pairs),
    }


def _divide(part: float, total: float) -> float:
    return part / total if total else 0.0


COMPONENTS = {POPE.name: POPE}
