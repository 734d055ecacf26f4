"""The base class of benchmarks: LLaVA's questions from LLaVA's files, metrics where labels exist, and submissions."""

import abc
import concurrent.futures
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import PIL.Image
import tqdm
from etils import epath

from stf_jax.config import UserError
from stf_jax.data.image import open_image, read_image, read_size
from stf_jax.data.records import IMAGE_MARK, BadRow, Record, Turn
from stf_jax.data.scenes import SHORT_ANSWER
from stf_jax.evals.files import read_jsonl

SHORT_ANSWER_SUFFIX = f"\n{SHORT_ANSWER}"  # LLaVA's; most of its question files already contain it
BLANK_COLOR = (122, 116, 104)  # CLIP's mean color
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Question:
    """One question in LLaVA's wording."""

    id: str | int  # ``question_id`` as in the file; not always unique
    text: str  # the question, without ``<image>``
    # Opens the image (raises BadRow); None for a text-only question. Equal openers open the same image.
    image: Callable[[], PIL.Image.Image] | None
    prompt: str  # what an answer file records as the prompt
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # recorded with the answer

    def to_record(self) -> Record:
        """Returns the conversation that ends with this question."""
        images = () if self.image is None else (self.image,)
        sizes = (self.image.size,) if isinstance(self.image, ImageFile) else ()
        turns = (Turn("human", f"{IMAGE_MARK}\n" * len(images) + self.text),)
        return Record(str(self.id), images, turns, sizes=sizes)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Opens an image file below a folder."""

    folder: epath.Path
    name: str

    def __call__(self) -> PIL.Image.Image:
        """Opens it. Raises BadRow if it is missing, outside the folder, or not an image."""
        return open_image(read_image(self.folder, self.name), os.fspath(self.folder / self.name))

    def size(self) -> tuple[int, int]:
        """Its width and height, without decoding it. Raises as opening it does."""
        return read_size(self.folder, self.name)


@dataclasses.dataclass(frozen=True)
class BlankImage:
    """Makes a blank image of the size of another, so that only what is in it is missing."""

    image: Callable[[], PIL.Image.Image]

    def __call__(self) -> PIL.Image.Image:
        """Opens the other image for its size. Raises BadRow as that does."""
        return PIL.Image.new("RGB", self.image().size, BLANK_COLOR)


class Score(NamedTuple):
    """The score of one question."""

    value: float  # in 0..1
    asked: Sequence[int]  # the indices of its entries in ``Benchmark.questions``: several if it is asked repeatedly
    blank: bool = False  # asked about a blank image


def score_each(values: Iterable[float]) -> list[Score]:
    """Returns scores of questions that are each asked once, in their order."""
    return [Score(float(value), (index,)) for index, value in enumerate(values)]


class Benchmark(abc.ABC):
    """Questions and how their answers are scored. Each benchmark is a subclass in its own module.

    The constructor reads all questions and labels, and :meth:`check_images` opens the images, so that problems with the
    files are reported before a model is loaded.

    Attributes:
      name: the name for ``--benchmark``.
      folders: the names that its folder may have among the evaluation files.
      groups: the groups it belongs to, whose names stand for all their benchmarks in ``--benchmark``.
      max_new_tokens: the limit of new tokens per answer, as in LLaVA's scripts.
      rule: a description of how an answer is read and scored; recorded in the protocol.
      questions: the questions in the order of the file.
      labels: the files that the metrics read; without any, :meth:`metrics` cannot be called.
      limited: whether :meth:`limit` removed questions.
      blank: whether :meth:`hide_images` made all images blank.
    """

    name: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    groups: ClassVar[tuple[str, ...]] = ()
    max_new_tokens: ClassVar[int] = 128
    rule: ClassVar[str]
    questions: list[Question]
    labels: Sequence[epath.Path] = ()
    limited: bool = False
    blank: bool = False

    def __init__(self, data: epath.Path) -> None:
        """``data``: the folder of all benchmarks (LLaVA's ``playground/data/eval``) or of this one."""
        candidates = [data / name for name in self.folders]
        self.folder = next((folder for folder in candidates if folder.is_dir()), data)

    @abc.abstractmethod
    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """Computes the metrics; shares are in 0..1.

        Args:
          texts: one answer for each of :attr:`questions`, in their order.
        """

    def scores(self, texts: Sequence[str]) -> list[Score]:
        """Scores single questions, so that ``stf_jax.compare`` can pair them; empty if a benchmark cannot.

        Args:
          texts: as for :meth:`metrics`.
        """
        del texts
        return []

    @property
    def scored(self) -> bool:
        """Whether there are labels."""
        return bool(self.labels)

    @property
    def count(self) -> int:
        """The number of questions that the metrics count."""
        return len(self.questions)

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes the files for the benchmark's server or official program to ``out``, and returns their paths."""
        del texts, out
        return []

    def limit(self, count: int) -> None:
        """Keeps only the first ``count`` questions, or slightly more where questions form groups."""
        before = len(self.questions)
        self.keep_first(count)
        self.limited = len(self.questions) < before

    def keep_first(self, count: int) -> None:
        """Shortens :attr:`questions`, for :meth:`limit`."""
        self.questions = self.questions[:count]

    def hide_images(self) -> None:
        """Makes the images of all questions blank, to measure what can be guessed without them."""
        self.blank = True
        self.questions = [
            question
            if question.image is None
            else dataclasses.replace(
                question, image=BlankImage(question.image), metadata=question.metadata | {"shown": "blank"}
            )
            for question in self.questions
        ]

    def check_images(self) -> None:
        """Opens every image once. Raises UserError with the number of images that cannot be opened."""
        images = dict.fromkeys(question.image for question in self.questions if question.image is not None)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(
                tqdm.tqdm(pool.map(_open_error, images), f"{self.name}: images", len(images), delay=2, leave=False)
            )
        bad = [error for error in errors if error is not None]
        if bad:
            raise UserError(f"{self.name}: {len(bad):,} of {len(images):,} images cannot be used. The first: {bad[0]}")

    def find(self, *names: str) -> epath.Path:
        """Returns the first of these files that exists in the benchmark's folder. Raises UserError if none does."""
        found = self.find_any(*names)
        if found is None:
            raise UserError(f"{self.name}: there is no {' or '.join(names)} in {self.folder}.")
        return found

    def find_any(self, *names: str) -> epath.Path | None:
        """Returns the first of these files or folders that exists in the benchmark's folder, or None."""
        return next((self.folder / name for name in names if (self.folder / name).exists()), None)

    def image_opener(self, folders: Sequence[str], image: str) -> Callable[[], PIL.Image.Image]:
        """Returns an opener of an image in the first of these folders that exists, or in the benchmark's own."""
        return ImageFile(self.find_any(*folders) or self.folder, image)

    def read_rows(self, file: epath.Path) -> list[dict[str, Any]]:
        """Reads LLaVA's question file: JSON lines of ``question_id``, ``image``, ``text``, ``category``.

        Raises:
          UserError: a malformed line, with its number; an empty file.
        """
        rows = []
        for number, row in read_jsonl(file):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), kind) and row[key] != ""
                for key, kind in (("question_id", (str, int)), ("image", str), ("text", str))
            ):
                raise UserError(f"{file}, line {number}: a question needs question_id, image and text.")
            rows.append(row)
        if not rows:
            raise UserError(f"{file} contains no questions.")
        return rows

    def make_question(self, row: dict[str, Any], *folders: str) -> Question:
        """Makes the question of a row, with its image in the first of ``folders`` that exists."""
        return Question(row["question_id"], row["text"], self.image_opener(folders, row["image"]), row["text"])


def _open_error(image: Callable[[], PIL.Image.Image]) -> BadRow | None:
    try:
        image()
    except BadRow as error:
        return error
    return None


def accuracy_by_kind(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Returns ``{"accuracy": mean score, "questions": count}`` for each kind of question, sorted by kind."""
    groups: dict[str, list[float]] = {kind: [] for kind in sorted(set(kinds))}
    for kind, score in zip(kinds, scores, strict=True):
        groups[kind].append(score)
    return {kind: {"accuracy": statistics.fmean(group), "questions": len(group)} for kind, group in groups.items()}
