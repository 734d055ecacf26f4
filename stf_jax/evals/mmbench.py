"""MMBench and MMBench-CN: one of up to four options, asked again with the options moved round (Liu et al., 2023)."""

import base64
import csv
import dataclasses
import io
import itertools
import pathlib
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from stf_jax.config import UserError
from stf_jax.data.image import MAX_FILE_BYTES, open_image
from stf_jax.data.records import BadRow
from stf_jax.evals.benchmark import LETTER_SUFFIX, Benchmark, Question
from stf_jax.runtime.files import move_file

csv.field_size_limit(MAX_FILE_BYTES)  # an image is a field
_OPTIONS = "ABCD"
_TURN = 1_000_000  # between the indices of a question and of its rotations
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # nor in an Excel file
_INDEX = re.compile("[0-9]{1,18}")
# LLaVA reads the table with pandas, for which these are no values, and leaves out any "nan" and "none" besides.
_NO_VALUES = ("", "#N/A", "<NA>", "N/A", "NA", "NULL", "n/a", "null")
# How an answer may write a letter, apart from other words; what comes first is looked for first.
_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


class MMBench(Benchmark):
    """``mmbench_dev_20230712.tsv``, which has the answers and the images, or ``mmbench_test_20230712.tsv`` without.

    VLMEvalKit's tables of the same questions will do as well: where several rows have one image, it writes the image
    once, and in the other rows' place for it the index of that row.

    Each rotation of a question is a row of its own; a question stands for itself in ``questions`` of the metrics.
    """

    name = "mmbench"
    folders = ("mmbench",)
    max_new_tokens = 1024
    rule = (
        "An answer chooses the one letter of A to E that stands alone or with punctuation among its words (a bare A "
        "only where there are at most three), else the one option whose text it holds, letter case aside; what chooses "
        "none, or several, is wrong (no judge model is asked). circular_accuracy counts a question whose rotations are "
        "all right, vanilla_accuracy one right as first asked."
    )
    _files: ClassVar[tuple[str, ...]] = (
        "mmbench_dev_20230712.tsv",
        "mmbench_test_20230712.tsv",
        "MMBench_DEV_EN.tsv",
        "MMBench_TEST_EN.tsv",
    )
    _request: ClassVar[str] = LETTER_SUFFIX

    def __init__(self, data: epath.Path):
        super().__init__(data)
        file = self.find(*self._files)
        self._columns, self._rows = _read(file)
        images = _images(file, self._rows)
        self.questions = [_question(index, row, images[index], self._request) for index, row in self._rows.items()]
        if any(row.get("answer") for row in self._rows.values()):
            for index, row in self._rows.items():
                if row["answer"] not in tuple(_OPTIONS):
                    raise UserError(f"{file}, index {index}: the answer is {row['answer']!r}, not one of A, B, C, D.")
            self.labels = (file,)
        elif "dev" in file.name.lower():
            raise UserError(
                f"{file} has no answers, and the dev split has: fetch it again; if it is the test split, call it "
                f"{self._files[-1]}."
            )

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        right = {}
        for question, text in zip(self.questions, texts, strict=True):
            row = self._rows[question.id]
            right[question.id] = parse_choice(text, _options(row)) == row["answer"]
        circular = dict.fromkeys((index for index in right if index < _TURN), True)
        for index, own in right.items():
            circular[index % _TURN] &= own

        def shares(indices):
            return {
                "circular_accuracy": statistics.fmean(circular[index] for index in indices),
                "vanilla_accuracy": statistics.fmean(right[index] for index in indices),
            }

        result = shares(circular)
        for column, key in (("category", "by_category"), ("l2-category", "by_l2_category")):
            if column in self._columns:
                kinds = {}
                for index in circular:
                    kinds.setdefault(self._rows[index][column] or "", []).append(index)
                result[key] = {kind: shares(own) | {"questions": len(own)} for kind, own in sorted(kinds.items())}
        return result

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``mmbench_submission.xlsx`` (``mmbench_cn_submission.xlsx``), which MMBench's server takes."""
        import openpyxl  # only wanted here

        columns = ["index", "question", *_OPTIONS, "prediction"]
        columns += [column for column in ("answer", "split") if column in self._columns]
        book = openpyxl.Workbook()
        book.active.append(columns)
        for place, (question, text) in enumerate(zip(self.questions, texts, strict=True), start=2):
            row = self._rows[question.id] | {"index": question.id, "prediction": text}
            for column, name in enumerate(columns, start=1):
                value = row.get(name)
                if isinstance(value, str):
                    cell = book.active.cell(place, column, _NOT_IN_XML.sub("", value))
                    cell.data_type = "s"  # "=1+1" is a text, too
                else:
                    book.active.cell(place, column, value)
        file = out / f"{self.name}_submission.xlsx"
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder) / file.name
            book.save(local)
            move_file(local, file)
        return [file]

    def keep_first(self, count: int) -> None:
        """Leaves the first ``count`` rows, and the other rotations of their questions."""
        kept = {question.id % _TURN for question in self.questions[:count]}
        self.questions = [question for question in self.questions if question.id % _TURN in kept]


class MMBenchCN(MMBench):
    """The same in Chinese: ``mmbench_dev_cn_20231003.tsv``."""

    name = "mmbench_cn"
    folders = ("mmbench_cn", "mmbench")
    _files = ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "MMBench_TEST_CN.tsv")
    _request = "\n请直接回答选项字母。"


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, by lmms-eval's rule (its ``can_infer``); None where it cannot be told.

    Args:
      text: the answer.
      options: texts of the options by their letters.
    """
    words = text.split()
    for form in _FORMS:
        found = [letter for letter in "ABCDE" if form.format(letter) in words]  # E: none of them, as judges say
        article = form == "{}" and found == ["A"] and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def _options(row):
    return {letter: row[letter] for letter in itertools.takewhile(row.get, _OPTIONS)}


def _question(index, row, image, request):
    hint = [row["hint"]] if row.get("hint") else []
    prompt = "\n".join([*hint, row["question"], *(f"{letter}. {text}" for letter, text in _options(row).items())])
    return Question(index, prompt + request, image, prompt)


@dataclasses.dataclass(frozen=True)
class _Image:
    """Opens an image that stands in the table."""

    text: str  # in base64
    name: str = dataclasses.field(compare=False)  # the same image may stand in several rows

    def __call__(self):
        text = "".join(self.text.split()).rstrip("=")
        try:  # what does not belong, such as a list of images, would be skipped
            content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError as error:
            raise BadRow("corrupt", f"Image {self.name} is not in base64: {error}.", self.name) from None
        return open_image(content, self.name)


def _images(file, rows):
    """The image of each row, by index: its own, or that of the row whose index stands in its place, which may go on."""
    images = {}
    for index in rows:
        chain = [index]
        while (last := chain[-1]) not in images:
            cell = rows[last]["image"].strip()
            if not _INDEX.fullmatch(cell):
                images[last] = _Image(cell, f"of index {last} in {file}")
            elif int(cell) not in rows:
                raise UserError(f"{file}, index {last}: its image is that of index {cell}, which is not there.")
            elif int(cell) in chain:
                raise UserError(f"{file}, index {cell}: its image refers to other rows and back to itself.")
            else:
                chain.append(int(cell))
        images |= dict.fromkeys(chain, images[last])
    return images


def _read(file):
    """Columns of the table, and its rows by index; a value that is none is None."""
    try:
        with file.open("rb") as opened:
            table = csv.DictReader(io.TextIOWrapper(opened, "utf-8-sig", newline=""), delimiter="\t")
            columns, found = table.fieldnames or (), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as values with tabs between: {error}.") from None
    needed = ("index", "question", "A", "B", "image")
    lacking = [column for column in needed if column not in columns]
    if not found or lacking:
        what = f": it has no {' and no '.join(lacking)}" if lacking else ""
        raise UserError(
            f"{file} is no table of questions with index, question, A, B and image{what}; take MMBench's own."
        )
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice:
        raise UserError(f"{file} has two columns {twice[0]!r}; take MMBench's own.")
    rows = {}
    for number, fields in enumerate(found, start=1):
        if None in fields or None in fields.values():
            raise UserError(f"{file}, row {number} has other columns than the table's head; fetch the file again.")
        row = {column: None if _is_none(value) else value for column, value in fields.items()}
        # An option may be the word "None", which LLaVA leaves out; an empty one is a fault.
        lacking = [key for key in needed if _is_empty(fields[key]) or (key not in _OPTIONS and not row[key])]
        if lacking:
            raise UserError(f"{file}, row {number} has no {lacking[0]}; take MMBench's own file.")
        answer = row.get("answer")
        if answer in tuple(_OPTIONS) and _is_empty(fields.get(answer, "")):
            raise UserError(f"{file}, row {number}: the answer is {answer}, which is empty; take MMBench's own file.")
        index = row.pop("index")
        if not _INDEX.fullmatch(index):
            raise UserError(f"{file}, row {number}: index {index[:40]!r} is not a whole number of at most 18 digits.")
        if int(index) in rows:
            raise UserError(f"{file}, row {number}: index {index} is another row's, too.")
        rows[int(index)] = row
    for index in rows:
        if index % _TURN not in rows:
            raise UserError(f"{file}: index {index} is a rotation of {index % _TURN}, which is not there.")
    return columns, rows


def _is_empty(value):
    return value.strip().lower() in ("", "nan")


def _is_none(value):
    return value in _NO_VALUES or value.lower() in ("nan", "none")
