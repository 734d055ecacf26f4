"""InfographicVQA: questions about infographics (Mathew et al., 2022); the validation and test splits.

The protocol is lmms-eval's tasks ``infovqa_val`` and ``infovqa_test``, version 0.7.3: lmms_eval/tasks/infovqa/
{_default_template_infovqa_yaml, infovqa_val.yaml, infovqa_test.yaml, utils.py} in EvolvingLMMs-Lab/lmms-eval; prompts
and scores are those of DocVQA. The files are ``InfographicVQA/{validation,test}-*.parquet`` of the data set
lmms-lab-encoder/DocVQA on the Hub (formerly lmms-lab/DocVQA), or the challenge's
``infographicsVQA_val_v1.0_withQT.json`` (older: ``infographicsVQA_val_v1.0.json``) and
``infographicsVQA_test_v1.0.json`` with ``infographicsvqa_images/``.
"""

from stf_jax.evals.authors import AuthorsFile
from stf_jax.evals.benchmarks.docvqa import DocVQA, DocVQATest


def _authors_file(*names: str) -> AuthorsFile:
    return AuthorsFile(names, "image_local_name", ("infographicsvqa_images", "images"), under="data")


class InfoVQA(DocVQA):
    """The 2,801 questions of the validation split."""

    name = "infovqa"
    folders = ("infovqa", "docvqa", "DocVQA")
    files = "InfographicVQA/validation-*.parquet"
    authors = (_authors_file("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"),)


class InfoVQATest(DocVQATest):
    """The 3,288 questions of the test split, whose answers only the server has."""

    name = "infovqa_test"
    folders = InfoVQA.folders
    files = "InfographicVQA/test-*.parquet"
    authors = (_authors_file("infographicsVQA_test_v1.0.json"),)


COMPONENTS = {kind.name: kind for kind in (InfoVQA, InfoVQATest)}
