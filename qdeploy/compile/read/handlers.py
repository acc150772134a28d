"""QDQ ONNX -> integer graph. Everything that cannot become an integer kernel is refused by name, all of it at once.

HANDLERS is all that can be read; an operator's conditions stand in the module that reads it.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from qdeploy.compile.graph import Graph
from qdeploy.compile.read import elementwise, linear, pools, shapes
from qdeploy.compile.read.reader import Handler, Reader


def _clip(reader: Reader, node: NodeProto) -> None:
    """Behind a QuantizeLinear a Clip is one of codes."""
    if node.input[0] in reader.codes:
        reader.clip_codes(node)
    else:
        elementwise.clip(reader, node)


HANDLERS: dict[str, Handler] = {
    "QuantizeLinear": Reader.quantize,
    "DequantizeLinear": Reader.dequantize,
    "Clip": _clip,
    "Relu": elementwise.relu,
    "Conv": linear.conv,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    "MaxPool": pools.max_pool,
    "GlobalMaxPool": pools.global_max_pool,
    "AveragePool": pools.average_pool,
    "GlobalAveragePool": pools.global_average_pool,
    "ReduceMean": pools.reduce_mean,
    "Softmax": pools.softmax,
    "Concat": shapes.concat,
    "Pad": shapes.pad,
    "Resize": shapes.resize,
    "Flatten": shapes.flatten,
    "Reshape": shapes.reshape,
    "Squeeze": shapes.squeeze,
    "Unsqueeze": shapes.unsqueeze,
    "Identity": shapes.identity,
    "Dropout": shapes.identity,
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    **dict.fromkeys(elementwise.BINARY, elementwise.binary),
}


def read_graph(model: ModelProto) -> Graph:
    """The integer graph of a canonical model; raises CompileError that lists every node which cannot be taken."""
    return Reader(model, HANDLERS).read()
