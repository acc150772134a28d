"""CudaConv: which kernel computes a convolution on a GPU, its tile, and how its weights lie in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from qdeploy.compile.cuda.toolchain import compiler_for
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.spec import Choice, ConvSpec
from qdeploy.compile.llvm import Dot
from qdeploy.errors import CompileError, RecipeError
from qdeploy.target import Target

DENSE, DEPTHWISE = (
    Dot("dp4a", 1, 0),
    Dot("dp4a", GROUP, 0),
)  # lanes: a channel's depth in a row; 4 channels side by side
FEW_PIXELS = 16  # below, half of a tensor core's rows would be empty, and weights are read once anyway
VECTOR = 16  # bytes that a thread loads at once


@dataclass(frozen=True)
class Gpu:
    """What the choice of tiles takes from an architecture (CUDA C++ programming guide, compute capabilities).

    `processors` of the named device; `products`: 8-bit multiply-adds of mma.sync a cycle and processor; `shared` memory
    of a processor, bytes; `load`: bytes a cycle and processor from the second-level cache.
    """

    device: str
    processors: int
    products: int
    shared: int
    load: int = 32


GPUS = {
    "sm_75": Gpu("T4", 40, 1024, 64 << 10),
    "sm_80": Gpu("A100", 108, 2048, 164 << 10),
    "sm_86": Gpu("A10", 72, 1024, 100 << 10),
    "sm_87": Gpu("Jetson AGX Orin", 16, 2048, 164 << 10),
    "sm_89": Gpu("L4", 58, 1024, 100 << 10),
    "sm_90": Gpu("H100", 132, 2048, 228 << 10),
}
OLDEST = 75  # architecture with products of bytes on tensor cores that compilers still know
DOT = "mma.u8.s8"  # what artifact.json names as the dot product
THREADS = 512  # that a processor holds at once: 65536 registers for threads of up to 128
LATENCY = 500  # cycles of a step that nothing hides: a load from the second-level cache, a barrier, the first products
EPILOGUE = 1500  # cycles of a block before its first and behind its last step


def gpu_of(target: Target) -> Gpu:
    """The GPU of a target of kind "cuda".

    Raises RecipeError for a name that no GPU has, CompileError where no compiler makes machine code for it.
    """
    if not re.fullmatch(r"sm_[1-9][0-9]+", target.gpu):
        raise RecipeError(f'target {target.name}: gpu {target.gpu!r} is no architecture: write it as in "sm_75"')
    if target.gpu not in GPUS:
        why = f"target {target.name}: there are kernels for {', '.join(GPUS)}, not for {target.gpu}"
        if int(target.gpu[3:]) < OLDEST:
            why += ", which has no tensor cores for bytes and which CUDA dropped after 12.9"
        raise CompileError(f"{why}: compile for the processor beside it, as with targets/aarch64.toml")
    compiler_for(target.gpu)
    return GPUS[target.gpu]


@dataclass(frozen=True)
class Tile:
    """Warps of a block along pixels, along output channels, and along the depth of one tile; each has 32 x 32 sums."""

    rows: int
    columns: int
    slices: int

    @property
    def pixels(self) -> int:
        """Of a block."""
        return 32 * self.rows

    @property
    def channels(self) -> int:
        """Of a block."""
        return 32 * self.columns

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.rows * self.columns * self.slices

    @property
    def step(self) -> int:
        """Bytes of the depth between two barriers."""
        return 64 if self.slices == 1 else 32 * self.slices

    @property
    def shared(self) -> int:
        """Bytes of a block's two stages, as device/conv_gemm.cuh has them."""
        return 2 * (self.pixels + self.channels) * (self.step + 16)

    def cycles(self, gpu: Gpu, pixels: int, channels: int, depth: int, groups: int) -> float:
        """Estimated cycles of a product [pixels, depth] x [depth, channels], `groups` times.

        A processor holds as many blocks at once as registers and shared memory allow. A step of all of them takes the
        longest of: their products, their loads, and the latency of one. Blocks beyond wait for the next wave.
        """
        blocks = -(-pixels // self.pixels) * -(-channels // self.channels) * groups
        most = max(1, min(THREADS // self.threads, gpu.shared // self.shared))
        waves = -(-blocks // (gpu.processors * most))
        resident = min(most, -(-blocks // gpu.processors))
        products = self.pixels * self.channels * self.step / gpu.products
        loads = (self.pixels + self.channels) * self.step / gpu.load
        step = max(resident * products, resident * loads, LATENCY)
        return waves * (-(-depth // self.step) * step + EPILOGUE)


# smaller ones first: in ties more processors work
TILES = (Tile(1, 1, 4), Tile(1, 2, 2), Tile(2, 2, 1), Tile(4, 1, 1), Tile(4, 2, 1))
MOST_LOADS = 8  # of pixels that a thread has under way: each takes registers for its window


def tiles(vector: int) -> list[Tile]:
    """The tiles whose threads load `vector` bytes at once."""
    return [tile for tile in TILES if tile.pixels * tile.step // (vector * tile.threads) <= MOST_LOADS]


def best_tile(gpu: Gpu, pixels: int, channels: int, depth: int, groups: int, vector: int) -> Tile:
    """The tile of least estimated cycles."""
    return min(tiles(vector), key=lambda tile: tile.cycles(gpu, pixels, channels, depth, groups))


def pitch_of(channels: int) -> int:
    """Bytes from one pixel to the next: whole vectors but for few channels."""
    for size in (4, 8):
        if channels <= size:
            return size
    return -(-channels // VECTOR) * VECTOR


class CudaConv(ConvSpec):
    """A convolution on a GPU. Its `choice` names the kernel; its weights are packed by pack_weights.py."""

    @property
    def taps(self) -> int:
        """Every kernel position is a segment."""
        return 1

    @property
    def quads(self) -> int:
        """Words of a kernel position: of a whole pixel, or of a group's channels."""
        return (pitch_of(self.inputs) if self.groups == 1 else -(-self.inputs // GROUP) * GROUP) // GROUP

    @property
    def tap_bytes(self) -> int:
        """Bytes of a kernel position."""
        return self.quads * GROUP

    @property
    def kernel(self) -> str:
        """The entry point."""
        assert self.choice is not None
        return self.choice.family

    @property
    def vector(self) -> int:
        """Bytes that may be loaded at once: pixels and groups begin at multiples of them."""
        return VECTOR if self.tap_bytes % VECTOR == 0 else GROUP


def cuda_conv(x: Layout, y: Layout, window: Window, groups: int, batch: int, gpu: Gpu) -> tuple[CudaConv, Tile | None]:
    """The convolution with its kernel, and the tile where that is a matrix product; `batch` images at once."""
    lanes = DEPTHWISE if groups > 1 and x.channels == y.channels == groups else DENSE
    spec = CudaConv(x, y, window, groups, lanes)
    pixels, tile = batch * y.height * y.width, None
    if spec.depthwise:
        kernel = "conv_depthwise"
    elif groups > 1 and (spec.inputs % GROUP or spec.outputs % GROUP):
        kernel = "conv_grouped"
    elif groups == 1 and pixels < FEW_PIXELS:
        kernel = f"conv_gemv_{spec.vector}"
    else:
        tile = best_tile(gpu, pixels, spec.outputs, prod(window.kernel) * spec.tap_bytes, groups, spec.vector)
        kernel = f"conv_gemm_{tile.pixels}x{tile.channels}_{spec.vector}"
    return CudaConv(x, y, window, groups, lanes, choice=Choice(kernel)), tile
