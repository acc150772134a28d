"""Packed weights against the layouts of spec.py written in numpy: orders, types, instruction sets, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.pack import Stored
from qdeploy.compile.kernels.pack_weights import WeightSpec, weights_kernel
from qdeploy.compile.kernels.spec import TABLE_BYTES, ConvSpec
from qdeploy.compile.llvm import Dot, resolve
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import DeviceError, ModelError
from qdeploy.export.write import qdq_bytes
from qdeploy.files import canonical_json, sha256
from qdeploy.qdq import arrays, parse_model
from qdeploy.target import Target
from tests.compile.kernels import Kernels, built, exported
from tests.nets_frozen import ladder_of

DOTS = {
    "vnni": Dot("vpdpbusd", 16, 32),
    "avx_vnni": Dot("vpdpbusd", 8, 16),
    "amx": Dot("vpdpbusd", 16, 32, True),
    "avx512": Dot("pmaddwd", 16, 32),
    "avx2": Dot("pmaddwd", 8, 16),
    "portable": Dot("none", 4, 16),
}
# channels in, channels out, groups, height, width, window
SHAPES = [
    (3, 17, 1, 9, 8, Window((3, 3), (2, 2), (1, 1, 1, 1))),
    (16, 40, 1, 5, 5, Window((1, 1))),
    (5, 33, 1, 9, 9, Window((3, 3), (1, 1), (2, 2, 2, 2), (2, 2))),
    (6, 9, 1, 3, 4, Window((3, 4))),
    (12, 18, 3, 6, 6, Window((3, 3), (1, 1), (1, 1, 1, 1))),
    (68, 48, 1, 7, 20, Window((2, 1))),
    (1, 1, 1, 4, 4, Window((1, 1))),
    (20, 20, 20, 8, 9, Window((3, 3), (1, 1), (1, 1, 1, 1))),
    (89, 89, 89, 9, 9, Window((5, 5), (1, 1), (2, 2, 2, 2))),
    (108, 108, 108, 9, 9, Window((5, 3), (2, 2), (2, 1, 2, 1))),
    (33, 33, 33, 9, 9, Window((7, 7), (1, 1), (3, 3, 3, 3))),
]


def conv_of(shape: tuple, dot: Dot, **options: bool) -> ConvSpec:
    inputs, outputs, groups, height, width, window = shape
    size = window.output(height, width)
    x, y = Layout(inputs, height, width, window.padding), Layout(outputs, *size)
    return ConvSpec(x, y, window, groups, dot, **options)


@dataclass(frozen=True)
class Case:
    """One convolution's stored parts, None where the file has none, and its quantizers' scales and zero points."""

    spec: WeightSpec
    parts: tuple[np.ndarray | None, ...]
    quant_x: tuple[float, int] = (0.013, 77)
    quant: tuple[float, int] = (0.21, 3)

    def packed(self, library: Kernels, names: dict) -> tuple[np.ndarray, ...]:
        """What the kernel makes; its outputs begin as garbage."""
        conv = self.spec.conv
        outs = [
            tvm.runtime.tensor(np.full(size, 85, dtype))
            for size, dtype in (
                (conv.weight_bytes, np.int8), (2 * conv.padded + 1, np.int32), (conv.padded, np.float32)
            )
        ]  # fmt: skip
        quants = [np.array([*q, 0, 255], np.float32) for q in (self.quant_x, self.quant)]
        stored = [np.ascontiguousarray(part).reshape(-1) for part in self.parts if part is not None]
        library[names[self.spec.code]](*self.spec.sizes, *map(tvm.runtime.tensor, [*stored, *quants]), *outs)
        return tuple(out.numpy() for out in outs)


def case(conv: ConvSpec, order: str = "conv", dtype: str = "int8", each: bool = True, bias: str = "unit") -> Case:
    """Random parts. `bias`: none, real (float32), unit (in units of s_x * s_w), or own (in a unit of its own)."""
    rng = np.random.default_rng(conv.weight_bytes)
    outputs, kernel = conv.y.channels, conv.window.kernel
    shape: tuple[int, ...] = {
        "conv": (outputs, conv.inputs, *kernel),
        "matmul": (conv.inputs * prod(kernel), outputs),
        "transposed conv": (conv.x.channels, outputs // conv.groups, *kernel),
    }[order]
    count = outputs if each else 1
    scale = rng.uniform(0.01, 0.04, count).astype(np.float32)
    low = 0 if dtype == "uint8" else -128
    if conv.packed4:
        weight = rng.choice(rng.permutation(256)[:16] + low, shape)
    else:
        weight = rng.integers(low, low + 256, shape) if not conv.narrow else rng.integers(-64, 65, shape)
    zero: np.ndarray | None = rng.integers(low, low + 256, count).astype(np.int8 if low else np.uint8)
    if dtype == "float32":
        weight = rng.normal(0, 2, shape)
    if conv.narrow:
        zero = None
    unit = np.float32(Case.quant_x[0]) * np.broadcast_to(scale, outputs)
    parts: dict[str, tuple[np.ndarray | None, ...]] = {
        "none": (None, None, None),
        "real": (rng.normal(0, 1, outputs).astype(np.float32), None, None),
        "unit": (rng.integers(-30000, 30000, outputs).astype(np.int32), unit, None),
        "own": (rng.integers(-999, 999, outputs).astype(np.int32), unit[:1] * np.float32(3.3), np.array([7], np.int32)),
    }
    arrays = (weight.astype(dtype), scale, zero, *parts[bias])
    stored = [None if a is None else Stored(a.dtype.name, a.shape) for a in arrays]
    return Case(WeightSpec(conv, *stored, order, low < 0), arrays)  # type: ignore[arg-type]


def codes_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """int64 codes [groups, O / groups, I / groups, taps] in -128 .. 127, and zero points [O] in the same."""
    (stored, scale, zero, *_), conv, order = case.parts, case.spec.conv, case.spec.order
    kernel, outputs, inputs = conv.window.kernel, conv.y.channels // conv.groups, conv.inputs
    shift = 0 if case.spec.signed else 128
    zeros = np.broadcast_to(np.zeros(1) if zero is None else zero, conv.y.channels).astype(np.int64)
    if order == "matmul":
        stored = stored.T
    elif order == "transposed conv":
        stored = stored.reshape(conv.groups, inputs, outputs, *kernel).transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
    stored = stored.reshape(conv.y.channels, -1)
    if stored.dtype == np.float32:
        steps = np.rint(stored / np.broadcast_to(scale, conv.y.channels)[:, None]) + zeros[:, None]
        stored = np.clip(steps, shift - 128, shift + 127)
    codes = stored.astype(np.int64).reshape(conv.groups, outputs, inputs, -1) - shift
    return codes, zeros - shift


def places_of(conv: ConvSpec) -> np.ndarray:
    """Where each output channel stands in the per-channel arrays."""
    if not conv.by_rows:
        groups, per_group = (1, conv.y.channels) if conv.depthwise else (conv.groups, conv.outputs)
        return (np.arange(groups)[:, None] * (conv.padded // groups) + np.arange(per_group)).reshape(-1)
    found = np.zeros(conv.padded, np.int64)
    for start, n in conv.strips:
        for i in range(4 * n):
            found[start + i] = start + i % 16 // 4 * n + i // 16 * 4 + i % 4
    return found[: conv.y.channels]


def layout_of(conv: ConvSpec, codes: np.ndarray) -> np.ndarray:
    """Weights in kernel order."""
    lanes = conv.dot.lanes
    if conv.by_rows:
        flat, found = codes.reshape(conv.y.channels, -1), []
        for start, n in conv.strips:
            strip = np.zeros((len(conv.strip_taps), 4 * n, 4), np.int8)
            for i in range(min(4 * n, conv.y.channels - start)):
                place = i % 16 // 4 * n + i // 16 * 4 + i % 4
                strip[:, place] = [[0 if t is None else flat[start + i, t] for t in dot] for dot in conv.strip_taps]
            found.append(strip.reshape(-1))
        return np.concatenate(found)
    if conv.depthwise:
        out = np.zeros((conv.blocks * lanes, conv.segments), np.int8)
        out[: conv.y.channels] = codes.reshape(conv.y.channels, -1)
        return out.reshape(conv.blocks, lanes, conv.segments).swapaxes(1, 2).reshape(-1)
    groups, outputs, inputs, _ = codes.shape
    rows = codes.reshape(groups, outputs, inputs, conv.segments, conv.taps).transpose(0, 1, 3, 4, 2)
    whole = np.zeros((groups, conv.blocks * lanes, conv.segments, conv.quads * 4), np.int8)
    whole[:, :outputs, :, : conv.taps * inputs] = rows.reshape(groups, outputs, conv.segments, -1)
    vectors = whole.reshape(groups, conv.blocks, lanes, conv.segments, conv.quads, 4).transpose(0, 1, 3, 4, 2, 5)
    out = np.zeros((*vectors.shape[:4], lanes * 4), np.int8)
    for lane in range(lanes):
        for byte in range(4):
            out[..., conv.byte_place(lane, byte)] = vectors[..., lane, byte]
    return out.reshape(-1)


def check(library: Kernels, names: dict, case: Case) -> None:
    conv, (_, scale, _, bias, bias_scale, bias_zero) = case.spec.conv, case.parts
    weights, integers, out_scale = case.packed(library, names)
    (codes, zeros), at, channels = codes_of(case), places_of(conv), conv.y.channels
    if conv.packed:
        table, present = weights[:TABLE_BYTES].reshape(4, 16), np.unique(codes)
        np.testing.assert_array_equal(table[:, : len(present)], np.tile(present, (4, 1)))
        pairs = weights[TABLE_BYTES:].view(np.uint8).reshape(-1, conv.quad_pairs, 4 * conv.dot.lanes)
        both = np.stack([pairs & 15, pairs >> 4], 2).reshape(len(pairs), -1, pairs.shape[2])
        weights = table[0][both[:, : conv.quads]]
        real = layout_of(conv, np.ones_like(codes)) != 0  # a lane without a channel may hold anything
        np.testing.assert_array_equal(weights.reshape(-1)[real], layout_of(conv, codes)[real])
    else:
        np.testing.assert_array_equal(weights, layout_of(conv, codes))
    unit = np.float32(case.quant_x[0]) * np.broadcast_to(scale, channels)
    want = np.zeros(channels, np.int64)
    if bias is not None and bias_scale is None:
        want = np.rint(bias.astype(np.float64) / unit.astype(np.float64)).astype(np.int64)
    elif bias is not None:
        value = bias.astype(np.int64) - (0 if bias_zero is None else bias_zero)
        own = np.broadcast_to(bias_scale, channels)
        want = np.where(own == unit, value, np.rint(value * (own.astype(np.float64) / unit.astype(np.float64))))
    sums = (codes.reshape(channels, -1) - zeros[:, None]).sum(1)
    expected = np.zeros(2 * conv.padded + 1, np.int64)
    expected[at] = want - case.quant_x[1] * sums
    expected[conv.padded + at] = zeros
    expected[-1] = np.any(zeros)
    np.testing.assert_array_equal(integers, expected)
    scales = np.zeros(conv.padded, np.float32)
    scales[at] = unit / np.float32(case.quant[0])
    np.testing.assert_array_equal(out_scale, scales)


def cases_of() -> dict[str, list[Case]]:
    """All convolutions that are packed, by test."""
    found = {f"shapes {name}": [case(conv_of(shape, dot)) for shape in SHAPES] for name, dot in DOTS.items()}
    window, dense, grouped = (conv_of(SHAPES[i], DOTS["avx2"]) for i in (3, 2, 4))
    found["matmul"] = [
        case(window, "matmul", dtype, each) for dtype in ("int8", "uint8", "float32") for each in (True, False)
    ]
    depthwise = [conv_of(SHAPES[7], DOTS[name]) for name in ("vnni", "avx2")]
    found["transposed"] = [case(conv, "transposed conv") for conv in (dense, grouped)]
    found["transposed"] += [case(conv, "transposed conv", "uint8") for conv in depthwise]
    found["float"] = [case(conv, "conv", "float32") for conv in depthwise]
    for bias in ("none", "real", "own"):
        found[f"bias {bias}"] = [case(conv_of(SHAPES[i], DOTS["vnni"]), bias=bias) for i in (0, 4, 7)]
    for name, dot in DOTS.items():
        convs = [conv_of(SHAPES[i], dot, packed4=True) for i in (1, 3, 5)]
        found[f"packed {name}"] = [
            case(conv, dtype=dtype) for conv, dtype in zip(convs, ("int8", "uint8", "int8"), strict=True)
        ]
    found["narrow"] = [case(conv_of(SHAPES[i], DOTS["avx2"], narrow=True)) for i in (0, 7)]
    return found


CASES = cases_of()
Packers = tuple[Kernels, dict]


def packers_of(cases: Iterable[Case], load: Callable[..., Any]) -> Packers:
    """Every different kernel of `cases`: which instructions the order of weights is for does not matter here."""
    codes = dict.fromkeys(one.spec.code for one in cases)
    names = {code: f"pack{i}" for i, code in enumerate(codes)}
    functions = {name: weights_kernel(name, code) for code, name in names.items()}
    return load(functions, resolve(Target("t", "x86_64", "llvm", "x86-64")).tvm), names


@pytest.fixture(scope="module")
def packers() -> Packers:
    return packers_of((one for cases in CASES.values() for one in cases), built)


@pytest.fixture(scope="module")
def talkative() -> Packers:
    """Those that may refuse weights, with their messages."""
    few = [one for cases in CASES.values() for one in cases if one.spec.conv.packed or one.spec.conv.narrow]
    return packers_of(few, exported)


@pytest.mark.parametrize("name", CASES)
def test_layout_and_integers(packers: Packers, name: str) -> None:
    for one in CASES[name]:
        check(*packers, one)


def test_geometry_is_no_reason_for_another_kernel() -> None:
    for name in DOTS:  # only what each lane, or each dot product of a strip, holds
        assert len({one.spec.code for one in CASES[f"shapes {name}"]}) <= 7
    convs = [conv_of(SHAPES[i], DOTS["avx2"]) for i in (0, 1, 2, 3, 4, 5)]
    assert len({case(conv).spec.code for conv in convs}) == 1


def refused(packers: Packers, one: Case, weight: np.ndarray, what: str) -> None:
    with pytest.raises(Exception, match=f"the weights are not {what}"):
        replace(one, parts=(weight, *one.parts[1:])).packed(*packers)


def test_more_than_16_codes_are_refused(talkative: Packers) -> None:
    packed = [one for name in DOTS for one in CASES[f"packed {name}"] if one.spec.conv.packed]
    assert packed
    for one in packed:
        refused(talkative, one, np.resize(np.arange(17), one.parts[0].shape).astype(one.parts[0].dtype), "few")
    assert "weight w must have at most 16 different codes" in packed[0].spec.failure("w")


def test_wide_weights_are_refused_where_products_could_saturate(talkative: Packers) -> None:
    for one in CASES["narrow"]:
        for value in (65, -65, -128):
            weight = one.parts[0].copy()
            weight.reshape(-1)[-1] = value
            refused(talkative, one, weight, "narrow")
    other = replace(CASES["narrow"][0].spec, conv=conv_of(SHAPES[0], DOTS["vnni"], narrow=True))
    assert not other.code.narrow and not other.failure("w")


def test_only_an_artifact_with_its_own_level_relies_on_its_weights(tmp_path: Path) -> None:
    """Any level may follow the compiled one, unless it is packed with the code."""
    net = ladder_of(2, (2,), width=4, size=6, blocks=1)[0]
    (tmp_path / "m.onnx").write_bytes(qdq_bytes(net))
    target, params = Target("t", "x86_64", "llvm", "x86-64-v3"), arrays(parse_model(qdq_bytes(net)))
    name = next(name for name, a in params.items() if a.ndim == 4 and np.abs(a).max() <= 64)
    wide = params[name].copy()
    wide.reshape(-1)[3] = -128
    compile_model(tmp_path / "m.onnx", target, tmp_path / "any")
    load_artifact(tmp_path / "any").prepare(params | {name: wide})
    compile_model(tmp_path / "m.onnx", target, tmp_path / "own", options=Options(constant=True))
    with pytest.raises(DeviceError, match=rf"weight {name} must have codes in -64 .. 64.*without --constant"):
        load_artifact(tmp_path / "own").prepare(params | {name: wide})


def test_a_sidecar_bounds_the_weights_of_every_level(tmp_path: Path) -> None:
    """Containers of 7 bits: the shorter product serves all levels, and a file that is none of them is refused."""
    net = ladder_of(2, (2,), width=4, size=6, blocks=1)[0]
    data, path = qdq_bytes(net), tmp_path / "m.onnx"
    path.write_bytes(data)
    params = arrays(parse_model(data))
    name = next(name for name, a in params.items() if a.ndim == 4 and np.abs(a).max() <= 64)
    narrow = {name.removesuffix(".weight"): {"bits": 2, "top": 4, "container": 7}}
    wide = params[name].copy()
    wide.reshape(-1)[3] = -128
    target = Target("t", "x86_64", "llvm", "x86-64-v3")
    sidecar = Path(f"{path}.json")
    for digest, taken in ((sha256(data), False), (sha256(b"another file"), True)):
        sidecar.write_bytes(canonical_json({"model": digest, "weights": narrow}))
        compile_model(path, target, tmp_path / "a", force=True)
        artifact = load_artifact(tmp_path / "a")
        artifact.prepare(params)
        with (
            nullcontext() if taken else pytest.raises(DeviceError, match=f"weight {name} must have codes in -64 .. 64")
        ):
            artifact.prepare(params | {name: wide})
    sidecar.write_bytes(canonical_json({"model": sha256(data), "weights": 3}))
    with pytest.raises(ModelError, match="no sidecar"):
        compile_model(path, target, tmp_path / "a", force=True)
