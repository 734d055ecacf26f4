"""MME: fourteen tasks, each image with a question to be answered yes and one to be answered no (Fu et al., 2023)."""

import collections
import itertools
import posixpath
import re
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.config import UserError, did_you_mean
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX, Benchmark
from stf_jax.evals.files import read_text_lines
from stf_jax.runtime.files import open_atomic

_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_RELEASE = "MME_Benchmark_release_version"
_REQUEST = "Please answer yes or no."  # ends MME's questions; LLaVA asks for a word or phrase instead


class MME(Benchmark):
    """LLaVA's ``llava_mme.jsonl`` with MME's labels, a text file an image or, of its ``eval_tool``, a file a task."""

    name = "mme"
    folders = ("MME", "mme")
    rule = (
        "An answer is yes where its first four characters hold yes, letter case aside, or else no where they hold no. "
        "A task's score is 100 times the share of questions answered rightly plus 100 times the share of images of "
        "which both are; perception sums ten tasks, cognition four."
    )

    def __init__(self, data: epath.Path):
        super().__init__(data)
        asked = self.find("llava_mme.jsonl")
        rows = self.read_rows(asked)
        self.questions = [self.make_question(row, _RELEASE) for row in rows]
        self._tasks = {}  # of each image, by its question_id as text
        for row in rows:
            task = row.get("category")
            if task not in _PERCEPTION + _COGNITION:
                known = did_you_mean(str(task), _PERCEPTION + _COGNITION)
                raise UserError(f"{asked}, question {row['question_id']}: unknown category {task!r}; {known}")
            self._tasks[str(row["question_id"])] = task
        for image, count in collections.Counter(str(question.id) for question in self.questions).items():
            if count != 2:
                raise UserError(f"{asked}: {image} has {count} of the two questions that an image has.")
        self._labels = self._read_labels()
        missing = [question for question in self.questions if self._key(question) not in self._labels]
        if missing:
            raise UserError(
                f"The labels in {self.folder} do not fit the questions: {len(missing):,} of {len(self.questions):,} "
                f"have none, such as {self._key(missing[0])[2]!r} on {missing[0].id}; take MME's own files."
            )

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        images = {}
        for question, text in zip(self.questions, texts, strict=True):
            _, gold = self._labels[self._key(question)]
            images.setdefault(str(question.id), []).append(parse_yes_no(text) == gold.lower())
        by_task = {}
        for task in _PERCEPTION + _COGNITION:
            pairs = [pair for image, pair in images.items() if self._tasks[image] == task]
            if pairs:
                by_task[task] = _scores(pairs)
        return {
            "perception": _sum(by_task, _PERCEPTION),
            "cognition": _sum(by_task, _COGNITION),
            "by_task": by_task,
        }

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``mme_results/TASK.txt``, which MME's ``calculation.py`` takes.

        A line is the name of the image's label file (which LLaVA writes there), question, truth and answer, with tabs
        between. That program takes every two lines for an image's.
        """
        folder = out / "mme_results"
        folder.mkdir(parents=True, exist_ok=True)
        tasks = {}
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
        """Leaves the first ``count`` questions, and what else is asked about their images."""
        kept = {str(question.id) for question in self.questions[:count]}
        self.questions = [question for question in self.questions if str(question.id) in kept]

    def _key(self, question):
        image = str(question.id)
        return self._tasks[image], _stem(image), _bare(question.text)

    def _read_labels(self):
        """Question in MME's words and its answer, Yes or No, by task, stem of the image's name, and bare question."""
        stems = {task: [] for task in self._tasks.values()}
        for image, task in self._tasks.items():
            stems[task].append(_stem(image))
        labels, files = {}, {}
        for task, own in stems.items():
            for file, number, stem, question, answer in self._lines(task, own):
                if answer.lower() not in ("yes", "no"):
                    raise UserError(f"{file}, line {number}: the answer is {answer!r}, neither Yes nor No.")
                _, found = labels.setdefault((task, stem, _bare(question)), (question, answer))
                if found.lower() != answer.lower():
                    raise UserError(f"{file}, line {number}: {question!r} has a Yes and a No; take MME's own file.")
                files[file] = None
        self.labels = tuple(files)
        return labels

    def _lines(self, task, stems):
        """File, number of the line, stem of the image's name, question and answer of a task's labels."""
        folder = self.find_any(f"{_RELEASE}/{task}/questions_answers_YN", f"{_RELEASE}/{task}")
        there = {path.name for path in folder.iterdir()} if folder is not None and folder.is_dir() else set()
        texts = [(folder / f"{stem}.txt", stem) for stem in stems if f"{stem}.txt" in there]
        if texts:
            return [(file, number, stem, *line) for file, stem in texts for number, line in _fields(file, 2)]
        file = self.find_any(f"eval_tool/Your_Results/{task}.txt")
        if file is None:
            raise UserError(
                f"mme: {self.folder} has no labels of {task}: neither {_RELEASE}/{task}/questions_answers_YN/*.txt nor "
                f"{_RELEASE}/{task}/*.txt nor eval_tool/Your_Results/{task}.txt."
            )
        return [(file, number, _stem(line[0]), *line[1:]) for number, line in _fields(file, 3)]


def parse_yes_no(text: str) -> str:
    """``yes``, ``no`` or ``other``, as MME's ``calculation.py`` reads an answer.

    lmms-eval's program differs: it drops full stops first, and takes a lone ``y`` or ``n`` for an answer.
    """
    start = text.lower()[:4]
    # Not as words: "not" and "know" are a no.
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def _scores(pairs):
    accuracy = statistics.fmean(right for pair in pairs for right in pair)
    accuracy_plus = statistics.fmean(all(pair) for pair in pairs)
    return {
        "score": 100 * accuracy + 100 * accuracy_plus,
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "questions": 2 * len(pairs),
    }


def _sum(by_task, tasks):
    return sum((by_task[task]["score"] for task in tasks if task in by_task), 0.0)


def _stem(name):
    return posixpath.splitext(posixpath.basename(name))[0]


def _bare(question):
    return question.replace(SHORT_ANSWER_SUFFIX.strip(), "").replace(_REQUEST, "").strip()


def _fields(file, columns):
    for number, line in read_text_lines(file):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < columns:
            wanted = ("file", "question", "answer")[-columns:]
            raise UserError(f"{file}, line {number}: a label needs {', '.join(wanted)}, with tabs between.")
        yield number, fields[:columns]  # the evaluation tool's examples have an answer of a model after them
