"""No kernel reads or writes outside its tensors: each of them lies against a page that nobody may touch.

Every activation, packed tensor, parameter, input and output has an inaccessible page right behind its last byte (but
for the alignment of tensors to 64 bytes), or right before its first one. A kernel that touches one is a signal in the
child process that runs the network.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import DataType

from qdeploy.compile import pipeline
from qdeploy.compile.artifact import opened
from qdeploy.compile.lower import Lowering
from qdeploy.compile.pipeline import Options, describe
from qdeploy.compile.plan import Plan
from qdeploy.compile.program import ALIGNMENT, Place, aligned
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.qdq import arrays
from tests.compile.kernels import target_of
from tests.compile.test_fuse import chains, conv, grids, residual, wide
from tests.qdq_models import Net

PAGE = mmap.PAGESIZE
SAME = {"pads": [1, 1, 1, 1]}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Room:
    """Places for tensors in one buffer, pages that nobody may touch between them."""

    def __init__(self, behind: bool) -> None:
        self.behind, self.size = behind, PAGE
        self.pages: set[int] = set()  # that may be touched

    def place(self, size: int) -> int:
        """Offset of a tensor of `size` bytes: it ends, or begins, at an inaccessible page."""
        first, count = self.size // PAGE, -(-max(1, size) // PAGE)
        self.pages.update(range(first, first + count))
        self.size = (first + count + 1) * PAGE
        return (first + count) * PAGE - aligned(size) if self.behind else first * PAGE


def pages(size: int, open_pages: set[int]) -> np.ndarray:
    """Memory of `size` bytes of which only `open_pages` may be touched."""
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in set(range(-(-size // PAGE))) - open_pages:
        assert protect(memory.ctypes.data + page * PAGE, PAGE, 0) == 0
    return memory


def guarded(array: np.ndarray, behind: bool, alignment: int = 1) -> np.ndarray:
    """A copy of `array` that ends, or begins, at an inaccessible page."""
    count = -(-max(1, array.nbytes) // PAGE)
    memory = pages((count + 2) * PAGE, set(range(1, count + 1)))
    start = (count + 1) * PAGE - -(-array.nbytes // alignment) * alignment if behind else PAGE
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def on(array: np.ndarray) -> Any:
    """A tensor of TVM's on the same bytes."""
    return tvm.runtime.from_dlpack(array)


def outcome(work: Callable[[], bool]) -> str:
    """What becomes of `work` in a child process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest's other threads; the child uses none of theirs
        child = os.fork()
    if not child:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "right", 1: "wrong codes", 2: "an exception"}.get(status, f"signal {-status}")


def run_guarded(net: Net, output: str, cpu: str, behind: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compile with a guarded plan, then prepare and run on guarded buffers: `outcome`."""
    target, model = target_of(cpu), net.model(output, 4, 14)
    packed, arena = Room(behind), Room(behind)

    def keep(self: Lowering, key: Any, kinds: Any) -> tuple[Place, ...]:
        sizes = [prod(shape) * DataType(dtype).itemsize for shape, dtype in kinds]
        self.packed[key] = tuple(Place("packed", packed.place(size)) for size in sizes)
        self.packed_bytes = packed.size
        return self.packed[key]

    def plan(sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]) -> Plan:
        offsets = {name: arena.place(sizes[name]) for name in lives}
        return Plan(offsets, arena.size, 0, 0)

    monkeypatch.setattr(Lowering, "_keep", keep)
    monkeypatch.setattr(pipeline, "plan", plan)
    graph = read_graph(model)
    head = describe(graph, [target], "0" * 64, Options())
    code, variant = pipeline.build(graph, target, head, "lib.so")
    artifact, values = opened(head, variant, code), arrays(model)
    evaluator = Evaluator(graph, values)
    images = [np.random.default_rng(i).normal(0, 4, graph.input_shape).astype(np.float32) for i in range(2)]
    want = [evaluator.output(image) for image in images]

    def work() -> bool:
        stored = [guarded(np.asarray(values[param.name]), behind) for param in graph.params]
        addresses = guarded(np.array([array.ctypes.data for array in stored], np.int64), behind, ALIGNMENT)
        level, space = on(pages(packed.size, packed.pages)), on(pages(arena.size, arena.pages))
        functions = artifact._functions
        functions["prepare"](on(addresses), level)
        for image, (real, codes) in zip(images, want, strict=True):
            x, y = guarded(image, behind, ALIGNMENT), guarded(np.zeros_like(real), behind, ALIGNMENT)
            functions["main"](on(x), level, space, on(y))
            z = guarded(np.zeros_like(codes), behind, ALIGNMENT)
            functions["codes"](on(x), level, space, on(z))
            if not (np.array_equal(y, real) and np.array_equal(z, codes)):
                return False
        return True

    return outcome(work)


def mixed(net: Net) -> str:
    """Every other kernel: grouped, dilated, strided and transposed convolutions, pools, copies, a region in float."""
    grids(net)
    x = conv(net, net.q("x"), (24, net.shape[1], 3, 3), 0, strides=[2, 2], **SAME)
    x = conv(net, x, (36, 8, 3, 3), 1, group=3, **SAME)
    x = conv(net, x, (64, 36, 3, 3), 2, pads=[2, 2, 2, 2], dilations=[2, 2])
    x = net.q(net.node("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], **SAME), "s2", "z2")
    x = net.q(net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), "s3", "z3")
    pads = net.store("pads", np.array([0, 0, 1, 2, 0, 0, 1, 0]))
    x = net.q(net.node("Concat", net.node("Pad", x, pads), net.q(net.node("Pad", x, pads)), axis=1), "s3", "z3")
    scales = net.store("scales", np.array([1, 1, 2, 2], np.float32))
    x = net.q(net.node("Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric"))
    x = net.q(net.node("Sub", net.node("LogSoftmax", x, axis=1), x))
    w = net.store("tw", np.random.default_rng(3).integers(-64, 65, (128, 5, 3, 2)).astype(np.int8))
    w = net.node("DequantizeLinear", w, net.store("tws", np.float32(0.013)), net.store("twz", np.int8(0)))
    x = net.q(net.node("ConvTranspose", x, w, strides=[2, 2]), "s1", "z1")
    x = net.q(net.node("Transpose", x, perm=[0, 1, 3, 2]), "s1", "z1")
    x = net.q(net.node("Softmax", x, axis=1), net.store("sp", np.float32(1 / 256)))
    x = net.q(net.node("GlobalAveragePool", x), "s0", "z0")
    return conv(net, x, (64, 5, 1, 1), 1)


NETS: dict[str, tuple[Callable[[Net], str], tuple[int, ...]]] = {
    "mixed": (mixed, (1, 3, 16, 16)), "chains": (chains, (1, 5, 9, 11)), "residual": (residual, (1, 5, 9, 11)),
    "wide": (wide, (1, 5, 9, 11)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cpu", "name", "behind"),
    [
        ("amx", "wide", True), ("amx", "mixed", True), ("vpdpbusd", "chains", True), ("vpdpbusd", "mixed", True),
        ("pmaddwd", "chains", True), ("pmaddwd", "residual", True), ("pmaddwd", "mixed", True),
        ("portable", "mixed", True), ("amx", "mixed", False), ("vpdpbusd", "chains", False), ("amx", "wide", False),
        ("pmaddwd", "mixed", False),
    ],
)  # fmt: skip
def test_nothing_outside_is_touched(cpu: str, name: str, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = NETS[name]
    net = Net(shape)
    assert run_guarded(net, make(net), cpu, behind, monkeypatch) == "right"


def test_a_touch_outside_is_seen() -> None:
    for behind in (True, False):
        array = guarded(np.arange(100, dtype=np.uint8), behind)
        assert outcome(lambda array=array: bool(array.sum() == 4950)) == "right"
        outside = array.ctypes.data + (100 if behind else -1)
        assert outcome(lambda outside=outside: bool(ctypes.string_at(outside, 1))) == "signal 11"
    room = Room(True)
    offsets = [room.place(size) for size in (64, 4096, 5000)]
    assert [offset % 64 for offset in offsets] == [0, 0, 0]
    assert all((offset + size) % PAGE == 0 for offset, size in zip(offsets, (64, 4096, 5056), strict=True))
    assert len(room.pages) == 4 and room.size == 8 * PAGE
