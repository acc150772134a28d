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
from qdeploy.compile.read.linear import add_bias
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Dims, Real, Refused, Result, Shape, Stored, View, three
from qdeploy.qdq import attributes

MAX_TERM = 400  # nodes, repeated ones included: kernels are written out in full

Attributes = Mapping[str, Any]


def _function(name: str) -> Callable[[Term, Attributes], Term]:
    return lambda x, a: Term(name, (x,))


def _gelu(x: Term, a: Attributes) -> Term:
    return gelu_tanh(x) if a.get("approximate", b"none") == b"tanh" else gelu(x)


def _magnitude(x: Term) -> Term:
    return Term("max", (x, Term("mul", (x, constant(-1)))))


def _selu(x: Term, alpha: float, gamma: float) -> Term:
    return Term("mul", (elu(x, alpha), constant(gamma)))


SELU = (1.67326319217681884765625, 1.05070102214813232421875)  # ONNX's defaults of alpha and gamma

FUNCTIONS = (
    "Exp", "Log", "Sqrt", "Tanh", "Sigmoid", "Erf", "Softplus", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh",
    "Cosh", "Asinh", "Acosh", "Atanh", "Floor", "Ceil", "Round", "Sign",
)  # fmt: skip
# operator -> its term over x
UNARY: dict[str, Callable[[Term, Attributes], Term]] = {
    **{name: _function(name.lower()) for name in FUNCTIONS},
    "HardSigmoid": lambda x, a: hard_sigmoid(x, a.get("alpha", 0.2), a.get("beta", 0.5)),
    "HardSwish": lambda x, a: hard_swish(x),
    "LeakyRelu": lambda x, a: leaky(x, a.get("alpha", 0.01)),
    "Elu": lambda x, a: elu(x, a.get("alpha", 1.0)),
    "Gelu": _gelu,
    "Selu": lambda x, a: _selu(x, a.get("alpha", SELU[0]), a.get("gamma", SELU[1])),
    "Softsign": lambda x, a: Term("div", (x, Term("add", (constant(1), _magnitude(x))))),
    "Mish": lambda x, a: Term("mul", (x, Term("tanh", (Term("softplus", (x,)),)))),
    "Neg": lambda x, a: Term("mul", (x, constant(-1))),
    "Abs": lambda x, a: _magnitude(x),
    "Reciprocal": lambda x, a: Term("div", (constant(1), x)),
}
BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max", "Pow": "pow", "PRelu": "",
}  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """A term and its operands; dims None: a constant, which fits any shape.

    `shape` is that of the term's tensor, whose elements in the order c, h, w are those of `dims`.
    """

    term: Term
    operands: tuple[Operand, ...] = ()
    shape: Shape = (1, 1, 1)
    dims: Dims | None = None
    view: View | None = None  # where the term is nothing else


def _formula(reader: Reader, name: str) -> Formula:
    """An activation or a scalar of the file; raises Refused."""
    value = reader.values.get(name)
    if isinstance(value, View):
        return Formula(operand(0), (value.operand,), reader.shape_of(value), value.dims, value)
    if isinstance(value, Result) and value.op.term is not None:
        return Formula(cut(value.op.term, value.low, value.high), value.op.inputs, value.shape, value.dims)
    if isinstance(value, Result):
        raise Refused(f"input {name} of {value.op.name} is not quantized: put QuantizeLinear behind it")
    if isinstance(value, Real):
        raise Refused(f"input {name} is float: put QuantizeLinear and DequantizeLinear before it")
    stored = reader.arrays.get(name)
    if stored is None:
        raise Refused(f"input {name} is not an activation: put QuantizeLinear and DequantizeLinear before it")
    if stored.size != 1 or stored.dtype != np.float32 or not np.isfinite(stored).all():
        raise Refused(f"constant {name} is {stored.dtype} {list(stored.shape)}: store it behind DequantizeLinear")
    return Formula(constant(float(stored.reshape(()))))


def _stored(reader: Reader, name: str, value: Stored) -> Formula:
    """A tensor behind DequantizeLinear beside an activation; its codes become a tensor of the graph."""
    if value.clipped or value.turned:
        raise Refused(f"constant {value.codes} is not plain codes behind DequantizeLinear: store its codes")
    if value.real:
        codes = reader.real(value.codes, "constant")
    else:
        codes = reader.param(value.codes, (np.uint8, np.int8), "constant")
    stored = reader.arrays[codes]
    kind = stored.dtype
    if value.real:  # ONNX's default is uint8
        kind = np.dtype(np.uint8) if value.zero_point is None else reader.arrays[value.zero_point].dtype
    grid = Quantizer(reader.scalar(value.scale, (np.float32,), "scale"), None, kind == np.int8)
    if value.zero_point is not None:
        reader.scalar(value.zero_point, (np.uint8, np.int8) if value.real else (kind.type,), "zero point")
        grid = replace(grid, zero_point=value.zero_point)
    elif grid.signed:
        raise Refused(f"constant {codes} is int8 without a zero point: give it one")
    if name not in reader.tensors:
        reader.emit(Op("constant", name, (), name, stored=codes), Tensor(name, three(stored.shape), grid))
    view = View(Operand(name, grid), stored.shape)
    return Formula(operand(0), (view.operand,), reader.tensors[name].shape, stored.shape, view)


def _formulas(reader: Reader, node: NodeProto) -> list[Formula]:
    found = []
    for name in node.input:
        value = reader.values.get(name)
        found.append(_stored(reader, name, value) if isinstance(value, Stored) else _formula(reader, name))
    if not any(isinstance(reader.values.get(name), View | Result) for name in node.input):
        raise Refused("none of its inputs is an activation")
    rank = max(len(formula.dims) for formula in found if formula.dims is not None)
    for name, formula in zip(node.input, found, strict=True):
        if formula.dims is None and reader.arrays[name].ndim > rank:
            raise Refused(f"constant {name} {list(reader.arrays[name].shape)} has more axes than the activations")
    if sum(formula.term.size() for formula in found) > MAX_TERM:
        raise Refused("it ends a chain of too many operators: put QuantizeLinear and DequantizeLinear between them")
    return found


def _joined(reader: Reader, formulas: list[Formula], make: Callable[[list[Term]], Term]) -> Formula:
    """One term over the operands of all; raises Refused where shapes do not broadcast."""
    formulas, shape, dims = _aligned(reader, formulas)
    operands: list[Operand] = []
    terms: list[Term] = []
    for formula in formulas:
        for one in formula.operands:
            if one not in operands:
                operands.append(one)
        terms.append(formula.term.moved([operands.index(one) for one in formula.operands]))
    return Formula(make(terms), tuple(operands), shape, dims)


def _aligned(reader: Reader, formulas: list[Formula]) -> tuple[list[Formula], Shape, Dims]:
    """The same formulas over tensors whose shapes broadcast as the file's do, and the result's shape in both.

    Where shapes differ, every operand becomes a tensor of shape three(its dims, led by ones to the greatest rank).
    """
    known = [(f.dims, f.shape) for f in formulas if f.dims is not None]
    listed = " and ".join(str(list(dims)) for dims, _ in known)
    if len(set(known)) == 1:
        return formulas, known[0][1], known[0][0]
    rank = max(len(dims) for dims, _ in known)
    try:
        whole = np.broadcast_shapes(*(dims for dims, _ in known))
    except ValueError:
        raise Refused(f"{listed} do not broadcast") from None
    if rank > 4 or (rank > 1 and whole[0] != 1):
        raise Refused(f"{list(whole)} has more axes than C, H, W")
    found = []
    for formula in formulas:
        if formula.dims is not None:
            dims = (1,) * (rank - len(formula.dims)) + formula.dims
            if formula.view is not None:
                view = reader.shaped(replace(formula.view, dims=dims))
                formula = replace(formula, operands=(view.operand,), shape=three(dims))
            elif formula.shape != three(dims):
                raise Refused(f"it joins {listed} before they are quantized")
        found.append(formula)
    return found, three(whole), whole


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
    assert formula.dims is not None
    kind = _kind(formula.term, len(formula.operands))
    reader.put(node, Op(kind, "", formula.operands, "", term=formula.term), formula.shape, formula.dims)


def unary(reader: Reader, node: NodeProto) -> None:
    """An operator of UNARY."""
    a = attributes(node)
    formula = _formula(reader, node.input[0])
    if formula.dims is None:
        raise Refused("its input is no activation")
    _put(reader, node, replace(formula, term=UNARY[node.op_type](formula.term, a)))


def binary(reader: Reader, node: NodeProto) -> None:
    """An operator of BINARY, with broadcasting over [C, H, W]; Min and Max take any number of inputs."""
    if node.op_type == "Add" and add_bias(reader, node):
        return
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
        joined = _joined(reader, formulas, lambda terms: reduce(lambda a, b: Term(op, (a, b)), terms))
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
        value = Result(op, reader.shape_of(value), value.dims)
    if not isinstance(value, Result):
        name = node.input[0]
        raise Refused(f"input {name} is not an activation: put QuantizeLinear and DequantizeLinear before it")
    lows = [b for b in (value.low, low) if b is not None]
    highs = [b for b in (value.high, high) if b is not None]
    if lows and highs and max(lows) > min(highs):
        raise Refused("its bounds leave nothing")
    reader.values[node.output[0]] = replace(value, low=max(lows, default=None), high=min(highs, default=None))
