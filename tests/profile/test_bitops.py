from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import ModelError
from qdeploy.export.write import qdq_bytes
from qdeploy.profile.bitops import bitops, grid_bits
from tests.nets_frozen import container_codes, random_frozen


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_the_width_of_container_codes_is_found(bits: int, top: int, seed: int) -> None:
    bits = min(bits, top)
    limit = 2 ** (top - 1)
    raw = np.random.default_rng(seed).integers(-limit, limit, 200)
    raw[:4] = -limit, limit - 1, 0, -1  # both ends and two neighbours, so that the grid shows
    codes = container_codes(raw, bits, top)
    assert grid_bits(codes) == bits


def test_grids_of_odd_tensors() -> None:
    assert grid_bits(np.zeros(5, np.int8)) == 1
    assert grid_bits(np.array([-128, 127], np.int8)) == 8
    assert grid_bits(np.array([0, 255], np.uint8)) == 8
    assert grid_bits(np.array([-64, -32, 0, 32], np.int8) + 15) == 2
    assert grid_bits(np.zeros(0, np.int8)) == 1


def test_counts_of_a_network(tmp_path: Path) -> None:
    net = random_frozen(0, bits=3, top=4, width=8, size=8, channels=3, blocks=2)
    path = tmp_path / "m.onnx"
    path.write_bytes(qdq_bytes(net))
    found = bitops(path)
    rows = {row["layer"]: row for row in found["layers"]}
    assert set(rows) == set(net.weights)
    assert rows["stem"] == {
        "layer": "stem", "macs": 8 * 8 * 8 * 27, "weight_bits": 8, "activation_bits": 8, "bitops": 8 * 8 * 8 * 27 * 64,
    }  # fmt: skip
    assert rows["block1.conv1"]["macs"] == 4 * 4 * 16 * 8 * 9
    for name, row in rows.items():
        assert row["weight_bits"] == net.spec[name].weight_bits
        assert row["activation_bits"] == net.spec[name].activation_bits
        assert row["bitops"] == row["macs"] * row["weight_bits"] * row["activation_bits"]
    total = found["total"]
    assert total["bitops"] == {
        "value": sum(r["bitops"] for r in rows.values()),
        "unit": "bitops",
        "source": "predicted",
    }
    assert total["complexity"]["value"] == total["bitops"]["value"] / 64


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError):
        bitops(path)
