"""Several QDQ ONNX files of one graph whose weights nest: read, compare, and say how each tensor nests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from qdeploy import qdq
from qdeploy.bundle.tables import FILE_NAME, ITEM_BYTES, Initializer
from qdeploy.errors import BundleError
from qdeploy.files import parse_json, read_bytes, sha256
from qdeploy.nesting import Nested, capped, nest

SIDECAR_FORMAT = "qdeploy-model/1"
Echo = Callable[[str], None]


@dataclass(frozen=True)
class LadderLevel:
    """One precision: its name, its ONNX file's canonical bytes, and what its sidecar says."""

    name: str
    data: bytes
    golden: Mapping[str, str] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ladder:
    """Levels in fetch order, of equal length; `initializers` as in FORMAT.md; `tensors`: its entries of kind planes."""

    model: str
    graph: str
    levels: tuple[LadderLevel, ...]
    initializers: tuple[Initializer, ...]
    tensors: tuple[Nested, ...]


@dataclass(frozen=True)
class _File:
    """A level as it was read."""

    level: LadderLevel
    model: ModelProto
    ranges: dict[str, tuple[int, int]]
    title: str | None  # model name from the sidecar
    tops: Mapping[str, int]  # of each node: the width whose codes its weights are prefixes of, from the sidecar

    def raw(self, name: str) -> bytes:
        offset, length = self.ranges[name]
        return self.level.data[offset : offset + length]


def read_ladder(paths: Sequence[Path], echo: Echo | None = None) -> Ladder:
    """Read QDQ ONNX files as the levels of one ladder; a level is called as its file, without `.onnx`.

    A sidecar beside a file is used if it is there. Files of other tools are brought into canonical form first; `echo`
    says so. Raises BundleError when names clash, graphs differ or weights do not nest, ModelError when a file is no
    legal ONNX.
    """
    say = echo or (lambda text: None)
    if not paths:
        raise BundleError("a bundle needs at least one level: name one or more ONNX files")
    files = [_read_level(Path(path), say) for path in paths]
    _check_distinct(files)
    for other in files[1:]:
        _check_same_tops(files[0], other)
        _check_same_graph(files[0], other)
    initializers, tensors = _tensors(files)
    files.sort(key=lambda file: sum(tensor.levels[file.level.name].bits * tensor.u.size for tensor in tensors))
    titles = {file.title for file in files if file.title}
    if len(titles) > 1:
        raise BundleError(f"the levels are of different models: {', '.join(sorted(titles))}")
    title = titles.pop() if titles else files[-1].level.name
    graph = qdq.graph_digest(files[0].level.data)
    return Ladder(title, graph, tuple(file.level for file in files), initializers, tensors)


# --- one level -------------------------------------------------------------------------------------------------------


def _read_level(path: Path, say: Echo) -> _File:
    name = path.name.removesuffix(".onnx")
    if not FILE_NAME.fullmatch(name):
        raise BundleError(f"{path.name} gives the level name {name!r}: rename it to letters, digits, '.', '_' or '-'")
    original, model = qdq.load_model(path)
    data = qdq.canonical_bytes(model)
    if data != original:
        say(f"level {name}: {path.name} was written by another tool; the bundle's reference is its canonical form")
        model = qdq.parse_model(data, str(path))
    golden, info, title, tops = _read_sidecar(path, original)
    return _File(LadderLevel(name, data, golden, info), model, qdq.raw_data_ranges(data), title, tops)


def _read_sidecar(path: Path, model: bytes) -> tuple[dict[str, str] | None, dict[str, Any], str | None, dict[str, int]]:
    """(golden digests, spec id and accuracy, model name, top widths of nodes) from `path`.json, if it is there."""
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.exists():
        return None, {}, None, {}
    value = parse_json(read_bytes(sidecar, "the sidecar", BundleError), str(sidecar), BundleError)
    if not isinstance(value, dict) or value.get("format") != SIDECAR_FORMAT:
        raise BundleError(f"{sidecar} is not a {SIDECAR_FORMAT} sidecar: export the model again or remove it")
    if value.get("model") != sha256(model):
        raise BundleError(f"{sidecar} belongs to another file than {path.name}: export the model again or remove it")
    golden, title = value.get("golden"), value.get("name")
    keys = {"input_sha256", "output_sha256"}
    texts = isinstance(golden, dict) and set(golden) == keys and all(isinstance(v, str) for v in golden.values())
    if golden is not None and not texts:
        raise BundleError(f"{sidecar}: golden is not input_sha256 and output_sha256: export the model again")
    if not isinstance(title, str) or not isinstance(value.get("spec_id", ""), str):
        raise BundleError(f"{sidecar}: name or spec_id is missing or no text: export the model again")
    info: dict[str, Any] = {"spec_id": value["spec_id"]} if "spec_id" in value else {}
    accuracy = value.get("accuracy")
    for key, number in (accuracy if isinstance(accuracy, dict) else {"": accuracy}).items():
        if isinstance(number, int | float):
            info["accuracy." + key if key else "accuracy"] = number
    try:
        tops = {str(node): int(row["top"]) for node, row in value.get("weights", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise BundleError(f"{sidecar}: weights is damaged ({e!r}): export the model again") from e
    return golden, info, title, tops


def _check_distinct(files: Sequence[_File]) -> None:
    names: dict[str, str] = {}
    contents: dict[bytes, str] = {}
    for file in files:
        name = file.level.name
        if name in names:
            raise BundleError(f"two levels are called {name}: rename one of the files")
        if file.level.data in contents:
            raise BundleError(f"levels {contents[file.level.data]} and {name} are identical: leave one out")
        names[name] = contents[file.level.data] = name


def _check_same_tops(first: _File, other: _File) -> None:
    """Codes of different top widths stand on grids of their own: none is a prefix of the other."""
    apart = [n for n in sorted(first.tops.keys() & other.tops.keys()) if first.tops[n] != other.tops[n]]
    if apart:
        node, names = apart[0], f"{first.level.name} and {other.level.name}"
        raise BundleError(
            f"levels {names} do not nest: the weights of {node} have steps of their own at {first.tops[node]} and at "
            f"{other.tops[node]} bits (as EQ-Net learns them), so low-bit codes are no prefixes of high-bit ones; "
            "bundle each precision by itself, or train with method vertical"
        )


# --- one graph -------------------------------------------------------------------------------------------------------


def _check_same_graph(first: _File, other: _File) -> None:
    """Equal bytes outside the initializers' raw data, and inside it too unless the role is numeric."""
    where = f"levels {first.level.name} and {other.level.name} are not of one graph"
    if first.ranges != other.ranges or _outside(first) != _outside(other):
        raise BundleError(f"{where}: {_first_difference(first.model, other.model)}; export both from one network")
    roles = qdq.numeric_roles(first.model)
    for name in first.ranges:
        if name not in roles and first.raw(name) != other.raw(name):
            raise BundleError(f"{where}: initializer {name} is part of the structure and differs; export both again")


def _outside(file: _File) -> bytes:
    """The file without any raw data."""
    kept, end = [], 0
    for offset, length in file.ranges.values():
        kept.append(file.level.data[end:offset])
        end = offset + length
    return b"".join([*kept, file.level.data[end:]])


def _first_difference(first: ModelProto, other: ModelProto) -> str:
    """The first node, initializer, input or output in which two models differ, in words."""
    for a, b in zip_longest(first.graph.node, other.graph.node):
        if a is None or b is None:
            node = a if b is None else b
            return f"node {node.name or node.output[0]} ({node.op_type}) is only in one of them"
        if a != b:
            return f"node {a.name or a.output[0]}: {_node_difference(a, b)}"
    for kind in ("initializer", "input", "output"):
        ours = {entry.name: entry for entry in getattr(first.graph, kind)}
        theirs = {entry.name: entry for entry in getattr(other.graph, kind)}
        if alone := sorted(ours.keys() ^ theirs.keys()):
            return f"{kind} {alone[0]} is only in one of them"
        for a, b in ((ours[name], theirs[name]) for name in ours):
            if kind == "initializer" and (a.data_type, a.dims) != (b.data_type, b.dims):
                return f"initializer {a.name} is {_type(a)} in one and {_type(b)} in the other"
            if kind != "initializer" and a != b:
                return f"{kind} {a.name} has another type or shape"
    return "their ONNX versions differ"


def _node_difference(a: NodeProto, b: NodeProto) -> str:
    if a.op_type != b.op_type:
        return f"{a.op_type} in one, {b.op_type} in the other"
    if list(a.input) != list(b.input) or list(a.output) != list(b.output):
        return f"{a.op_type} with other inputs or outputs"
    return f"{a.op_type} with other attributes"


def _type(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)}"


# --- how it nests ----------------------------------------------------------------------------------------------------


def _tensors(files: Sequence[_File]) -> tuple[tuple[Initializer, ...], tuple[Nested, ...]]:
    """The table of initializers and the nested weight tensors, both in file order."""
    roles = qdq.numeric_roles(files[0].model)
    initializers, tensors = [], []
    for tensor in _in_file_order(files[0]):
        name, shape = tensor.name, tuple(tensor.dims)
        differs = any(file.raw(name) != files[0].raw(name) for file in files[1:])
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        if dtype not in ITEM_BYTES:
            if differs:
                raise BundleError(f"initializer {name} is {_type(tensor)} and differs between levels: not supported")
            continue  # no artifact can ask for it; it stays in the skeleton
        nested = None
        if roles.get(name) == "weight" and dtype in ("int8", "uint8") and shape and 0 not in shape:
            arrays = {file.level.name: np.frombuffer(file.raw(name), dtype).reshape(shape) for file in files}
            nested = nest(name, arrays)
        if nested is not None:
            tensors.append(capped(nested))
        kind = "planes" if nested is not None else "side" if differs else "fixed"
        initializers.append(Initializer(name, dtype, shape, files[0].ranges[name][0], kind))
    return tuple(initializers), tuple(tensors)


def _in_file_order(file: _File) -> Iterator[TensorProto]:
    by_name = {tensor.name: tensor for tensor in file.model.graph.initializer}
    return (by_name[name] for name in file.ranges)
