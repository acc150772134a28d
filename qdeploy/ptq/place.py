"""Where quantizers go: which activations become codes, which operators stay in float and why.

The rules follow what ONNX Runtime fuses and what `qdeploy compile` reads:

* every input and output of a layer, sum, product or pool is quantized; the network's output too;
* a Relu or Clip behind such an operator, with no other reader between, belongs to it;
* what only moves codes (MaxPool, Reshape, ...) keeps its input's quantizer;
* operators that together are a function of one activation (a spelled-out HardSwish or Gelu) have no quantizer between
  them: they become one table. x * Sigmoid(x) has one, because ONNX Runtime has integer kernels for both parts;
* everything else reads and writes float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto

from qdeploy.ptq.graph import FloatGraph
from qdeploy.ptq.layers import OPERATORS, Layer, read_layer
from qdeploy.qdq import attributes

MOVES = (
    "MaxPool", "GlobalMaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Identity",
    "Dropout", "DepthToSpace", "SpaceToDepth", "Gather", "Pad", "Resize", "Expand",
)  # fmt: skip
BOUNDS = ("Relu", "Clip")
FUNCTIONS = (
    "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "Mish", "Softplus",
    "Softsign", "Erf", "Exp", "Log", "Sqrt", "Neg", "Abs", "Reciprocal", "Pow",
)  # fmt: skip
PAIRS = ("Add", "Sub", "Mul", "Div", "Min", "Max")
POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Softmax")
ELEMENTWISE = (*BOUNDS, *FUNCTIONS, *PAIRS)
WITH_KERNELS = {"Sigmoid", "Mul"}  # a function of these alone has ONNX Runtime's integer kernels


@dataclass
class Placement:
    """layers: what is quantized with stored weights, in graph order. owners: quantized activation -> the one whose
    scale and zero point it has. inside: values without a quantizer between quantized operators. quantized: names of the
    quantized nodes. floats: (operator, name, reason) of each node that stays in float.
    """

    layers: list[Layer] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    quantized: set[str] = field(default_factory=set)
    floats: list[tuple[str, str, str]] = field(default_factory=list)


def place(graph: FloatGraph, excluded: frozenset[str] = frozenset()) -> Placement:
    """Decide for every node and activation; layers named in `excluded` stay in float."""
    found = Placement()
    sources = _sources(graph)
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        kind, reason = _kind(graph, node, sources)
        if node.op_type in OPERATORS and not node.domain:
            layer = read_layer(graph, node)
            kind, reason = ("layer", "") if isinstance(layer, Layer) else ("float", layer)
            if node.name in excluded:
                kind, reason = "float", "the settings leave it in float"
            elif isinstance(layer, Layer):
                found.layers.append(layer)
        kinds[node.name] = kind
        if kind == "float":
            found.floats.append((node.op_type, node.name, reason))
    _join_biases(graph, found, kinds)
    _inside(graph, found, kinds, sources)
    _owners(graph, found, kinds)
    _label_edges(found)
    return found


# Kinds of nodes ------------------------------------------------------------------------------------------------------


def _kind(graph: FloatGraph, node: NodeProto, sources: dict[str, str | None]) -> tuple[str, str]:
    """("move", "math" or "float", why it is float)."""
    op, a = node.op_type, attributes(node)
    activations = [name for name in node.input if name in graph.floats]
    if node.domain not in ("", "ai.onnx"):
        return "float", f"operator of domain {node.domain}"
    if not activations or any(name and name not in graph.floats for name in node.output):
        return "float", "it does not make float32 activations of fixed shape"
    if op in MOVES:
        return _moves(graph, node, a)
    if op == "PRelu" and graph.arrays.get(node.input[1], np.zeros(0)).size != 1:
        return "float", "its slope differs between channels"
    if op in BOUNDS or op in FUNCTIONS:
        return ("math", "") if len(activations) == 1 else ("float", "its parameters are computed")
    if op in PAIRS:
        known = op in ("Add", "Mul", "Sub", "Min", "Max") or sources.get(node.output[0]) is not None
        return ("math", "") if known else ("float", "division of activations has no integer kernel")
    if op == "Softmax":
        last = node.output[0] in graph.output_names
        return ("float", "probabilities at the network's output stay as they are") if last else ("math", "")
    if op == "ReduceMean":
        axes = graph.arrays[node.input[1]].tolist() if len(node.input) > 1 and node.input[1] else a.get("axes")
        rank = len(graph.floats[node.input[0]])
        over = axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))
        return ("math", "") if over else ("float", "only the mean over height and width has an integer kernel")
    if op == "Concat":
        stored = any(name in graph.arrays for name in node.input)
        return ("float", "it joins stored numbers to activations") if stored else ("math", "")
    return ("math", "") if op in POOLS else ("float", "operator without an integer kernel")


def _moves(graph: FloatGraph, node: NodeProto, a: dict[str, object]) -> tuple[str, str]:
    if len(node.output) > 1 and node.op_type != "Split":
        return "float", "its second output is not a float32 activation"
    if node.op_type == "Resize" and a.get("mode", b"nearest") != b"nearest":
        return "float", "only the nearest pixel has an integer kernel"
    if node.op_type == "Pad":
        fill = graph.arrays.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        plain = a.get("mode", b"constant") == b"constant" and (fill is None or not fill.any())
        return ("move", "") if plain else ("float", "only padding with 0 has an integer kernel")
    return "move", ""


def _sources(graph: FloatGraph) -> dict[str, str | None]:
    """Output of an element-wise node -> the one activation that it is a function of, None for several."""
    found: dict[str, str | None] = {}
    readers, outputs = graph.readers(), set(graph.output_names)
    for node in graph.nodes:
        if node.op_type not in ELEMENTWISE or node.domain or node.output[0] not in graph.floats:
            continue
        first = node.input[0]
        if node.op_type in BOUNDS and found.get(first) is None and len(readers[first]) == 1 and first not in outputs:
            found[node.output[0]] = None  # it belongs to the operator before it
            continue
        inputs = [name for name in node.input if name and name not in graph.arrays]
        scalar = all(graph.arrays[name].size == 1 for name in node.input if name in graph.arrays)
        bases = {found.get(name) or name for name in inputs}
        found[node.output[0]] = bases.pop() if len(bases) == 1 and scalar else None
    return found


def _join_biases(graph: FloatGraph, found: Placement, kinds: dict[str, str]) -> None:
    """A MatMul and the Add of a stored [O] behind it are one layer."""
    readers = graph.readers()
    for i, layer in enumerate(found.layers):
        after = readers.get(_output(graph, layer), [])
        if layer.op != "MatMul" or len(after) != 1 or after[0].op_type != "Add":
            continue
        add = after[0]
        stored = next((name for name in add.input if name in graph.arrays), None)
        if stored is not None and graph.arrays[stored].shape == (graph.arrays[layer.weight].shape[1],):
            found.layers[i] = replace(layer, bias=stored, adds=add.name)
            found.inside.add(_output(graph, layer))
            kinds[add.name] = "layer"


def _output(graph: FloatGraph, layer: Layer) -> str:
    return str(next(node.output[0] for node in graph.nodes if node.name == layer.name))


def _label_edges(found: Placement) -> None:
    """The kind of the first and of the last layer."""
    for place, kind in ((-1, "last"), (0, "first")):
        if found.layers:
            found.layers[place] = replace(found.layers[place], kind=kind)


# Values --------------------------------------------------------------------------------------------------------------


def _inside(graph: FloatGraph, found: Placement, kinds: dict[str, str], sources: dict[str, str | None]) -> None:
    """Values that get no quantizer because one reader continues the operator that makes them."""
    makers, readers = graph.makers(), graph.readers()
    outputs = set(graph.output_names)
    functions: dict[str, set[str]] = {}  # activation -> the operators of its functions
    for value, source in sources.items():
        if source is not None:
            functions.setdefault(source, set()).add(makers[value].op_type)
    for value, maker in makers.items():
        after = readers.get(value, [])
        if not after or value in outputs or any(kinds[node.name] not in ("math", "layer") for node in after):
            continue
        bound = len(after) == 1 and after[0].op_type in BOUNDS and kinds[after[0].name] == "math"
        if bound and kinds[maker.name] in ("layer", "math") and maker.op_type != "Concat":
            found.inside.add(value)
            continue
        source = sources.get(value)
        if source is None or any(sources.get(node.output[0]) != source for node in after):
            continue
        if not functions[source] <= WITH_KERNELS:
            found.inside.add(value)


def _owners(graph: FloatGraph, found: Placement, kinds: dict[str, str]) -> None:
    """Fill `owners` and `quantized`; a move between float operators stays in float."""
    readers = graph.readers()
    wanted: dict[str, bool] = {}
    for node in reversed(graph.nodes):
        wants = kinds[node.name] in ("layer", "math")
        passes = kinds[node.name] == "move" and any(wanted.get(name, False) for name in node.output)
        for i, name in enumerate(node.input):
            if name in graph.floats and (wants or (passes and i == 0)):
                wanted[name] = True
    if wanted.get(graph.input):
        found.owners[graph.input] = graph.input
    for node in graph.nodes:
        kind = kinds[node.name]
        if kind == "move" and node.input[0] in found.owners:
            found.owners |= {name: found.owners[node.input[0]] for name in node.output if name in readers or
                             name in graph.output_names}  # fmt: skip
            found.quantized.add(node.name)
        elif kind in ("layer", "math"):
            found.owners |= {name: name for name in node.output if name and name not in found.inside}
            found.quantized.add(node.name)
        else:
            found.owners |= {name: name for name in node.output if wanted.get(name)}
            if kind == "move":
                found.floats.append((node.op_type, node.name, "what it moves is float"))
