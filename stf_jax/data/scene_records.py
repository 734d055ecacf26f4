"""Embedded data as training records in LLaVA's conversation format, made on demand."""

import functools
from types import ModuleType

from stf_jax.config import UserError
from stf_jax.data import scenes, world_text
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.data.scenes import MOST_THINGS, SHORT_ANSWER
from stf_jax.data.world_labels import label, make_drill

EDITIONS: dict[int, ModuleType] = {1: scenes, 2: world_text}
_SECOND_EDITION = ("cues", "cells")  # tasks that the first does not have
_DRILLS = 4  # of so many labelled images, all but one are drills
# Tasks in turn, each with whether the caption replaces the image.
_MIXTURES = {
    1: (("documents", True), *[("captions", False)] * 7),
    2: (
        ("documents", True),
        ("cues", True),
        *[("cues", False)] * 2,
        ("documents", False),
        ("captions", False),
        *[("conversations", False)] * 2,
    ),
}
ROUNDS = {1: 3, 2: 6}  # of questions on one image, by edition; what is asked twice is left out
_MOST_ASKED = {1: 15, 2: 10}  # questions that remain of these, so that many do not make a long conversation


class SceneRecords:
    """Scenes as training records, made on demand.

    Tasks:
      captions: an image and its caption, for stage 1.
      conversations: an image and some rounds of questions of every kind that it allows, for stage 2.
      documents: a caption as text, then such questions on it, for a language model to begin.
      cues: a caption as text, then short cues with their answers (:func:`world_text.cues`); second edition only.
      mixture: in the first edition, seven captions to one document; in the second, all tasks, three records
        with an image to one with a caption in its place.
      cells: an image, three times in four a drill, with the labels of its cells; second edition only.
    """

    name = "embedded scenes"

    def __init__(
        self, task: str, size: int, seed: int, held_out: bool = False, most: int = MOST_THINGS, edition: int = 1
    ):
        """Records 0 to ``size`` of a seed, split and edition; ``most`` limits what an image shows, as in make_scene.

        Raises UserError for a task that the edition does not have.
        """
        if task in _SECOND_EDITION and edition == 1:
            raise UserError(f"data.scenes.task={task} needs the world's second edition: set data.scenes.edition=2.")
        self._task, self._size, self._seed = task, size, seed
        self._held_out, self._most, self._edition = held_out, most, edition

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        """The record of that index, below ``len(self)``."""
        if self._task == "cells":
            return self._labelled(index)
        world = EDITIONS[self._edition]
        scene = world.make_scene(self._seed, index, self._held_out, self._most)
        rng = world.generator(self._seed + 1, self._held_out, index)
        mixture = _MIXTURES[self._edition]
        task, as_text = mixture[index % len(mixture)] if self._task == "mixture" else (self._task, True)
        as_text = as_text and task in ("documents", "cues")  # whether the caption replaces the image
        head = world.caption(scene) if as_text else IMAGE_MARK
        document = task in ("documents", "cues")
        if task == "captions" and self._task == "mixture" and self._edition == 2:
            # As the plain template has it, whatever the run's template is.
            document, turns = True, [Turn("human", IMAGE_MARK), Turn("gpt", f"{world.caption(scene, rng)}\n")]
        elif task == "captions":
            # In any order: whoever may begin with any thing has to find it by what it is, not by counting.
            turns = [Turn("human", f"{world.DESCRIBE}\n{IMAGE_MARK}"), Turn("gpt", world.caption(scene, rng))]
        elif task == "cues":
            turns = [Turn("human", f"{head}\n")]
            for cue, answer in world_text.cues(scene, rng):
                turns += [Turn("human", f"{cue}:"), Turn("gpt", f" {answer}\n")]
        else:
            rounds = range(ROUNDS[self._edition])
            asked = {q.text: q for _ in rounds for q in world.questions(scene, rng, self._held_out)}.values()
            asked = list(asked)[: _MOST_ASKED[self._edition]]
            if task == "documents":
                # The caption stands where the image will; to repeat it is how a model learns to look things up.
                said = [(q.text, q.answer) for q in asked]
                said.insert(rng.integers(len(said) + 1), (world.DESCRIBE, world.caption(scene)))
                turns = [Turn("human", f"{head}\n")]
                for question, answer in said:
                    turns += [Turn("human", f"USER: {question} ASSISTANT:"), Turn("gpt", f" {answer}\n")]
            else:
                turns = [t for q in asked for t in (Turn("human", q.text), Turn("gpt", q.answer))]
                turns[0] = Turn("human", f"{IMAGE_MARK}\n{turns[0].text}\n{SHORT_ANSWER}")
        images = () if as_text else (functools.partial(world.draw, scene, index),)
        return Record(f"scene-{self._seed}-{index}", images, tuple(turns), document=document)

    def _labelled(self, index):
        # The scene is made when its image or labels are needed: planning rows needs neither.
        image, labels = functools.partial(self._draw, index), functools.partial(self._label, index)
        turns = (Turn("human", IMAGE_MARK), Turn("gpt", "."))
        return Record(f"cells-{self._seed}-{index}", (image,), turns, labels=labels)

    def _draw(self, index):
        return world_text.draw(self._make(index), index)

    def _label(self, index):
        return label(self._make(index))

    def _make(self, index):
        if index % _DRILLS:
            return make_drill(self._seed, index)
        return world_text.make_scene(self._seed, index, most=self._most)
