"""Decides by the rules of a config, for each parameter, whether it trains, how fast, and what adapts it.

A rule is a pattern of parameter paths and an action:

    ("fusion/.*", "train")              it trains
    ("vision/.*", "train*0.1")          at a tenth of the learning rate
    ("vision/blocks[12:]/.*", "train")  only in these layers; the first is 0
    ("llm/.*", "lora:rank=16")          an adapter (models/adapters) of each linear layer in blocks trains
    ("llm/.*", "lora*0.5")              at half of the learning rate
    ("llm/.*", "lora@int8")             kernels of linear layers in blocks are frozen in int8 (models/quantized.py)
    ("vision/.*", "freeze@nf4")         in 4 bits
    (".*", "freeze")

For each parameter, and each layer of a block, the first rule whose pattern matches all of its path decides.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping

from stf_jax.checkpointing.renames import path_matches
from stf_jax.config import UserError, did_you_mean
from stf_jax.models.adapters.base import ADAPTERS, Adapter, find_adapter
from stf_jax.models.quantized import QUANTIZATIONS, Quantization
from stf_jax.registry import is_outside

Rules = tuple[tuple[str, str], ...]
_LAYERS = re.compile(r"(.*)\[(\d{0,9}):(\d{0,9})\](/.*)")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of a config, in parts.

    Attributes:
      label: the pattern as written.
      pattern: without the range of layers.
      layers: the range as (first, last + 1), where None is the end; None for a rule without one.
      action: ``train``, ``freeze`` or the name of an adapter.
      factor: what multiplies the learning rate.
      quantization: of frozen kernels, if they are quantized.
    """

    label: str
    pattern: re.Pattern[str]
    layers: tuple[int, int | None] | None
    action: str
    factor: float
    quantization: Quantization | None

    @property
    def adapter_name(self) -> str:
        """The name of the rule's adapter; empty if it has none."""
        return "" if self.action in ("train", "freeze") else self.action

    def covers(self, layer: int | None) -> bool:
        """Whether the rule's range has a layer."""
        if self.layers is None:
            return True
        first, end = self.layers
        return layer is not None and first <= layer and (end is None or layer < end)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a parameter in training.

    Attributes:
      factors: what multiplies the learning rate, of each layer for a parameter of a block, else of all of it; 0 where
        it is frozen. With an adapter, the factors are the adapter's.
      adapter: what trains beside the frozen parameter.
      quantization: of a kernel that is frozen in few bits.
    """

    factors: tuple[float, ...]
    adapter: Adapter | None = None
    quantization: Quantization | None = None


def parse_rules(rules: Rules) -> list[Rule]:
    """Parses the rules of a config.

    Raises:
      UserError: a pattern that is not a regular expression, an unknown action or quantization, or a factor that is not
        positive.
    """
    return [_parse_rule(pattern, action) for pattern, action in rules]


def _parse_rule(label: str, action: str) -> Rule:
    rule, factor = f"Freeze rule ({label!r}, {action!r})", 1.0
    name, star, text = action.rpartition("*")
    if star:
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf or name == "freeze":
            raise UserError(
                f"{rule} must be 'freeze', or 'train' or an adapter times a positive number, such as 'train*0.1'."
            )
        action = name
    action, at, kind = action.partition("@")
    if at and (kind not in QUANTIZATIONS or action == "train"):
        raise UserError(f"{rule} can only freeze kernels, in int8 or nf4: write 'freeze@int8' or 'lora@nf4'.")
    match = _LAYERS.fullmatch(label)
    pattern, layers = label, None
    if match:
        pattern, layers = match[1] + match[4], (int(match[2] or 0), int(match[3]) if match[3] else None)
    if action not in ("train", "freeze"):
        known = ("train", "freeze", *ADAPTERS.known)
        if action not in known and not is_outside(action):
            raise UserError(f"{rule} must say 'train' or 'freeze', or name an adapter; {did_you_mean(action, known)}")
        find_adapter(action)
    try:
        return Rule(label, re.compile(pattern), layers, action, factor, QUANTIZATIONS.get(kind))
    except re.error as error:
        raise UserError(f"Freeze rule pattern {pattern!r} is not a regular expression: {error}.") from None


def decide(rules: Rules, depths: Mapping[str, int | None], linears: Collection[str] = ()) -> dict[str, Decision]:
    """Decides for each parameter of a model without adapters.

    Args:
      depths: layers that each parameter stacks, by path; None for one of no block.
      linears: paths of the kernels that an adapter may adapt, and that may be quantized.

    Raises:
      UserError: as :func:`parse_rules`; a parameter that no rule covers; a rule that covers nothing, adapts nothing,
        quantizes nothing or has a range of layers that some parameter lacks; a parameter that trains in some layers
        and is adapted in others, or is quantized in some; nothing is left to train.
    """
    parsed = parse_rules(rules)
    for rule in parsed:
        _check_coverage(rule, depths)
    decisions: dict[str, Decision] = {}
    deciding: set[Rule] = set()  # on a kernel of a linear layer in blocks
    for path, depth in depths.items():
        matching = [rule for rule in parsed if path_matches(rule.pattern, path)]
        chosen: list[Rule] = []
        for layer in range(depth) if depth is not None else [None]:
            covering = [rule for rule in matching if rule.covers(layer)]
            if not covering:
                where = f"{path}[{layer}]" if matching else path
                raise UserError(f"No freeze rule covers parameter {where!r}; add one to config.rules.")
            chosen.append(covering[0])
        # An adapter's rule freezes what it cannot adapt.
        actions = [rule.action if path in linears or not rule.adapter_name else "freeze" for rule in chosen]
        training = set(actions) - {"freeze"}
        if len(training) > 1:
            raise UserError(
                f"The freeze rules train the layers of {path!r} in different ways: those that are not frozen must all "
                "train, or all have the same adapter."
            )
        kinds = {rule.quantization for rule in chosen if path in linears}
        if len(kinds) > 1:
            raise UserError(
                f"The layers of {path!r} can be quantized only together; give all of them '@int8' or '@nf4'."
            )
        deciding |= {rule for rule in chosen if path in linears}
        factors = (rule.factor if action != "freeze" else 0.0 for rule, action in zip(chosen, actions, strict=True))
        name = next(iter(training - {"train"}), None)
        decisions[path] = Decision(tuple(factors), find_adapter(name) if name else None, next(iter(kinds), None))
    for rule in parsed:
        if (rule.adapter_name or rule.quantization) and rule not in deciding:
            what = f"({rule.label!r}, {rule.action!r}) adapts" if rule.adapter_name else f"{rule.label!r} quantizes"
            raise UserError(f"Freeze rule {what} nothing: it decides on no kernel of a linear layer in blocks.")
    if not any(any(decision.factors) for decision in decisions.values()):
        raise UserError("The freeze rules leave nothing to train.")
    return decisions


def _check_coverage(rule: Rule, depths: Mapping[str, int | None]) -> None:
    matches = [path for path in depths if path_matches(rule.pattern, path)]
    if not matches:
        raise UserError(f"Freeze rule {rule.label!r} covers no parameter; paths look like {min(depths)!r}.")
    if rule.layers is None:
        return
    for path in matches:
        (first, end), depth = rule.layers, depths[path]
        if depth is None:
            raise UserError(f"Freeze rule {rule.label!r} names layers, but {path!r} is not in a block.")
        if not first < (depth if end is None else end) <= depth:
            raise UserError(f"Freeze rule {rule.label!r} names layers that {path!r} lacks; it has 0 to {depth - 1}.")


def find_kernel_adapters(rules: Iterable[Rule], kernels: Iterable[str]) -> dict[str, Adapter]:
    """The adapters of kernels that are known to have one, by path."""
    named = [rule for rule in rules if rule.adapter_name]
    found = {path: next((rule for rule in named if path_matches(rule.pattern, path)), None) for path in kernels}
    return {path: find_adapter(rule.adapter_name) for path, rule in found.items() if rule is not None}


def rate_factors(rules: Rules) -> dict[str, float]:
    """Factors of the learning rate other than 1, by pattern without its ``/.*``: ``vision``, ``llm/blocks[:4]``."""
    return {rule.label.removesuffix("/.*"): rule.factor for rule in parse_rules(rules) if rule.factor != 1}
