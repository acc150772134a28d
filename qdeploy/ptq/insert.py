"""QuantizeLinear, Clip and DequantizeLinear put into the float graph: the QDQ model of one level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto, helper

from qdeploy.errors import ModelError
from qdeploy.ptq.graph import FloatGraph, limits
from qdeploy.ptq.layers import Layer
from qdeploy.ptq.place import BOUNDS, PAIRS, Placement
from qdeploy.ptq.ranges import Grid, make_grid
from qdeploy.ptq.settings import Choice
from qdeploy.ptq.weights import Quantized
from qdeploy.qdq import canonical_bytes

WIDE = 8  # bits of every activation but the inputs of layers

Widths = dict[str, set[int]]


def input_widths(placement: Placement, choices: Mapping[str, Choice], graph: FloatGraph) -> Widths:
    """The widths that each quantized activation is read at; 8 for what layers alone do not read."""
    widths: Widths = {name: set() for name in placement.owners}
    layers = {layer.name: layer for layer in placement.layers}
    for node in graph.nodes:
        for i, name in enumerate(node.input):
            if name in widths:
                narrow = node.name in layers and i == 0
                widths[name].add(choices[node.name].activation_bits if narrow else WIDE)
    moved = {owner for name, owner in placement.owners.items() if name != owner}
    for name in widths:
        if name in graph.output_names or name == graph.input or placement.owners[name] != name or name in moved:
            widths[name].add(WIDE)
    return {name: found or {WIDE} for name, found in widths.items()}


class _Writer:
    """Nodes and arrays of the QDQ graph while it grows."""

    def __init__(self, graph: FloatGraph, placement: Placement, grids: Mapping[tuple[str, int], Grid]) -> None:
        self.graph, self.placement, self.grids = graph, placement, grids
        self.nodes: list[NodeProto] = []
        self.arrays = dict(graph.arrays)
        self.real: dict[tuple[str, int], str] = {}  # (activation, width) -> its dequantized value
        self.renamed: dict[str, str] = {}  # output of the network -> the float value before its quantizer

    def store(self, name: str, array: np.ndarray) -> str:
        if name in self.arrays or name in self.graph.floats:
            raise ModelError(f"a tensor of the model is called {name}, which quantizing needs: rename it")
        self.arrays[name] = array
        return name

    def quantize(self, name: str, widths: set[int]) -> None:
        """Quantizers of activation `name` behind the node that makes it; narrower ones read its 8-bit codes."""
        owner = self.placement.owners[name]
        value = self.renamed.get(name, name)
        for bits in sorted(widths, reverse=True):
            made = self._pair(name, owner, bits, value, "" if bits == max(widths) else f".{bits}")
            self.real[name, bits] = made
            value = self.real[name, max(widths)]

    def _pair(self, name: str, owner: str, bits: int, value: str, suffix: str) -> str:
        """QuantizeLinear -> [Clip] -> DequantizeLinear; returns the dequantized value."""
        grid = self.grids[owner, bits]
        base = f"{owner}{suffix}"
        if f"{base}.scale" not in self.arrays:
            self.store(f"{base}.scale", np.array(grid.scale, np.float32))
            self.store(f"{base}.zero_point", np.array(grid.zero_point, grid.dtype))
        parameters = [f"{base}.scale", f"{base}.zero_point"]
        codes, out = f"{name}{suffix}.codes", f"{name}{suffix}.values"
        if name in self.graph.output_names and not suffix:
            out = name
        self.node("QuantizeLinear", [value, *parameters], codes, f"{name}{suffix}.quantize")
        whole = np.iinfo(grid.dtype)
        if (grid.lo, grid.hi) != (whole.min, whole.max):
            if f"{base}.clip_min" not in self.arrays:
                self.store(f"{base}.clip_min", np.array(grid.lo, grid.dtype))
                self.store(f"{base}.clip_max", np.array(grid.hi, grid.dtype))
            bounds = [f"{base}.clip_min", f"{base}.clip_max"]
            clipped = self.node("Clip", [codes, *bounds], f"{codes}.clipped", f"{name}{suffix}.clip")
            codes = clipped
        return self.node("DequantizeLinear", [codes, *parameters], out, f"{name}{suffix}.dequantize")

    def node(self, op: str, inputs: list[str], output: str, name: str, axis: int | None = None) -> str:
        made = helper.make_node(op, inputs, [output], name)
        if axis is not None:
            made.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(made)
        return output

    def weight(self, layer: Layer, quantized: Quantized) -> str:
        """The weight behind its DequantizeLinear."""
        codes = self.store(f"{layer.name}.weight", quantized.codes)
        parameters = [
            self.store(f"{layer.name}.weight_scale", quantized.scale),
            self.store(f"{layer.name}.weight_zero_point", quantized.zero_point),
        ]
        axis = layer.axis if quantized.scale.ndim else None
        return self.node(
            "DequantizeLinear", [codes, *parameters], f"{codes}.values", f"{layer.name}.weight.dequantize", axis
        )

    def bias(self, layer: Layer, bias: np.ndarray, unit: np.ndarray) -> str:
        """The int32 bias in units of input x weight scale behind its DequantizeLinear; ModelError if too large."""
        real = np.rint(bias.astype(np.float64) / unit)
        if not np.all(np.abs(real) <= np.iinfo(np.int32).max):
            raise ModelError(
                f"layer {layer.name}: a bias does not fit int32 beside such small weights: leave it in float"
            )
        codes = real.astype(np.int32)
        names = [self.store(f"{layer.name}.bias", codes), self.store(f"{layer.name}.bias_scale", unit)]
        return self.node(
            "DequantizeLinear", names, f"{layer.name}.bias.values", f"{layer.name}.bias.dequantize",
            0 if unit.ndim else None,
        )  # fmt: skip


def insert(
    graph: FloatGraph,
    placement: Placement,
    choices: Mapping[str, Choice],
    grids: Mapping[tuple[str, int], Grid],
    weights: Mapping[str, Quantized],
) -> bytes:
    """The canonical QDQ ONNX file; `grids` by (owner activation, width), `weights` by layer.

    Levels of a ladder get files of equal length that differ in codes, scales and biases alone. Raises ModelError when a
    name is taken.
    """
    writer = _Writer(graph, placement, grids)
    widths = input_widths(placement, choices, graph)
    layers = {layer.name: layer for layer in placement.layers}
    adds = {layer.adds: layer for layer in placement.layers if layer.adds}
    outputs = set(graph.output_names)
    writer.renamed = {name: f"{name}.float" for name in placement.owners if name in outputs}
    if graph.input in placement.owners:
        writer.quantize(graph.input, widths[graph.input])
    redundant = _redundant_bounds(graph, placement, grids, widths)
    for node in graph.nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(copy.input):
            bits = choices[node.name].activation_bits if node.name in layers and i == 0 else WIDE
            copy.input[i] = writer.real.get((name, bits), name)
        for i, name in enumerate(copy.output):
            copy.output[i] = writer.renamed.get(name, name)
        if node.name in layers:
            _put_layer(writer, layers[node.name], copy, choices, weights[node.name])
        elif node.name in adds:
            layer = adds[node.name]
            place = next(i for i, name in enumerate(node.input) if name == layer.bias)
            copy.input[place] = f"{layer.name}.bias.values"
            writer.nodes.append(copy)
        elif node.name in redundant:
            writer.renamed[node.output[0]] = copy.input[0]
        elif node.name not in placement.quantized:
            writer.nodes.append(copy)
        else:
            _store_constants(writer, copy)
            writer.nodes.append(copy)
        for name in node.output:
            if name in placement.owners:
                writer.quantize(name, widths[name])
    return _model(graph, writer)


def _redundant_bounds(
    graph: FloatGraph, placement: Placement, grids: Mapping[tuple[str, int], Grid], widths: Widths
) -> set[str]:
    """Names of the Relus and Clips that the quantizer behind them does anyway: its end codes lie inside."""
    found = set()
    for node in graph.nodes:
        name = node.output[0]
        if node.op_type not in BOUNDS or node.input[0] not in placement.inside or name not in placement.owners:
            continue
        grid = grids[placement.owners[name], max(widths[name])]
        low, high = limits(graph, node)
        ends = [float(np.clip(np.rint(end / grid.scale) + grid.zero_point, grid.lo, grid.hi)) for end in (low, high)]
        if ends == [grid.lo, grid.hi] and name not in graph.output_names:
            found.add(node.name)
    return found


def _put_layer(
    writer: _Writer, layer: Layer, node: NodeProto, choices: Mapping[str, Choice], quantized: Quantized
) -> None:
    """A layer with its weight and bias behind DequantizeLinear."""
    grid = writer.grids[writer.placement.owners[layer.input], choices[layer.name].activation_bits]
    node.input[1] = writer.weight(layer, quantized)
    if quantized.bias is not None:
        value = writer.bias(layer, quantized.bias, np.asarray(np.float32(grid.scale) * quantized.scale))
        if layer.adds is None:
            node.input[2] = value
    writer.nodes.append(node)


def _store_constants(writer: _Writer, node: NodeProto) -> None:
    """Stored operands of a sum or product become 8-bit codes; single numbers stay."""
    for i, name in enumerate(node.input):
        array = writer.graph.arrays.get(name)
        if node.op_type not in PAIRS or array is None or array.size == 1:
            continue
        grid = make_grid(float(array.min()), float(array.max()), WIDE, "asymmetric")
        codes = np.clip(np.rint(array / grid.scale) + grid.zero_point, grid.lo, grid.hi).astype(np.uint8)
        base = f"{node.name}.constant{i}"
        names = [
            writer.store(base, codes),
            writer.store(f"{base}.scale", np.array(grid.scale, np.float32)),
            writer.store(f"{base}.zero_point", np.array(grid.zero_point, np.uint8)),
        ]
        node.input[i] = writer.node("DequantizeLinear", names, f"{base}.values", f"{base}.dequantize")


def _model(graph: FloatGraph, writer: _Writer) -> bytes:
    made = FloatGraph(
        writer.nodes, writer.arrays, graph.input, graph.shape, graph.outputs, graph.opset, graph.domains,
        graph.ir_version, {},
    )  # fmt: skip
    return canonical_bytes(made.model())
