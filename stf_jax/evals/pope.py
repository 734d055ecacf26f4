"""POPE: is there such a thing in the image? Objects that are there, and others that are not (Li et al., 2023)."""

import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark
from stf_jax.evals.files import read_jsonl

_SPLITS = ("random", "popular", "adversarial")
_SHARES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


class POPE(Benchmark):
    """LLaVA's ``llava_pope_test.jsonl`` with POPE's ``coco/coco_pope_{random,popular,adversarial}.json``.

    Labels are found by image and question. POPE's newer files hold the questions in another order, and others; paired
    by place, as LLaVA's script does, they are wrong without a word.
    """

    name = "pope"
    folders = ("pope",)
    rule = (
        "Of an answer up to its first full stop, without commas: no where No, no or not is among the words between "
        "spaces, else yes. F1, precision and recall are of yes, yes_ratio is the share of answers that are yes; the "
        "means are over the splits."
    )

    def __init__(self, data: epath.Path):
        super().__init__(data)
        asked = self.find("llava_pope_test.jsonl")
        rows = self.read_rows(asked)
        self.questions = [self.make_question(row, "val2014") for row in rows]
        by_split = {}
        for row in rows:
            split = row.get("category")
            if split not in _SPLITS:
                known = did_you_mean(str(split), _SPLITS)
                raise UserError(f"{asked}, question {row['question_id']}: unknown category {split!r}; {known}")
            by_split.setdefault(split, []).append(_key(row))
        files = {split: self.find(f"coco/coco_pope_{split}.json") for split in by_split}
        labels = {split: _read(files[split], keys) for split, keys in by_split.items()}
        self.labels = tuple(files.values())
        self._labels = [(row["category"], labels[row["category"]][_key(row)]) for row in rows]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        pairs = {split: [] for split in _SPLITS}
        for (split, gold), text in zip(self._labels[: len(self.questions)], texts, strict=True):
            pairs[split].append((is_yes(text), gold))
        splits = {split: _scores(own) for split, own in pairs.items() if own}
        # The one number of papers (LLaVA-1.5-7B: 85.9) is the mean F1 of the splits, not the F1 of all answers.
        return {share: statistics.fmean(scores[share] for scores in splits.values()) for share in _SHARES} | splits


def is_yes(text: str) -> bool:
    """Whether an answer is taken for a yes, to the letter as LLaVA's script does: ``NO``, too, is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _key(row):
    return row["image"], row["text"].removesuffix(SHORT_ANSWER_SUFFIX).strip()


def _read(file, asked):
    labels = {}
    for number, row in read_jsonl(file):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("image"), str)
            or not isinstance(row.get("text"), str)
            or row.get("label") not in ("yes", "no")
        ):
            raise UserError(f"{file}, line {number}: a label needs image, text, and yes or no under label.")
        gold = row["label"] == "yes"
        if labels.setdefault(_key(row), gold) != gold:
            raise UserError(f"{file}, line {number}: {_name(_key(row))} has a yes and a no; take POPE's own file.")
    missing = [key for key in asked if key not in labels]
    if missing:
        raise UserError(
            f"{file} does not fit the questions: {len(missing):,} of {len(asked):,} have no label, such as "
            f"{_name(missing[0])}; take the file that LLaVA names (POPE's repository at commit e3e39262)."
        )
    return labels


def _name(key):
    image, question = key
    return f"{question!r} on {image}"


def _scores(pairs):
    said, gold = sum(yes for yes, _ in pairs), sum(yes for _, yes in pairs)
    both = sum(yes and true for yes, true in pairs)
    precision, recall = _share(both, said), _share(both, gold)
    return {
        "f1": _share(2 * precision * recall, precision + recall),
        "accuracy": statistics.fmean(yes == true for yes, true in pairs),
        "precision": precision,
        "recall": recall,
        "yes_ratio": said / len(pairs),
        "questions": len(pairs),
    }


def _share(part, whole):
    return part / whole if whole else 0.0
