"""A benchmark of one's own: is an image of one gray bright?"""

import PIL.Image

from stf_jax.evals.benchmark import Benchmark, Question, score_each


class Gray:
    def __init__(self, value):
        self.value = value

    def __call__(self):
        return PIL.Image.new("RGB", (32, 32), (self.value,) * 3)


class Brightness(Benchmark):
    name = "brightness"
    folders = ()  # no files
    rule = "Yes or no, in any case, with or without a period."
    scored = True

    def __init__(self, data):
        super().__init__(data)
        self._answers = {200: "yes", 250: "yes", 20: "no", 70: "no"}
        self.questions = [Question(i, "Is it bright?", Gray(i), "Is it bright?") for i in self._answers]

    def metrics(self, texts):
        return {"accuracy": sum(score.value for score in self.scores(texts)) / len(texts)}

    def scores(self, texts):  # for stf_jax.compare
        pairs = zip(texts, self._answers.values(), strict=False)
        return score_each(text.strip(" .").lower() == answer for text, answer in pairs)
