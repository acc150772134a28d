"""The parity gate: it passes what is right and names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.export.parity import Parity, TensorParity, measure, parity, stock_session
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from tests.nets_frozen import ladder_of, random_frozen


@pytest.fixture(scope="module")
def net() -> FrozenNet:
    return random_frozen(0, blocks=1, width=4, images=3)


def with_golden(net: FrozenNet, name: str, change: int, count: int) -> FrozenNet:
    """Goldens of tensor `name` moved by `change` steps in `count` places."""
    codes = net.golden[name].copy()
    flat = codes.reshape(-1)
    flat[:count] = np.where(flat[:count] < 128, flat[:count] + change, flat[:count] - change)
    return replace(net, golden=dict(net.golden) | {name: codes})


@pytest.mark.parametrize("seed", range(3))
def test_ladders_pass(seed: int) -> None:
    for level in ladder_of(seed, blocks=2, width=8, size=12, max_pool=seed == 1, depthwise=seed == 2):
        result = parity(qdq_bytes(level), level)
        assert result.largest_step <= 1
        assert [t.name for t in result.fused] == list(level.activations)
        assert result.codes == sum(codes.size for codes in level.golden.values()) + level.golden[level.output].size
        # the reference is exact for every fused operator but Add, whose ties ONNX Runtime rounds after another order
        adds = {node.output for node in level.nodes if node.op == "add"}
        assert all(t.differing == 0 for t in result.fused if t.name not in adds)


def test_a_wrong_golden_is_named(net: FrozenNet) -> None:
    with pytest.raises(ModelError, match=r"first tensor that differs is block0\.conv2\.out"):
        parity(qdq_bytes(net), with_golden(net, "block0.conv2.out", 9, 1))


def test_many_single_steps_are_refused(net: FrozenNet) -> None:
    data = qdq_bytes(net)
    with pytest.raises(ModelError, match=r"stem\.out"):
        parity(data, with_golden(net, "stem.out", 1, 40))


def test_a_wrong_model_is_refused(net: FrozenNet) -> None:
    tensors = dict(net.tensors)
    tensors["stem.bias"] = tensors["stem.bias"] + np.int32(2000)
    with pytest.raises(ModelError, match=r"stem\.out"):
        parity(qdq_bytes(replace(net, tensors=tensors)), net)


def test_no_golden_images_is_an_error(net: FrozenNet) -> None:
    empty = replace(net, golden={name: codes[:0] for name, codes in net.golden.items()})
    with pytest.raises(ModelError, match="no golden images"):
        parity(qdq_bytes(net), empty)


def test_bounds() -> None:
    good, tie = TensorParity("a", 5000, 0, 0), TensorParity("b", 5000, 5, 1)
    far, often = TensorParity("c", 5000, 1, 2), TensorParity("d", 5000, 11, 1)
    final = TensorParity("output", 10, 3, 7)
    assert Parity((good, tie), (good, tie), final, 0).problems() == []
    assert "c (1 of 5000, by up to 2)" in Parity((good, far), (good,), final, 0).problems()[0]
    assert "in fused kernels 11 of 10000" in Parity((good,), (good, often), final, 0).problems()[0]
    assert "2 images" in Parity((good,), (good,), final, 2).problems()[0]


def test_json_counts_what_users_run(net: FrozenNet) -> None:
    value = measure(qdq_bytes(net), net).to_json()
    assert value["tensors"] == len(net.activations) and value["output"][1] == 30
    assert set(value) == {"tensors", "codes", "differing", "largest_step", "output", "fused", "unoptimized"}


def test_runtime_refusal_is_one_line() -> None:
    with pytest.raises(ModelError, match="ONNX Runtime refuses") as caught:
        stock_session(b"nonsense")
    assert "\n" not in str(caught.value)
