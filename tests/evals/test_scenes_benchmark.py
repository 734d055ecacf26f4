"""The embedded benchmark: scoring by hand, held-out questions, what is written."""

import json

import PIL.Image
import pytest
from tiny import tiny

from stf_jax.data.scenes import HELD_OUT_WORDS, KINDS, Question
from stf_jax.evals import scenes
from stf_jax.evals.scenes import Answered


def _answered(kind, truth, answer, blank):
    return Answered(PIL.Image.new("RGB", (96, 96)), Question(kind, "Is there?", truth), answer, blank)


def test_score_by_hand():
    answered = [
        _answered("existence", "yes", "Yes", "no"),
        _answered("existence", "no", "yes", "no"),
        _answered("existence", "no", "no.", "no"),  # one word is asked for: what is not the word is wrong
        _answered("reading", "BOK", "BOK", ""),
    ]
    assert scenes.score(answered) == {
        "accuracy": 2 / 4,
        "blank_image_accuracy": 2 / 4,
        "by_kind": {
            "existence": {"accuracy": 1 / 3, "blank_image_accuracy": 2 / 3, "questions": 3},
            "reading": {"accuracy": 1.0, "blank_image_accuracy": 0.0, "questions": 1},
        },
    }


def test_held_out_questions_are_the_same_each_time_and_of_every_kind():
    first, again = scenes.held_out_questions(40), scenes.held_out_questions(40)
    assert [q for _, q in first] == [q for _, q in again]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(first, again, strict=True))
    assert {q.kind for _, q in first} == set(KINDS)
    assert all(q.answer in HELD_OUT_WORDS for _, q in first if q.kind == "reading")


class _Oracle:
    """Stands for the model: answers by looking at the pictures' pixels."""

    def __init__(self, truths):
        self._truths = truths

    def __call__(self, prompts, images):
        for prompt, image in zip(prompts, images, strict=True):
            yield self._truths.get((prompt.tokens.tobytes(), image.tobytes()), "no")


def test_measure_pairs_answers_with_their_questions(tmp_path, monkeypatch):
    config = tiny(benchmark="scenes", benchmark_pictures=12)
    truths = {}

    def oracle(plan, params, tokenizer, mesh, limit, template):
        assert template == config.data.template
        vision = scenes.vision_preset(config.model.vision)
        slots = scenes.slots_per_image(config.model)
        for picture, question in scenes.held_out_questions(12):
            prompt = scenes._prompt(config, tokenizer, slots, picture, question)
            assert tokenizer.decode(prompt.tokens[~prompt.is_image]).endswith("single word or phrase. ASSISTANT:")
            image = scenes.to_square(picture, vision, config.data.aspect)[None]
            truths[prompt.tokens.tobytes(), image.tobytes()] = question.answer
            longest = tokenizer(" " + question.answer, add_special_tokens=False).input_ids
            assert len(longest) < limit  # every truth can be said in full, with its end
        return _Oracle(truths)

    monkeypatch.setattr(scenes, "GreedyAnswers", oracle)
    results = scenes.measure(config, None, None, tmp_path)
    assert results["metrics"]["accuracy"] == 1.0
    assert results["metrics"]["blank_image_accuracy"] == pytest.approx(
        sum(q.answer == "no" for _, q in scenes.held_out_questions(12)) / results["questions"]
    )
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"benchmark", "metrics", "questions", "model"} <= results.keys()
    with PIL.Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 500
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == results["questions"]
    for kind in KINDS:
        assert kind in scenes.table(results)
