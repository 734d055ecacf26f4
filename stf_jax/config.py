"""What can be configured: frozen dataclasses, one field a line with its unit.

A config file (``configs/*.py``) defines ``get_config(arg) -> ml_collections.ConfigDict``: it starts from
:func:`default_config`, which holds every key there is, and changes what it wants. The command line may change more
(``--config.mesh.fsdp=8``). :func:`resolve` then freezes the result into one :class:`TrainConfig` a stage. A key that
does not exist is refused at each of these steps, with the nearest key that does. The type of each number says which
values it may have.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import ml_collections


class UserError(Exception):
    """The input cannot be used: one sentence that names the thing and the mend. Verbs end with exit status 2."""

    status = 2


class RunFailed(Exception):
    """A run cannot go on as it is: one sentence. Verbs end with exit status 1."""

    status = 1


class TryAgain(Exception):
    """Other machines are to blame: one sentence. Exit status 75; the same command, given again, goes on."""

    status = 75  # "temporary failure" in BSD's sysexits.h


class Stopped(Exception):
    """SIGTERM was obeyed: one sentence. Exit status 143; the same command, given again, goes on."""

    status = 143  # as shells have it


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have, both ends included. Of floats, NaN is never in range."""

    low: float
    high: float


# Steps are counted in int32 and the optimizer computes in float32, in which smaller or larger ends become 0, 1 or inf.
Count = Annotated[int, Range(0, 10**9)]
Size = Annotated[int, Range(1, 10**9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Factor = Annotated[float, Range(0, 1e30)]
Above0 = Annotated[float, Range(1e-30, 1e30)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.9999999)]
Epochs = Annotated[float, Range(0, 10**5)]  # all are planned at the start
Seconds = Annotated[float, Range(0, 10**9)]
Edition = Annotated[int, Range(1, 2)]
Axis = Annotated[int, Range(-1, 10**6)]  # 0 is refused with the mesh (runtime/mesh.py)


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How the tapped states of the vision tower become image tokens of the language model (models/fusion.py)."""

    # mlp | avg_pool | pixel_shuffle | ldp_v2 | c_abstractor | resampler | token_packer | stf | mbtf | mbtf_stf
    fusion: str = "mbtf_stf"
    taps: tuple[Count, ...] = ()  # tower blocks, deepest first, 1-based (0: embedding); (): eight evenly spaced
    kernel: Size = 2  # patches a side that become one token; mlp and mbtf do not ask
    mbtf_hidden: Count = 0  # channels between MBTF's two layers; 0: half of all tapped channels (8192 → 4096)
    mbtf_width: Count = 0  # channels MBTF gives; 0: the tower's width (1024)
    stf_hidden: Count = 0  # channels between STF's two layers; 0: 4·kernel²·its input width (16384)
    depth: Count = 0  # blocks of resampler, and of c_abstractor before its pooling and after; 0: their authors' 6 and 3
    variant: str = "code"  # code: what the authors' program computes | paper: what their figure draws
    init: str = "torch"  # torch | kaiming | xavier | normal
    pad_grid: bool = False  # pad a patch grid that the kernel does not divide, by zeros at the right and bottom


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which tower, which language model, what joins them, and how they are computed."""

    vision: str = ""  # a vision preset (models/presets.py) or a folder; "": init_from's, else clip-l-14-336
    llm: str = ""  # a language model preset (models/presets.py) or a folder; "": init_from's, else vicuna-7b
    fusion: FusionConfig = FusionConfig()
    precision: str = "bfloat16"  # bfloat16: frozen weights and compute | float32: everything
    scan_layers: bool = True  # one compiled block looped over, or each layer written out
    remat: str = "full"  # what backward recomputes: none | dots (all but matrix products) | full
    attention: str = "auto"  # auto | reference | xla | cudnn | splash (models/attention.py)
    reduce: str = ""  # when answering, untrained (models/selection.py): fastv | random | visionzip; "": nothing
    keep: Count = 0  # image tokens per image that reduce leaves; 0: a quarter
    cells: Count = 0  # cells along a patch's side that a head on the tower labels; above 0 it trains on their labels


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The embedded procedural images (data/scenes.py, data/world.py)."""

    edition: Edition = 2  # 1: shapes and words | 2: print of all sizes, charts and forms, too
    task: str = "conversations"  # documents | captions | mixture | conversations | cues | cells
    size: Size = 20_000  # records in one epoch
    things: Size = 4  # most shapes in an image; of the second edition also most prints, bars, lines of a form


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become rows of tokens and images."""

    source: str = "llava"  # llava: annotations + images | scenes: embedded
    annotations: str = ""  # LLaVA JSON files, or folders that stf_jax.prepare wrote, separated by commas
    images: str = ""  # folders that the JSON files' image paths start from, in the same order; one serves them all
    records: Count = 0  # how many they hold, for stf_jax.plan where they are not here to be counted; 0: unknown
    mix: tuple[Factor, ...] = ()  # a number for each of them, read as mix_by says; (): each row once an epoch
    mix_by: str = "epoch"  # epoch: how often an epoch takes each set's rows | weight: the set's share of all rows
    scenes: ScenesConfig = ScenesConfig()
    tokenizer: str = ""  # folder that transformers reads; miniature, miniature/2: embedded; "": init_from's
    template: str = "v1"  # plain | v1 | llama-3 | chatml | mistral (data/conversation.py)
    aspect: str = "square"  # square: resize and centre-crop | pad: to a square with the mean colour
    max_length: Size = 2048  # tokens per row, image slots included
    packing: bool = False  # several conversations a row, kept apart by segment ids
    group_by_modality_length: bool = True  # unpacked: batches of like length, with images or without, as LLaVA's
    buckets: Size = 1  # unpacked: lengths that batches are filled up to, told by the data's; each is compiled once
    images_per_row: Count = 1  # image places per row (M); 0 for text alone
    threads: Size = 2  # threads that read and decode on each host


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as torch and LLaVA run it."""

    learning_rate: Above0 = 1e-3  # at the peak
    schedule: str = "cosine"  # cosine (to zero) | constant (after warm-up)
    warmup_ratio: Share = 0.03  # share of all steps with a linearly rising rate
    weight_decay: Factor = 0.0  # of matrices; biases and norms are spared
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Above0 = 1e-8
    clip_norm: Factor = 0.0  # global gradient norm; 0: no clipping, as in the authors' runs
    accumulation_steps: Size = 1  # microbatches a step


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all that are left; ``data`` and ``fsdp`` both: see ``fsdp``."""

    data: Axis = -1  # batch; parameters whole
    fsdp: Axis = -1  # batch; parameters and moments sharded; with data -1 as well: a whole slice, and data the slices
    tensor: Axis = 1  # heads, feed-forward and vocabulary sharded


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What of a run is kept on disk."""

    every_steps: Size = 500  # steps between checkpoints; the last step is always saved
    keep_last: Size = 2  # newest checkpoints kept
    keep_every: Count = 0  # steps; checkpoints at its multiples are kept for good; 0: none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What a run is measured on, at its end and on the way (evals/)."""

    benchmarks: tuple[
        str, ...
    ] = ()  # gqa | scienceqa | vqav2 | vizwiz | textvqa | pope | mmbench | mmbench_cn | mme | scenes
    data: str = ""  # folder with LLaVA's evaluation files; scenes needs none
    limit: Count = 0  # questions of each, the first ones; 0: all
    every_steps: Count = 0  # steps between measurements; 0: at the end alone
    batch: Size = 16  # questions at once


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps of which a profile is taken, for TensorBoard (xprof), in ``workdir/profile``."""

    first_step: Count = 0  # the first of them; 0: none
    steps: Size = 3  # how many


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases beside TensorBoard, once ``pip install wandb`` is done; it reads ``WANDB_MODE`` and the like."""

    project: str = ""  # "": none
    entity: str = ""  # team or user; "": the key's own


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What a run bears, and when it gives up (docs/operations.md)."""

    skipped_updates: Count = 10  # updates in a row that are skipped because a loss or gradient is not finite
    spike: Factor = 2.0  # times the median of the last 50 losses that one is logged for; 0: none is
    unsaved_steps: Count = 0  # steps past the newest whole checkpoint while saving fails; 0: 2·checkpoint.every_steps
    hang_seconds: Seconds = 1800.0  # a step, a save, some questions, reading the weights may take; 0: for ever
    host_seconds: Size = 60  # that another host may be silent before it is taken for dead


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    name: str = "train"  # what logs and tables call it
    seed: Seed = 0  # of initialisation and data order
    steps: Count = 0  # optimizer steps; 0: as many as the epochs need
    epochs: Epochs = 1.0  # passes over the data, where steps is 0
    global_batch_size: Size = 256  # rows per step, over all devices and microbatches
    log_every_steps: Size = 10  # steps between lines of metrics.jsonl
    init_from: str = ""  # folders of weights or runs to start from, separated by commas; or "miniatures", embedded
    init_missing: tuple[str, ...] = ()  # patterns of parameters that start afresh; init_from must have all others
    rules: tuple[tuple[str, str], ...] = ((".*", "train"),)  # (pattern of parameter path, train | freeze), first wins
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()
    wandb: WandbConfig = WandbConfig()
    faults: FaultsConfig = FaultsConfig()


REDUCTIONS = ("fastv", "random", "visionzip")  # ways to fewer image tokens without training
_CHOICES = {
    "model.fusion.variant": ("code", "paper"),
    "model.fusion.init": ("torch", "kaiming", "xavier", "normal"),
    "model.precision": ("bfloat16", "float32"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "reference", "xla", "cudnn", "splash"),
    "model.reduce": ("", *REDUCTIONS),
    "data.source": ("llava", "scenes"),
    "data.scenes.task": ("documents", "captions", "mixture", "conversations", "cues", "cells"),
    "data.aspect": ("square", "pad"),
    "data.mix_by": ("epoch", "weight"),
    "optimizer.schedule": ("cosine", "constant"),
}


def short_message(error: BaseException) -> str:
    """What an exception says, for the middle of a sentence: in a line, not at length, without a full stop."""
    return " ".join(str(error).split())[:200].strip(" .") or type(error).__name__


def shorten(text: str, most: int = 200) -> str:
    """A user's text for a message, log or report: as can be written, the middle of one of more characters left out."""
    text = text.encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be written
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]}… {left_out:,} characters …{text[-(most // 2) :]}"


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """A clause that names the nearest known spelling, or lists what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}."


def default_config() -> ml_collections.ConfigDict:
    """Every key of :class:`TrainConfig` at its default, and two for runs of several stages.

    ``stages`` maps a stage's name to the keys in which it differs; ``run`` names the stages to run, in order.

    Returns a locked ``ConfigDict``: assigning to an unknown key raises.
    """
    config = ml_collections.ConfigDict(dataclasses.asdict(TrainConfig()))
    config.stages = ml_collections.ConfigDict()
    config.run = ()
    return config.lock()


def single_stage(config: ml_collections.ConfigDict, stage: str) -> ml_collections.ConfigDict:
    """One of the config's stages as a config of its own, whose keys the command line may change directly.

    Raises:
      UserError: an unknown stage.
    """
    if stage not in config.stages:
        raise UserError(f"Unknown stage {stage!r}; {did_you_mean(stage, config.run)}")
    alone = config.copy_and_resolve_references()
    alone.update(config.stages[stage])
    alone.update(name=stage, run=())
    alone.stages = ml_collections.ConfigDict()
    return alone.lock()


def parse_arg(arg: str | None, **known: Any) -> ml_collections.ConfigDict:
    """Reads ``"key=value,…"`` after a config file's name, each value in the type of its default.

    Args:
      arg: the text after the colon of ``--config=FILE:arg``, or None.
      **known: the keys that the config file takes, with their defaults.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    result = ml_collections.ConfigDict(known)
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            raise UserError(f"Config argument {item!r} is not known; {did_you_mean(key, [f'{k}=' for k in known])}")
        result[key] = _convert(known[key], value, key)
    return result


def _convert(default, text, key):
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        raise UserError(f"{key}={text!r} should be of type {type(default).__name__}.") from None


def resolve(config: Mapping[str, Any]) -> list[TrainConfig]:
    """Freezes a ``ConfigDict`` into the stages that it runs, in order; a config without ``run`` is one stage.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range, or a key set both for the whole run and
        by a stage (the stage's would win without a word).
    """
    base = ml_collections.ConfigDict(config).to_dict()
    stages, run = base.pop("stages", {}), base.pop("run", ())
    if not all(isinstance(name, str) for name in run) or len(set(run)) < len(run):
        raise UserError(f"Config key run is {run!r}; it should hold names of stages, each once.")
    if stages and not run:
        raise UserError(f"The config has stages {', '.join(stages)} but runs none; set run to their names, in order.")
    if not run:
        return [_validated(_build(TrainConfig, base, ""))]
    defaults = flatten(default_config().to_dict())
    resolved = []
    for name in run:
        if name not in stages:
            raise UserError(f"Config key run names stage {name!r}: {did_you_mean(name, stages)}")
        if not isinstance(stages[name], Mapping):
            raise UserError(f"Config key stages.{name} is {stages[name]!r}; it should hold the keys that differ.")
        flat = flatten(base)
        for key, value in flatten(stages[name]).items():
            if key not in defaults:
                raise UserError(f"Unknown config key stages.{name}.{key}: {did_you_mean(key, defaults)}")
            if flat.get(key, defaults[key]) != defaults[key]:
                raise UserError(f"Config key {key} is set by stage {name!r}; set stages.{name}.{key} instead.")
            flat[key] = value
        resolved.append(_validated(_build(TrainConfig, _unflatten(flat | {"name": name}), "")))
    return resolved


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain data, for ``config.json``; of a model whose shapes are known, its names alone."""
    values = dataclasses.asdict(config)
    return values | {"model": {field.name: values["model"][field.name] for field in dataclasses.fields(ModelConfig)}}


def from_json(data: Mapping[str, Any]) -> TrainConfig:
    """Inverse of :func:`to_json` after a trip through JSON. Raises UserError as :func:`resolve` does.

    A run made before the embedded world had a second edition continues with the first, in training and evaluation.
    """
    scenes, measured = data.get("data", {}).get("scenes", {}), data.get("eval", {}).get("benchmarks", ())
    if scenes and "edition" not in scenes:
        names = ["shapes" if name == "scenes" else name for name in measured]
        data = {
            **data,
            "data": {**data["data"], "scenes": {**scenes, "edition": 1}},
            "eval": {**data.get("eval", {}), "benchmarks": names},
        }
    return _validated(_build(TrainConfig, data, ""))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _unflatten(flat):
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _build(cls, values, prefix):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"Unknown config key {prefix}{key}: {did_you_mean(key, fields)}")
    return cls(**{key: _typed(fields[key].type, value, prefix + key) for key, value in values.items()})


def _typed(kind, value, key):
    if typing.get_origin(kind) is Annotated:
        number, allowed = typing.get_args(kind)
        if isinstance(value, (int, float)) and not allowed.low <= value <= allowed.high:
            raise UserError(f"Config key {key} is {value}; it must be between {allowed.low:,} and {allowed.high:,}.")
        return _typed(number, value, key)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _build(kind, value, f"{key}.")
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (tuple, list)):
            inner, *rest = typing.get_args(kind)
            kinds = [inner] * len(value) if rest == [...] else [inner, *rest]
            if len(kinds) == len(value):
                return tuple(_typed(k, v, key) for k, v in zip(kinds, value, strict=True))
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"Config key {key} is {value!r}, which is not of type {getattr(kind, '__name__', kind)}.")


def _validated(config):
    flat = flatten(dataclasses.asdict(config))
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"Config key {key} is {flat[key]!r}: {did_you_mean(str(flat[key]), filter(None, choices))}")
    return config
