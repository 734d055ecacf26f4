"""What every benchmark is: LLaVA's questions from LLaVA's files, a metric where labels are here, a submission else."""

import abc
import concurrent.futures
import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import PIL.Image
import tqdm
from etils import epath

from stf_jax.config import UserError
from stf_jax.data.image import open_image, read_image
from stf_jax.data.records import IMAGE_MARK, BadRow, Record, Turn
from stf_jax.data.scenes import SHORT_ANSWER
from stf_jax.evals.files import read_jsonl

SHORT_ANSWER_SUFFIX = f"\n{SHORT_ANSWER}"  # LLaVA's; already in most of its question files
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Question:
    """One question as LLaVA asks it."""

    id: str | int  # ``question_id``, as the file has it; not always unique
    text: str  # what is asked, without ``<image>``
    # Opens the image (raises BadRow); None for a question of text alone. Equal ones open the same image.
    image: Callable[[], PIL.Image.Image] | None
    prompt: str  # what an answer file records as the prompt
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # recorded with the answer

    def record(self) -> Record:
        """The conversation that ends with it."""
        images = () if self.image is None else (self.image,)
        return Record(str(self.id), images, (Turn("human", f"{IMAGE_MARK}\n" * len(images) + self.text),))


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Opens an image file below a folder."""

    folder: epath.Path
    name: str

    def __call__(self) -> PIL.Image.Image:
        """Raises BadRow for one that is missing, outside the folder, or no image."""
        return open_image(read_image(self.folder, self.name), os.fspath(self.folder / self.name))


class Benchmark(abc.ABC):
    """Questions, and what to make of their answers. A subclass a benchmark, each in a file of its own.

    Its constructor reads questions and labels whole, and :meth:`check_images` opens the images, so that whatever is
    wrong with the files is said before a model is loaded.

    Attributes:
      name: as ``--benchmark`` has it.
      folders: names that its folder has among LLaVA's evaluation files.
      tokens: most new tokens of an answer, as LLaVA's scripts have it.
      rule: how an answer is read and scored, in words; goes into the protocol.
      questions: in the order of the file.
      labels: files that the metric reads; without any, :meth:`metrics` cannot be called.
      limited: whether :meth:`limit` left questions out.
    """

    name: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int] = 128
    rule: ClassVar[str]
    questions: list[Question]
    labels: Sequence[epath.Path] = ()
    limited: bool = False

    def __init__(self, data: epath.Path):
        """``data``: the folder of all benchmarks (``playground/data/eval`` with LLaVA), or this one's."""
        inside = [data / name for name in self.folders]
        self.folder = next((folder for folder in inside if folder.is_dir()), data)

    @abc.abstractmethod
    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        """What the answers come to, shares in 0..1.

        Args:
          texts: one answer for each of :attr:`questions`, in their order.
        """

    @property
    def scored(self) -> bool:
        """Whether there are labels."""
        return bool(self.labels)

    @property
    def count(self) -> int:
        """How many questions the metric speaks of."""
        return len(self.questions)

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes what the benchmark's server or own program takes into the folder ``out``; which files."""
        del texts, out
        return []

    def limit(self, count: int) -> None:
        """Leaves only the first ``count`` questions, or about so many, where questions belong together."""
        before = len(self.questions)
        self.keep_first(count)
        self.limited = len(self.questions) < before

    def keep_first(self, count: int) -> None:
        """What :meth:`limit` does to the questions."""
        self.questions = self.questions[:count]

    def check_images(self) -> None:
        """Opens every image that is asked about once. Raises UserError that counts those that cannot be opened."""
        images = dict.fromkeys(question.image for question in self.questions if question.image is not None)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(
                tqdm.tqdm(pool.map(_error, images), f"{self.name}: images", len(images), delay=2, leave=False)
            )
        bad = [error for error in errors if error is not None]
        if bad:
            raise UserError(f"{self.name}: {len(bad):,} of {len(images):,} images cannot be used. The first: {bad[0]}")

    def find(self, *names: str) -> epath.Path:
        """The first of those files in the benchmark's folder. Raises UserError where none is there."""
        found = self.find_any(*names)
        if found is None:
            raise UserError(f"{self.name}: there is no {' or '.join(names)} in {self.folder}.")
        return found

    def find_any(self, *names: str) -> epath.Path | None:
        """The first of those files or folders in the benchmark's folder that is there."""
        return next((self.folder / name for name in names if (self.folder / name).exists()), None)

    def image_opener(self, folders: Sequence[str], image: str) -> Callable[[], PIL.Image.Image]:
        """Opens an image of the first of those folders that is there, or of the benchmark's own."""
        return ImageFile(self.find_any(*folders) or self.folder, image)

    def read_rows(self, file: epath.Path) -> list[dict[str, Any]]:
        """Rows of a question file of LLaVA's: JSON lines of ``question_id``, ``image``, ``text``, ``category``.

        Raises:
          UserError: a line that is none, named by its number; no line at all.
        """
        found = []
        for number, row in read_jsonl(file):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), kind) and row[key] != ""
                for key, kind in (("question_id", (str, int)), ("image", str), ("text", str))
            ):
                raise UserError(f"{file}, line {number}: a question needs question_id, image and text.")
            found.append(row)
        if not found:
            raise UserError(f"{file} holds no questions.")
        return found

    def make_question(self, row: dict[str, Any], *folders: str) -> Question:
        """The question of such a row, its image in the first of ``folders`` that is there."""
        return Question(row["question_id"], row["text"], self.image_opener(folders, row["image"]), row["text"])


def _error(image):
    try:
        image()
    except BadRow as error:
        return error
    return None


def accuracy_by_kind(kinds: Sequence[str], scores: Sequence[float]) -> dict[str, dict[str, Any]]:
    """For each kind of question, in alphabetical order, ``{"accuracy": mean score, "questions": how many}``."""
    groups = {kind: [] for kind in sorted(set(kinds))}
    for kind, score in zip(kinds, scores, strict=True):
        groups[kind].append(score)
    return {kind: {"accuracy": statistics.fmean(group), "questions": len(group)} for kind, group in groups.items()}
