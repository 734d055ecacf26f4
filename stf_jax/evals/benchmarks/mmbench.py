"""MMBench and MMBench-CN: multiple choice, asked again with the options rotated (Liu et al., 2023)."""

import base64
import csv
import dataclasses
import io
import pathlib
import re
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
from etils import epath

from stf_jax.config import UserError
from stf_jax.data.image import MAX_FILE_BYTES, open_image
from stf_jax.data.records import BadRow
from stf_jax.evals.benchmark import LETTER_SUFFIX, Benchmark, Question
from stf_jax.files import move_file

csv.field_size_limit(MAX_FILE_BYTES)  # an image is a field
_OPTIONS = "ABCD"
_ROTATION = 1_000_000  # difference between the indices of a question and of its next rotation
_INVALID_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # also invalid in an Excel file
_INDEX = re.compile("[0-9]{1,18}")
# LLaVA reads the table with pandas, which treats these as missing, and also ignores any "nan" and "none".
_MISSING = ("", "#N/A", "<NA>", "N/A", "NA", "NULL", "n/a", "null")
# The forms of a letter as a separate word, in order of precedence.
_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_Row = dict[str, str | None]  # the values by column; None is a missing one


class MMBench(Benchmark):
    """``mmbench_dev_20230712.tsv`` with images and answers, or ``mmbench_test_20230712.tsv`` without answers.

    VLMEvalKit's tables of the same questions work too. Where several rows share an image, they contain it once, and the
    other rows contain the index of that row.

    Each rotation of a question is a row; ``questions`` in the metrics counts questions, not rotations.
    """

    name = "mmbench"
    folders: ClassVar[tuple[str, ...]] = ("mmbench",)
    groups = ("paper",)
    max_new_tokens = 1024
    rule = (
        "An answer chooses the one letter of A to E that is among its words, alone or with punctuation (a bare A "
        "counts only among at most three words), or else the one option whose text it contains, ignoring case. An "
        "answer that chooses none or several is wrong; no judge model is used. circular_accuracy counts questions "
        "whose rotations are all answered correctly, vanilla_accuracy those answered correctly in their original order."
    )
    _files: ClassVar[tuple[str, ...]] = (
        "mmbench_dev_20230712.tsv",
        "mmbench_test_20230712.tsv",
        "MMBench_DEV_EN.tsv",
        "MMBench_TEST_EN.tsv",
    )
    _suffix: ClassVar[str] = LETTER_SUFFIX

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        file = self.find(*self._files)
        self._columns, self._rows = _read_table(file)
        images = _find_images(file, self._rows)
        self.questions = [_make_question(index, row, images[index], self._suffix) for index, row in self._rows.items()]
        if any(row.get("answer") for row in self._rows.values()):
            for index, row in self._rows.items():
                if row["answer"] not in tuple(_OPTIONS):
                    raise UserError(f"{file}, index {index}: the answer is {row['answer']!r}, not one of A, B, C, D.")
            self.labels = (file,)
        elif "dev" in file.name.lower():
            raise UserError(
                f"{file} has no answers, but the dev split has them: download it again. If this is the test split, "
                f"name it {self._files[-1]}."
            )

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        correct: dict[int, bool] = {}
        for question, text in zip(self.questions, texts, strict=True):
            row = self._rows[_index(question)]
            correct[_index(question)] = parse_choice(text, _get_options(row)) == row["answer"]
        circular = dict.fromkeys((index for index in correct if index < _ROTATION), True)
        for index, is_correct in correct.items():
            circular[index % _ROTATION] &= is_correct

        def accuracies(indices: Collection[int]) -> dict[str, float]:
            return {
                "circular_accuracy": statistics.fmean(circular[index] for index in indices),
                "vanilla_accuracy": statistics.fmean(correct[index] for index in indices),
            }

        result: dict[str, Any] = accuracies(circular)
        for column, key in (("category", "by_category"), ("l2-category", "by_l2_category")):
            if column in self._columns:
                groups: dict[str, list[int]] = {}
                for index in circular:
                    groups.setdefault(self._rows[index][column] or "", []).append(index)
                result[key] = {
                    kind: accuracies(indices) | {"questions": len(indices)} for kind, indices in sorted(groups.items())
                }
        return result

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``mmbench_submission.xlsx`` (``mmbench_cn_submission.xlsx``) for MMBench's server."""
        import openpyxl  # only used here

        columns = ["index", "question", *_OPTIONS, "prediction"]
        columns += [column for column in ("answer", "split") if column in self._columns]
        book = openpyxl.Workbook()
        book.active.append(columns)
        for line, (question, text) in enumerate(zip(self.questions, texts, strict=True), start=2):
            row = self._rows[_index(question)] | {"index": question.id, "prediction": text}
            for column, name in enumerate(columns, start=1):
                value = row.get(name)
                if isinstance(value, str):
                    cell = book.active.cell(line, column, _INVALID_XML.sub("", value))
                    cell.data_type = "s"  # "=1+1" is text as well
                else:
                    book.active.cell(line, column, value)
        file = out / f"{self.name}_submission.xlsx"
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder) / file.name
            book.save(local)
            move_file(local, file)
        return [file]

    def keep_first(self, count: int) -> None:
        """Keeps the first ``count`` rows, and the other rotations of their questions."""
        kept = {_index(question) % _ROTATION for question in self.questions[:count]}
        self.questions = [question for question in self.questions if _index(question) % _ROTATION in kept]


class MMBenchCN(MMBench):
    """MMBench in Chinese: ``mmbench_dev_cn_20231003.tsv``."""

    name = "mmbench_cn"
    folders = ("mmbench_cn", "mmbench")
    _files = ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "MMBench_TEST_CN.tsv")
    _suffix = "\n请直接回答选项字母。"


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter that an answer chooses by lmms-eval's rule (its ``can_infer``), or None if it is unclear.

    Args:
      text: the answer.
      options: the options' texts by letter.
    """
    words = text.split()
    for form in _FORMS:
        found = [letter for letter in "ABCDE" if form.format(letter) in words]  # E: a judge's "none of them"
        is_article = form == "{}" and found == ["A"] and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def _index(question: Question) -> int:
    return int(question.id)  # is an int already


def _get_options(row: _Row) -> dict[str, str]:
    options: dict[str, str] = {}
    for letter in _OPTIONS:
        text = row.get(letter)
        if not text:
            break
        options[letter] = text
    return options


def _get_needed(row: _Row, column: str) -> str:
    value = row[column]
    assert value is not None  # _read_table checks it
    return value


def _make_question(index: int, row: _Row, image: "_Image", suffix: str) -> Question:
    hint = row.get("hint")
    start = [hint] if hint else []
    prompt = "\n".join(
        [*start, _get_needed(row, "question"), *(f"{letter}. {text}" for letter, text in _get_options(row).items())]
    )
    return Question(index, prompt + suffix, image, prompt)


@dataclasses.dataclass(frozen=True)
class _Image:
    """Opens an image in the table."""

    text: str  # base64
    name: str = dataclasses.field(compare=False)  # several rows may contain the same image

    def __call__(self) -> PIL.Image.Image:
        text = "".join(self.text.split()).rstrip("=")
        try:  # without validate, invalid text such as a list of images would be skipped
            content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError as error:
            raise BadRow("corrupt", f"Image {self.name} is not base64: {error}.", self.name) from None
        return open_image(content, self.name)


def _find_images(file: epath.Path, rows: Mapping[int, _Row]) -> dict[int, _Image]:
    """Returns the image of each row by index: its own, or that of the row it refers to, possibly through others."""
    images: dict[int, _Image] = {}
    for index in rows:
        chain = [index]
        while (last := chain[-1]) not in images:
            cell = _get_needed(rows[last], "image").strip()
            if not _INDEX.fullmatch(cell):
                images[last] = _Image(cell, f"of index {last} in {file}")
            elif int(cell) not in rows:
                raise UserError(f"{file}, index {last}: its image refers to index {cell}, which does not exist.")
            elif int(cell) in chain:
                raise UserError(f"{file}, index {cell}: its image refers to itself, directly or through other rows.")
            else:
                chain.append(int(cell))
        images |= dict.fromkeys(chain, images[last])
    return images


def _read_table(file: epath.Path) -> tuple[Sequence[str], dict[int, _Row]]:
    """Returns the table's columns, and its rows by index; missing values are None."""
    try:
        with file.open("rb") as opened:
            table = csv.DictReader(io.TextIOWrapper(opened, "utf-8-sig", newline=""), delimiter="\t")
            columns, found = table.fieldnames or (), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as tab-separated values: {error}.") from None
    needed = ("index", "question", "A", "B", "image")
    missing = [column for column in needed if column not in columns]
    if not found or missing:
        reason = f" (it has no {' and no '.join(missing)})" if missing else ""
        raise UserError(
            f"{file} is not a table of questions with index, question, A, B and image{reason}; use MMBench's own file."
        )
    repeated = [column for column in columns if column and columns.count(column) > 1]
    if repeated:
        raise UserError(f"{file} has two columns named {repeated[0]!r}; use MMBench's own file.")
    rows: dict[int, _Row] = {}
    for number, fields in enumerate(found, start=1):
        if None in fields or None in fields.values():
            raise UserError(f"{file}, row {number} does not have the header's columns; download the file again.")
        row: _Row = {column: None if _is_missing(value) else value for column, value in fields.items()}
        # An option may be the word "None", which LLaVA leaves out; an empty option is an error.
        missing = [key for key in needed if _is_empty(fields[key]) or (key not in _OPTIONS and not row[key])]
        if missing:
            raise UserError(f"{file}, row {number} has no {missing[0]}; use MMBench's own file.")
        answer = row.get("answer")
        if answer in tuple(_OPTIONS) and _is_empty(fields.get(answer, "")):
            raise UserError(
                f"{file}, row {number}: the answer is {answer}, but that option is empty; use MMBench's own file."
            )
        index = _get_needed(row, "index")
        del row["index"]
        if not _INDEX.fullmatch(index):
            raise UserError(f"{file}, row {number}: index {index[:40]!r} is not an integer of at most 18 digits.")
        if int(index) in rows:
            raise UserError(f"{file}, row {number}: another row also has index {index}.")
        rows[int(index)] = row
    for key in rows:
        if key % _ROTATION not in rows:
            raise UserError(f"{file}: index {key} is a rotation of {key % _ROTATION}, which does not exist.")
    return columns, rows


def _is_empty(value: str) -> bool:
    return value.strip().lower() in ("", "nan")


def _is_missing(value: str) -> bool:
    return value in _MISSING or value.lower() in ("nan", "none")


COMPONENTS = {kind.name: kind for kind in (MMBench, MMBenchCN)}
