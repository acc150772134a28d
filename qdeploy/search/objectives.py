"""What a search can optimise and bound: names, units, directions, and the constraints of a command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qdeploy.errors import RecipeError


@dataclass(frozen=True)
class Quantity:
    """One figure of a subnet. `maximised`: more is better; `device`: it belongs to a target."""

    name: str
    unit: str
    text: str
    maximised: bool = False
    device: bool = False

    @property
    def key(self) -> str:
        """Name with its unit, as constraints, tables and files have it."""
        return f"{self.name}_{self.unit}" if self.unit else self.name


QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("accuracy", "", "top-1 in per cent on held-out images", maximised=True),
        Quantity("bitops", "", "multiply-adds x weight bits x activation bits, summed over layers"),
        Quantity("complexity", "", "the papers': float multiply-adds + bitops / 64"),
        Quantity("weights", "kib", "weight codes at their own widths"),
        Quantity("activations", "kib", "the sum of all layers' inputs at their widths"),
        Quantity("latency", "ms", "one inference, batch 1, one thread", device=True),
        Quantity("download", "kib", "a first pull: bundle of this one level and its program", device=True),
        Quantity("peak_memory", "kib", "packed weights, activation arena, code", device=True),
    )
}
KEYS = {quantity.key: quantity for quantity in QUANTITIES.values()}


@dataclass(frozen=True)
class Measured:
    """A quantity on one target: `target` is "" where it belongs to none."""

    quantity: Quantity
    target: str = ""

    @property
    def key(self) -> str:
        """Such as latency_ms@host."""
        return f"{self.quantity.key}@{self.target}" if self.target else self.quantity.key


@dataclass(frozen=True)
class Bound:
    """A limit in the quantity's unit: the least value of what is maximised, the greatest of anything else."""

    what: Measured
    limit: float

    def excess(self, values: Any) -> Any:
        """How far `values` (a number or an array) break the limit, relative to it; 0 or less where they keep it."""
        ratio = values / self.limit - 1.0
        return -ratio if self.what.quantity.maximised else ratio

    @property
    def sign(self) -> str:
        """How a value must stand to the limit."""
        return ">=" if self.what.quantity.maximised else "<="


def near(name: str, known: Iterable[str]) -> str:
    """A hint after an unknown name: the nearest, else all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"


def parse_quantity(text: str) -> Quantity:
    """A quantity by its name, with or without its unit; RecipeError with a near miss."""
    if text in QUANTITIES:
        return QUANTITIES[text]
    if text in KEYS:
        return KEYS[text]
    head, _, unit = text.rpartition("_")
    if head in QUANTITIES:
        known = QUANTITIES[head]
        raise RecipeError(f"{head} has no unit {unit!r}: write {known.key}")
    raise RecipeError(f"unknown objective {text!r}: {near(text, [*QUANTITIES, *KEYS])}")


def parse_measured(text: str, targets: Sequence[str]) -> list[Measured]:
    """NAME or NAME@TARGET; a device's quantity without a target stands for all targets. Raises RecipeError."""
    name, at, target = text.partition("@")
    quantity = parse_quantity(name)
    if not quantity.device:
        if at:
            raise RecipeError(f"{quantity.key} is the same on every target: leave @{target} out")
        return [Measured(quantity)]
    if not targets:
        raise RecipeError(f"{quantity.key} belongs to a device: name one with --target")
    if at and target not in targets:
        raise RecipeError(f"unknown target {target!r} in {text!r}: {near(target, targets)}")
    return [Measured(quantity, one) for one in ([target] if at else targets)]


def parse_objectives(texts: Sequence[str], targets: Sequence[str]) -> list[Measured]:
    """At least one objective, none twice; RecipeError otherwise."""
    found = [measured for text in texts for measured in parse_measured(text, targets)]
    if not found:
        raise RecipeError("a search needs an objective: for example --objective accuracy --objective latency")
    for i, measured in enumerate(found):
        if measured in found[:i]:
            raise RecipeError(f"objective {measured.key} is given twice")
    return found


def parse_bounds(texts: Sequence[str], targets: Sequence[str], floors: Sequence[str] = ()) -> list[Bound]:
    """NAME_UNIT=NUMBER or NAME_UNIT@TARGET=NUMBER each; RecipeError for anything else.

    `texts` are upper limits (--max), `floors` lower ones (--min), which what is maximised can have and nothing else.
    """
    found: list[Bound] = []
    for option, text in [*(("--max", text) for text in texts), *(("--min", text) for text in floors)]:
        name, equals, value = text.partition("=")
        measured = parse_measured(name, targets)
        quantity = measured[0].quantity
        if quantity.maximised != (option == "--min"):
            other, way = ("--min", "maximised") if quantity.maximised else ("--max", "minimised")
            raise RecipeError(f"{option} {text}: {quantity.key} is {way}, limit it with {other}")
        if name.partition("@")[0] != quantity.key:
            raise RecipeError(
                f"{option} {text} says no unit: write {quantity.key}{'=' + value if equals else '=NUMBER'}"
            )
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit > 0):
            raise RecipeError(f"{option} {text}: {value!r} is no positive number; write for example {quantity.key}=5")
        found += [Bound(one, limit) for one in measured]
    for i, bound in enumerate(found):
        if bound.what in [other.what for other in found[:i]]:
            raise RecipeError(f"a limit of {bound.what.key} is given twice")
    return found
