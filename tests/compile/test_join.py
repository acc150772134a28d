"""Bit planes -> container codes: the kernel against bundle/planes.py, for every layout, length and target."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import tvm

from qdeploy.bundle.planes import container, join, pack, pack_part, sort_bits, split_cheapest
from qdeploy.bundle.tables import TensorLevel
from qdeploy.compile.kernels.join import LAYOUTS, LENGTH, UNUSED, join_kernel
from qdeploy.compile.program import ALIGNMENT
from qdeploy.errors import BundleError
from tests.compile.kernels import exported, target_of
from tests.compile.test_guards import guarded, on, outcome

Kernel = Callable[..., None]


@pytest.fixture(scope="module", params=["vpdpbusd", "pmaddwd", "portable"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    resolved = target_of(request.param)
    return exported({"join": join_kernel("join", resolved.features)}, resolved.tvm)["join"]


def bias_of(bits: int, shift: int, offset: int) -> int:
    return offset - ((1 << bits >> 1) << shift)


class Codes:
    """A tensor's codes while parts are joined to it."""

    def __init__(self, kernel: Kernel, count: int) -> None:
        self.kernel, self.count = kernel, count
        self.codes = tvm.runtime.tensor(np.zeros(count, np.uint8))
        self.held = self.bias = 0

    def add(self, bits: int, layout: str, raw: bytes, shift: int = 0, bias: int = 0) -> np.ndarray:
        data = tvm.runtime.tensor(np.frombuffer(raw, np.uint8))
        self.kernel(data, self.codes, bits, LAYOUTS.index(layout), self.held, shift, self.bias, bias)
        self.held, self.bias = self.held + bits, bias
        return self.codes.numpy()


def layouts_of(bits: int, held: int) -> list[str]:
    return ["tight"] + ["spaced"] * (bits in (3, 5, 6, 7)) + ["sorted"] * (bits == 1 and held > 0)


def raw_of(symbols: np.ndarray, bits: int, layout: str, prefix: np.ndarray, held: int) -> bytes:
    if layout == "sorted":
        return np.packbits(sort_bits(symbols, prefix, held)[0]).tobytes()
    return pack(symbols, bits, layout)


@pytest.mark.parametrize("count", [1, 7, 31, 64, 65, 257, 5003])
def test_every_part_of_every_length(kernel: Kernel, count: int) -> None:
    """Behind any number of planes, from any container to any other."""
    rng = np.random.default_rng(count)
    for held in range(8):
        for bits in range(1, 9 - held):
            u = rng.integers(0, 1 << (held + bits), count).astype(np.uint8)
            if held % 2:  # a few contexts alone
                u = np.minimum(u, (1 << (held + bits)) // 2 + 1)
            prefix, symbols = u >> np.uint8(bits) if bits < 8 else np.zeros_like(u), u & np.uint8((1 << bits) - 1)
            shift, bias = int(rng.integers(0, 9 - held - bits)), [int(b) for b in rng.integers(-128, 128, 2)]
            for layout in layouts_of(bits, held):
                codes = Codes(kernel, count)
                if held:
                    before = ((prefix.astype(int) << shift + bits) + bias[0] & 255).astype(np.uint8)
                    codes.codes = tvm.runtime.tensor(before)
                    codes.held, codes.bias = held, bias[0]
                got = codes.add(bits, layout, raw_of(symbols, bits, layout, prefix, held), shift, bias[1])
                want = ((u.astype(int) << shift) + bias[1] & 255).astype(np.uint8)
                np.testing.assert_array_equal(got, want, f"{held} + {bits} {layout}")


@pytest.mark.parametrize(("bits", "base", "dtype"), [(4, 2, "int8"), (8, 3, "uint8"), (6, 1, "int8")])
def test_a_tensor_as_the_bundle_writes_it(kernel: Kernel, bits: int, base: int, dtype: str) -> None:
    """Each level refines the codes of the one below; equal to joining all planes in numpy."""
    rng = np.random.default_rng(bits)
    u = np.clip(rng.normal(1 << bits >> 1, 2 ** (bits - 2.5), (24, 3, 41)), 0, (1 << bits) - 1).astype(np.uint8)
    parts = split_cheapest(u, bits, base)
    held, codes = 0, Codes(kernel, u.size)
    for i, part in enumerate(parts):
        held += part.bits
        low = 0 if dtype == "int8" else 128
        level = TensorLevel(held, 8 - held, low + (1 << (8 - held) >> 1) - 1 + (held == 8))
        known = [(p.bits, p.layout, b"".join(p.segments)) for p in parts[: i + 1]]
        want = container(join(known, u.shape), level, dtype)
        got = codes.add(*known[-1], level.shift, bias_of(held, level.shift, level.offset))
        np.testing.assert_array_equal(got.view(dtype), want.reshape(-1))
    assert [part.bits for part in parts] != [bits]


def test_damage_is_refused(kernel: Kernel) -> None:
    symbols = np.zeros(13, np.uint8)
    for bits, layout in ((2, "tight"), (3, "spaced"), (5, "spaced"), (1, "tight")):
        raw = pack(symbols, bits, layout)
        for wrong in (raw + b"\0", raw[:-1]):
            with pytest.raises(Exception, match=LENGTH):
                Codes(kernel, 13).add(bits, layout, wrong)
        with pytest.raises(Exception, match=UNUSED):
            Codes(kernel, 13).add(bits, layout, raw[:-1] + b"\1")
    with pytest.raises(Exception, match=UNUSED):
        Codes(kernel, 13).add(3, "spaced", b"\1" + pack(symbols, 3, "spaced")[1:])
    with pytest.raises(Exception, match=UNUSED):  # the last byte's second symbol
        Codes(kernel, 13).add(3, "spaced", pack(symbols, 3, "spaced")[:-1] + b"\4")
    assert pack_part(symbols, 2, symbols, 0).bits == 2


def random_parts(rng: np.random.Generator, count: int) -> list[tuple[int, str, bytes]]:
    """Up to 8 planes of any bytes, in parts of right and now and then wrong lengths."""
    parts, held = [], 0
    while held < 8 and (not held or rng.random() < 0.8):
        bits = int(rng.integers(1, 9 - held))
        layout = str(rng.choice(layouts_of(bits, held)))
        size = -(-count // (8 // bits)) if layout == "spaced" else -(-count * bits // 8)
        raw = rng.integers(0, 256, size + (rng.random() < 0.02), np.uint8)
        if rng.random() < 0.9:  # what is unused is zero
            if layout == "spaced":
                raw &= np.uint8(256 - (1 << 8 % bits))
            unused = size * 8 - count * bits if layout != "spaced" else (size * (8 // bits) - count) * bits + 8 % bits
            raw[size - 1] &= np.uint8(256 - (1 << unused))
        parts.append((bits, layout, raw.tobytes()))
        held += bits
    return parts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("behind", [True, False])
def test_any_bytes_are_joined_as_numpy_does_or_refused(kernel: Kernel, behind: bool) -> None:
    """Nothing outside the tensors is touched, whatever the planes hold."""
    refused: list[bool] = []

    def one(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        count = int(rng.choice([1, 5, 63, 64, 65, 300, 1000, int(rng.integers(1, 5000))]))
        parts, codes = random_parts(rng, count), guarded(np.zeros(count, np.uint8), behind, ALIGNMENT)
        try:
            want = join(parts, (count,))
        except BundleError:
            want = None
        held, bias = 0, 0
        try:
            for bits, layout, raw in parts:
                part = guarded(np.frombuffer(raw, np.uint8), behind, ALIGNMENT)
                shift, after = 8 - held - bits, int(rng.integers(-128, 128))
                kernel(on(part), on(codes), bits, LAYOUTS.index(layout), held, shift, bias, after)
                held, bias = held + bits, after
        except RuntimeError as e:
            refused.append(True)
            return want is None and (LENGTH in str(e) or UNUSED in str(e))
        return want is not None and bool((((want.astype(int) << 8 - held) + bias & 255) == codes).all())

    assert outcome(lambda: all(one(seed) for seed in range(150)) and 5 < len(refused) < 75) == "right"
