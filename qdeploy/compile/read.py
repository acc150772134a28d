"""QDQ ONNX -> integer graph. Everything that cannot become an integer kernel is refused by name, all of it at once.

HANDLERS is all that can be read; an operator's conditions stand in the module that reads it.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from qdeploy.compile import read_elementwise, read_linear, read_pools, read_shapes
from qdeploy.compile.graph import Graph
from qdeploy.compile.reader import Handler, Reader


def _clip(reader: Reader, node: NodeProto) -> None:
    """Behind a QuantizeLinear a Clip is one of codes."""
    if node.input[0] in reader.codes:
        reader.clip_codes(node)
    else:
        read_elementwise.clip(reader, node)


HANDLERS: dict[str, Handler] = {
    "QuantizeLinear": Reader.quantize,
    "DequantizeLinear": Reader.dequantize,
    "Clip": _clip,
    "Relu": read_elementwise.relu,
    "Conv": read_linear.conv,
    "Gemm": read_linear.gemm,
    "MatMul": read_linear.matmul,
    "MaxPool": read_pools.max_pool,
    "GlobalMaxPool": read_pools.global_max_pool,
    "AveragePool": read_pools.average_pool,
    "GlobalAveragePool": read_pools.global_average_pool,
    "ReduceMean": read_pools.reduce_mean,
    "Softmax": read_pools.softmax,
    "Concat": read_shapes.concat,
    "Pad": read_shapes.pad,
    "Resize": read_shapes.resize,
    "Flatten": read_shapes.flatten,
    "Reshape": read_shapes.reshape,
    "Squeeze": read_shapes.squeeze,
    "Unsqueeze": read_shapes.unsqueeze,
    "Identity": read_shapes.identity,
    "Dropout": read_shapes.identity,
    **dict.fromkeys(read_elementwise.UNARY, read_elementwise.unary),
    **dict.fromkeys(read_elementwise.BINARY, read_elementwise.binary),
}


def read_graph(model: ModelProto) -> Graph:
    """The integer graph of a canonical model; raises CompileError that lists every node which cannot be taken."""
    return Reader(model, HANDLERS).read()
