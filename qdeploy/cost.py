"""Cost: what a model costs on a device; every number with its unit and where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qdeploy.errors import RecipeError

FLOPS_PER_BITOPS = 64  # a float multiply-add counts as one of 8 x 8 bits (QFA, "FLOPs + BitOPs / 64")
UNITS = ("ms", "bytes", "bitops", "macs", "ratio")
SOURCES = ("predicted", "measured")


def complexity(flops: Any, bitops: Any) -> Any:
    """FLOPs of float layers + BitOPs / 64 of quantized ones, both of multiply-adds; numbers or arrays (QFA)."""
    return flops + bitops / FLOPS_PER_BITOPS


@dataclass(frozen=True)
class Measure:
    """One number. `source` is "measured" (a clock or a counter said so) or "predicted" (a formula or a model did)."""

    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise RecipeError(f"unit {self.unit!r} is unknown: choose one of {', '.join(UNITS)}")
        if self.source not in SOURCES:
            raise RecipeError(f"source {self.source!r} is unknown: choose one of {', '.join(SOURCES)}")

    def __add__(self, other: Measure) -> Measure:
        """A sum is measured only when both terms are."""
        if self.unit != other.unit:
            raise RecipeError(f"cannot add {self.unit} and {other.unit}")
        source = "measured" if self.source == other.source == "measured" else "predicted"
        return Measure(self.value + other.value, self.unit, source)

    def to_json(self) -> dict[str, Any]:
        """{"value", "unit", "source"}."""
        return {"value": self.value, "unit": self.unit, "source": self.source}


@dataclass(frozen=True)
class Cost:
    """Named measures of one model on one device class, in order."""

    measures: tuple[tuple[str, Measure], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.measures]
        if len(set(names)) != len(names):
            raise RecipeError("a cost names a measure twice")

    @classmethod
    def build(cls, rows: Iterable[tuple[str, float, str, str]]) -> Cost:
        """From (name, value, unit, source) rows."""
        return cls(tuple((name, Measure(value, unit, source)) for name, value, unit, source in rows))

    def __getitem__(self, name: str) -> Measure:
        for key, measure in self.measures:
            if key == name:
                return measure
        raise RecipeError(f"no measure {name!r}: there are {', '.join(key for key, _ in self.measures)}")

    def to_json(self) -> dict[str, Any]:
        """{name: measure}."""
        return {name: measure.to_json() for name, measure in self.measures}
