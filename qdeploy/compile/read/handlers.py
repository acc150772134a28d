"""QDQ ONNX -> integer graph. What has no integer kernel becomes float regions, each node with the reason.

HANDLERS is all that has integer kernels; an operator's conditions stand in the module that reads it.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from qdeploy.compile.graph import Graph
from qdeploy.compile.read import elementwise, linear, moves, pools, shapes
from qdeploy.compile.read.normalize import normalize
from qdeploy.compile.read.reader import Handler, Reader


def _clip(reader: Reader, node: NodeProto) -> None:
    """Behind a QuantizeLinear a Clip is one of codes."""
    if node.input[0] in reader.codes:
        reader.clip_codes(node)
    elif node.input[0] in reader.quantized or node.input[0] in reader.arrays:
        reader.clip_stored(node)
    else:
        elementwise.clip(reader, node)


HANDLERS: dict[str, Handler] = {
    "QuantizeLinear": Reader.quantize,
    "DequantizeLinear": Reader.dequantize,
    "Clip": _clip,
    "Relu": elementwise.relu,
    "Conv": linear.conv,
    "ConvTranspose": linear.conv_transpose,
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
    "Transpose": moves.transpose,
    "Slice": moves.slice_,
    "Split": moves.split,
    "Gather": moves.gather,
    "DepthToSpace": moves.depth_to_space,
    "SpaceToDepth": moves.space_to_depth,
    "Squeeze": shapes.squeeze,
    "Unsqueeze": shapes.unsqueeze,
    "Identity": shapes.identity,
    "Dropout": shapes.identity,
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    **dict.fromkeys(elementwise.BINARY, elementwise.binary),
}


def read_graph(model: ModelProto, shape: tuple[str, tuple[int, ...]] | None = None) -> Graph:
    """The integer graph of a canonical model; `shape` fixes its input's open sizes: (name, sizes with the batch).

    Raises CompileError that lists every node which can run neither in integers nor in float.
    """
    return Reader(model, normalize(model, shape), HANDLERS).read()
