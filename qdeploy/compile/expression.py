"""Element-wise formulas between DequantizeLinear and QuantizeLinear, and their values in numpy.

A term is a tree of float32 operations over operands (dequantized activations) and constants. PLAIN operations round
once each and exist as kernels; FUNCTIONS have no defined rounding anywhere, so here they are float64 rounded to
float32, and only tables made at compile time may hold them (docs/adr/0006-tables.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PLAIN: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "sigmoid": _sigmoid, "pow": np.power,
    "erf": np.vectorize(math.erf, otypes=[np.float64]), "softplus": lambda x: np.logaddexp(0, x),
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "floor": np.floor, "ceil": np.ceil, "round": np.rint, "sign": np.sign,
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One node: `op` is "operand" (`value` is its index), "constant" (`value`), or a key of PLAIN or FUNCTIONS."""

    op: str
    args: tuple[Term, ...] = ()
    value: float = 0.0

    @property
    def plain(self) -> bool:
        """True when every operation rounds once and no divisor can be 0, so that a kernel can repeat it exactly."""
        if self.op in FUNCTIONS or (self.op == "div" and self.args[1].op != "constant"):
            return False
        return all(arg.plain for arg in self.args)

    def moved(self, places: Sequence[int]) -> Term:
        """The same term over other operands: operand i becomes operand places[i]."""
        if self.op == "operand":
            return operand(places[int(self.value)])
        return Term(self.op, tuple(arg.moved(places) for arg in self.args), self.value)

    def size(self) -> int:
        """Number of nodes, repeated ones included."""
        return 1 + sum(arg.size() for arg in self.args)


def operand(index: int) -> Term:
    """The real values of operand `index`."""
    return Term("operand", (), index)


def constant(value: float) -> Term:
    """A float32 constant."""
    return Term("constant", (), float(np.float32(value)))


def cut(x: Term, low: float | None, high: float | None) -> Term:
    """x cut to [low, high]."""
    if low is not None:
        x = Term("max", (x, constant(low)))
    return x if high is None else Term("min", (x, constant(high)))


def hard_sigmoid(x: Term, alpha: float, beta: float) -> Term:
    """max(0, min(1, alpha * x + beta)), the product rounded before the sum."""
    return cut(Term("add", (Term("mul", (x, constant(alpha))), constant(beta))), 0.0, 1.0)


def hard_swish(x: Term) -> Term:
    """x * hard_sigmoid(x, 1/6, 1/2)."""
    return Term("mul", (x, hard_sigmoid(x, 1 / 6, 0.5)))


def leaky(x: Term, slope: float) -> Term:
    """x where it is positive, else slope * x: one of the two summands is always 0."""
    negative = Term("mul", (Term("min", (x, constant(0))), constant(slope)))
    return Term("add", (Term("max", (x, constant(0))), negative))


def gelu(x: Term) -> Term:
    """0.5 * x * (1 + erf(x / sqrt 2))."""
    inner = Term("erf", (Term("mul", (x, constant(math.sqrt(0.5)))),))
    return Term("mul", (Term("mul", (x, constant(0.5))), Term("add", (inner, constant(1)))))


def gelu_tanh(x: Term) -> Term:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""
    cube = Term("mul", (Term("mul", (x, Term("mul", (x, x)))), constant(0.044715)))
    inner = Term("tanh", (Term("mul", (Term("add", (x, cube)), constant(math.sqrt(2 / math.pi)))),))
    return Term("mul", (Term("mul", (x, constant(0.5))), Term("add", (inner, constant(1)))))


def elu(x: Term, alpha: float) -> Term:
    """x where it is positive, else alpha * (exp(x) - 1): one of the two summands is always 0."""
    negative = Term("sub", (Term("exp", (Term("min", (x, constant(0))),)), constant(1)))
    return Term("add", (Term("max", (x, constant(0))), Term("mul", (negative, constant(alpha)))))


def evaluate(term: Term, operands: Sequence[np.ndarray]) -> np.ndarray:
    """float32 values of `term` over float32 `operands` that broadcast; infinities and NaN come out as they are."""
    if term.op == "operand":
        return operands[int(term.value)]
    if term.op == "constant":
        return np.asarray(term.value, np.float32)
    args = [evaluate(arg, operands) for arg in term.args]
    with np.errstate(all="ignore"):
        if term.op in PLAIN:
            return PLAIN[term.op](args[0], args[1])
        return FUNCTIONS[term.op](*(arg.astype(np.float64) for arg in args)).astype(np.float32)


def tabulate(term: Term, scale: float, zero_point: int) -> np.ndarray:
    """float32 [256]: `term` of every uint8 code of one grid."""
    codes = np.arange(256, dtype=np.int32) - np.int32(zero_point)
    return np.broadcast_to(evaluate(term, [codes.astype(np.float32) * np.float32(scale)]), 256)
