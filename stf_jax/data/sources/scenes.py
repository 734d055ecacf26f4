"""Training records of the embedded scenes in LLaVA's conversation format, generated on demand."""

import functools
from types import ModuleType

import numpy as np
import PIL.Image

from stf_jax.config import TrainConfig, UserError
from stf_jax.data import scenes, world_text
from stf_jax.data.records import IMAGE_MARK, Record, Turn
from stf_jax.data.scenes import MAX_THINGS, SHORT_ANSWER
from stf_jax.data.world import Scene
from stf_jax.data.world_labels import CELLS, label_cells, make_drill

EDITIONS: dict[int, ModuleType] = {1: scenes, 2: world_text}
_SECOND_EDITION = ("cues", "cells")  # tasks that only the second edition has
_DRILL_CYCLE = 4  # in the task "cells", all but one of this many images are drills
# Tasks in turn, and whether the caption replaces the image.
_MIXTURES: dict[int, tuple[tuple[str, bool], ...]] = {
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
ROUNDS = {1: 3, 2: 6}  # of questions on one image, by edition; repeated questions are left out
_MAX_QUESTIONS = {1: 15, 2: 10}  # per conversation, by edition; limits its length


class SceneRecords:
    """A sequence of training records of scenes, generated on demand.

    Tasks:
      captions: an image and its caption, for stage 1.
      conversations: an image and rounds of questions of all kinds that it allows, for stage 2.
      documents: a caption as text, then questions on it, to pretrain a language model.
      cues: a caption as text, then short cues with their answers (:func:`world_text.make_cues`); second edition only.
      mixture: in the first edition, seven captions per document; in the second, all tasks, with three records
        with an image per record with a caption in its place.
      cells: an image, three in four of them drills, with labels of its cells; second edition only.
    """

    name = "embedded scenes"

    def __init__(
        self, task: str, size: int, seed: int, held_out: bool = False, max_things: int = MAX_THINGS, edition: int = 1
    ) -> None:
        """Makes the first ``size`` records of a seed, split and edition; ``max_things`` is that of ``make_scene``.

        Raises UserError if the edition does not have the task.
        """
        if task in _SECOND_EDITION and edition == 1:
            raise UserError(f"data.scenes.task={task} needs the world's second edition: set data.scenes.edition=2.")
        self._task, self._size, self._seed = task, size, seed
        self._held_out, self._max_things, self._edition = held_out, max_things, edition
        self.cells = CELLS if task == "cells" else 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Returns the record with that index, below ``len(self)``."""
        if self._task == "cells":
            return self._make_cells_record(index)
        world = EDITIONS[self._edition]
        scene = world.make_scene(self._seed, index, self._held_out, self._max_things)
        rng = world.make_rng(self._seed + 1, self._held_out, index)
        mixture = _MIXTURES[self._edition]
        task, as_text = mixture[index % len(mixture)] if self._task == "mixture" else (self._task, True)
        as_text = as_text and task in ("documents", "cues")  # whether the caption replaces the image
        head = world.make_caption(scene) if as_text else IMAGE_MARK
        document = task in ("documents", "cues")
        turns: list[Turn]
        if task == "captions" and self._task == "mixture" and self._edition == 2:
            # In the plain template's format, for any template of the run.
            document, turns = True, [Turn("human", IMAGE_MARK), Turn("gpt", f"{world.make_caption(scene, rng)}\n")]
        elif task == "captions":
            # In random order, so that a model must find things by what they are, not by their rank.
            turns = [Turn("human", f"{world.DESCRIBE}\n{IMAGE_MARK}"), Turn("gpt", world.make_caption(scene, rng))]
        elif task == "cues":
            turns = [Turn("human", f"{head}\n")]
            for cue, answer in world_text.make_cues(scene, rng):
                turns += [Turn("human", f"{cue}:"), Turn("gpt", f" {answer}\n")]
        else:
            rounds = range(ROUNDS[self._edition])
            by_text = {q.text: q for _ in rounds for q in world.make_questions(scene, rng, self._held_out)}
            questions = list(by_text.values())[: _MAX_QUESTIONS[self._edition]]
            first = 0  # of the questions that a description may precede
            if self._edition == 2:
                questions = world_text.ask_relations_first(questions)
                first = sum(question.kind == "relation" for question in questions)
            if task == "documents":
                # The caption takes the place of the image. Repeating it teaches a model to look things up.
                pairs = [(q.text, q.answer) for q in questions]
                pairs.insert(rng.integers(first, len(pairs) + 1), (world.DESCRIBE, world.make_caption(scene)))
                turns = [Turn("human", f"{head}\n")]
                for question, answer in pairs:
                    turns += [Turn("human", f"USER: {question} ASSISTANT:"), Turn("gpt", f" {answer}\n")]
            else:
                turns = [t for q in questions for t in (Turn("human", q.text), Turn("gpt", q.answer))]
                turns[0] = Turn("human", f"{IMAGE_MARK}\n{turns[0].text}\n{SHORT_ANSWER}")
        images = () if as_text else (functools.partial(world.draw, scene, index),)
        sizes = (_get_size,) * len(images)
        return Record(f"scene-{self._seed}-{index}", images, tuple(turns), document=document, sizes=sizes)

    def _make_cells_record(self, index: int) -> Record:
        # The scene is made when its image or labels are needed; planning rows needs neither.
        image, labels = functools.partial(self._draw, index), functools.partial(self._label, index)
        turns = (Turn("human", IMAGE_MARK), Turn("gpt", "."))
        return Record(f"cells-{self._seed}-{index}", (image,), turns, labels=labels)

    def _draw(self, index: int) -> PIL.Image.Image:
        return world_text.draw(self._make(index), index)

    def _label(self, index: int) -> np.ndarray:
        return label_cells(self._make(index))

    def _make(self, index: int) -> Scene:
        if index % _DRILL_CYCLE:
            return make_drill(self._seed, index)
        return world_text.make_scene(self._seed, index, max_things=self._max_things)


def _get_size() -> tuple[int, int]:
    return scenes.SIDE, scenes.SIDE


def open_scenes(config: TrainConfig) -> list[SceneRecords]:
    """Opens the scenes of ``data.scenes`` with the run's seed. Raises UserError as :class:`SceneRecords`."""
    world = config.data.scenes
    return [SceneRecords(world.task, world.size, config.seed, max_things=world.things, edition=world.edition)]


COMPONENTS = {"scenes": open_scenes}
