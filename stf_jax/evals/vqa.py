"""Open answers to visual questions: EvalAI's normaliser, and the accuracy among annotators."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stf_jax.config import UserError

RULE = (
    "An answer and the annotators' are normalised as EvalAI does. Each annotator is left out in turn: an answer that n "
    "of the others gave counts min(1, n/3), and the mean of these is its accuracy."
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
""".split()  # noqa: SIM905 (a list would be thrice as long)
# A contraction is mended where exactly one apostrophe is missing. The original also loses one, and has four with a
# capital I, which never meet a text in lower case: "im" stays as it is.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=2**16)  # annotators agree: most answers of a data set are a few thousand words
def normalize(text: str) -> str:
    """An answer as EvalAI's answer processor gives it, to the character (Pythia's, which LLaVA and lmms-eval use).

    In lower case, without punctuation and articles, numbers up to ten in digits, apostrophes in contractions. Its
    oddities are kept, for scores are compared with those of others.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    # One place beside a space decides for all places of a mark: "a-b" is two words, but "a-b - c" has "ab".
    text = text.translate({ord(mark): "" if f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS})
    # 32: the original hands re.UNICODE, whose value that is, to the argument that counts. The full stop after a digit
    # goes too ("5." is "5"), as the original's look-behind is misspelt.
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, n/3), where n of the *others* gave the predicted answer; all normalised.

    The consensus metric of VQA (Antol et al., 2015). A share in 0..1: of ten annotators, 3 who agree with the
    prediction make 0.9, 4 make 1.

    Args:
      prediction: the model's answer.
      answers: one of each annotator, at least one.
    """
    prediction = normalize(prediction)
    same = sum(normalize(answer) == prediction for answer in answers)
    return (same * min(3, same - 1) + (len(answers) - same) * min(3, same)) / (3 * len(answers))


def accuracies(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """:func:`accuracy` of each text, by its own annotators' answers."""
    return [accuracy(text, own) for text, own in zip(texts, answers, strict=True)]


def annotator_answers(label: Mapping[str, Any], name: str) -> list[str]:
    """The answers of a label, ``{"answers": […]}``, each a text or ``{"answer": text}``.

    Raises:
      UserError: it has none, or others; ``name`` says which label it is.
    """
    answers = label.get("answers")
    entries = answers if isinstance(answers, list) else []
    texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: a label needs answers, a list of the annotators' texts.")
    return texts
