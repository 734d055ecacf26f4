"""The base class of benchmarks that are asked and scored as lmms-eval does.

Their questions come from a data set on the Hub, or from the files that the benchmark's authors publish.
"""

import abc
import fnmatch
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.authors import AuthorsFile, AuthorsTable
from stf_jax.evals.benchmark import Benchmark, Question, Score, score_each
from stf_jax.evals.tables import Columns, Row, Table

# The mark of one of several files: 00000-of-00003, which old uploads follow by a hash.
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")


class HubBenchmark(Benchmark):
    """Questions from the Parquet files of a data set, or from its authors' JSON files.

    A subclass names the data set and its columns, and says what a row asks and how answers to rows are scored.

    Attributes:
      repository: the data set on the Hub, for messages.
      files: the files of the split in the data set.
      columns: the columns that are read, and the kinds that each may have.
      authors: the authors' files, read where there are no Parquet files; empty if only those can be read.
      id_column: the column of the question's id; without it, the id is the position in the split.
      image_column: the column of the image.
      has_labels: whether the split is published with answers.
      rows: the rows of the questions, in their order.
    """

    repository: ClassVar[str]
    files: ClassVar[str] = "data/test-*.parquet"
    columns: ClassVar[Columns]
    authors: ClassVar[tuple[AuthorsFile, ...]] = ()
    id_column: ClassVar[str] = ""
    image_column: ClassVar[str] = "image"
    has_labels: ClassVar[bool] = True
    rows: list[Row]

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        files = self._find_files(data)
        table: Table | AuthorsTable = Table(files, self.columns) if files else self._read_authors_files(data)
        self.rows = [row for row in table.rows if self.is_asked(row)]
        if not self.rows:
            raise UserError(f"{self.name}: no row of {table.files[0]} is one of its questions.")
        for row in self.rows:
            row.check_complete()
            self.check_row(row)
        self.questions = [self._make_question(table, row) for row in self.rows]
        self.labels = tuple(table.files) if self.has_labels else ()

    @abc.abstractmethod
    def make_prompt(self, row: Row) -> str:
        """Returns the text that follows the image."""

    def is_asked(self, row: Row) -> bool:
        """Whether the row is a question of this benchmark."""
        del row
        return True

    def check_row(self, row: Row) -> None:
        """Checks the values of a row. Raises UserError if :meth:`metrics` cannot use them."""

    @abc.abstractmethod
    def score(self, text: str, row: Row) -> float:
        """Scores an answer to a row in 0..1; called only if the split has labels."""

    def score_rows(self, texts: Sequence[str]) -> list[float]:
        """Scores the answers to all rows."""
        return [self.score(text, row) for text, row in zip(texts, self.rows, strict=True)]

    def scores(self, texts: Sequence[str]) -> list[Score]:
        return score_each(self.score_rows(texts)) if self.has_labels else []

    def keep_first(self, count: int) -> None:
        super().keep_first(count)
        self.rows = self.rows[:count]

    def _make_question(self, table: Table | AuthorsTable, row: Row) -> Question:
        text = self.make_prompt(row)
        # Question ids are those of the authors; lmms-eval's sample files have the position in the split instead.
        metadata: dict[str, Any] = {"doc_id": row.number}
        question_id = row[self.id_column] if self.id_column else row.number
        return Question(question_id, text, table.image_opener(row, self.image_column), text, metadata)

    def _find_files(self, data: epath.Path) -> list[epath.Path]:
        """Returns the Parquet files of the split, in order; there may be none. Raises UserError if some are missing."""
        parent, _, pattern = self.files.rpartition("/")
        # A data set may have a split of the same name in two folders, so only "data" may be left out.
        folders = [self.folder / parent, data / parent, *([self.folder] if parent in ("", "data") else [])]
        found = next((files for folder in folders if (files := _list_files(folder, pattern))), [])
        if not found:
            return []
        shards = [match for file in found if (match := _SHARD.search(file.name))]
        count = int(shards[0][2]) if shards else 1
        if len(found) != count or [int(shard[1]) for shard in shards] != [*range(count)][: len(shards)]:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"{self.name}: the files {pattern} in {found[0].parent} are not those of one upload, {count} in "
                f"number: {names}. Download the data set again."
            )
        return found

    def _read_authors_files(self, data: epath.Path) -> AuthorsTable:
        """Reads the authors' files. Raises UserError if there are none, with a way to get the data set."""
        table = AuthorsTable(self.folder, self.authors, self.columns)
        if table.files:
            return table
        target = data / self.folders[0] if self.folder == data else self.folder
        names = "".join(f" or {kind.names[0]}" for kind in self.authors)
        raise UserError(
            f"{self.name}: there is no {self.files}{names} in {self.folder}; get the files with: "
            f"hf download {self.repository} --repo-type=dataset --local-dir={target}"
        )


def _list_files(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """Returns the files in a folder, which need not exist, whose names match a pattern; sorted by name."""
    if not folder.is_dir():
        return []
    files = [file for file in folder.iterdir() if fnmatch.fnmatchcase(file.name, pattern)]
    return sorted(files, key=lambda file: file.name)


def mean(scores: Sequence[float]) -> float:
    """Returns the mean as lmms-eval adds it up; an exact sum may differ from it in the last digit."""
    return sum(scores) / len(scores)
