"""Filters rows by ratings of their texts, such as ``relevance>=4 and formatting>=3``."""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from stf_jax.config import UserError
from stf_jax.data.records import BadRow
from stf_jax.data.rows import PAIRS_KEY, is_empty

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*(\w+)\s*([<>]=?|[=!]=)\s*(-?[0-9]+(?:\.[0-9]+)?)\s*")
_SUFFIXES = ("", "_ratings", "_min")  # FineVision's: one rating for each text, and the lowest of them


@dataclasses.dataclass(frozen=True)
class _Condition:
    name: str
    compare: Callable[[float, float], bool]
    number: float

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.name + suffix for suffix in _SUFFIXES)

    def check(self, row: Mapping[str, Any]) -> list[bool] | bool:
        """Returns whether the row meets the condition, or whether each of its texts does."""
        rating = next((row[key] for key in self.keys if not is_empty(row.get(key))), None)
        return [self._check_rating(each) for each in rating] if isinstance(rating, list) else self._check_rating(rating)

    def _check_rating(self, rating: Any) -> bool:
        return is_empty(rating) or self.compare(rating, self.number)


class Filter:
    """Conditions on ratings, all of which a row or a text must meet; a missing rating meets any."""

    def __init__(self, text: str) -> None:
        """Parses ``NAME>=NUMBER and …``; an empty text is a filter that all rows pass.

        A rating is the value of a row's key ``NAME``, ``NAME_ratings`` or ``NAME_min``, the first of these that it has:
        a number for the row, or a list with a number for each of its ``texts``.

        Raises:
          UserError: the text is something else.
        """
        self.text = text
        self._conditions: list[_Condition] = []
        for part in text.split(" and ") if text.strip() else []:
            found = _CONDITION.fullmatch(part)
            if found is None:
                raise UserError(
                    f"The filter {text!r} should be conditions like 'relevance>=4 and formatting>=3': a name, one of "
                    f"{' '.join(_OPERATORS)}, and a number."
                )
            self._conditions.append(_Condition(found[1], _OPERATORS[found[2]], float(found[3])))

    def __bool__(self) -> bool:
        return bool(self._conditions)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a row that may have the ratings."""
        return tuple(key for condition in self._conditions for key in condition.keys)

    def keep(self, row: Any, where: str) -> Any:
        """Returns the row without the texts that do not meet the conditions; the row itself, if all do.

        Raises:
          BadRow: ``filtered`` if nothing is left; ``ratings`` if ratings are not numbers, or not one for each text.
        """
        if not self._conditions or not isinstance(row, dict):
            return row
        try:
            checks = [condition.check(row) for condition in self._conditions]
        except TypeError:
            raise BadRow("ratings", f"{where[:1].upper()}{where[1:]} has ratings that are not numbers.") from None
        lists = [check for check in checks if isinstance(check, list)]
        kept = [all(pair) for pair in zip(*lists, strict=False)]
        if not all(check for check in checks if isinstance(check, bool)) or (lists and not any(kept)):
            raise BadRow("filtered", f"{where[:1].upper()}{where[1:]} has ratings outside the filter {self.text}.")
        if not lists or PAIRS_KEY not in row:
            return row
        texts = row[PAIRS_KEY]
        if not isinstance(texts, list) or any(len(each) != len(texts) for each in lists):
            raise BadRow(
                "ratings", f"{where[:1].upper()}{where[1:]} has ratings, but not one for each of its {PAIRS_KEY}."
            )
        return row | {PAIRS_KEY: [text for text, keep in zip(texts, kept, strict=True) if keep]}
