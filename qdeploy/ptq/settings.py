"""What a user may choose about a quantization: settings, rules for layers by name, and their TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qdeploy.errors import RecipeError
from qdeploy.files import read_bytes

MIN_BITS, MAX_BITS = 2, 8
CHOICES: dict[str, tuple[str, ...]] = {
    "calibration": ("minmax", "margin", "percentile", "mse", "entropy", "auto"),
    "granularity": ("channel", "tensor"),
    "symmetry": ("symmetric", "asymmetric"),
    "activation_symmetry": ("asymmetric", "symmetric"),
    "rounding": ("least-squares", "nearest"),
    "first_last": ("8", "same", "float"),
}
OF_A_LAYER = ("weight_bits", "activation_bits", "granularity", "symmetry", "quantize")


@dataclass(frozen=True)
class Choice:
    """How one layer is quantized: the widths of its weights and of its input, and the grid of its weights."""

    weight_bits: int = 8
    activation_bits: int = 8
    granularity: str = "channel"
    symmetry: str = "symmetric"
    quantize: bool = True


@dataclass(frozen=True)
class Rule:
    """`values` replace the fields of Choice for every layer whose name fits the shell pattern `match`."""

    match: str
    values: Mapping[str, Any]

    def fits(self, layer: str) -> bool:
        """True for the name of a layer that the rule is about."""
        return fnmatchcase(layer, self.match)


@dataclass(frozen=True)
class Settings:
    """How a network is quantized.

    calibration: how the range of an activation is found (ranges.py), `percentile` for that method alone; "auto" takes
    the method of least output error on calibration images that it did not see. granularity,
    symmetry: of weights. activation_symmetry: asymmetric is uint8, symmetric int8 with zero point 0. rounding: of
    weights, to the nearest code or by layer-wise least squares (rounding.py). first_last: width of the first and the
    last layer, "8", "same" as the others or "float". equalize: even ranges out between layers by exact rescaling
    (streams.py; of weights with granularity "tensor", fold.py). bias_correction: remove the mean error of each layer's
    output. rules: what differs for layers by name; a later rule wins.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    granularity: str = "channel"
    symmetry: str = "symmetric"
    activation_symmetry: str = "asymmetric"
    calibration: str = "auto"
    percentile: float = 99.99
    rounding: str = "least-squares"
    first_last: str = "8"
    equalize: bool = True
    bias_correction: bool = True
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        _check("the settings", {name: value for name, value in values.items() if name != "rules"})
        for rule in self.rules:
            _check(f"the rule for {rule.match!r}", rule.values)

    def choices(self, layers: Sequence[str], widths: Mapping[str, int] | None = None) -> dict[str, Choice]:
        """The choice for each of `layers` (names in graph order); `widths` are weight widths found by a search.

        Order of force: settings, `widths`, the policy for first and last, rules. Raises RecipeError for a rule that no
        layer fits.
        """
        basic = Choice(self.weight_bits, self.activation_bits, self.granularity, self.symmetry)
        found = {name: replace(basic, weight_bits=(widths or {}).get(name, self.weight_bits)) for name in layers}
        for name in {*layers[:1], *layers[-1:]} if self.first_last != "same" else ():
            edge = replace(found[name], weight_bits=8, activation_bits=8)
            found[name] = edge if self.first_last == "8" else replace(edge, quantize=False)
        for rule in self.rules:
            fitting = [name for name in layers if rule.fits(name)]
            if not fitting:
                raise RecipeError(f"the rule for {rule.match!r} fits no layer: the layers are {', '.join(layers)}")
            found |= {name: replace(found[name], **rule.values) for name in fitting}
        return found


def _check(where: str, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for a value out of its set."""
    for name, value in values.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise RecipeError(f"{name} of {where} is {value!r}: choose from {', '.join(CHOICES[name])}")
        if name.endswith("_bits") and not (type(value) is int and MIN_BITS <= value <= MAX_BITS):
            raise RecipeError(f"{name} of {where} is {value!r}: give {MIN_BITS} to {MAX_BITS}")
        if name == "percentile" and not (type(value) in (int, float) and 50 < value <= 100):
            raise RecipeError(f"percentile of {where} is {value!r}: give more than 50 and at most 100")
        if name in ("quantize", "equalize", "bias_correction") and type(value) is not bool:
            raise RecipeError(f"{name} of {where} is {value!r}: give true or false")


def load_settings(path: Path) -> dict[str, Any]:
    """Fields of Settings from a TOML file; `[[layer]]` tables with `match` are its rules. Raises RecipeError."""
    try:
        document = tomllib.loads(read_bytes(Path(path), "the settings", RecipeError).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path} is no TOML file: {e}") from e
    tables = document.pop("layer", [])
    known = {field.name for field in fields(Settings)} - {"rules"}
    if unknown := sorted(set(document) - known):
        raise RecipeError(f"{path} sets {unknown[0]!r}: the keys are {', '.join(sorted(known))} and [[layer]]")
    rules = []
    for table in tables if isinstance(tables, list) else [{}]:
        match = table.pop("match", None)
        if not isinstance(match, str) or not table:
            raise RecipeError(
                f'{path}: a [[layer]] needs match = "PATTERN" and at least one of {", ".join(OF_A_LAYER)}'
            )
        if unknown := sorted(set(table) - set(OF_A_LAYER)):
            raise RecipeError(f"{path}: [[layer]] {match!r} sets {unknown[0]!r}: choose from {', '.join(OF_A_LAYER)}")
        rules.append(Rule(match, table))
    return document | {"rules": tuple(rules)}
