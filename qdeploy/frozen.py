"""FrozenNet: one subnet as integers, without torch. The hand-over from training to export.

A folder with three files:

* `frozen.json`          graph, quantizers, spec, accuracy (canonical JSON)
* `tensors.safetensors`  per conv/linear node: `NODE.weight` int8 [O, I/groups, kh, kw] or [O, I] container codes,
                         `NODE.weight_scale` float32 [O], `NODE.bias` int32 [O] in units of s_input * weight_scale[o],
                         `NODE.weight_zero_point` int8 scalar where weights are asymmetric
* `golden.safetensors`   uint8 codes of every activation tensor, [n, ...], for n real images, input included

Activations are uint8 codes: real value = (code - zero_point) * scale. Convolutions and linear layers read their input
tensor's codes, accumulate in int32 and requantize into their output tensor's quantizer; docs/integers.md defines the
arithmetic and `qdeploy.integer` is its reference. Every tensor has one quantizer; a `requantize` node makes a second
tensor of other width from one that already exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qdeploy.errors import ModelError, RecipeError
from qdeploy.files import canonical_json, new_folder, parse_json, read_bytes, sha256, write_atomic
from qdeploy.space import SubnetSpec

FORMAT = "qdeploy-frozen/1"

# operator -> its attributes and how many whole numbers each holds; padding is top, left, bottom, right
OPERATORS: dict[str, dict[str, int]] = {
    "conv": {"stride": 2, "padding": 4, "dilation": 2, "groups": 1},
    "linear": {},
    "add": {},
    "mul": {},  # the second input is a tensor of the same shape or [C, 1, 1]
    "hard_swish": {},
    "hard_sigmoid": {},
    "max_pool": {"kernel": 2, "stride": 2, "padding": 4},
    "global_average_pool": {},  # [C, H, W] -> [C, 1, 1]
    "flatten": {},
    "requantize": {},
}
TWO_INPUTS = ("add", "mul")
KEEPS_CODES = ("max_pool", "flatten")  # output quantizer = input quantizer


@dataclass(frozen=True)
class Quantizer:
    """uint8 quantizer of one activation tensor: code = clamp(round_half_even(x / scale) + zero_point, lo, hi).

    `scale` is exactly a float32 value. `clip` says that the graph has an integer Clip to [lo, hi] behind this
    quantizer: it is structure, the same at every level, and without it lo = 0 and hi = 255.
    """

    scale: float
    zero_point: int
    lo: int = 0
    hi: int = 255
    clip: bool = False

    def problems(self) -> list[str]:
        """Every reason why this quantizer is illegal."""
        found = []
        if not (np.isfinite(self.scale) and self.scale > 0 and float(np.float32(self.scale)) == self.scale):
            found.append(f"scale {self.scale!r} is not a positive finite float32")
        if not 0 <= self.lo <= self.zero_point <= self.hi <= 255:
            found.append(f"codes need 0 <= lo {self.lo} <= zero point {self.zero_point} <= hi {self.hi} <= 255")
        if not self.clip and (self.lo, self.hi) != (0, 255):
            found.append(f"range {self.lo}..{self.hi} without a Clip")
        return found


@dataclass(frozen=True)
class Tensor:
    """An activation tensor: its name, its shape without the batch axis, its quantizer."""

    name: str
    shape: tuple[int, ...]
    quantizer: Quantizer


@dataclass(frozen=True)
class Node:
    """One operator. `relu` says that a Relu stands between it and its output's quantizer."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    relu: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightBits:
    """Where a node's weight codes stand on the common grid: width now, width at the top, container width (D1).

    `channels`: the width of each output channel where they differ; `bits` and `top` are then the greatest. A channel of
    w bits stands on a grid of its own, multiples of 2^(container - w).
    """

    bits: int
    top: int
    container: int
    channels: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `channels` is left out where there are none."""
        whole: dict[str, Any] = {"bits": self.bits, "top": self.top, "container": self.container}
        return whole if self.channels is None else whole | {"channels": list(self.channels)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> WeightBits:
        """Inverse of `to_json`; raises KeyError or TypeError."""
        channels = row.get("channels")
        known = {key: row[key] for key in ("bits", "top", "container")}
        return cls(**known, channels=None if channels is None else tuple(int(width) for width in channels))

    def problems(self, weight: np.ndarray) -> list[str]:
        """Why `channels` is not that of an int8 weight [O, ...]."""
        if self.channels is None:
            return []
        if len(self.channels) != len(weight) or max(self.channels) != self.bits or min(self.channels) < 0:
            return [f"channels need {len(weight)} widths, the greatest {self.bits}"]
        grid = (1 << (self.container - np.array(self.channels))).reshape(-1, *[1] * (weight.ndim - 1))
        return [] if not (weight % grid).any() else ["a channel's codes are not on the grid of its width"]


@dataclass(frozen=True)
class FrozenNet:
    """See the module's docstring. `tensors` maps names to arrays, `golden` activation names to uint8 codes [n, ...]."""

    name: str
    spec: SubnetSpec
    input: str
    output: str
    nodes: tuple[Node, ...]
    activations: Mapping[str, Tensor]
    weights: Mapping[str, WeightBits]
    tensors: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]
    report: Mapping[str, Any] = field(default_factory=dict)  # measured: accuracy, parity with the simulation

    def problems(self) -> list[str]:
        """Every breach of the format; an empty list for a legal network."""
        found: list[str] = []
        known = {self.input}
        for name, tensor in self.activations.items():
            found += [f"tensor {name}: {text}" for text in tensor.quantizer.problems()]
        for node in self.nodes:
            found += self._node_problems(node, known)
            known.add(node.output)
        if self.output not in known:
            found.append(f"output {self.output} is not made by any node")
        if len({len(codes) for codes in self.golden.values()}) > 1:
            found.append("golden codes are of different numbers of images")
        for name in known:
            if name not in self.activations:
                found.append(f"tensor {name} has no entry")
            elif name in self.golden:
                codes = self.golden[name]
                if codes.dtype != np.uint8 or codes.shape[1:] != self.activations[name].shape:
                    found.append(f"golden codes of {name} are not uint8 [n, {self.activations[name].shape}]")
            else:
                found.append(f"tensor {name} has no golden codes")
        return found

    def _node_problems(self, node: Node, known: set[str]) -> list[str]:
        found = []
        if node.op not in OPERATORS:
            return [f"node {node.name}: unknown operator {node.op}"]
        if set(node.attributes) != set(OPERATORS[node.op]):
            found.append(f"node {node.name}: attributes {sorted(node.attributes)} are not {sorted(OPERATORS[node.op])}")
        for key, length in OPERATORS[node.op].items():
            value = node.attributes.get(key)
            numbers = [value] if length == 1 else value
            good = isinstance(numbers, list | tuple) and len(numbers) == length
            if not (good and all(type(n) is int and n >= (0 if key == "padding" else 1) for n in numbers)):  # type: ignore[union-attr]
                found.append(f"node {node.name}: {key} is {value!r}, {length} whole numbers are needed")
        found += [f"node {node.name} reads {name} before it is made" for name in node.inputs if name not in known]
        if len(node.inputs) != (2 if node.op in TWO_INPUTS else 1):
            found.append(f"node {node.name}: {node.op} with {len(node.inputs)} inputs")
        if node.output in known:
            found.append(f"node {node.name} makes {node.output} a second time")
        if node.op in ("conv", "linear"):
            found += self._weight_problems(node)
        return found

    def _weight_problems(self, node: Node) -> list[str]:
        found = []
        weight = self.tensors.get(f"{node.name}.weight")
        ndim = 4 if node.op == "conv" else 2
        if weight is None or weight.dtype != np.int8 or weight.ndim != ndim:
            found.append(f"node {node.name}: weight is missing or not int8 of {ndim} dimensions")
        for role, dtype in (("weight_scale", np.float32), ("bias", np.int32)):
            array = self.tensors.get(f"{node.name}.{role}")
            if array is None or array.dtype != dtype or (weight is not None and array.shape != weight.shape[:1]):
                found.append(f"node {node.name}: {role} is missing or not {np.dtype(dtype)}, one for each output")
            elif role == "weight_scale" and not (np.isfinite(array) & (array > 0)).all():
                found.append(f"node {node.name}: a weight scale is not positive and finite")
        zero_point = self.tensors.get(f"{node.name}.weight_zero_point")
        if zero_point is not None and (zero_point.dtype != np.int8 or zero_point.shape != ()):
            found.append(f"node {node.name}: weight_zero_point is not an int8 scalar")
        if node.name not in self.weights:
            found.append(f"node {node.name}: no weight bits")
        elif self.weights[node.name].bits != next(
            (e.weight_bits for e in self.spec.layers if e.layer == node.name), None
        ):
            found.append(f"node {node.name}: its weight bits are not those of the spec")
        elif weight is not None and weight.ndim:
            found += [f"node {node.name}: {text}" for text in self.weights[node.name].problems(weight)]
        return found

    def check(self) -> FrozenNet:
        """Return self, or raise ModelError with every problem."""
        if found := self.problems():
            raise ModelError("the frozen network is illegal: " + "; ".join(found))
        return self


def save_frozen(net: FrozenNet, folder: Path, force: bool = False) -> None:
    """Write the three files as a whole or not at all."""
    net.check()
    tensors = save_tensors({k: np.asarray(v, order="C") for k, v in sorted(net.tensors.items())})
    golden = save_tensors({k: np.ascontiguousarray(v) for k, v in sorted(net.golden.items())})
    head = {
        "format": FORMAT,
        "name": net.name,
        "spec": net.spec.to_json(),
        "input": net.input,
        "output": net.output,
        "nodes": [asdict(node) | {"attributes": dict(node.attributes)} for node in net.nodes],
        "activations": [asdict(tensor) for tensor in net.activations.values()],
        "weights": {name: bits.to_json() for name, bits in net.weights.items()},
        "files": {"tensors.safetensors": sha256(tensors), "golden.safetensors": sha256(golden)},
        "report": dict(net.report),
    }
    head["sha256"] = sha256(canonical_json(head))
    with new_folder(folder, force) as out:
        write_atomic(out / "tensors.safetensors", tensors)
        write_atomic(out / "golden.safetensors", golden)
        write_atomic(out / "frozen.json", canonical_json(head))


def load_frozen(folder: Path) -> FrozenNet:
    """Inverse of `save_frozen`; raises ModelError when a file is missing, damaged or edited."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a subnet folder: make one with `qdeploy subnet`")
    data = read_bytes(folder / "frozen.json", "the frozen network", ModelError)
    head = parse_json(data, str(folder / "frozen.json"), ModelError)
    try:
        if head["format"] != FORMAT:
            raise ModelError(f"{folder}: format {head['format']!r} is not {FORMAT}")
        digest = head.pop("sha256")
        if digest != sha256(canonical_json(head)):
            raise ModelError(f"{folder / 'frozen.json'} was edited or damaged: make the subnet again")
        arrays = []
        for name in ("tensors.safetensors", "golden.safetensors"):
            content = read_bytes(folder / name, "the frozen network's", ModelError)
            if sha256(content) != head["files"][name]:
                raise ModelError(f"{folder / name} does not match frozen.json: make the subnet again")
            arrays.append(load_tensors(content))
        activations = {
            row["name"]: Tensor(row["name"], tuple(row["shape"]), Quantizer(**row["quantizer"]))
            for row in head["activations"]
        }
        nodes = tuple(Node(**(row | {"inputs": tuple(row["inputs"])})) for row in head["nodes"])
        weights = {name: WeightBits.from_json(row) for name, row in head["weights"].items()}
        spec = SubnetSpec.from_json(head["spec"])
        tensors, golden = arrays
        net = FrozenNet(
            head["name"],
            spec,
            head["input"],
            head["output"],
            nodes,
            activations,
            weights,
            tensors,
            golden,
            head["report"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, RecipeError) as e:
        raise ModelError(f"{folder} is damaged ({e!r}): make the subnet again") from e
    return net.check()
