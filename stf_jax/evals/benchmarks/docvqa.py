"""DocVQA: questions about scanned pages of documents (Mathew et al., 2021); the validation and test splits.

The protocol is lmms-eval's tasks ``docvqa_val`` and ``docvqa_test``, version 0.7.3: lmms_eval/tasks/docvqa/
{_default_template_docvqa_yaml, docvqa_val.yaml, docvqa_test.yaml, utils.py} and ``anls`` in lmms_eval/api/metrics.py,
in EvolvingLMMs-Lab/lmms-eval. The files are ``DocVQA/{validation,test}-*.parquet`` of the data set
lmms-lab-encoder/DocVQA on the Hub (formerly lmms-lab/DocVQA), or the challenge's ``val_v1.0_withQT.json`` (older:
``val_v1.0.json``) and ``test_v1.0.json`` with ``documents/``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from etils import epath

from stf_jax.config import UserError
from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.matching import ANLS_RULE, anls
from stf_jax.evals.tables import Columns, Row
from stf_jax.files import write_json


class DocVQA(HubBenchmark):
    """The 5,349 questions of the validation split."""

    name = "docvqa"
    folders: ClassVar[tuple[str, ...]] = ("docvqa", "DocVQA")
    groups: ClassVar[tuple[str, ...]] = ("ocr",)
    repository = "lmms-lab-encoder/DocVQA"
    files = "DocVQA/validation-*.parquet"
    max_new_tokens = 32
    rule = ANLS_RULE
    columns: ClassVar[Columns] = {
        "questionId": ("text", "integer"),
        "question": ("text",),
        "answers": ("list of text",),
        "image": ("image",),
    }
    authors = (AuthorsFile(("val_v1.0_withQT.json", "val_v1.0.json"), folders=("val",), under="data"),)
    id_column = "questionId"

    def make_prompt(self, row: Row) -> str:
        return row["question"] + SHORT_ANSWER_SUFFIX

    def score(self, text: str, row: Row) -> float:
        return anls(text, row["answers"])

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"anls": mean(self.score_rows(texts))}


class DocVQATest(DocVQA):
    """The 5,188 questions of the test split, whose answers only the server has."""

    name = "docvqa_test"
    groups = ()
    files = "DocVQA/test-*.parquet"
    columns: ClassVar[Columns] = {"questionId": ("text", "integer"), "question": ("text",), "image": ("image",)}
    authors = (AuthorsFile(("test_v1.0.json",), folders=("test",), under="data"),)
    has_labels = False

    def check_row(self, row: Row) -> None:
        try:
            int(row["questionId"])
        except ValueError:
            raise UserError(f"{row.name}: questionId {row['questionId']!r} is not an integer.") from None

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``docvqa_test_for_submission.json`` (``infovqa_…``) for the Robust Reading Competition's server."""
        file = out / f"{self.name}_for_submission.json"
        pairs = zip(self.rows, texts, strict=True)
        write_json(file, [{"questionId": int(row["questionId"]), "answer": text} for row, text in pairs])
        return [file]


COMPONENTS = {kind.name: kind for kind in (DocVQA, DocVQATest)}
