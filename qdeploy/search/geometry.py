"""What each layer of a space is, for every shape that it can have: multiply-adds, weights, bytes of coded planes.

A layer depends on resolution, base width, its own block's kernel and expansion and on nothing else, so a table of
layers x shapes prices any subnet. The networks of one shape throughout, at full depth, show every entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.bundle.planes import gather, split_cheapest
from qdeploy.nesting import nest
from qdeploy.quant.graph import Graph
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.search.encoding import Encoding
from qdeploy.space import MAX_BITS, SubnetSpec


@dataclass(frozen=True)
class Geometry:
    """Tables [layers, shapes], layers as in the space, shapes as `Encoding.shapes`; int64.

    `inputs`: values of the tensor that a layer reads; 0 where an earlier layer reads the same tensor at the same width.
    `coded`: [layers, shapes, bits], bytes of the coded planes at each width that the layer can have; of granularities
    and symmetries the last ones are priced.
    `shifted`: bool [layers, shapes, bits, granularities, symmetries], whether the weights' zero point is not 0.
    `real`: bool [layers], layers left in floating point.
    """

    macs: np.ndarray
    weights: np.ndarray
    channels: np.ndarray
    inputs: np.ndarray
    coded: np.ndarray
    shifted: np.ndarray
    real: np.ndarray


@torch.no_grad()
def _sizes(network: nn.Module, graph: Graph, image: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """(shape of the input, shape of the output) of every layer, without the batch."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    names = {step.module: step.name for step in graph.layers}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        found[names[module]] = (tuple(args[0].shape[1:]), tuple(output.shape[1:]))

    hooks = [cast(nn.Module, step.module).register_forward_hook(note) for step in graph.layers]
    parameter = next(network.parameters())
    training = network.training
    network.eval()(torch.zeros(1, *image, device=parameter.device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return found


def coded_bytes(codes: np.ndarray) -> int:
    """Bytes of the coded planes of one weight tensor on its own, codes int8 as `LayerCodes` has them."""
    nested = nest("weight", {"level": codes})
    if nested is None:
        return 0
    bits = nested.levels["level"].bits
    return sum(len(piece.data) for piece in gather(split_cheapest(nested.u, nested.bits, bits)))


def _with(spec: SubnetSpec, layer: str, bits: int, granularity: str | None, symmetry: str | None) -> SubnetSpec:
    """`spec` with other weights in one layer."""
    changed = replace(spec[layer], weight_bits=bits, granularity=granularity, symmetry=symmetry)
    return replace(spec, layers=tuple(changed if entry.layer == layer else entry for entry in spec.layers))


def geometry(net: SimulatedNet, encoding: Encoding, image: tuple[int, ...]) -> Geometry:
    """Read the tables off the trained network; `image`: shape [C, H, W] of one image where the space has no other."""
    specs, layers = encoding.specs(encoding.covering()), encoding.space.layers
    macs, weights, channels, inputs = (np.zeros((len(layers), len(specs)), np.int64) for _ in range(4))
    coded = np.zeros((len(layers), len(specs), MAX_BITS + 1), np.int64)
    shifted = np.zeros((*coded.shape, *encoding.kinds), bool)
    known: dict[bytes, int] = {}  # many layers are the same in several shapes
    for shape, spec in enumerate(specs):
        subnet = net.subnet(spec)
        pixels = spec.architecture.resolution if spec.architecture else None
        sizes = _sizes(subnet.network, subnet.graph, image if pixels is None else (image[0], pixels, pixels))
        read: set[str] = set()
        for row, layer in enumerate(layers):
            (source, output), step = sizes[layer.layer], subnet.steps[layer.layer]
            count = cast("nn.Conv2d | nn.Linear", step.module).weight.numel()
            macs[row, shape] = count * int(np.prod(output[1:], dtype=np.int64))
            weights[row, shape], channels[row, shape] = count, output[0]
            key = f"{step.inputs[0]} {'low' if subnet.reads_low(step) else 'stream'}"
            inputs[row, shape] = 0 if key in read else int(np.prod(source, dtype=np.int64))
            read.add(key)
            if subnet.is_float(step):
                continue
            kinds = product(enumerate(layer.granularity or (None,)), enumerate(layer.symmetry or (None,)))
            for bits, ((i, granularity), (j, symmetry)) in product(layer.weight_bits, kinds):
                found = subnet.layer_codes(step, _with(spec, layer.layer, bits, granularity, symmetry))
                shifted[row, shape, bits, i, j] = found.zero_point != 0
                if (content := found.codes.tobytes()) not in known:
                    known[content] = coded_bytes(found.codes)
                coded[row, shape, bits] = known[content]
    real = np.array([net.is_float(net.steps[layer.layer]) for layer in layers], bool)
    return Geometry(macs, weights, channels, inputs, coded, shifted, real)
