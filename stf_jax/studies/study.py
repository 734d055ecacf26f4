"""Studies: variants of one run, each trained from several seeds, and the folders of their runs."""

import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath

from stf_jax import cli
from stf_jax.cli import Parser
from stf_jax.config import TrainConfig, UserError, did_you_mean, flatten, from_json, resolve, to_json
from stf_jax.data.sources.base import find_source
from stf_jax.evals.files import RESULTS
from stf_jax.files import read_json
from stf_jax.training.stages import stage_workdir

EVAL_OPTIONS_FILE = "asked.json"  # in the folder of a cell that does not train
_REPEAT_SEED_OFFSET = 1000  # between the seeds of a variant and those of its repetition
_INHERITED_KEYS = ("model.vision", "model.llm", "data.tokenizer")  # stf_jax.main fills these in if they are empty


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of a study.

    Attributes:
      name: the name in tables and folders.
      overrides: ``key=value`` changes of the run's config, as after ``--config.`` on the command line.
      source: for a variant that does not train, the variant whose runs it evaluates with other options.
      eval_options: these options of ``stf_jax.evaluate``.
      repeats: the variant that this one repeats with other seeds, as a negative control.
    """

    name: str
    overrides: tuple[str, ...] = ()
    source: str = ""
    eval_options: tuple[str, ...] = ()
    repeats: str = ""

    def run_seed(self, seed: int) -> int:
        """Returns the seed of the variant's run for one of the study's seeds."""
        return seed + _REPEAT_SEED_OFFSET if self.repeats else seed


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
      base: a config file of ``stf_jax.main``, with its argument, relative to the working directory.
      baseline: the variant that the others are compared with.
      seeds: seeds for initialization and data; runs with the same seed read the same data.
      margin: the difference in points, over all questions, below which two variants count as equal.
      kind_margin: the same for the questions of one kind.
    """

    title: str
    question: str
    base: str
    baseline: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    margin: float = 2.0
    kind_margin: float = 5.0

    def get_variant(self, name: str) -> Variant:
        """Returns the variant with this name."""
        return next(variant for variant in self.variants if variant.name == name)

    def get_trained(self, variant: Variant) -> Variant:
        """Returns the variant that trains the runs of ``variant``: itself or its source."""
        return self.get_variant(variant.source) if variant.source else variant

    def resolve_stages(self, variant: Variant, seed: int) -> list[TrainConfig]:
        """Resolves the run's config. Raises UserError as ``stf_jax.main`` would, with the variant's name."""
        try:
            return resolve(cli.parse(self.main_options(variant, seed), "", workdir=False)[1])
        except UserError as error:
            raise UserError(f"Variant {variant.name!r}: {error}") from None

    def main_options(self, variant: Variant, seed: int) -> list[str]:
        """Returns the options of ``stf_jax.main`` for a run, without ``--workdir``."""
        trained = self.get_trained(variant)
        overrides = (f"seed={trained.run_seed(seed)}", *trained.overrides)
        return [f"--config={self.base}", *(f"--config.{override}" for override in overrides)]


_KEYS = ("title", "question", "base", "baseline")
_NAME = r"\w[\w.=+-]*"  # the name of a single folder


def default_study() -> ml_collections.ConfigDict:
    """Returns a study's config with all keys; ``configs/ablations/*.py`` fill them in.

    ``title``, ``question``, ``base``, ``baseline``, ``seeds``, ``margin`` and ``kind_margin`` are :class:`Study`'s.
    ``common`` has the overrides of all variants. ``variants`` has pairs of a name and its overrides. ``asked`` has
    pairs of a name, and the variant whose runs are evaluated with options of ``stf_jax.evaluate``:
    ``(("fastv", ("mlp", "--reduce=fastv")),)``. ``repeated`` has pairs of a name, and the variant that is trained again
    with other seeds: ``(("again", ("mlp",)),)``. It is a control: a sound study must find no difference.
    """
    config = ml_collections.ConfigDict(dict.fromkeys(_KEYS, ""))
    config.update(common=(), seeds=(0, 1, 2), variants=(), asked=(), repeated=(), margin=2.0, kind_margin=5.0)
    return config.lock()


def read_study(config: ml_collections.ConfigDict) -> Study:
    """Reads a study from its config, and checks the config of every run.

    Raises:
      UserError: an invalid key or variant, or a variant that ``stf_jax.main`` or ``evaluate`` would refuse.
    """
    values: dict[str, Any] = config.to_dict()
    known = default_study().to_dict()
    for key in values:
        if key not in known:
            raise UserError(f"Unknown study key {key!r}: {did_you_mean(key, known)}")
    if missing := [key for key in known if key not in values]:
        raise UserError(f"The study lacks {', '.join(missing)}; get_config must start from default_study().")
    for key in _KEYS:
        if not isinstance(values[key], str) or not values[key]:
            raise UserError(f"The study's {key} is {values[key]!r}; it must be a nonempty string.")
    seeds = values["seeds"]
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"The study's seeds are {seeds!r}; they must be distinct integers.")
    variants = []
    for name, overrides in _check_pairs("variants", values["variants"]):
        variants.append(Variant(name, (*_check_strings("common", values["common"]), *_check_strings(name, overrides))))
    trained = [variant.name for variant in variants]
    for name, options in _check_pairs("repeated", values["repeated"]):
        source = (*_check_strings(name, options), "")[0]
        if source not in trained:
            raise UserError(f"Variant {name!r} repeats {source!r}: {did_you_mean(source, trained)}")
        overrides = next(variant.overrides for variant in variants if variant.name == source)
        variants.append(Variant(name, overrides, repeats=source))
    for name, options in _check_pairs("asked", values["asked"]):
        source, eval_options = (*_check_strings(name, options), "")[0], options[1:]
        if source not in trained:
            raise UserError(f"Variant {name!r} evaluates the runs of {source!r}: {did_you_mean(source, trained)}")
        variants.append(Variant(name, source=source, eval_options=eval_options))
    names = [variant.name for variant in variants]
    if wrong := [name for name in names if not re.fullmatch(_NAME, name) or names.count(name) > 1]:
        raise UserError(
            f"The study's variant {wrong[0]!r} needs a unique name: a letter, digit or _, then any of these and .=+-"
        )
    if values["baseline"] not in names:
        raise UserError(f"The study's baseline is {values['baseline']!r}: {did_you_mean(values['baseline'], names)}")
    margins = values["margin"], values["kind_margin"]
    if not all(isinstance(margin, int | float) and margin > 0 for margin in margins):
        raise UserError(f"The study's margin and kind_margin are {margins!r}; they must be above 0 points.")
    study = Study(
        title=values["title"],
        question=values["question"],
        base=values["base"],
        baseline=values["baseline"],
        variants=tuple(variants),
        seeds=tuple(seeds),
        margin=values["margin"],
        kind_margin=values["kind_margin"],
    )
    evaluations: dict[tuple[tuple[str, ...], str, int], Variant] = {}
    resolved: dict[tuple[str, int], list[TrainConfig]] = {}  # of the variants that train
    for variant, seed in itertools.product(variants, seeds):
        run = study.get_trained(variant).name, seed
        stages = resolved[run] = resolved.get(run) or study.resolve_stages(variant, seed)
        last = stages[-1]
        if any(stage.seed != study.get_trained(variant).run_seed(seed) for stage in stages):
            raise UserError(f"Variant {variant.name!r} sets its seed; use the study's seeds instead.")
        if not last.eval.benchmarks:
            raise UserError(f"Variant {variant.name!r} is not evaluated: set eval.benchmarks in its last stage.")
        if seed == seeds[0]:
            _check_components(variant, stages)
        evaluations.setdefault((last.eval.benchmarks, last.eval.data, last.eval.limit), variant)
    if len(evaluations) > 1:
        two = " and ".join(repr(variant.name) for variant in list(evaluations.values())[:2])
        raise UserError(
            f"Variants {two} are evaluated on different questions: give them the same eval.benchmarks, eval.data and "
            "eval.limit."
        )
    return study


def _check_pairs(key: str, values: Any) -> Sequence[tuple[str, tuple[Any, ...]]]:
    if not all(isinstance(pair, tuple) and tuple(map(type, pair)) == (str, tuple) for pair in values):
        raise UserError(f"The study's {key} must be pairs of a name and a tuple of strings, such as ('mlp', ('k=v',)).")
    return values


def _check_strings(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise UserError(f"The study's {name} is {values!r}; it must be a tuple of strings such as 'key=value'.")
    return values


def _check_components(variant: Variant, stages: Sequence[TrainConfig]) -> None:
    """Finds the data sources, checks the evaluation options and builds the model's shapes, before any training.

    The options may only change the model, not the checkpoint or the questions.
    """
    from stf_jax.models.blueprint import blueprint  # both take seconds to import
    from stf_jax.models.spec import resolve_model

    parser = Parser(add_help=False, allow_abbrev=False)
    cli.add_model_arguments(parser)
    try:
        options = parser.parse_args(variant.eval_options)
        for stage in stages:
            find_source(stage.data.source)
        if options.tokens == "auto":
            raise UserError("a study cannot evaluate with --tokens=auto; do it by itself, and compare the results.")
        chosen = {"reduce": options.reduce, "keep": options.keep, "tokens": options.tokens}
        model = dataclasses.replace(stages[-1].model, **chosen)
        if variant.source:  # its shapes are those of the source
            resolve_model(model).reduction  # noqa: B018 (it is computed here)
        else:
            blueprint(model)
    except UserError as error:
        raise UserError(f"Variant {variant.name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant with one seed: a workdir of ``stf_jax.main`` or a folder of ``stf_jax.evaluate``.

    Attributes:
      source_run: the folder of the run that it evaluates; None for a cell that trains.
    """

    study: Study
    variant: Variant
    seed: int
    folder: pathlib.Path
    source_run: pathlib.Path | None

    @property
    def name(self) -> str:
        """The name in logs and reports."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def checkpoint(self) -> pathlib.Path:
        """The workdir of the last stage, which is evaluated."""
        stages = self.study.resolve_stages(self.variant, self.seed)
        return stage_workdir(self.source_run or self.folder, stages, stages[-1])

    @property
    def command(self) -> list[str]:
        """The command that runs this cell."""
        if self.source_run is None:
            options = [*self.study.main_options(self.variant, self.seed), f"--workdir={self.folder}"]
            return [sys.executable, "-m", "stf_jax.main", *options]
        last = self.study.resolve_stages(self.variant, self.seed)[-1]
        options = [f"--checkpoint={self.checkpoint}", f"--benchmark={','.join(last.eval.benchmarks)}"]
        options += [f"--data={last.eval.data}"] if last.eval.data else []
        options += [f"--limit={last.eval.limit}", f"--batch={last.eval.batch}", f"--out={self.folder}"]
        return [sys.executable, "-m", "stf_jax.evaluate", *options, *self.variant.eval_options]

    @property
    def done(self) -> bool:
        """Whether its results exist. Raises UserError if they belong to another run."""
        if not (self.folder / RESULTS).exists():
            return False
        if self.source_run is None:
            differences = self._find_differences()
        elif read_json(epath.Path(self.folder / EVAL_OPTIONS_FILE)) != list(self.variant.eval_options):
            differences = [EVAL_OPTIONS_FILE]
        else:
            differences = [] if _same_evaluation(self.folder, self.source_run) else ["weights or questions"]
        if differences:
            raise UserError(
                f"{self.folder} contains a run that differs from the study's in {', '.join(differences)}: choose "
                "another --cells, or delete it."
            )
        return True

    def _find_differences(self) -> list[str]:
        """Returns the config keys in which the run in the folder differs from the study's."""
        keys: list[str] = []
        stages = self.study.resolve_stages(self.variant, self.seed)
        for stage in stages:
            saved = from_json(read_json(epath.Path(stage_workdir(self.folder, stages, stage) / "config.json")))
            if stage is not stages[0]:  # stf_jax.main sets it to the previous stage
                saved = dataclasses.replace(saved, init_from=stage.init_from)
            values, wanted = flatten(to_json(saved)), flatten(to_json(stage))
            # Where the study leaves these keys empty, the run took them from its init_from.
            inherited = [key for key in _INHERITED_KEYS if not wanted[key]]
            inherited += ["model.remat"] * (wanted["model.remat"] == "auto")  # the run chose
            keys += [key for key in wanted if values[key] != wanted[key] and key not in inherited]
        return sorted(set(keys))


def _same_evaluation(folder: pathlib.Path, other: pathlib.Path) -> bool:
    """Returns whether two evaluations used the same weights and questions.

    Weights are compared only if both have the same precision, because their fingerprints depend on it.
    """
    if not (other / RESULTS).exists():
        return False
    first, second = map(_read_protocols, (folder, other))
    if len(first) != len(second):
        return False
    for one, two in zip(first, second, strict=True):
        keys = ["weights"] if one["asking"]["precision"] == two["asking"]["precision"] else []
        if any((one | one["asking"])[key] != (two | two["asking"])[key] for key in ("benchmark", "questions", *keys)):
            return False
    return True


def _read_protocols(folder: pathlib.Path) -> list[dict[str, Any]]:
    results = read_json(epath.Path(folder / RESULTS))
    return [one["protocol"] for one in (results if isinstance(results, list) else [results])]


def make_cells(study: Study, folder: pathlib.Path) -> list[Cell]:
    """Makes all cells of a study, in folders ``folder/VARIANT/seed_N``.

    They are ordered seed by seed, so that early results cover all variants.
    """

    def get_folder(variant: Variant, seed: int) -> pathlib.Path:
        return folder / variant.name / f"seed_{seed}"

    cells = []
    for seed in study.seeds:
        for variant in study.variants:
            source_run = get_folder(study.get_trained(variant), seed) if variant.source else None
            cells.append(Cell(study, variant, seed, get_folder(variant, seed), source_run))
    return cells
