"""MME: fourteen tasks, with one yes question and one no question per image (Fu et al., 2023)."""

import collections
import itertools
import posixpath
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark, Question
from stf_jax.evals.files import read_text_lines
from stf_jax.files import open_atomic

_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_RELEASE = "MME_Benchmark_release_version"
_SUFFIX = "Please answer yes or no."  # of MME's questions; LLaVA asks for a word or phrase instead
_Key = tuple[str, str, str]  # of a label: the task, the stem of the image's name, the question without suffixes
_Label = tuple[str, str]  # MME's question, and the answer Yes or No


class MME(Benchmark):
    """LLaVA's ``llava_mme.jsonl`` with MME's labels: one text file per image, or ``eval_tool``'s one file per task."""

    name = "mme"
    folders = ("MME", "mme")
    groups = ("paper",)
    rule = (
        "An answer is yes if its first four characters contain yes, ignoring case, or else no if they contain no. A "
        "task's score is 100 times the share of questions answered correctly plus 100 times the share of images with "
        "both questions answered correctly; perception sums ten tasks, cognition four."
    )

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        question_file = self.find("llava_mme.jsonl")
        rows = self.read_rows(question_file)
        self.questions = [self.make_question(row, _RELEASE) for row in rows]
        self._tasks: dict[str, str] = {}  # the task of each image, by its question_id as text
        for row in rows:
            task = row.get("category")
            if task not in _PERCEPTION + _COGNITION:
                hint = did_you_mean(str(task), _PERCEPTION + _COGNITION)
                raise UserError(f"{question_file}, question {row['question_id']}: unknown category {task!r}; {hint}")
            self._tasks[str(row["question_id"])] = task
        for image, count in collections.Counter(str(question.id) for question in self.questions).items():
            if count != 2:
                raise UserError(f"{question_file}: {image} has {count} questions, but every image must have two.")
        self._labels = self._read_labels()
        missing = [question for question in self.questions if self._key(question) not in self._labels]
        if missing:
            raise UserError(
                f"The labels in {self.folder} do not match the questions: {len(missing):,} of "
                f"{len(self.questions):,} have no label, such as {self._key(missing[0])[2]!r} on {missing[0].id}; use "
                "MME's own files."
            )

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        images: dict[str, list[bool]] = {}
        for question, text in zip(self.questions, texts, strict=True):
            _, gold = self._labels[self._key(question)]
            images.setdefault(str(question.id), []).append(parse_yes_no(text) == gold.lower())
        by_task = {}
        for task in _PERCEPTION + _COGNITION:
            pairs = [pair for image, pair in images.items() if self._tasks[image] == task]
            if pairs:
                by_task[task] = _score_task(pairs)
        return {
            "perception": _sum_scores(by_task, _PERCEPTION),
            "cognition": _sum_scores(by_task, _COGNITION),
            "by_task": by_task,
        }

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``mme_results/TASK.txt`` for MME's ``calculation.py``.

        A line has the name of the image's label file (as LLaVA writes it), the question, the gold answer and the
        answer, separated by tabs. That program takes each two consecutive lines as one image.
        """
        folder = out / "mme_results"
        folder.mkdir(parents=True, exist_ok=True)
        tasks: dict[str, dict[str, list[str]]] = {}
        for question, text in zip(self.questions, texts, strict=True):
            task, stem, _ = key = self._key(question)
            line = "\t".join([f"{stem}.txt", *self._labels[key], re.sub(r"[\t\r\n]", " ", text)])
            tasks.setdefault(task, {}).setdefault(str(question.id), []).append(line + "\n")
        files = {task: folder / f"{task}.txt" for task in tasks}
        for task, images in tasks.items():
            with open_atomic(files[task]) as file:
                file.writelines(itertools.chain(*images.values()))
        return list(files.values())

    def keep_first(self, count: int) -> None:
        """Keeps the first ``count`` questions, and the other questions about their images."""
        kept = {str(question.id) for question in self.questions[:count]}
        self.questions = [question for question in self.questions if str(question.id) in kept]

    def _key(self, question: Question) -> _Key:
        image = str(question.id)
        return self._tasks[image], _get_stem(image), _strip_suffixes(question.text)

    def _read_labels(self) -> dict[_Key, _Label]:
        """Reads the labels of all questions."""
        stems: dict[str, list[str]] = {task: [] for task in self._tasks.values()}
        for image, task in self._tasks.items():
            stems[task].append(_get_stem(image))
        labels: dict[_Key, _Label] = {}
        files: dict[epath.Path, None] = {}
        for task, task_stems in stems.items():
            for file, number, stem, question, answer in self._read_lines(task, task_stems):
                if answer.lower() not in ("yes", "no"):
                    raise UserError(f"{file}, line {number}: the answer is {answer!r}, neither Yes nor No.")
                _, first = labels.setdefault((task, stem, _strip_suffixes(question)), (question, answer))
                if first.lower() != answer.lower():
                    raise UserError(
                        f"{file}, line {number}: {question!r} is labeled both Yes and No; use MME's own file."
                    )
                files[file] = None
        self.labels = tuple(files)
        return labels

    def _read_lines(self, task: str, stems: Iterable[str]) -> list[tuple[epath.Path, int, str, str, str]]:
        """Returns (file, line number, stem of the image's name, question, answer) for each label of a task."""
        folder = self.find_any(f"{_RELEASE}/{task}/questions_answers_YN", f"{_RELEASE}/{task}")
        names = {path.name for path in folder.iterdir()} if folder is not None and folder.is_dir() else set()
        files = [(folder / f"{stem}.txt", stem) for stem in stems if folder is not None and f"{stem}.txt" in names]
        if files:
            return [
                (file, number, stem, question, answer)
                for file, stem in files
                for number, (question, answer) in _read_fields(file, 2)
            ]
        file = self.find_any(f"eval_tool/Your_Results/{task}.txt")
        if file is None:
            raise UserError(
                f"mme: {self.folder} has no labels for {task}: neither {_RELEASE}/{task}/questions_answers_YN/*.txt "
                f"nor {_RELEASE}/{task}/*.txt nor eval_tool/Your_Results/{task}.txt."
            )
        return [
            (file, number, _get_stem(name), question, answer)
            for number, (name, question, answer) in _read_fields(file, 3)
        ]


def parse_yes_no(text: str) -> str:
    """Returns ``yes``, ``no`` or ``other``, as MME's ``calculation.py`` reads an answer.

    lmms-eval's program differs: it first removes full stops, and accepts ``y`` or ``n`` alone as an answer.
    """
    start = text.lower()[:4]
    # Substrings, not words: "not" and "know" count as no.
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def _score_task(pairs: Sequence[Sequence[bool]]) -> dict[str, float]:
    accuracy = statistics.fmean(correct for pair in pairs for correct in pair)
    accuracy_plus = statistics.fmean(all(pair) for pair in pairs)
    return {
        "score": 100 * accuracy + 100 * accuracy_plus,
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "questions": 2 * len(pairs),
    }


def _sum_scores(by_task: Mapping[str, Mapping[str, float]], tasks: Iterable[str]) -> float:
    return sum((by_task[task]["score"] for task in tasks if task in by_task), 0.0)


def _get_stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _strip_suffixes(question: str) -> str:
    return question.replace(SHORT_ANSWER_SUFFIX.strip(), "").replace(_SUFFIX, "").strip()


def _read_fields(file: epath.Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_text_lines(file):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < columns:
            names = ("file", "question", "answer")[-columns:]
            raise UserError(f"{file}, line {number}: a label needs {', '.join(names)}, separated by tabs.")
        yield number, fields[:columns]  # the evaluation tool's examples also have a model's answer


COMPONENTS = {MME.name: MME}
