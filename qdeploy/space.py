"""SearchSpace: what may vary in a network. SubnetSpec: one choice of it, as a frozen, hashable value.

Search and prediction use one common form of a spec: a vector of *genes*, one for everything that has more than one
choice, of fixed length for a space. A gene of a block that the spec's depth leaves out is inactive: it stands at 0, and
its one-hot columns are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from math import prod
from random import Random
from typing import Any

from qdeploy.errors import RecipeError
from qdeploy.files import canonical_json, parse_json, sha256

SPEC_VERSION = 1
MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = 32  # a width of training alone: left in floating point
GRANULARITIES = ("tensor", "channel")  # one weight step a tensor, or one an output channel
SYMMETRIES = ("symmetric", "asymmetric")  # weight zero point 0, or an integer of the tensor
OPTIONS = {"granularity": GRANULARITIES, "symmetry": SYMMETRIES}
LAYER_FIELDS = ("weight_bits", "activation_bits", "granularity", "symmetry")
Choice = int | str
Reference = tuple[int, int]  # (stage, block in the stage), from 0


# ---- one choice ----------------------------------------------------------------------------------------------------


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class LayerBits:
    """Choices of one layer: its weights' width, the width of the activations that it reads, how weights are quantized.

    `granularity` and `symmetry` are None where the network has no such choice.
    """

    layer: str
    weight_bits: int
    activation_bits: int
    granularity: str | None = None
    symmetry: str | None = None

    def __post_init__(self) -> None:
        for field in ("weight_bits", "activation_bits"):
            bits = getattr(self, field)
            if not _whole(bits) or not (MIN_BITS <= bits <= MAX_BITS or bits == FLOAT_BITS):
                raise RecipeError(
                    f"{field} of layer {self.layer} is {bits!r}: choose a whole number from {MIN_BITS} to {MAX_BITS}"
                )
        for field, choices in OPTIONS.items():
            value = getattr(self, field)
            if value is not None and value not in choices:
                raise RecipeError(f"{field} of layer {self.layer} is {value!r}: choose one of {', '.join(choices)}")

    def to_json(self) -> list[Any]:
        """[name, weight bits, activation bits], and an object with granularity and symmetry where they are set."""
        options = {field: getattr(self, field) for field in OPTIONS if getattr(self, field) is not None}
        return [self.layer, self.weight_bits, self.activation_bits, *([options] if options else [])]

    @classmethod
    def from_json(cls, row: Any) -> LayerBits:
        """Inverse of `to_json`; raises RecipeError."""
        if not (isinstance(row, list) and len(row) in (3, 4) and isinstance(row[0], str)):
            raise RecipeError(f"layer entry {row!r} is not [name, weight bits, activation bits] or one with options")
        options = row[3] if len(row) == 4 else {}
        if not isinstance(options, dict) or set(options) - set(OPTIONS) or any(v is None for v in options.values()):
            raise RecipeError(
                f"options of layer {row[0]} are {options!r}: an object with {', '.join(OPTIONS)} is needed"
            )
        return cls(row[0], row[1], row[2], **options)


@dataclass(frozen=True)
class Block:
    """One block of an elastic stage: kernel size, expansion ratio; None where the network has no such choice."""

    kernel: int | None = None
    expand: int | None = None


@dataclass(frozen=True)
class Architecture:
    """Blocks of every elastic stage (their number is the stage's depth), input resolution in pixels, base width."""

    stages: tuple[tuple[Block, ...], ...] = ()
    resolution: int | None = None
    width: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value without unset fields."""
        stages = [[_without_none(asdict(block)) for block in stage] for stage in self.stages]
        rest = _without_none({"resolution": self.resolution, "width": self.width})
        return ({"stages": stages} if stages else {}) | rest

    @classmethod
    def from_json(cls, value: Any) -> Architecture:
        """Inverse of `to_json`; raises RecipeError."""
        where = "the spec's architecture"
        fields = _object(value, where, ("stages", "resolution", "width"))
        stages = fields.pop("stages", [])
        if not isinstance(stages, list) or not all(isinstance(stage, list) for stage in stages):
            raise RecipeError(f"{where}: stages is {stages!r}, a list of lists of blocks is needed")
        blocks = (
            tuple(Block(**_numbers(_object(b, f"a block of {where}", ("kernel", "expand")))) for b in s) for s in stages
        )
        return cls(tuple(blocks), **_numbers(fields))


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _object(value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """`value` as a new dict; RecipeError for another type or a key that is not among `keys`."""
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is {value!r}: an object with {', '.join(keys)} is needed")
    if unknown := set(value) - set(keys):
        raise RecipeError(f"unknown key {min(unknown)!r} in {where}: keys are {', '.join(keys)}")
    return dict(value)


def _numbers(fields: Mapping[str, Any]) -> dict[str, int]:
    """The same fields; RecipeError unless each is a positive whole number."""
    for key, value in fields.items():
        if not _whole(value) or value < 1:
            raise RecipeError(f"{key} is {value!r}: a positive whole number is needed")
    return dict(fields)


@dataclass(frozen=True)
class SubnetSpec:
    """Choices of every layer of one subnet, layers in graph order, and of its architecture where that is elastic.

    Two specs are equal when all fields are; `id` is stable across machines and versions (fields that are unset are
    omitted from the JSON, so a later version's fields leave it as it is).
    """

    network: str
    layers: tuple[LayerBits, ...]
    architecture: Architecture | None = None

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
        rows = [entry.to_json() for entry in self.layers]
        value = {"version": SPEC_VERSION, "network": self.network, "layers": rows}
        return value | ({} if self.architecture is None else {"architecture": self.architecture.to_json()})

    @classmethod
    def from_json(cls, value: Any) -> SubnetSpec:
        """Inverse of `to_json`; raises RecipeError that names the field at fault."""
        if not isinstance(value, dict):
            raise RecipeError("a subnet spec is a JSON object with version, network and layers")
        _object(value, "the subnet spec", ("version", "network", "layers", "architecture"))
        if type(value.get("version")) is not int or value["version"] != SPEC_VERSION:
            raise RecipeError(f"subnet spec version {value.get('version')!r} is not {SPEC_VERSION}")
        network, layers = value.get("network"), value.get("layers")
        if not isinstance(network, str) or not isinstance(layers, list):
            raise RecipeError("a subnet spec needs a string 'network' and a list 'layers'")
        architecture = Architecture.from_json(value["architecture"]) if "architecture" in value else None
        return cls(network, tuple(LayerBits.from_json(row) for row in layers), architecture)

    @classmethod
    def parse(cls, data: bytes) -> SubnetSpec:
        """From the bytes of a spec file."""
        return cls.from_json(parse_json(data, "the subnet spec", RecipeError))

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return sha256(canonical_json(self.to_json()))[:12]

    def nests_in(self, higher: SubnetSpec) -> bool:
        """True when every weight width here is at most `higher`'s: then one bundle can hold both as a climb."""
        same = self.network == higher.network and self.architecture == higher.architecture
        if not same or len(self.layers) != len(higher.layers):
            return False
        return all(low.weight_bits <= higher[low.layer].weight_bits for low in self.layers)


# ---- what may vary -------------------------------------------------------------------------------------------------


def check_choice(what: str, value: Any, choices: Sequence[Choice]) -> None:
    """Raise RecipeError unless `value` is among `choices`, or None where there are none."""
    if value not in (choices or (None,)):
        known = f"choose from {list(choices)}" if choices else "this network has no such choice, leave it out"
        raise RecipeError(f"{what} is {value}: {known}")


@dataclass(frozen=True)
class LayerSpace:
    """Choices of one layer, in the order in which genes count them; an empty tuple: the network has no such choice.

    `shares` names an earlier layer that reads the same tensor, so that both have one activation width. `block` is the
    (stage, block) to which the layer belongs, None for a layer of every subnet.
    """

    layer: str
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    granularity: tuple[str, ...] = ()
    symmetry: tuple[str, ...] = ()
    shares: str | None = None
    block: Reference | None = None

    def check(self, entry: LayerBits) -> None:
        """Raise RecipeError that names the field and the choices unless `entry` is one of this layer's."""
        for field in LAYER_FIELDS:
            check_choice(f"{field} of {self.layer}", getattr(entry, field), getattr(self, field))


@dataclass(frozen=True)
class Gene:
    """Something that has choices: `name` says what; in `block`, if it is active only where the stage is that deep."""

    name: str
    choices: tuple[Choice, ...]
    block: Reference | None = None


@dataclass(frozen=True)
class SearchSpace:
    """Everything that may vary in one network; an empty tuple: no such choice.

    `layers` in graph order, those of every block of the deepest network among them. `depths`: of each elastic stage,
    how many of its blocks may be kept. `kernels` and `expands`: of every block. `resolutions` in pixels, `widths`: base
    widths. `architecture`: the only one, where one subnet was trained alone.
    """

    network: str
    layers: tuple[LayerSpace, ...]
    depths: tuple[tuple[int, ...], ...] = ()
    kernels: tuple[int, ...] = ()
    expands: tuple[int, ...] = ()
    resolutions: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        known: dict[str, LayerSpace] = {}
        for layer in self.layers:
            if layer.layer in known:
                raise RecipeError(f"the search space names layer {layer.layer} twice")
            if not layer.weight_bits or not layer.activation_bits:
                raise RecipeError(f"layer {layer.layer} of the search space has no widths to choose from")
            leader = known.get(layer.shares) if layer.shares is not None else layer
            if leader is None or leader.block not in (None, layer.block):
                raise RecipeError(f"layer {layer.layer} shares with {layer.shares}, which is not there before it")
            if leader.activation_bits != layer.activation_bits:
                raise RecipeError(f"{leader.layer} and {layer.layer} read one tensor: give them the same widths")
            if layer.block is not None and layer.block not in self.blocks:
                raise RecipeError(f"layer {layer.layer} is of block {layer.block}, which no depth reaches")
            known[layer.layer] = layer
        if not known:
            raise RecipeError("a search space needs at least one layer")

    @property
    def blocks(self) -> list[Reference]:
        """(stage, block) of every block of the deepest network."""
        return [(stage, block) for stage, depths in enumerate(self.depths) for block in range(max(depths))]

    @cached_property
    def variables(self) -> tuple[Gene, ...]:
        """What has more than one choice: the depths first, since they say which of the others are active."""
        return tuple(g for g in (*self._depth_genes, *self._shape_genes, *self._layer_genes) if len(g.choices) > 1)

    @property
    def _depth_genes(self) -> list[Gene]:
        return [Gene(f"stage {stage} depth", depths) for stage, depths in enumerate(self.depths)]

    @property
    def _shape_genes(self) -> list[Gene]:
        found = [Gene("resolution", self.resolutions), Gene("width", self.widths)]
        for stage, block in self.blocks:
            found.append(Gene(f"stage {stage} block {block} kernel", self.kernels, (stage, block)))
            found.append(Gene(f"stage {stage} block {block} expand", self.expands, (stage, block)))
        return found

    @property
    def _layer_genes(self) -> list[Gene]:
        return [
            Gene(f"{layer.layer} {field}", getattr(layer, field), layer.block)
            for layer in self.layers
            for field in LAYER_FIELDS
            if field != "activation_bits" or layer.shares is None
        ]

    @property
    def size(self) -> int:
        """How many different specs there are, exactly."""
        inside = {reference: 1 for reference in self.blocks}
        outside = 1
        for gene in (*self._shape_genes, *self._layer_genes):
            choices = max(1, len(gene.choices))
            if gene.block is None:
                outside *= choices
            else:
                inside[gene.block] *= choices
        for stage, depths in enumerate(self.depths):
            outside *= sum(prod(inside[stage, block] for block in range(depth)) for depth in depths)
        return outside

    # ---- specs and genes -------------------------------------------------------------------------------------------

    def from_genes(self, vector: Sequence[int]) -> SubnetSpec:
        """The spec of a vector of indices into `variables`'s choices; what inactive genes say does not matter."""
        if len(vector) != len(self.variables):
            raise RecipeError(f"{len(vector)} genes: this space has {len(self.variables)}")
        values: dict[str, Choice] = {}
        for gene, index in zip(self.variables, vector, strict=True):
            if not 0 <= index < len(gene.choices):
                raise RecipeError(f"gene {gene.name} is {index}: choose from 0 to {len(gene.choices) - 1}")
            values[gene.name] = gene.choices[int(index)]

        def pick(name: str, choices: Sequence[Choice]) -> Any:
            return values.get(name, choices[0] if choices else None)

        depths = [pick(f"stage {stage} depth", depths) for stage, depths in enumerate(self.depths)]
        layers: dict[str, LayerBits] = {}
        for layer in self._present(depths):
            chosen: dict[str, Any] = {
                field: pick(f"{layer.layer} {field}", getattr(layer, field)) for field in LAYER_FIELDS
            }
            if layer.shares is not None:
                chosen["activation_bits"] = layers[layer.shares].activation_bits
            layers[layer.layer] = LayerBits(layer.layer, **chosen)
        stages = tuple(
            tuple(
                Block(
                    pick(f"stage {s} block {b} kernel", self.kernels), pick(f"stage {s} block {b} expand", self.expands)
                )
                for b in range(depth)
            )
            for s, depth in enumerate(depths)
        )
        found = Architecture(stages, pick("resolution", self.resolutions), pick("width", self.widths))
        found = self.architecture or found
        return SubnetSpec(self.network, tuple(layers.values()), None if found == Architecture() else found)

    def genes(self, spec: SubnetSpec) -> tuple[int, ...]:
        """Inverse of `from_genes`, inactive genes 0; RecipeError for a spec outside the space."""
        self.check(spec)
        values = self._values(spec)
        return tuple(gene.choices.index(values[gene.name]) if gene.name in values else 0 for gene in self.variables)

    def _present(self, depths: Sequence[int]) -> list[LayerSpace]:
        return [x for x in self.layers if x.block is None or x.block[1] < depths[x.block[0]]]

    @staticmethod
    def _values(spec: SubnetSpec) -> dict[str, Any]:
        """What `spec` chooses, by name of its active genes."""
        values: dict[str, Any] = {f"{e.layer} {f}": getattr(e, f) for e in spec.layers for f in LAYER_FIELDS}
        architecture = spec.architecture or Architecture()
        values |= {"resolution": architecture.resolution, "width": architecture.width}
        for s, stage in enumerate(architecture.stages):
            values[f"stage {s} depth"] = len(stage)
            for b, block in enumerate(stage):
                values |= {f"stage {s} block {b} kernel": block.kernel, f"stage {s} block {b} expand": block.expand}
        return values

    def check(self, spec: SubnetSpec) -> None:
        """Raise RecipeError unless `spec` lies in this space; names the field and the choices."""
        if spec.network != self.network:
            raise RecipeError(f"the spec is for network {spec.network!r}, this one is {self.network!r}")
        stages = (spec.architecture or Architecture()).stages
        if self.architecture not in (None, spec.architecture):
            raise RecipeError("the spec has another architecture than the one subnet that was trained alone")
        if self.architecture is None and len(stages) != len(self.depths):
            raise RecipeError(f"the spec has {len(stages)} elastic stages, the network {len(self.depths)}")
        values, depths = self._values(spec), [len(stage) for stage in stages]
        shape = [] if self.architecture else [*self._depth_genes, *self._shape_genes]  # no block beyond the depths
        for gene in shape:
            if gene.name in values:
                check_choice(gene.name, values[gene.name], gene.choices)
        present = self._present(depths)
        if [entry.layer for entry in spec.layers] != [layer.layer for layer in present]:
            raise RecipeError(
                f"the spec's layers are not the network's: those are {', '.join(x.layer for x in present)}"
            )
        for layer, entry in zip(present, spec.layers, strict=True):
            layer.check(entry)
            if layer.shares is not None and spec[layer.shares].activation_bits != entry.activation_bits:
                raise RecipeError(
                    f"{layer.shares} and {layer.layer} read one tensor: they need the same activation_bits"
                )

    def alone(self, spec: SubnetSpec) -> SearchSpace:
        """The space of `spec` and nothing else; RecipeError for a spec outside this one."""
        self.check(spec)
        layers = []
        for layer in self._present([len(stage) for stage in (spec.architecture or Architecture()).stages]):
            chosen: dict[str, Any] = {
                f: () if getattr(spec[layer.layer], f) is None else (getattr(spec[layer.layer], f),)
                for f in LAYER_FIELDS
            }
            layers.append(replace(layer, block=None, **chosen))
        return SearchSpace(self.network, tuple(layers), architecture=spec.architecture)

    # ---- search ----------------------------------------------------------------------------------------------------

    def sample(self, random: Random) -> SubnetSpec:
        """A spec whose every gene is drawn uniformly."""
        return self.from_genes([random.randrange(len(gene.choices)) for gene in self.variables])

    def mutate(self, spec: SubnetSpec, random: Random, probability: float) -> SubnetSpec:
        """Each active gene changes to one of its other choices with `probability`; new blocks are drawn uniformly."""
        vector = []
        for gene, value, active in zip(self.variables, self.genes(spec), self.active(spec), strict=True):
            if not active:
                value = random.randrange(len(gene.choices))  # of use only if the depth comes to reach it
            elif random.random() < probability:
                value = (value + random.randrange(1, len(gene.choices))) % len(gene.choices)
            vector.append(value)
        return self.from_genes(vector)

    def crossover(self, first: SubnetSpec, second: SubnetSpec, random: Random) -> SubnetSpec:
        """Each gene from either parent with equal chance; from the one in which it is active if that is one alone."""
        parents = [(self.genes(spec), self.active(spec)) for spec in (first, second)]
        vector = []
        for i in range(len(self.variables)):
            able = [genes[i] for genes, active in parents if active[i]] or [parents[0][0][i]]
            vector.append(random.choice(able))
        return self.from_genes(vector)

    def active(self, spec: SubnetSpec) -> tuple[bool, ...]:
        """Which genes say something about `spec`."""
        values = self._values(spec)
        return tuple(gene.name in values for gene in self.variables)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the one-hot encoding's columns, "gene=choice"."""
        return tuple(f"{gene.name}={choice}" for gene in self.variables for choice in gene.choices)

    def one_hot(self, spec: SubnetSpec) -> tuple[int, ...]:
        """0 or 1 for each of `columns`; all zero for an inactive gene."""
        found: list[int] = []
        for gene, value, active in zip(self.variables, self.genes(spec), self.active(spec), strict=True):
            found += [int(active and index == value) for index in range(len(gene.choices))]
        return tuple(found)

    # ---- JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value without what has no choices."""
        rows = [{k: v for k, v in asdict(layer).items() if v not in ((), None)} for layer in self.layers]
        rest: dict[str, Any] = {k: getattr(self, k) for k in ("depths", "kernels", "expands", "resolutions", "widths")}
        rest["architecture"] = None if self.architecture is None else self.architecture.to_json()
        value = {"network": self.network, "layers": rows} | {key: item for key, item in rest.items() if item}
        plain: dict[str, Any] = parse_json(canonical_json(value), "the search space", RecipeError)
        return plain

    @classmethod
    def from_json(cls, value: Any) -> SearchSpace:
        """Inverse of `to_json`; raises RecipeError."""
        fields = _object(value, "the search space", [field.name for field in dataclass_fields(cls)])
        try:
            rows = [LayerSpace(**{key: _tuples(item) for key, item in row.items()}) for row in fields.pop("layers")]
            if "architecture" in fields:
                fields["architecture"] = Architecture.from_json(fields["architecture"])
            return cls(layers=tuple(rows), **{key: _tuples(item) for key, item in fields.items()})
        except (KeyError, TypeError, AttributeError) as e:
            raise RecipeError(f"the search space is damaged ({e!r}): write it again") from e

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return sha256(canonical_json(self.to_json()))[:12]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
