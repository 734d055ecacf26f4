"""VizWiz: questions of blind people about their own photographs (Gurari et al., 2018)."""

import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from stf_jax.evals import vqa
from stf_jax.evals.benchmark import Benchmark
from stf_jax.evals.files import index_by_id, match_labels, read_labels
from stf_jax.files import write_json

_IMAGES = {"llava_test.jsonl": "test", "llava_val.jsonl": "val"}


class VizWiz(Benchmark):
    """LLaVA's ``llava_test.jsonl``, or a ``llava_val.jsonl`` with VizWiz's own ``val.json``.

    Each image has one question, so labels are matched by image name. VizWiz's ``test.json`` has no answers.
    """

    name = "vizwiz"
    folders = ("vizwiz",)
    groups = ("paper",)
    rule = vqa.RULE

    def __init__(self, data: epath.Path) -> None:
        super().__init__(data)
        question_file = self.find(*_IMAGES)
        rows = self.read_rows(question_file)
        self.questions = [self.make_question(row, _IMAGES[question_file.name]) for row in rows]
        self._images = [row["image"] for row in rows]
        # VizWiz's archive contains both splits: use the one with more of the questions' images.
        labels, file = max(
            (
                (index_by_id(read_labels(file, image=str), "image", file), file)
                for file in (self.folder / "val.json", self.folder / "test.json")
                if file.exists()
            ),
            key=lambda found: sum(image in found[0] for image in self._images),
            default=({}, None),
        )
        if any("answers" in label for label in labels.values()):
            assert file is not None  # there are labels
            self.labels = (file,)
            matched = match_labels(self._images, labels, file)
            self._answers = [vqa.annotator_answers(label, f"{file}, {label['image']}") for label in matched]

    def metrics(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"accuracy": statistics.fmean(vqa.accuracies(texts, self._answers[: len(self.questions)]))}

    def write_submission(self, texts: Sequence[str], out: epath.Path) -> list[epath.Path]:
        """Writes ``vizwiz_submission.json``."""
        file = out / "vizwiz_submission.json"
        pairs = zip(self._images[: len(self.questions)], texts, strict=True)
        write_json(file, [{"image": image, "answer": vqa.normalize(text)} for image, text in pairs])
        return [file]


COMPONENTS = {VizWiz.name: VizWiz}
