"""TextVQA without OCR tokens in the question: what the model itself reads (Singh et al., 2019); validation, 0.5.1.

The protocol is lmms-eval's task ``textvqa_val``, version 0.7.3: lmms_eval/tasks/textvqa/
{_default_template_textvqa_yaml, textvqa_val.yaml, utils.py} in EvolvingLMMs-Lab/lmms-eval. The files are
``data/validation-*.parquet`` of the data set lmms-lab-encoder/textvqa on the Hub (formerly lmms-lab/textvqa), or the
authors' ``TextVQA_0.5.1_val.json`` with ``train_images/``. LLaVA's protocol, with OCR tokens, is the benchmark
``textvqa``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from stf_jax.evals import vqa
from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX
from stf_jax.evals.hub import HubBenchmark, mean
from stf_jax.evals.tables import Columns, Row


class TextVQANoOCR(HubBenchmark):
    """The 5,000 questions of the validation split."""

    name = "textvqa_no_ocr"
    folders = ("textvqa_no_ocr", "textvqa")
    groups = ("ocr",)
    repository = "lmms-lab-encoder/textvqa"
    files = "data/validation-*.parquet"
    max_new_tokens = 1024  # lmms-eval's for LLaVA; the task has no limit
    rule = vqa.RULE
    columns: ClassVar[Columns] = {
        "question_id": ("integer", "text"),
        "question": ("text",),
        "answers": ("list of text",),
        "image": ("image",),
    }
    authors = (AuthorsFile(("TextVQA_0.5.1_val.json",), "image_id", ("train_images",), under="data", suffix=".jpg"),)
    id_column = "question_id"

    def make_prompt(self, row: Row) -> str:
        return row["question"].capitalize() + SHORT_ANSWER_SUFFIX  # which makes all other letters lowercase

    def score(self, text: str, row: Row) -> float:
        return vqa.accuracy(text, row["answers"])

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"accuracy": mean(self.score_rows(texts))}


COMPONENTS = {TextVQANoOCR.name: TextVQANoOCR}
