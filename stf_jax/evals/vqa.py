"""Scoring of open answers: EvalAI's normalization and the accuracy against several annotators."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stf_jax.config import UserError

RULE = (
    "The answer and the annotators' answers are normalized as EvalAI does. Each annotator is left out in turn, and an "
    "answer that n of the others gave scores min(1, n/3); the accuracy is the mean of these scores."
)

_MARKS = ';/[]"{}()=+\\_-><@`!'
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a list would be three times as long)
# A contraction with exactly one missing apostrophe is corrected. The original table also drops one apostrophe, and has
# four entries with a capital I, which never match lowercase text: "im" is unchanged.
_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _WITH_APOSTROPHES
    for index, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=2**16)  # annotators agree: most answers in a data set are a few thousand words
def normalize(text: str) -> str:
    """Normalizes an answer exactly as EvalAI's answer processor does (Pythia's, used by LLaVA and lmms-eval).

    It lowercases, removes punctuation and articles, writes numbers up to ten as digits, and adds apostrophes to
    contractions. Its oddities are kept, because scores are compared with published ones.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    # A mark next to a space anywhere is removed everywhere: "a-b" becomes two words, but "a-b - c" contains "ab".
    text = text.translate({ord(mark): "" if f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS})
    # count=32: the original passes re.UNICODE, whose value is 32, as the count. The full stop after a digit is removed
    # too ("5." becomes "5"), because the original's look-behind is misspelled.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes VQA's consensus accuracy (Antol et al., 2015), in 0..1.

    It is the mean over the annotators of min(1, n/3), where n of the *others* gave the predicted answer; all answers
    are normalized. If 3 of ten annotators agree with the prediction, it is 0.9; if 4 agree, 1.

    Args:
      prediction: the model's answer.
      answers: one answer per annotator, at least one.
    """
    prediction = normalize(prediction)
    same = sum(normalize(answer) == prediction for answer in answers)
    return (same * min(3, same - 1) + (len(answers) - same) * min(3, same)) / (3 * len(answers))


def accuracies(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Computes :func:`accuracy` of each text against its annotators' answers."""
    return [accuracy(text, annotators) for text, annotators in zip(texts, answers, strict=True)]


def annotator_answers(label: Mapping[str, Any], name: str) -> list[str]:
    """Returns the answers of a label ``{"answers": […]}``, each a string or ``{"answer": string}``.

    Raises:
      UserError: the answers are missing or malformed; ``name`` identifies the label in the message.
    """
    answers = label.get("answers")
    entries = answers if isinstance(answers, list) else []
    texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    strings = [text for text in texts if isinstance(text, str)]
    if not strings or len(strings) < len(texts):
        raise UserError(f"{name}: a label needs answers, a list of the annotators' strings.")
    return strings
