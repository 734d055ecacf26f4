"""The Python API: saved models that answer questions about images, and the commands as functions."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import ml_collections
import numpy as np
import PIL.Image
from etils import epath

from stf_jax import cli
from stf_jax.config import MeshConfig, Precision, UserError, did_you_mean
from stf_jax.data.image import open_image_file
from stf_jax.data.records import Record, make_question
from stf_jax.files import to_path
from stf_jax.inference.choosing import ChoosingGenerator
from stf_jax.inference.generator import Generator
from stf_jax.looking.look import MAX_NEW_TOKENS, Look, look_at
from stf_jax.looking.page import write_pages
from stf_jax.training.stages import resolve_stages, run_stages
from stf_jax.weights.model import SavedModel

Image = PIL.Image.Image | np.ndarray | str | os.PathLike[str]  # arrays are uint8 [H, W, 3]


class Model:
    """A saved model on its devices, as returned by :func:`load`.

    Attributes:
      checkpoint: the folder it was loaded from.
      step: the training step of its weights, or None if they were imported.
      tokens_per_image: image tokens that the language model reads per image, or with tiles per thumbnail and tile; the
        most if they are chosen for each image.
    """

    def __init__(self, generator: Generator, saved: SavedModel, checkpoint: epath.Path):
        self._generator = generator
        self.checkpoint, self.step = checkpoint, saved.step
        self.tokens_per_image = generator.slots

    def chat(self, image: Image | None, question: str, max_new_tokens: int = 512) -> str:
        """Answers one question, with or without an image."""
        return self.generate([(image, question)], max_new_tokens)[0]

    def generate(
        self, prompts: Sequence[tuple[Image | None, str]], max_new_tokens: int = 512, batch_size: int = 16
    ) -> list[str]:
        """Answers questions, each with or without an image, by greedy decoding.

        Raises:
          UserError: an image cannot be opened, the model does not accept images, or a prompt is too long for it.
        """
        records = [_make_record(number, image, question) for number, (image, question) in enumerate(prompts)]
        return list(self._generator.generate(records, max_new_tokens, batch_size))

    def image_tokens(self, image: Image) -> np.ndarray:
        """The image tokens of an image as the language model reads them, float32 [N, D].

        Raises:
          UserError: the image cannot be opened, or the model has no vision tower.
        """
        return self._generator.image_tokens(_open_image(image))

    def look(
        self,
        image: Image,
        question: str,
        out: str | os.PathLike[str] = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Look:
        """Answers a question, and maps what the image tokens hold and what the answer depends on.

        Args:
          image: the image.
          question: about the image.
          out: a folder, to which the page of ``stf_jax.look`` is written; by default none is.
          max_new_tokens: of the answer.

        Raises:
          UserError: the image cannot be opened, the model has no vision tower, the question is too long for it, or
            the folder cannot be written.
        """
        generator, opened = self._generator, _open_image(image)
        if isinstance(generator, ChoosingGenerator):
            generator = generator.choose_for(opened)
        found = look_at(generator, opened, question, self.checkpoint.name, max_new_tokens)
        if out:
            name = pathlib.Path(image).name if isinstance(image, str | os.PathLike) else "image"
            write_pages({name: [found]}, to_path(os.fspath(out)))
        return found


def load(
    checkpoint: str | os.PathLike[str],
    *,
    precision: Precision | Literal[""] = "",
    reduce: str = "",
    keep: int = 0,
    tokens: int | Literal["auto"] = 0,
    tolerance: float | None = None,
    mesh: tuple[int, int, int] = (1, 1, 1),
) -> Model:
    """Loads a model from the newest checkpoint of a run, a folder of imported weights, or an export.

    Args:
      precision: ``bfloat16`` or ``float32``; by default that of the run, and bfloat16 for other folders.
      reduce: an untrained reducer of image tokens, by a name of docs/evaluating.md or as ``module:thing``, and its
        options, ``:key=value,…``.
      keep: image tokens per image that ``reduce`` keeps; by default a quarter.
      tokens: image tokens per image, one of the budgets that the model was trained with; by default the most. ``auto``
        chooses them for each image (docs/budgets.md).
      tolerance: with ``tokens="auto"``, how far answers may be from those with the most tokens, in nats per answer
        token.
      mesh: devices along data, fsdp and tensor.

    Raises:
      UserError: the folder holds no model, or an incomplete one.
    """
    from stf_jax.inference.loading import load_generator
    from stf_jax.parallel.mesh import make_mesh

    folder = to_path(os.fspath(checkpoint))
    devices = make_mesh(MeshConfig(*mesh))
    chosen = reduce, keep, tokens, tolerance
    generator, saved = load_generator(folder, devices, precision, *chosen, allow_text_only=True)
    return Model(generator, saved, folder)


def load_config(name: str, *overrides: str) -> ml_collections.ConfigDict:
    """Reads a config: ``load_config("demo:fusion=stf", "seed=1", "stages.pretrain.steps=600")``.

    Args:
      name: a config file or the name of one in configs/, with its argument, as ``--config`` takes it.
      overrides: values of keys, as ``--config.KEY=VALUE`` without ``--config.``.

    Raises:
      UserError: the file cannot be read, or a key or value is invalid.
    """
    return cli.parse([f"--config={name}", *(f"--config.{override}" for override in overrides)], "", workdir=False)[1]


def train(config: Any, workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Trains the stages of a config in order, each from the result of the previous one, as ``stf_jax.main`` does.

    Args:
      config: the return value of :func:`load_config`, or of ``get_config`` in a config file; or a name, as
        :func:`load_config` takes it.
      workdir: the folder of the run, which resumes from its newest checkpoint, if any.

    Returns:
      The benchmark results of the last evaluated stage.

    Raises:
      UserError: the config or the data cannot be used.
      RunFailed, TryAgain, Stopped: the run ended before its last step (docs/operations.md).
    """
    folder = to_path(os.fspath(workdir))
    config = load_config(config) if isinstance(config, str) else config
    results = [result for _, result in run_stages(resolve_stages(config, folder), folder) if result]
    return results[-1] if results else []


def evaluate(
    model: Model,
    benchmark: str,
    out: str | os.PathLike[str] = "",
    *,
    data: str = "",
    limit: int = 0,
    blank: bool = False,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Evaluates a model on a benchmark, as ``stf_jax.evaluate`` does.

    Args:
      benchmark: a name of docs/evaluating.md; ``scenes`` needs no files.
      out: the folder for results.json, answers.jsonl and the submission file of the benchmark. After an
        interruption, the same call continues. By default nothing is kept.
      data: the folder with the evaluation files.
      limit: evaluate only the first N questions; 0: all.
      blank: make all images blank, to see what can be guessed.

    Returns:
      The contents of results.json: ``benchmark``, ``metrics``, ``questions``, ``model`` and the protocol.
    """
    from stf_jax.evals.registry import open_benchmarks
    from stf_jax.evals.runner import check_images, evaluate

    opened, *others = open_benchmarks([benchmark], data, limit)
    if others:
        raise UserError(f"{benchmark} is a group of benchmarks; name one of them.")
    if blank:
        opened.hide_images()
    check_images([opened])
    origin = {"checkpoint": str(model.checkpoint), "step": model.step}
    name = pathlib.Path(os.path.abspath(model.checkpoint)).name
    with tempfile.TemporaryDirectory() if not out else contextlib.nullcontext(os.fspath(out)) as folder:
        return evaluate(opened, model._generator, to_path(folder), name, origin, rows=batch_size)


def import_weights(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    vision: str = "",
    dtype: str = "",
    families: Sequence[str] = (),
    base: str = "",
) -> dict[str, Any]:
    """Imports weights into a folder for ``config.init_from``, as ``stf_jax.convert import`` does.

    Args:
      source: a folder or file in the format of Hugging Face, LLaVA or llama.cpp (docs/weights.md).
      to: the folder to write; it must not exist.
      vision: another source, whose vision tower replaces that of ``source``.
      dtype: the type to cast values to; by default each keeps its type.
      families: ``package.module:FAMILY`` of the tower or the language model, if it is your own.
      base: the model that ``source`` adapts, if that is a LoRA adapter.

    Returns:
      The report, which is also written to import.json next to the weights.
    """
    from stf_jax.weights import imports

    return imports.import_weights(os.fspath(source), to_path(os.fspath(to)), vision, dtype, families, base)


def export(
    checkpoint: str | os.PathLike[str], to: str | os.PathLike[str], *, format: str = "hf", dtype: str = ""
) -> dict[str, Any]:
    """Exports a model for other programs, as ``stf_jax.convert export`` does.

    Args:
      format: ``hf`` for transformers and vLLM, ``llava-stf`` for the authors' code, ``native`` for
        ``config.init_from``, ``peft`` for the LoRA adapters of a run.
      dtype: the type to cast values to; by default each keeps its type.

    Returns:
      The report, which is also written to export.json next to the weights.
    """
    from stf_jax.weights.export_hf import export_hf
    from stf_jax.weights.export_peft import export_peft
    from stf_jax.weights.export_stf import export_llava_stf
    from stf_jax.weights.exports import export_native

    formats = {"hf": export_hf, "llava-stf": export_llava_stf, "native": export_native, "peft": export_peft}
    if format not in formats:
        raise UserError(f"format={format!r} is not known; {did_you_mean(format, formats)}")
    return formats[format](to_path(os.fspath(checkpoint)), to_path(os.fspath(to)), dtype)


def _make_record(number: int, image: Image | None, question: str) -> Record:
    return make_question(f"prompt {number}", () if image is None else (lambda: _open_image(image),), question)


def _open_image(image: Image) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(image)
    return open_image_file(to_path(os.fspath(image)))
