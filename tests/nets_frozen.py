"""Random FrozenNets for everybody's tests: calibrated so that codes spread, goldens by qdeploy.integer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdeploy.frozen import FrozenNet, Node, Quantizer, Tensor, WeightBits
from qdeploy.integer import accumulate, conv_accumulate, dequantize, run_node
from qdeploy.space import SubnetSpec

CONV = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}


def container_bits(top: int) -> int:
    """Width C of the container grid for a ladder whose top is `top` bits (decision D1)."""
    return 7 if top <= 6 else 8


def container_codes(raw_top: np.ndarray, bits: int, top: int) -> np.ndarray:
    """Top codes w_N -> int8 container codes c_b = w_b * 2^(C-b) + m_b of their `bits`-bit prefix (decision D1)."""
    container = container_bits(top)
    raw = raw_top.astype(np.int64) >> (top - bits)
    midpoint = 0 if bits == top else 2 ** (container - 1 - bits) - (1 if top == 8 else 2 ** (container - 1 - top))
    return (raw * 2 ** (container - bits) + midpoint).astype(np.int8)


def _quantizer(real: np.ndarray, bits: int, clip: bool) -> Quantizer:
    """The range that `real` fills, cut a little below 8 bits so that the clip is at work."""
    top = 2**bits - 1
    quantile = 1.0 if bits == 8 else 0.995
    low = min(0.0, float(np.quantile(real, 1 - quantile)))
    high = max(1e-3, float(np.quantile(real, quantile)))
    scale = np.float32((high - low) / top)
    zero_point = int(np.clip(np.rint(-low / scale), 0, top))
    return Quantizer(float(scale), zero_point, 0, top, clip)


@dataclass
class Builder:
    """Grows a FrozenNet node by node and keeps its golden codes; each tensor's quantizer comes from its real values."""

    rng: np.random.Generator
    codes: np.ndarray  # uint8 [n, C, H, W]
    nodes: list[Node] = field(default_factory=list)
    activations: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, WeightBits] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    golden: dict[str, np.ndarray] = field(default_factory=dict)
    spec: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.activations["image"] = Tensor("image", self.codes.shape[1:], Quantizer(float(np.float32(1 / 64)), 117))
        self.golden["image"] = self.codes

    def net(self, output: str, name: str = "random") -> FrozenNet:
        """What was built so far, unchecked."""
        spec = SubnetSpec.build(name, self.spec or {"none": (8, 8)})
        parts = (self.activations, self.weights, self.tensors, self.golden)
        return FrozenNet(name, spec, "image", output, tuple(self.nodes), *parts, {"accuracy": {"top1": 0.5}})

    def real(self, name: str) -> np.ndarray:
        """Real values of tensor `name`, float32."""
        return dequantize(self.golden[name], self.activations[name].quantizer)

    def emit(self, node: Node, quantizer: Quantizer) -> str:
        """Append `node`, run it on the golden codes, return its output's name."""
        self.activations[node.output] = Tensor(node.output, (), quantizer)
        codes = run_node(self.net(node.output), node, self.golden)
        self.activations[node.output] = Tensor(node.output, codes.shape[1:], quantizer)
        self.golden[node.output] = codes
        self.nodes.append(node)
        return node.output

    def layer(
        self, name: str, x: str, shape: tuple[int, ...], bits: int, top: int, out_bits: int = 8, clip: bool = False,
        relu: bool = False, **attributes: Any,
    ) -> str:  # fmt: skip
        """A convolution (weight shape of 4 numbers) or a linear layer (of 2) with random weights on the common grid."""
        op = "conv" if len(shape) == 4 else "linear"
        node = Node(name, op, (x,), f"{name}.out", relu, CONV | attributes if op == "conv" else {})
        limit, container = 2 ** (top - 1), container_bits(top)
        raw = np.clip(np.rint(self.rng.normal(0, limit / 2.2, shape)), -limit, limit - 1).astype(np.int64)
        fan_in = int(np.prod(shape[1:]))
        scale = (self.rng.uniform(0.5, 2, shape[0]) / limit / np.sqrt(fan_in)).astype(np.float32)
        scale = (scale * np.float32(2.0 ** (top - container))).astype(np.float32)
        weight = container_codes(raw, bits, top)
        offset = self.rng.normal(0, 0.3, shape[0])
        source = self.activations[x].quantizer
        unit = np.float32(source.scale) * scale
        bias = np.rint(offset / unit).astype(np.int32)
        self.tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scale, f"{name}.bias": bias}
        self.weights[name] = WeightBits(bits, top, container)
        self.spec[name] = (bits, int(source.hi + 1).bit_length() - 1)
        centred = self.golden[x].astype(np.int32) - source.zero_point
        broadcast = (slice(None), None, None) if op == "conv" else slice(None)
        acc = conv_accumulate(centred, weight, node) if op == "conv" else accumulate(centred, weight)
        real = (acc + bias[broadcast]) * unit[broadcast]
        return self.emit(node, _quantizer(np.maximum(real, 0) if relu else real, out_bits, clip))

    def add(self, name: str, a: str, b: str, relu: bool = True) -> str:
        """Residual sum at 8 bits."""
        real = self.real(a) + self.real(b)
        return self.emit(
            Node(name, "add", (a, b), f"{name}.out", relu), _quantizer(np.maximum(real, 0) if relu else real, 8, False)
        )

    def mul(self, name: str, a: str, b: str) -> str:
        """Product at 8 bits; `b` may be [C, 1, 1]."""
        return self.emit(Node(name, "mul", (a, b), f"{name}.out"), _quantizer(self.real(a) * self.real(b), 8, False))

    def activation(self, name: str, x: str, op: str, bits: int = 8) -> str:
        """`hard_swish` or `hard_sigmoid`."""
        gate = np.clip(self.real(x) / 6 + 0.5, 0, 1)
        real = self.real(x) * gate if op == "hard_swish" else gate
        return self.emit(Node(name, op, (x,), f"{name}.out"), _quantizer(real, bits, bits < 8))

    def requantize(self, name: str, x: str, bits: int) -> str:
        """The same values at `bits` bits, always with a Clip."""
        return self.emit(Node(name, "requantize", (x,), f"{name}.out"), _quantizer(self.real(x), bits, True))

    def max_pool(self, name: str, x: str) -> str:
        """3x3, stride 2, padding 1."""
        attributes = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1, 1, 1]}
        return self.emit(Node(name, "max_pool", (x,), f"{name}.out", False, attributes), self.activations[x].quantizer)

    def pool(self, name: str, x: str) -> str:
        """Global average pool at 8 bits."""
        real = self.real(x).mean((2, 3))
        return self.emit(Node(name, "global_average_pool", (x,), f"{name}.out"), _quantizer(real, 8, False))

    def flatten(self, name: str, x: str) -> str:
        """[C, H, W] -> [C * H * W]."""
        return self.emit(Node(name, "flatten", (x,), f"{name}.out"), self.activations[x].quantizer)


def random_images(seed: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 codes [count, C, H, W] of noise with some smoothness, so that layers see structure."""
    rng = np.random.default_rng([seed, 1])
    noise = rng.normal(0, 1, (count, *shape))
    smooth = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3) + rng.normal(0, 1, (count, shape[0], 1, 1))) / 2
    return np.clip(np.rint(117 + 64 * smooth), 0, 255).astype(np.uint8)


def random_frozen(
    seed: int, *, bits: int | Mapping[str, int] = 4, top: int = 4, activation_bits: int | None = None, blocks: int = 2,
    width: int = 8, size: int = 8, channels: int = 3, classes: int = 10, images: int = 4, residual: bool = True,
    requantize: bool = True, depthwise: bool = False, max_pool: bool = False, groups: int = 1, dilation: int = 1,
) -> FrozenNet:  # fmt: skip
    """A small residual network of random weights.

    stem (8/8) -> [max_pool] -> `blocks` of ([requantize] -> conv -> [depthwise] -> conv [+ shortcut] -> add) -> global
    average pool -> flatten -> fc (8/8). Inner layers have `bits` (one number, or {layer: bits}) of a `top`-bit grid;
    activations that inner layers read have `activation_bits` (default: as the layer's weights) and a Clip where
    `requantize`, else 8 bits. From the second block on width doubles, stride is 2, the shortcut is a 1x1 convolution.
    """
    rng = np.random.default_rng([seed, 0])
    b = Builder(rng, random_images(seed, images, (channels, size, size)))

    def width_of(layer: str) -> int:
        return bits if isinstance(bits, int) else bits[layer]

    def low(layer: str) -> int:
        if not requantize:
            return 8
        return activation_bits if activation_bits is not None else width_of(layer)

    x = b.layer("stem", "image", (width, channels, 3, 3), 8, 8, relu=True)
    if max_pool:
        x = b.max_pool("max_pool", x)
    for i in range(blocks):
        stride, wide = (2, width * 2) if i else (1, width)
        c1, c2, dw, short = (f"block{i}.{part}" for part in ("conv1", "conv2", "depthwise", "shortcut"))
        y = entry = b.requantize(f"block{i}.in", x, low(c1)) if requantize else x
        clip = requantize
        next_low = low(dw) if depthwise else low(c2)
        pad = dilation
        shape = (wide, width // groups, 3, 3)
        y = b.layer(
            c1, y, shape, width_of(c1), top, next_low, clip, True, stride=[stride, stride], groups=groups,
            dilation=[dilation, dilation], padding=[pad, pad, pad, pad],
        )  # fmt: skip
        if depthwise:
            y = b.layer(dw, y, (wide, 1, 3, 3), width_of(dw), top, low(c2), clip, True, groups=wide)
        y = b.layer(c2, y, (wide, wide, 3, 3), width_of(c2), top)
        if residual:
            if i:
                x = b.layer(
                    short, entry, (wide, width, 1, 1), width_of(short), top, stride=[2, 2], padding=[0, 0, 0, 0]
                )
            y = b.add(f"block{i}.add", x, y)
        x, width = y, wide
    x = b.flatten("flatten", b.pool("pool", x))
    x = b.layer("fc", x, (classes, width), 8, 8)
    return b.net(x).check()


def ladder_of(net_seed: int, levels: Sequence[int] = (2, 3, 4), **options: Any) -> list[FrozenNet]:
    """One FrozenNet a level, lowest first: the same graph and top codes, each level's codes the prefixes of D1.

    Weight scales are equal at all levels; biases, activation quantizers and Clip bounds are each level's own.
    `options` go to `random_frozen`.
    """
    return [random_frozen(net_seed, bits=bits, top=max(levels), **options) for bits in levels]
