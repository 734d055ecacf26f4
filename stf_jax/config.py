"""Configuration: frozen dataclasses, one field per line with its meaning and unit.

A config file (``configs/*.py``) defines ``get_config(arg) -> ml_collections.ConfigDict``. It starts from
:func:`default_config`, which holds every key, and changes some of them. The command line may override more
(``--config.mesh.fsdp=8``). :func:`resolve` then freezes the result into one :class:`TrainConfig` per stage. Each of
these steps rejects an unknown key and suggests the closest known one. The type of a number defines its range.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

if TYPE_CHECKING:
    import ml_collections  # imported where config files are read: benchmarks/device_check.py runs without it
    from _typeshed import DataclassInstance


class UserError(ValueError):
    """The input cannot be used: one sentence that states the problem and how to fix it. Exit status 2."""

    status = 2


class RunFailed(Exception):
    """The run cannot continue: one sentence that says why. Exit status 1."""

    status = 1


class TryAgain(Exception):
    """A transient failure on another host: one sentence. Exit status 75; the same command resumes the run."""

    status = 75  # "temporary failure" in BSD's sysexits.h


class Stopped(Exception):
    """The run stopped on SIGTERM: one sentence. Exit status 143; the same command resumes the run."""

    status = 143  # as shells report it


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have, both ends included. NaN is never in range."""

    low: float
    high: float


# Steps are counted in int32 and the optimizer computes in float32, in which smaller or larger ends become 0, 1 or inf.
Count = Annotated[int, Range(0, 10**9)]
Size = Annotated[int, Range(1, 10**9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
NonNegative = Annotated[float, Range(0, 1e30)]
Positive = Annotated[float, Range(1e-30, 1e30)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.9999999)]
Epochs = Annotated[float, Range(0, 10**5)]  # all are planned at the start
Seconds = Annotated[float, Range(0, 10**9)]
Edition = Annotated[int, Range(1, 2)]
TileCount = Annotated[int, Range(2, 64)]  # one tile would show what the thumbnail shows
Axis = Annotated[int, Range(-1, 10**6)]  # 0 is rejected with the mesh (parallel/mesh.py)

# Choices; the comments of the fields say what they mean.
Variant = Literal["code", "paper"]
Initialization = Literal["torch", "kaiming", "xavier", "normal"]
Precision = Literal["bfloat16", "float32"]
Remat = Literal["auto", "none", "dots", "mlp", "attention", "full", "offload"]
Attention = Literal["auto", "reference", "xla", "cudnn", "splash"]
Task = Literal["documents", "captions", "mixture", "conversations", "cues", "cells"]
MixBy = Literal["epoch", "weight"]
Aspect = Literal["square", "pad", "tiles"]
Marks = Literal["newline", "none"]
Schedule = Literal["cosine", "constant"]
BudgetsPerStep = Literal["all", "one"]


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How the tapped states of the vision tower become image tokens of the language model (models/fusions)."""

    # fusion: mlp | avg_pool | pixel_shuffle | ldp_v2 | c_abstractor | resampler | token_packer | mqt | stf | mbtf |
    # mbtf_stf | package.module:Class of your own (docs/your-own-fusion.md)
    fusion: str = "mbtf_stf"
    taps: tuple[Count, ...] = ()  # tower blocks to read, deepest first, 1-based (0: embedding); (): 8, evenly spaced
    kernel: Size = 2  # patches per side of the window that becomes one token; mlp and mbtf ignore it
    mbtf_hidden: Count = 0  # channels between MBTF's two layers; 0: half of all tapped channels (8192 → 4096)
    mbtf_width: Count = 0  # output channels of MBTF; 0: the tower's width (1024)
    stf_hidden: Count = 0  # channels between STF's two layers; 0: 4·kernel²·its input width (16384)
    depth: Count = 0  # blocks of resampler, and of c_abstractor before and after its pooling; 0: as published, 6 and 3
    variant: Variant = "code"  # code: what the authors' program computes | paper: what the paper's figure shows
    init: Initialization = "torch"  # initialization of the layers: torch | kaiming | xavier | normal
    # numbers of image tokens per image that one model makes, most first (docs/budgets.md); (): one number
    budgets: tuple[Size, ...] = ()
    pad_grid: bool = False  # pad a patch grid that kernel does not divide, with zeros at the right and bottom


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The vision tower, the language model, the fusion between them, and how they are computed."""

    # vision tower: preset (models/towers), folder or package.module:SHAPE; "": that of init_from, else clip-l-14-336
    vision: str = ""
    # language model: preset (models/decoders), folder or package.module:SHAPE; "": that of init_from, else vicuna-7b
    llm: str = ""
    fusion: FusionConfig = FusionConfig()
    precision: Precision = "bfloat16"  # bfloat16: of frozen weights and compute | float32: of everything
    scan_layers: bool = True  # true: compile one block and loop over the layers | false: unroll the layers
    # what the backward pass recomputes, from least to most: none | dots (all but matrix products) | mlp (all but the
    # MLP's first products) | attention (all but queries, keys and values) | full | offload (full, with the inputs
    # of layers in the host's memory); auto: the first of these that fits
    remat: Remat = "auto"
    attention: Attention = "auto"  # attention kernel: auto | reference | xla | cudnn | splash (models/attention.py)
    tokens: Count = 0  # image tokens per image at inference, one of fusion.budgets; 0: the first
    reduce: str = ""  # untrained reducer at inference (models/reducers), NAME[:key=value,…] or package.module:thing
    keep: Count = 0  # image tokens per image that the reducer keeps; 0: one quarter
    # image tokens that each decoder layer sees, in training too (models/schedules), NAME[:key=value,…] or
    # package.module:thing; "": all layers see all
    schedule: str = ""
    cells: Count = 0  # cells per patch side that a head on the vision tower is trained to label; 0: no such head
    chooser: bool = False  # whether a head on the vision tower chooses each image's number of tokens (docs/budgets.md)


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The embedded procedural images (data/scenes.py, data/world.py)."""

    edition: Edition = 2  # 1: shapes and words | 2: also printed text of all sizes, charts and forms
    task: Task = "conversations"  # documents | captions | mixture | conversations | cues | cells
    size: Size = 20_000  # records per epoch
    things: Size = 4  # maximum shapes per image; edition 2: also maximum printed texts, chart bars and form lines


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """How images are cut with ``data.aspect=tiles`` (docs/tiles.md)."""

    most: TileCount = 4  # maximum tiles per image, besides its thumbnail
    # newline: a learned token ends each row of the tiles' tokens, and tokens of padding are left out | none: the tokens
    # of one tile after another
    marks: Marks = "newline"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become rows of tokens and images."""

    # source: llava (files in annotations and images) | scenes (embedded procedural images) | package.module:function of
    # your own (docs/your-own-data.md)
    source: str = "llava"
    # LLaVA JSON, Parquet, save_to_disk folders, WebDataset tars or folders that stf_jax.prepare wrote, separated by
    # commas (docs/your-own-data.md)
    annotations: str = ""
    images: str = ""  # image folder of each file with image paths, separated by commas; one folder serves all files
    filter: str = ""  # keep rows and texts by ratings: relevance>=4 and formatting>=3; those without a rating stay
    records: Count = 0  # records in annotations, for stf_jax.plan where the files are absent; 0: unknown
    mix: tuple[NonNegative, ...] = ()  # one number per data set, see mix_by; (): every record once per epoch
    mix_by: MixBy = "epoch"  # what mix gives. epoch: passes over the data set | weight: its share of all rows
    scenes: ScenesConfig = ScenesConfig()
    tokenizer: str = ""  # folder that transformers loads; miniature, miniature/2: embedded; "": that of init_from
    # conversation template (models/decoders): plain | v1 | llama-3 | chatml | mistral | package.module:CHAT
    template: str = "v1"
    # square: resize and center-crop | pad: pad to a square with the mean color | tiles: a thumbnail and tiles
    aspect: Aspect = "square"
    tiles: TilesConfig = TilesConfig()
    max_length: Size = 2048  # tokens per row, image tokens included
    packing: bool = False  # put several conversations in a row, separated by segment ids
    group_by_modality_length: bool = True  # without packing: batch rows of similar length, images apart, as LLaVA does
    buckets: Size = 1  # without packing: number of row lengths to pad batches to, chosen by the data; each is compiled
    # without packing: positions per batch, so that steps cost alike. Batches of shorter rows have more of them, in
    # multiples of global_batch_size; 0: every batch has global_batch_size rows
    tokens_per_batch: Count = 0
    images_per_row: Count = 1  # maximum images per row (M); 0: text only
    threads: Size = 2  # threads per host that read and decode

    @property
    def image_places(self) -> int:
        """The squares per row that the tower reads: one per image, or its thumbnail and tiles."""
        return self.images_per_row * (1 + self.tiles.most if self.aspect == "tiles" else 1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in PyTorch and LLaVA."""

    learning_rate: Positive = 1e-3  # peak learning rate
    schedule: Schedule = "cosine"  # learning rate after the warm-up: cosine (to zero) | constant
    warmup_ratio: Fraction = 0.03  # fraction of all steps with a linearly rising learning rate
    weight_decay: NonNegative = 0.0  # decoupled weight decay of matrices; biases and norms have none
    b1: Decay = 0.9  # decay rate of the first moment
    b2: Decay = 0.999  # decay rate of the second moment
    eps: Positive = 1e-8  # added to the square root of the second moment
    clip_norm: NonNegative = 0.0  # maximum global gradient norm; 0: no clipping, as in the authors' runs
    accumulation_steps: Size = 1  # microbatches per step


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1, for all remaining devices; data and fsdp may both be -1."""

    data: Axis = -1  # splits the batch; parameters are replicated. -1 with fsdp -1: the number of slices
    fsdp: Axis = -1  # splits the batch, parameters and moments. -1 with data -1: all devices of a slice
    # splits attention heads, feed-forward and vocabulary. If data and fsdp are -1 and a batch has fewer rows than there
    # are devices, 1 becomes the number of devices per row
    tensor: Axis = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a run are written and kept."""

    every_steps: Size = 500  # steps between checkpoints; the last step is always saved
    keep_last: Size = 2  # number of newest checkpoints to keep
    keep_every: Count = 0  # keep checkpoints at multiples of this many steps permanently; 0: none
    # true: save all frozen parameters in the workdir, once | false: not those that init_from has; its folders are then
    # needed to resume and to open the run
    save_frozen: bool = True


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Benchmarks that evaluate a run during and after training (evals/)."""

    # benchmarks, or groups of them: paper | ocr | general | all (docs/evaluating.md); package.module:Class of your own
    benchmarks: tuple[str, ...] = ()
    data: str = ""  # folder with the evaluation files; scenes, prints and shapes need none
    limit: Count = 0  # evaluate only the first N questions of each benchmark; 0: all
    every_steps: Count = 0  # steps between evaluations; 0: only at the end
    batch: Size = 16  # questions per batch


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps to profile for TensorBoard (xprof), written to ``workdir/profile``."""

    first_step: Count = 0  # first step to profile; 0: no profile
    steps: Size = 3  # number of steps to profile


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, in addition to TensorBoard. Needs ``pip install wandb``; reads ``WANDB_MODE`` and its like."""

    project: str = ""  # Weights & Biases project; "": do not use Weights & Biases
    entity: str = ""  # Weights & Biases team or user; "": the default of the API key


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """Which faults a run tolerates, and when it gives up (docs/operations.md)."""

    skipped_updates: Count = 10  # consecutive updates that may be skipped for a loss or gradient that is not finite
    spike: NonNegative = 2.0  # log a loss that exceeds this many times the median of the last 50; 0: never
    unsaved_steps: Count = 0  # maximum steps past the last checkpoint while saves fail; 0: 2·checkpoint.every_steps
    hang_seconds: Seconds = 1800.0  # watchdog timeout in seconds of a step, save, evaluation batch or load; 0: disabled
    host_seconds: Size = 60  # seconds without a heartbeat after which another host is considered dead


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    name: str = "train"  # name of the stage in logs and tables
    seed: Seed = 0  # seed of initialization and data order
    # on GPUs: compile steps from kernels that always add in the same order, so that a resumed run equals an
    # uninterrupted one to the bit, at some cost in speed | elsewhere: no effect, because steps already do
    deterministic: bool = False
    steps: Count = 0  # optimizer steps; 0: as many as epochs needs
    epochs: Epochs = 1.0  # passes over the data, if steps is 0
    global_batch_size: Size = 256  # rows per step, over all devices and microbatches (see data.tokens_per_batch)
    log_every_steps: Size = 10  # steps between lines of metrics.jsonl
    # folders of weights or runs, separated by commas; embedded: miniatures, miniatures/2, miniatures/siglip
    init_from: str = ""
    init_missing: tuple[str, ...] = ()  # regular expressions of parameters to initialize; init_from has all others
    # what is minimized: next_token | distill:teacher=FOLDER,temperature=1,weight=0.5 | cells | choose |
    # package.module:thing; "": cells with model.cells, choose with model.chooser, else next_token
    objective: str = ""
    # the loss of a step with several model.fusion.budgets. all: the mean over all of them | one: the loss at one
    # budget, drawn from the seed and the step
    budgets_per_step: BudgetsPerStep = "all"
    # (regular expression of parameter path, train | freeze | adapter) pairs; the first match decides. Adapter: lora,
    # lora:rank=16,alpha=32,… or package.module:thing; train*0.1 learns at a tenth of the rate;
    # freeze@int8 or lora@nf4 freezes kernels in 8 or 4 bits (checkpointing/rules.py)
    rules: tuple[tuple[str, str], ...] = ((".*", "train"),)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()
    wandb: WandbConfig = WandbConfig()
    faults: FaultsConfig = FaultsConfig()


def short_message(error: BaseException) -> str:
    """The message of an exception, to embed in a sentence: one line, at most 200 characters, no final period."""
    return " ".join(str(error).split())[:200].strip(" .") or type(error).__name__


def shorten(text: str, limit: int = 200) -> str:
    """A user's text for a message, log or report: encodable, its middle omitted beyond ``limit`` characters."""
    text = text.encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be encoded
    omitted = len(text) - limit
    if omitted <= 0:
        return text
    return f"{text[: limit // 2]}… {omitted:,} characters …{text[-(limit // 2) :]}"


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """A clause that suggests the closest known name, or lists all known names."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(known) or 'none'}."


def default_config() -> "ml_collections.ConfigDict":
    """All keys of :class:`TrainConfig` at their defaults, plus ``stages`` and ``run`` for runs of several stages.

    ``stages`` maps the name of a stage to the keys it overrides; ``run`` lists the stages to run, in order.

    Returns a locked ``ConfigDict``: assigning to an unknown key raises.
    """
    import ml_collections

    config = ml_collections.ConfigDict(dataclasses.asdict(TrainConfig()))
    config.stages = ml_collections.ConfigDict()
    config.run = ()
    return config.lock()


def single_stage(config: "ml_collections.ConfigDict", stage: str) -> "ml_collections.ConfigDict":
    """One stage of a config as a separate config, whose keys the command line can override directly.

    Raises:
      UserError: an unknown stage.
    """
    if stage not in config.stages:
        raise UserError(f"Unknown stage {stage!r}; {did_you_mean(stage, config.run)}")
    single = config.copy_and_resolve_references()
    single.update(config.stages[stage])
    single.update(name=stage, run=())
    single.stages = type(config)()
    return single.lock()


def parse_arg(arg: str | None, **known: Any) -> "ml_collections.ConfigDict":
    """Parses ``"key=value,…"`` after the name of a config file, each value in the type of its default.

    Args:
      arg: the text after the colon of ``--config=FILE:arg``, or None.
      **known: the keys that the config file accepts, with their defaults.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    import ml_collections

    result = ml_collections.ConfigDict(known)
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            raise UserError(f"Config argument {item!r} is not known; {did_you_mean(key, [f'{k}=' for k in known])}")
        result[key] = _convert(known[key], value, key)
    return result


def _convert(default: bool | float | str, text: str, key: str) -> bool | float | str:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        raise UserError(f"{key}={text!r} should be of type {type(default).__name__}.") from None


def resolve(config: Mapping[str, Any]) -> list[TrainConfig]:
    """Freezes a ``ConfigDict`` into the stages it runs, in order; a config without ``run`` is one stage.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range, or a key set both for the whole run and
        by a stage (the stage's value would silently win).
    """
    import ml_collections

    base = ml_collections.ConfigDict(config).to_dict()
    stages, run = base.pop("stages", {}), base.pop("run", ())
    if not all(isinstance(name, str) for name in run) or len(set(run)) < len(run):
        raise UserError(f"Config key run is {run!r}; it should list names of stages, each once.")
    if stages and not run:
        raise UserError(f"The config has stages {', '.join(stages)} but runs none; set run to their names, in order.")
    if not run:
        return [_build(TrainConfig, base, "")]
    defaults = flatten(default_config().to_dict())
    resolved = []
    for name in run:
        if name not in stages:
            raise UserError(f"Config key run names stage {name!r}: {did_you_mean(name, stages)}")
        if not isinstance(stages[name], Mapping):
            raise UserError(f"Config key stages.{name} is {stages[name]!r}; it should hold the keys to override.")
        flat = flatten(base)
        for key, value in flatten(stages[name]).items():
            if key not in defaults:
                raise UserError(f"Unknown config key stages.{name}.{key}: {did_you_mean(key, defaults)}")
            if flat.get(key, defaults[key]) != defaults[key]:
                raise UserError(f"Config key {key} is set by stage {name!r}; set stages.{name}.{key} instead.")
            flat[key] = value
        resolved.append(_build(TrainConfig, _unflatten(flat | {"name": name}), ""))
    return resolved


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain data, for ``config.json``; of a resolved model only the keys of :class:`ModelConfig`."""
    values = dataclasses.asdict(config)
    return values | {"model": {field.name: values["model"][field.name] for field in dataclasses.fields(ModelConfig)}}


def from_json(data: Mapping[str, Any]) -> TrainConfig:
    """Inverse of :func:`to_json` after a JSON round trip. Raises UserError as :func:`resolve` does.

    A run from before the second edition of the embedded world continues with the first, in training and evaluation.
    """
    scenes, benchmarks = data.get("data", {}).get("scenes", {}), data.get("eval", {}).get("benchmarks", ())
    if scenes and "edition" not in scenes:
        names = ["shapes" if name == "scenes" else name for name in benchmarks]
        data = {
            **data,
            "data": {**data["data"], "scenes": {**scenes, "edition": 1}},
            "eval": {**data.get("eval", {}), "benchmarks": names},
        }
    return _build(TrainConfig, data, "")


def fusion_from_json(values: Mapping[str, Any]) -> FusionConfig:
    """Returns a fusion's config from JSON, whose lists are tuples. Raises UserError for a wrong key or value."""
    return _build(FusionConfig, values, "model.fusion.")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


_Config = TypeVar("_Config", bound="DataclassInstance")


def _build(cls: type[_Config], values: Mapping[str, Any], prefix: str) -> _Config:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"Unknown config key {prefix}{key}: {did_you_mean(key, fields)}")
    return cls(**{key: _typed(fields[key].type, value, prefix + key) for key, value in values.items()})


def replace(config: _Config, prefix: str, **changes: Any) -> _Config:
    """Changes fields as :func:`dataclasses.replace` does, and checks them as those of a config file.

    Args:
      prefix: what stands before the keys in messages, such as ``model.``.

    Raises:
      UserError: a value of another type, out of range, or not one of the choices.
    """
    types = {field.name: field.type for field in dataclasses.fields(config)}
    return dataclasses.replace(
        config, **{key: _typed(types[key], value, prefix + key) for key, value in changes.items()}
    )


def _typed(kind: Any, value: Any, key: str) -> Any:
    if typing.get_origin(kind) is Annotated:
        number, allowed = typing.get_args(kind)
        if isinstance(value, (int, float)) and not allowed.low <= value <= allowed.high:
            raise UserError(f"Config key {key} is {value}; it must be between {allowed.low:,} and {allowed.high:,}.")
        return _typed(number, value, key)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if isinstance(value, str) and value not in choices:
            raise UserError(f"Config key {key} is {value!r}: {did_you_mean(value, filter(None, choices))}")
        return _typed(str, value, key)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
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
