"""`prepare` of quantizers: one level's scale, zero point and bounds -> what kernels read.

A packed quantizer is float32 [4]: scale, zero point, lowest and highest code, all in uint8 codes (int8 ones are
shifted by 128). pack_weights.py and pack_table.py are the rest of `prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import HIGH, LOW, SCALE, ZERO, Buffer, Expr, cast, const, load, prim_func, store

SHIFT = 128  # int8 codes + 128 are uint8 codes


@dataclass(frozen=True)
class Stored:
    """dtype and shape of an initializer."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizerSpec:
    """Which parts a quantizer has."""

    scale: Stored
    zero_point: Stored | None
    clip_min: Stored | None
    clip_max: Stored | None
    low: float | None
    high: float | None


def _inputs(parts: list[tuple[str, Stored | None]]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, part.shape, part.dtype) for name, part in parts if part is not None]


def _shifted(buffer: Buffer, dtype: str, index: Expr) -> Expr:
    """A code as an unsigned one, int32."""
    return cast("int32", load(buffer, index), 1) + const(SHIFT if dtype == "int8" else 0)


def quantizer_kernel(name: str, spec: QuantizerSpec) -> tirx.PrimFunc:
    """(scale, zero point?, clip_min?, clip_max?) -> float32 [4]."""
    parts = [("scale", spec.scale), ("zero", spec.zero_point), ("least", spec.clip_min), ("most", spec.clip_max)]
    params = _inputs(parts)

    def body(*buffers: Buffer) -> None:
        given = dict(zip([p[0] for p in params], buffers, strict=False))
        dtypes = {p[0]: p[2] for p in params}
        out = buffers[-1]

        def code(part: str, default: int) -> Expr:
            if part not in given:
                return const(float(default), "float32")
            return cast("float32", _shifted(given[part], dtypes[part], const(0)), 1)

        def bounded(value: float) -> Expr:
            """The code of a real value, not yet rounded into a bound."""
            step = T.nearbyint(const(value, "float32") / load(out, const(SCALE))) + load(out, const(ZERO))
            return T.Min(T.Max(step, const(0.0, "float32")), const(255.0, "float32"))

        store(out, load(given["scale"], const(0)), const(SCALE))
        store(out, code("zero", 0), const(ZERO))
        store(out, code("least", 0), const(LOW))
        store(out, code("most", 255), const(HIGH))
        if spec.low is not None:
            store(out, T.Max(load(out, const(LOW)), bounded(spec.low)), const(LOW))
        if spec.high is not None:
            store(out, T.Min(load(out, const(HIGH)), bounded(spec.high)), const(HIGH))

    return prim_func(name, [*params, ("out", (4,), "float32")], body)
