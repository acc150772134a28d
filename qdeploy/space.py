"""SubnetSpec: one choice of everything that may vary, as a frozen, hashable value (search uses it as its key)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdeploy.errors import RecipeError
from qdeploy.files import canonical_json, parse_json, sha256

SPEC_VERSION = 1
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, order=True)
class LayerBits:
    """Widths of one layer: its weights, and the activations that it reads."""

    layer: str
    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        for field in ("weight_bits", "activation_bits"):
            bits = getattr(self, field)
            if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
                raise RecipeError(
                    f"{field} of layer {self.layer} is {bits!r}: choose a whole number from {MIN_BITS} to {MAX_BITS}"
                )


@dataclass(frozen=True)
class SubnetSpec:
    """Bits of every quantized layer of one network, layers in graph order.

    Two specs are equal when network and layers are; `id` is stable across machines and versions
    (fields that a later version adds are omitted from the JSON while they are unset).
    """

    network: str
    layers: tuple[LayerBits, ...]

    def __post_init__(self) -> None:
        names = [layer.layer for layer in self.layers]
        if len(set(names)) != len(names):
            raise RecipeError("a subnet spec names a layer twice")
        if not names:
            raise RecipeError("a subnet spec needs at least one layer")

    @classmethod
    def build(cls, network: str, bits: Mapping[str, tuple[int, int]]) -> SubnetSpec:
        """From {layer: (weight bits, activation bits)} in graph order."""
        return cls(network, tuple(LayerBits(name, *pair) for name, pair in bits.items()))

    def __getitem__(self, layer: str) -> LayerBits:
        for entry in self.layers:
            if entry.layer == layer:
                return entry
        raise RecipeError(f"the spec has no layer {layer}: its layers are {', '.join(e.layer for e in self.layers)}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; the layers keep their order."""
        rows = [[entry.layer, entry.weight_bits, entry.activation_bits] for entry in self.layers]
        return {"version": SPEC_VERSION, "network": self.network, "layers": rows}

    @classmethod
    def from_json(cls, value: Any) -> SubnetSpec:
        """Inverse of `to_json`; raises RecipeError that names the field at fault."""
        if not isinstance(value, dict):
            raise RecipeError("a subnet spec is a JSON object with version, network and layers")
        if unknown := set(value) - {"version", "network", "layers"}:
            raise RecipeError(f"unknown key {min(unknown)!r} in the subnet spec: keys are version, network, layers")
        if type(value.get("version")) is not int or value["version"] != SPEC_VERSION:
            raise RecipeError(f"subnet spec version {value.get('version')!r} is not {SPEC_VERSION}")
        network, layers = value.get("network"), value.get("layers")
        if not isinstance(network, str) or not isinstance(layers, list):
            raise RecipeError("a subnet spec needs a string 'network' and a list 'layers'")
        entries = []
        for row in layers:
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)):
                raise RecipeError(f"layer entry {row!r} is not [name, weight bits, activation bits]")
            entries.append(LayerBits(*row))
        return cls(network, tuple(entries))

    @classmethod
    def parse(cls, data: bytes) -> SubnetSpec:
        """From the bytes of a spec file."""
        return cls.from_json(parse_json(data, "the subnet spec", RecipeError))

    @property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return sha256(canonical_json(self.to_json()))[:12]

    def nests_in(self, higher: SubnetSpec) -> bool:
        """True when every weight width here is at most `higher`'s: then one bundle can hold both as a climb."""
        if self.network != higher.network or len(self.layers) != len(higher.layers):
            return False
        return all(low.weight_bits <= higher[low.layer].weight_bits for low in self.layers)
