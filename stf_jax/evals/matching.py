"""Scoring of short answers about documents and charts, as in lmms-eval: ANLS and relaxed correctness."""

from collections.abc import Sequence

ANLS_RULE = (
    "ANLS: the answer and each gold answer are compared in lowercase, with single spaces. Their similarity is 1 minus "
    "the edit distance, divided by the length of the longer of both as they were given. A question scores the highest "
    "similarity, or 0 if it is below 0.5."
)
RELAXED_RULE = (
    "If the answer and the gold answer are numbers (x% is x/100), the answer is correct within 5% of the gold answer. "
    "Otherwise, or if the gold answer is zero, both must be equal, ignoring case."
)
_MIN_SIMILARITY = 0.5
_TOLERANCE = 0.05


def anls(text: str, answers: Sequence[str]) -> float:
    """Computes the normalized Levenshtein similarity (Biten et al., 2019) to the most similar answer, in 0..1.

    It is exactly lmms-eval's: the distance is that of normalized strings, but the length is that of the given ones in
    uppercase, where ß has two letters. The mean over questions is the ANLS.

    Args:
      text: the model's answer, without spaces at its ends.
      answers: the gold answers, at least one.
    """
    similarity = 1 - min(_relative_distance(text, answer) for answer in answers)
    return similarity if similarity >= _MIN_SIMILARITY else 0.0


def _relative_distance(text: str, answer: str) -> float:
    length = max(len(text.upper()), len(answer.upper()))
    return edit_distance(_normalize(text), _normalize(answer)) / length if length else 0.0


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(first: str, second: str) -> int:
    """Counts the characters to insert, delete or replace to turn one string into the other (Levenshtein, 1966)."""
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        row = [i]
        for j, b in enumerate(second):
            row.append(min(above[j] + (a != b), above[j + 1] + 1, row[j] + 1))
        above = row
    return above[-1]


def is_relaxed_match(text: str, answer: str) -> bool:
    """Whether an answer equals the gold answer by ChartQA's relaxed rule (:data:`RELAXED_RULE`)."""
    value, gold = _to_number(text), _to_number(answer)
    if value is None or not gold:
        return text.lower() == answer.lower()
    return abs(value - gold) / abs(gold) <= _TOLERANCE


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
