"""Element-wise operators: chains of them become one term over the activations that they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from onnx import NodeProto

from qdeploy.compile.expression import (
    Term,
    constant,
    cut,
    elu,
    gelu,
    gelu_tanh,
    hard_sigmoid,
    hard_swish,
    leaky,
    operand,
)  # fmt: skip
from qdeploy.compile.graph import Op, Operand, Quantizer, Tensor
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, Result, Shape, Stored, View
from qdeploy.qdq import attributes

MAX_TERM = 400  # nodes, repeated ones included: kernels are written out in full

Attributes = Mapping[str, Any]


def _function(name: str) -> Callable[[Term, Attributes], Term]:
    return lambda x, a: Term(name, (x,))


def _gelu(x: Term, a: Attributes) -> Term:
    return gelu_tanh(x) if a.get("approximate", b"none") == b"tanh" else gelu(x)


# operator -> its term over x
UNARY: dict[str, Callable[[Term, Attributes], Term]] = {
    **{name: _function(name.lower()) for name in ("Exp", "Log", "Sqrt", "Tanh", "Sigmoid", "Erf", "Softplus")},
    "HardSigmoid": lambda x, a: hard_sigmoid(x, a.get("alpha", 0.2), a.get("beta", 0.5)),
    "HardSwish": lambda x, a: hard_swish(x),
    "LeakyRelu": lambda x, a: leaky(x, a.get("alpha", 0.01)),
    "Elu": lambda x, a: elu(x, a.get("alpha", 1.0)),
    "Gelu": _gelu,
    "Mish": lambda x, a: Term("mul", (x, Term("tanh", (Term("softplus", (x,)),)))),
    "Neg": lambda x, a: Term("mul", (x, constant(-1))),
    "Abs": lambda x, a: Term("max", (x, Term("mul", (x, constant(-1))))),
    "Reciprocal": lambda x, a: Term("div", (constant(1), x)),
}
BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max", "Pow": "pow", "PRelu": "",
}  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """A term and its operands; shape None: a constant, which fits any shape."""

    term: Term
    operands: tuple[Operand, ...] = ()
    shape: Shape | None = None
    flat: bool = False


def _formula(reader: Reader, name: str) -> Formula:
    """An activation or a scalar of the file; raises Refused."""
    value = reader.values.get(name)
    if isinstance(value, View):
        return Formula(operand(0), (value.operand,), reader.shape_of(value), value.flat)
    if isinstance(value, Result) and value.op.term is not None:
        return Formula(cut(value.op.term, value.low, value.high), value.op.inputs, value.shape, value.flat)
    if isinstance(value, Result):
        raise Refused(f"input {name} of {value.op.name} is not quantized: put QuantizeLinear behind it")
    stored = reader.arrays.get(name)
    if stored is None:
        raise Refused(f"input {name} is not an activation: put QuantizeLinear and DequantizeLinear before it")
    if stored.size != 1 or stored.dtype != np.float32 or not np.isfinite(stored).all():
        raise Refused(f"constant {name} is {stored.dtype} {list(stored.shape)}: store it behind DequantizeLinear")
    return Formula(constant(float(stored.reshape(()))))


def _stored(reader: Reader, name: str, value: Stored, shape: Shape, flat: bool) -> Formula:
    """A tensor behind DequantizeLinear beside an activation of `shape`; its codes become a tensor of the graph."""
    if value.real:
        raise Refused(f"constant {value.codes} is float32 behind QuantizeLinear: store its codes")
    codes = reader.param(value.codes, (np.uint8, np.int8), "constant")
    stored = reader.arrays[codes]
    dims = stored.shape
    if stored.size == 1:
        own: Shape = (1, 1, 1)
    elif flat and stored.size == int(np.prod(shape)) and max(dims) == stored.size:
        own = shape
    elif not flat and len(dims) <= 4 and dims[:-3] in ((), (1,)):
        own = tuple((1, 1, 1, *dims)[-3:])
    else:
        raise Refused(f"constant {codes} {list(dims)} does not fit {[1, *shape]}")
    grid = Quantizer(reader.scalar(value.scale, (np.float32,), "scale"), None, stored.dtype == np.int8)
    if value.zero_point is not None:
        grid = replace(grid, zero_point=reader.scalar(value.zero_point, (stored.dtype.type,), "zero point"))
    elif grid.signed:
        raise Refused(f"constant {codes} is int8 without a zero point: give it one")
    if name not in reader.tensors:
        reader.emit(Op("constant", name, (), name, stored=codes), Tensor(name, own, grid))
    elif reader.tensors[name].shape != own:
        raise Refused(f"constant {codes} is read in two shapes: store it twice")
    return Formula(operand(0), (Operand(name, grid),), own, flat)


def _formulas(reader: Reader, node: NodeProto) -> list[Formula]:
    stored = [isinstance(reader.values.get(name), Stored) for name in node.input]
    found = [Formula(constant(0)) if s else _formula(reader, n) for n, s in zip(node.input, stored, strict=True)]
    first = next((f for f in found if f.shape is not None), None)
    if first is None or first.shape is None:
        raise Refused("none of its inputs is an activation")
    for i, name in enumerate(node.input):
        value = reader.values.get(name)
        if isinstance(value, Stored):
            found[i] = _stored(reader, name, value, first.shape, first.flat)
    return found


def _joined(formulas: list[Formula], make: Callable[[list[Term]], Term]) -> Formula:
    """One term over the operands of all; raises Refused where shapes do not broadcast."""
    operands: list[Operand] = []
    terms: list[Term] = []
    for formula in formulas:
        for one in formula.operands:
            if one not in operands:
                operands.append(one)
        terms.append(formula.term.moved([operands.index(one) for one in formula.operands]))
    known = [f for f in formulas if f.shape is not None]
    shapes = [f.shape for f in known if f.shape is not None]
    if any(f.flat != known[0].flat for f in known):
        raise Refused("it mixes [1, N] and [1, C, H, W]")
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise Refused(f"{' and '.join(str([1, *s]) for s in shapes)} do not broadcast") from None
    if known[0].flat and any(s not in (shape, (1, 1, 1)) for s in shapes):
        raise Refused(f"{' and '.join(str([1, int(np.prod(s))]) for s in shapes)} do not broadcast")
    return Formula(make(terms), tuple(operands), (shape[0], shape[1], shape[2]), known[0].flat)


def _kind(term: Term, count: int) -> str:
    if term.op == "operand":
        return "requantize"
    if count == 1:
        return "table"
    plain = term.op in ("add", "sub", "mul") and term.args == (operand(0), operand(1))
    return term.op if plain else "elementwise"


def _put(reader: Reader, node: NodeProto, formula: Formula) -> None:
    if formula.term.size() > MAX_TERM:
        raise Refused("it ends a chain of too many operators: put QuantizeLinear and DequantizeLinear between them")
    assert formula.shape is not None
    kind = _kind(formula.term, len(formula.operands))
    reader.put(node, Op(kind, "", formula.operands, "", term=formula.term), formula.shape, formula.flat)


def unary(reader: Reader, node: NodeProto) -> None:
    """An operator of UNARY."""
    a = attributes(node)
    formula = _formula(reader, node.input[0])
    if formula.shape is None:
        raise Refused("its input is no activation")
    _put(reader, node, replace(formula, term=UNARY[node.op_type](formula.term, a)))


def binary(reader: Reader, node: NodeProto) -> None:
    """An operator of BINARY, with broadcasting over [C, H, W]; Min and Max take any number of inputs."""
    formulas = _formulas(reader, node)
    op = BINARY[node.op_type]
    if node.op_type == "PRelu":
        slope = formulas[1].term
        if slope.op != "constant":
            raise Refused("only one stored slope is supported")
        _put(reader, node, replace(formulas[0], term=leaky(formulas[0].term, slope.value)))
    elif node.op_type == "Pow":
        _power(reader, node, formulas)
    elif len(formulas) == 1:
        _put(reader, node, formulas[0])
    else:
        joined = _joined(formulas, lambda terms: reduce(lambda a, b: Term(op, (a, b)), terms))
        if op == "div" and joined.term.args[1] == constant(0):
            raise Refused("it divides by 0")
        _put(reader, node, joined)


def _power(reader: Reader, node: NodeProto, formulas: list[Formula]) -> None:
    """x * x, x * x * x, or a function of x."""
    base, exponent = formulas
    if exponent.term.op != "constant":
        raise Refused("only a stored exponent is supported")
    times = exponent.term.value
    whole = {2.0: 2, 3.0: 3}.get(times)
    if whole is None:
        term = Term("pow", (base.term, constant(times)))
    else:
        term = reduce(lambda a, b: Term("mul", (a, b)), [base.term] * whole)
    _put(reader, node, replace(base, term=term))


def relu(reader: Reader, node: NodeProto) -> None:
    """A bound on what waits for its quantizer."""
    _bound(reader, node, 0.0, None)


def clip(reader: Reader, node: NodeProto) -> None:
    """A float Clip: bounds on what waits for its quantizer."""
    a = attributes(node)
    if reader.opset < 11:
        low, high = a.get("min"), a.get("max")
    else:
        low, high = (_number(reader, node, i) for i in (1, 2))
    _bound(reader, node, low, high)


def _number(reader: Reader, node: NodeProto, i: int) -> float | None:
    """A stored bound, plain or quantized; None where there is none."""
    if len(node.input) <= i or not node.input[i]:
        return None
    array = reader.arrays.get(node.input[i])
    if array is None or array.size != 1 or not np.isfinite(array).all():
        raise Refused(f"bound {node.input[i]} is not one stored finite number")
    return float(array.reshape(()))


def _bound(reader: Reader, node: NodeProto, low: float | None, high: float | None) -> None:
    value = reader.values.get(node.input[0])
    if isinstance(value, View):
        op = Op("requantize", node.name or node.output[0], (value.operand,), "", term=operand(0))
        value = Result(op, reader.shape_of(value), value.flat)
    if not isinstance(value, Result):
        name = node.input[0]
        raise Refused(f"input {name} is not an activation: put QuantizeLinear and DequantizeLinear before it")
    lows = [b for b in (value.low, low) if b is not None]
    highs = [b for b in (value.high, high) if b is not None]
    if lows and highs and max(lows) > min(highs):
        raise Refused("its bounds leave nothing")
    reader.values[node.output[0]] = replace(value, low=max(lows, default=None), high=min(highs, default=None))
