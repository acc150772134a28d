"""The integer reference: what a FrozenNet computes, in slow and obvious numpy. docs/integers.md is its prose.

Every kernel and every runtime is held against this. All arithmetic between integers is exact; the float32 operations
are the ones that docs/integers.md lists, in its order, each rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qdeploy.frozen import FrozenNet, Node, Quantizer

F32_EXACT = 1 << 24  # integers up to here are exact in float32, so BLAS may add them in any order


def quantize(x: np.ndarray, q: Quantizer) -> np.ndarray:
    """float32 -> uint8 codes: clamp(round_half_even(x / scale) + zero_point, lo, hi)."""
    codes = np.rint(np.asarray(x, np.float32) / np.float32(q.scale)) + np.float32(q.zero_point)
    return np.clip(codes, q.lo, q.hi).astype(np.uint8)


def dequantize(codes: np.ndarray, q: Quantizer) -> np.ndarray:
    """uint8 codes -> float32: (code - zero_point) * scale."""
    return (codes.astype(np.int32) - np.int32(q.zero_point)).astype(np.float32) * np.float32(q.scale)


Real = np.ndarray | np.float32


def fma(a: Real, b: Real, c: Real) -> np.ndarray:
    """float32 a * b + c, rounded once, as processors with a fused multiply-add compute it; operands broadcast.

    The product is exact in float64. Its sum with c is rounded to odd there (the exact error of the sum tells whether
    bits were lost), and a sum rounded to odd rounds to float32 as the exact one would (Boldo and Melquiond, 2008).
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
    product, c = np.broadcast_arrays(np.atleast_1d(product), np.asarray(c, np.float32).astype(np.float64))
    total = product + c
    high = total - product
    error = (product - (total - high)) + (c - high)
    to_even = (error != 0) & (total.view(np.int64) & 1 == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    odd = (total.view(np.int64) + np.where(to_even, away, 0)).view(np.float64)
    return odd.astype(np.float32).reshape(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)))


Affine = tuple[float | np.float32, int]  # scale, zero point


def added(a: np.ndarray, b: np.ndarray, grid_a: Affine, grid_b: Affine, grid: Affine) -> np.ndarray:
    """The sum of two activations as a float32 code that is not rounded yet: fma(a, r_a, fma(b, r_b, k)).

    Codes and zero points are the file's own. r_i = s_i / s_y, k = z_y - fma(r_a, z_a, r_b * z_b), all in float32. Where
    the first operand is broadcast along the last axis that has more than one place, callers swap the two.
    """
    ratio_a, ratio_b = (np.float32(g[0]) / np.float32(grid[0]) for g in (grid_a, grid_b))
    offset = np.float32(grid[1]) - fma(ratio_a, np.float32(grid_a[1]), ratio_b * np.float32(grid_b[1]))
    return fma(a.astype(np.float32), ratio_a, fma(b.astype(np.float32), ratio_b, offset))


def multiplied(a: np.ndarray, b: np.ndarray, grid_a: Affine, grid_b: Affine, grid: Affine) -> np.ndarray:
    """The product of two activations as a float32 code that is not rounded yet: float32(p * r) + z_y.

    p = (a - z_a) * (b - z_b) is an integer, r = float32(float32(s_a * s_b) / s_y).
    """
    product = (a.astype(np.int32) - np.int32(grid_a[1])) * (b.astype(np.int32) - np.int32(grid_b[1]))
    ratio = np.float32(grid_a[0]) * np.float32(grid_b[0]) / np.float32(grid[0])
    return product.astype(np.float32) * ratio + np.float32(grid[1])


def hard_sigmoid(x: np.ndarray) -> np.ndarray:
    """min(max(x / 6 + 1/2, 0), 1) in float32: the product with float32(1/6), then the sum, each rounded once."""
    return np.clip(np.asarray(x, np.float32) * np.float32(1 / 6) + np.float32(0.5), np.float32(0), np.float32(1))


def requantize_scale(input_scale: float, weight_scale: np.ndarray, output_scale: float) -> np.ndarray:
    """float32(float32(s_x * s_w) / s_y), per output channel."""
    product = np.float32(input_scale) * weight_scale.astype(np.float32)
    return (product / np.float32(output_scale)).astype(np.float32)


def requantize(acc: np.ndarray, scale: np.ndarray, q: Quantizer) -> np.ndarray:
    """int32 accumulators -> uint8: rne(float32(acc) * scale) + zero point, clamped; `scale` broadcasts."""
    rounded = np.rint(acc.astype(np.int32).astype(np.float32) * scale)
    return np.clip(rounded + np.float32(q.zero_point), q.lo, q.hi).astype(np.uint8)


def accumulate(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Exact sum over k of x[..., k] * weight[o, k], int64: float BLAS wherever every partial sum is exact."""
    bound = int(np.abs(x).max(initial=0)) * int(np.abs(weight.astype(np.int32)).sum(1).max(initial=0))
    dtype = np.float32 if bound < F32_EXACT else np.float64
    return (x.astype(dtype) @ weight.T.astype(dtype)).astype(np.int64)


def conv_accumulate(x: np.ndarray, weight: np.ndarray, node: Node) -> np.ndarray:
    """Codes minus zero points, x [n, C, H, W] and weight [O, C/g, kh, kw] -> int64 [n, O, H', W'].

    Padding inserts real zero, which is 0 after the zero point is subtracted.
    """
    attributes = node.attributes
    top, left, bottom, right = attributes["padding"]
    (sh, sw), (dh, dw), groups = attributes["stride"], attributes["dilation"], attributes["groups"]
    kh, kw = weight.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), axis=(2, 3))
    windows = windows[:, :, ::sh, ::sw, ::dh, ::dw]  # [n, C, H', W', kh, kw]
    n, channels, height, width = windows.shape[:4]
    per_group, outputs = channels // groups, weight.shape[0] // groups
    out = np.empty((n, weight.shape[0], height, width), np.int64)
    for g in range(groups):
        columns = windows[:, g * per_group : (g + 1) * per_group].transpose(0, 2, 3, 1, 4, 5)
        part = weight[g * outputs : (g + 1) * outputs].reshape(outputs, -1)
        acc = accumulate(columns.reshape(n, height, width, -1), part)
        out[:, g * outputs : (g + 1) * outputs] = acc.transpose(0, 3, 1, 2)
    return out


def centred_weight(net: FrozenNet, node: Node) -> np.ndarray:
    """Weight codes of a layer minus its zero point, int16."""
    codes = net.tensors[f"{node.name}.weight"].astype(np.int16)
    zero_point = net.tensors.get(f"{node.name}.weight_zero_point")  # absent where weights are symmetric
    return codes if zero_point is None else codes - np.int16(zero_point)


def run_node(net: FrozenNet, node: Node, codes: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 codes of `node.output` from the codes of its inputs."""
    inputs = [net.activations[name].quantizer for name in node.inputs]
    target = net.activations[node.output].quantizer
    first = codes[node.inputs[0]]
    if node.op in ("conv", "linear"):
        weight, bias = centred_weight(net, node), net.tensors[f"{node.name}.bias"]
        scale = requantize_scale(inputs[0].scale, net.tensors[f"{node.name}.weight_scale"], target.scale)
        centred = first.astype(np.int32) - inputs[0].zero_point
        acc = conv_accumulate(centred, weight, node) if node.op == "conv" else accumulate(centred, weight)
        broadcast = (slice(None), None, None) if node.op == "conv" else slice(None)
        out = requantize(acc + bias[broadcast].astype(np.int64), scale[broadcast], target)
    elif node.op == "add":
        grids = [(q.scale, q.zero_point) for q in (*inputs, target)]
        real = added(first, codes[node.inputs[1]], grids[0], grids[1], grids[2])
        out = np.clip(np.rint(real), target.lo, target.hi).astype(np.uint8)
    elif node.op == "mul":
        grids = [(q.scale, q.zero_point) for q in (*inputs, target)]
        real = multiplied(first, codes[node.inputs[1]], grids[0], grids[1], grids[2])
        out = np.clip(np.rint(real), target.lo, target.hi).astype(np.uint8)
    elif node.op in ("hard_swish", "hard_sigmoid"):
        x = dequantize(first, inputs[0])
        gate = hard_sigmoid(x)
        out = quantize(x * gate if node.op == "hard_swish" else gate, target)
    elif node.op == "global_average_pool":
        area = first.shape[2] * first.shape[3]
        acc = (first.astype(np.int32) - inputs[0].zero_point).sum((2, 3), keepdims=True)
        scale = np.asarray(np.float32(inputs[0].scale) / (np.float32(target.scale) * np.float32(area)), np.float32)
        out = requantize(acc, scale, target)
    elif node.op == "max_pool":
        (kh, kw), (sh, sw) = node.attributes["kernel"], node.attributes["stride"]
        top, left, bottom, right = node.attributes["padding"]
        padded = np.pad(first, ((0, 0), (0, 0), (top, bottom), (left, right)))  # code 0 is the least: neutral for max
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(2, 3))
        out = windows[:, :, ::sh, ::sw].max((4, 5))
    elif node.op == "flatten":
        out = first.reshape(first.shape[0], -1)
    else:  # requantize: another width of the same values
        out = quantize(dequantize(first, inputs[0]), target)
    if node.relu:
        out = np.maximum(out, np.uint8(target.zero_point))
    return out


def run(net: FrozenNet, codes: np.ndarray, keep: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Run the network on input codes uint8 [n, C, H, W]; returns the codes of the tensors in `keep` (default: all)."""
    wanted = set(net.activations) if keep is None else set(keep)
    last_use = {name: i for i, node in enumerate(net.nodes) for name in node.inputs}
    live = {net.input: codes}
    for i, node in enumerate(net.nodes):
        live[node.output] = run_node(net, node, live)
        for name in set(node.inputs) - wanted:
            if last_use[name] == i:
                del live[name]
    return {name: value for name, value in live.items() if name in wanted}


def logits(net: FrozenNet, codes: np.ndarray, batch: int = 256) -> np.ndarray:
    """Float32 outputs [n, classes] of the network for input codes uint8 [n, C, H, W], in batches."""
    quantizer = net.activations[net.output].quantizer
    parts = [run(net, codes[i : i + batch], [net.output])[net.output] for i in range(0, len(codes), batch)]
    return dequantize(np.concatenate(parts), quantizer)
