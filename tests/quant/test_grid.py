import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.quant.grid import container_bits, container_codes, midpoint

TOPS = st.integers(2, 8)


def all_codes(top: int) -> np.ndarray:
    return np.arange(-(1 << (top - 1)), 1 << (top - 1))


@pytest.mark.parametrize("top", range(2, 9))
def test_container_codes_are_the_midpoints_of_the_top_codes_they_stand_for(top: int) -> None:
    fine = 2.0 ** (top - container_bits(top))
    for bits in range(2, top + 1):
        codes = container_codes(all_codes(top), bits, top)
        half = (2 ** (top - bits) - 1) / 2  # eq. 6 in units of the top step: w_i 2^(n-i) + (2^(n-i) - 1) / 2
        expected = (all_codes(top) >> (top - bits)) * 2.0 ** (top - bits) + half
        floored = top == 8 and bits < 8  # half a unit does not exist at 8 bits: floored
        np.testing.assert_array_equal(codes * fine, np.floor(expected) if floored else expected)


@pytest.mark.parametrize("top", range(2, 7))
def test_up_to_six_bits_pair_sums_cannot_saturate(top: int) -> None:
    for bits in range(2, top + 1):
        assert np.abs(container_codes(all_codes(top), bits, top).astype(int)).max() <= 64


@given(TOPS, st.data())
def test_every_width_nests_in_the_next(top: int, data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, top))
    codes = container_codes(all_codes(top), bits, top).astype(int)
    raw = (codes - midpoint(bits, top)) >> (container_bits(top) - bits)
    np.testing.assert_array_equal(raw, all_codes(top) >> (top - bits))


def test_without_compensation_nothing_is_added() -> None:
    codes = container_codes(np.array([-8, -1, 0, 7]), 2, 4, compensation=False)
    assert codes.tolist() == [-64, -32, 0, 32]
