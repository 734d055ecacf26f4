"""What a study is: variants of one run, each trained from several seeds, and where the runs lie."""

import dataclasses
import itertools
import pathlib
import re
import sys
from typing import Any

import ml_collections
from etils import epath

from stf_jax.config import TrainConfig, UserError, did_you_mean, flatten, from_json, resolve, to_json
from stf_jax.evals.files import RESULTS
from stf_jax.runtime import cli
from stf_jax.runtime.cli import Parser
from stf_jax.runtime.files import read_json

ASKED = "asked.json"  # in the folder of a cell that trains nothing
_OTHER_SEEDS = 1000  # between the seeds of a variant and those of the one that repeats it
_FOLLOW = ("model.vision", "model.llm", "data.tokenizer")  # keys that stf_jax.main fills in where they are empty


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do it.

    Attributes:
      name: in tables and folders.
      overrides: ``key=value`` of the run's config, as behind ``--config.`` on the command line.
      of: where it trains nothing, the variant whose runs it asks in another way.
      asked: that way, options of ``stf_jax.evaluate``.
      repeats: the variant that it is under another name, trained from other seeds: a negative control.
    """

    name: str
    overrides: tuple[str, ...] = ()
    of: str = ""
    asked: tuple[str, ...] = ()
    repeats: str = ""

    def seed(self, seed: int) -> int:
        """The seed that its run of a study's seed has."""
        return seed + _OTHER_SEEDS if self.repeats else seed


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
      base: a config file of ``stf_jax.main``, with its argument, from the folder that a study is started in.
      baseline: the variant that the others are compared with.
      seeds: of initialisation and data; runs of one seed read the same data.
      margin: points over all questions below which two variants count as equal.
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

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def trained(self, variant: Variant) -> Variant:
        """The variant whose runs a variant is of: itself, or another."""
        return self.variant(variant.of) if variant.of else variant

    def stages(self, variant: Variant, seed: int) -> list[TrainConfig]:
        """The run's config, resolved. Raises UserError as ``stf_jax.main`` would, naming the variant."""
        try:
            return resolve(cli.parse(self.options(variant, seed), "", workdir=False)[1])
        except UserError as error:
            raise UserError(f"Variant {variant.name!r}: {error}") from None

    def options(self, variant: Variant, seed: int) -> list[str]:
        """Of ``stf_jax.main``, but for the workdir."""
        trained = self.trained(variant)
        overrides = (f"seed={trained.seed(seed)}", *trained.overrides)
        return [f"--config={self.base}", *(f"--config.{override}" for override in overrides)]


_KEYS = ("title", "question", "base", "baseline")
_NAME = r"\w[\w.=+-]*"  # no path but of one folder


def default_study() -> ml_collections.ConfigDict:
    """Every key of a study's config file, which ``configs/ablations/*.py`` fill in.

    ``title``, ``question``, ``base``, ``baseline`` and ``seeds`` are :class:`Study`'s. ``common`` holds overrides of
    all variants; ``variants`` are pairs of a name and theirs; ``asked`` are pairs of the name of a further variant and
    the one whose runs it asks with options of ``stf_jax.evaluate``: ``(("fastv", ("mlp", "--reduce=fastv")),)``.
    ``repeated`` are pairs of a name and the variant that is trained once more under it, from other seeds, a control
    that a sound study must not tell from the variant: ``(("again", ("mlp",)),)``. ``margin`` and ``kind_margin`` are
    :class:`Study`'s.
    """
    config = ml_collections.ConfigDict(dict.fromkeys(_KEYS, ""))
    config.update(common=(), seeds=(0, 1, 2), variants=(), asked=(), repeated=(), margin=2.0, kind_margin=5.0)
    return config.lock()


def read_study(config: ml_collections.ConfigDict) -> Study:
    """Checks a study's config, and every run's.

    Raises:
      UserError: a key or variant that is not one, or a variant that ``stf_jax.main`` or ``evaluate`` would refuse.
    """
    values: dict[str, Any] = config.to_dict()
    known = default_study().to_dict()
    for key in values:
        if key not in known:
            raise UserError(f"Unknown key {key!r} of a study: {did_you_mean(key, known)}")
    if missing := [key for key in known if key not in values]:
        raise UserError(f"The study lacks {', '.join(missing)}; let get_config begin with default_study().")
    for key in _KEYS:
        if not isinstance(values[key], str) or not values[key]:
            raise UserError(f"The study's {key} is {values[key]!r}; it should be some text.")
    seeds = values["seeds"]
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"The study's seeds are {seeds!r}; they should be numbers, each once.")
    variants = []
    for name, overrides in _pairs("variants", values["variants"]):
        variants.append(Variant(name, (*_texts("common", values["common"]), *_texts(name, overrides))))
    trained = [variant.name for variant in variants]
    for name, options in _pairs("repeated", values["repeated"]):
        of = (*_texts(name, options), "")[0]
        if of not in trained:
            raise UserError(f"Variant {name!r} repeats {of!r}: {did_you_mean(of, trained)}")
        variants.append(Variant(name, next(one.overrides for one in variants if one.name == of), repeats=of))
    for name, options in _pairs("asked", values["asked"]):
        of, asked = (*_texts(name, options), "")[0], options[1:]
        if of not in trained:
            raise UserError(f"Variant {name!r} asks the runs of {of!r}: {did_you_mean(of, trained)}")
        variants.append(Variant(name, of=of, asked=asked))
    names = [variant.name for variant in variants]
    if wrong := [name for name in names if not re.fullmatch(_NAME, name) or names.count(name) > 1]:
        raise UserError(
            f"The study's variant {wrong[0]!r} should have a name of its own: a letter or digit, then also any of _.=+-"
        )
    if values["baseline"] not in names:
        raise UserError(f"The study's baseline is {values['baseline']!r}: {did_you_mean(values['baseline'], names)}")
    margins = values["margin"], values["kind_margin"]
    if not all(isinstance(margin, int | float) and margin > 0 for margin in margins):
        raise UserError(f"The study's margin and kind_margin are {margins!r}; they should be points above 0.")
    study = Study(*(values[key] for key in _KEYS), tuple(variants), tuple(seeds), *margins)
    measured = {}
    for variant, seed in itertools.product(variants, seeds):
        *before, last = study.stages(variant, seed)
        if any(stage.seed != study.trained(variant).seed(seed) for stage in (*before, last)):
            raise UserError(f"Variant {variant.name!r} sets its seed; the study's seeds do that.")
        if not last.eval.benchmarks:
            raise UserError(f"Variant {variant.name!r} is not measured: set eval.benchmarks of its last stage.")
        if seed == seeds[0]:
            _check_model(variant, last.model)
        measured.setdefault((last.eval.benchmarks, last.eval.data, last.eval.limit), variant)
    if len(measured) > 1:
        names = " and ".join(repr(variant.name) for variant in list(measured.values())[:2])
        raise UserError(f"Variants {names} are asked other questions: let eval.benchmarks, data and limit be the same.")
    return study


def _pairs(key, values):
    if not all(isinstance(pair, tuple) and tuple(map(type, pair)) == (str, tuple) for pair in values):
        raise UserError(f"The study's {key} should be pairs of a name and a tuple of texts, such as ('mlp', ('k=v',)).")
    return values


def _texts(name, values):
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise UserError(f"The study's {name} is {values!r}; it should be a tuple of texts such as 'key=value'.")
    return values


def _check_model(variant, config):
    """Now, and not when all is trained. What is asked, and of whom, is the study's to say."""
    from stf_jax.training.state import blueprint  # which takes seconds to import

    parser = Parser(add_help=False, allow_abbrev=False)
    cli.add_model_arguments(parser)
    try:
        asked = parser.parse_args(variant.asked)
        blueprint(dataclasses.replace(config, reduce=asked.reduce, keep=asked.keep))
    except UserError as error:
        raise UserError(f"Variant {variant.name!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant from one seed: a workdir of ``stf_jax.main``, or a folder of ``stf_jax.evaluate``.

    Attributes:
      needs: folder of the run that is asked; None for one that trains.
    """

    study: Study
    variant: Variant
    seed: int
    folder: pathlib.Path
    needs: pathlib.Path | None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def checkpoint(self) -> pathlib.Path:
        """Workdir of the last stage that its figures are of."""
        stages = self.study.stages(self.variant, self.seed)
        return _workdir(self.needs or self.folder, stages, stages[-1])

    @property
    def command(self) -> list[str]:
        """What makes it, as anyone may repeat it."""
        if self.needs is None:
            options = [*self.study.options(self.variant, self.seed), f"--workdir={self.folder}"]
            return [sys.executable, "-m", "stf_jax.main", *options]
        last = self.study.stages(self.variant, self.seed)[-1]
        options = [f"--checkpoint={self.checkpoint}", f"--benchmark={','.join(last.eval.benchmarks)}"]
        options += [f"--data={last.eval.data}"] if last.eval.data else []
        options += [f"--limit={last.eval.limit}", f"--batch={last.eval.batch}", f"--out={self.folder}"]
        return [sys.executable, "-m", "stf_jax.evaluate", *options, *self.variant.asked]

    @property
    def done(self) -> bool:
        """Whether its results are there. Raises UserError where they are of another run."""
        if not (self.folder / RESULTS).exists():
            return False
        if self.needs is None:
            differ = self._differences()
        elif read_json(epath.Path(self.folder / ASKED)) != list(self.variant.asked):
            differ = [ASKED]
        else:
            differ = [] if _alike(self.folder, self.needs) else ["weights or questions"]
        if differ:
            raise UserError(
                f"{self.folder} holds a run that differs from what the study asks for, in {', '.join(differ)}: choose "
                "another --cells, or remove it."
            )
        return True

    def _differences(self):
        """Keys of the config in which the run that is there differs."""
        keys = []
        stages = self.study.stages(self.variant, self.seed)
        for stage in stages:
            found = from_json(read_json(epath.Path(_workdir(self.folder, stages, stage) / "config.json")))
            if stage is not stages[0]:  # stf_jax.main lets it start from the one before
                found = dataclasses.replace(found, init_from=stage.init_from)
            found, wanted = flatten(to_json(found)), flatten(to_json(stage))
            # What the study leaves open, the run took from its init_from.
            keys += [key for key in wanted if found[key] != wanted[key] and not (key in _FOLLOW and not wanted[key])]
        return sorted(set(keys))


def _workdir(folder, stages, stage):
    """Where ``stf_jax.main`` puts a stage."""
    return folder / stage.name if len(stages) > 1 else folder


def _alike(folder, other):
    """Whether two measurements are of the same weights and questions; in another precision, weights look otherwise."""
    if not (other / RESULTS).exists():
        return False
    first, second = map(_protocols, (folder, other))
    if len(first) != len(second):
        return False
    for one, two in zip(first, second, strict=True):
        keys = ["weights"] if one["asking"]["precision"] == two["asking"]["precision"] else []
        if any((one | one["asking"])[key] != (two | two["asking"])[key] for key in ("benchmark", "questions", *keys)):
            return False
    return True


def _protocols(folder):
    found = read_json(epath.Path(folder / RESULTS))
    return [one["protocol"] for one in (found if isinstance(found, list) else [found])]


def cells(study: Study, folder: pathlib.Path) -> list[Cell]:
    """All cells, seed by seed, so that whoever looks early sees all variants; in ``folder/VARIANT/seed_N``."""

    def place(variant, seed):
        return folder / variant.name / f"seed_{seed}"

    made = []
    for seed in study.seeds:
        for variant in study.variants:
            needs = place(study.trained(variant), seed) if variant.of else None
            made.append(Cell(study, variant, seed, place(variant, seed), needs))
    return made
