import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.planes import container, join, split_cheapest
from qdeploy.bundle.tables import Tensor, TensorLevel
from qdeploy.bundle.validate import code_range
from qdeploy.errors import BundleError
from qdeploy.nesting import Nested, capped, lowest, nest
from tests.nets_frozen import container_codes


def raw_codes(seed: int, bits: int, size: int, spread: float = 2.2) -> np.ndarray:
    half = 2 ** (bits - 1)
    real = np.random.default_rng(seed).normal(0, half / spread, (size, 1))
    return np.clip(np.rint(real), -half, half - 1).astype(np.int64)


def rebuilt(nested: Nested, level: str, dtype: str) -> np.ndarray:
    entry = nested.levels[level]
    low, high = code_range(Tensor(nested.name, nested.bits, ()), entry, nested.bits)
    assert np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max
    return container((nested.u.astype(int) >> (nested.bits - entry.bits)).astype(np.uint8), entry, dtype)


SCHEMES = {
    "compensated": container_codes,
    "plain": lambda raw, bits, top: (raw >> (top - bits)).astype(np.int8),
    "shifted": lambda raw, bits, top: (raw >> (top - bits) << (8 - bits)).astype(np.int8),
    "unsigned": lambda raw, bits, top: ((raw + 2 ** (top - 1)) >> (top - bits)).astype(np.uint8),
}


@given(
    st.integers(0, 10**6),
    st.integers(2, 8),
    st.sets(st.integers(2, 8), min_size=1),
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from([1, 2, 3, 10, 2000]),
)
def test_every_truncation_nests(seed: int, top: int, levels: set[int], scheme: str, size: int) -> None:
    raw = raw_codes(seed, top, size)
    codes = {f"w{bits}": SCHEMES[scheme](raw, bits, top) for bits in {min(b, top) for b in levels} | {top}}
    nested = nest("t", codes)
    if nested is None:
        assert all((array == array.flat[0]).all() for array in codes.values())
        return
    assert nested.u.shape == raw.shape and nested.u.max() < 1 << nested.bits and nested.bits <= top
    for level, array in codes.items():
        assert nested.levels[level].bits <= int(level[1:])
        assert np.array_equal(rebuilt(nested, level, array.dtype.name), array)
    order = sorted(codes, key=lambda level: int(level[1:]))
    assert [nested.levels[level].bits for level in order] == sorted(entry.bits for entry in nested.levels.values())


@pytest.mark.parametrize("top", range(2, 9))
def test_nominal_bits_on_full_tensors(top: int) -> None:
    """D1's shift C - b and offset m_b, for every top."""
    raw = np.tile(np.arange(-(2 ** (top - 1)), 2 ** (top - 1)), 2)[:, None]
    nested = nest("t", {f"w{bits}": container_codes(raw, bits, top) for bits in range(2, top + 1)})
    assert nested is not None and nested.bits == top
    full = 7 if top <= 6 else 8
    for bits in range(2, top + 1):
        middle = 2 ** (full - 1 - bits) - 2 ** (full - 1 - top) if bits < top else 0
        entry = nested.levels[f"w{bits}"]
        assert (entry.bits, entry.shift, entry.offset) == (bits, full - bits, int(np.floor(middle)))


def test_constant_at_all_levels_is_no_weight() -> None:
    assert nest("t", {"a": np.full((3, 3), 5, np.int8), "b": np.full((3, 3), 7, np.int8)}) is None


def test_constant_at_a_lower_level_needs_no_planes() -> None:
    nested = nest("t", {"low": np.full((2, 2), 9, np.int8), "top": np.array([[1, 2], [3, 1]], np.int8)})
    assert nested is not None and nested.levels["low"] == TensorLevel(0, 0, 9)
    assert np.array_equal(rebuilt(nested, "low", "int8"), np.full((2, 2), 9))


def test_one_sign_needs_no_sign_plane() -> None:
    nested = nest("t", {"a": np.arange(16, dtype=np.int8)[:, None]})
    assert nested is not None and nested.bits == 4
    assert np.array_equal(rebuilt(nested, "a", "int8")[:, 0], np.arange(16))


def test_rounded_levels_are_refused_with_counts() -> None:
    raw = raw_codes(0, 4, 1000)
    low = np.clip(np.rint(raw / 4), -2, 1).astype(np.int8)  # rounds half to even: no truncation
    with pytest.raises(BundleError, match=r"tensor conv.weight does not nest: the codes of level w2 are no prefix"):
        nest("conv.weight", {"w4": raw.astype(np.int8), "w2": low})


def test_independent_levels_are_refused_with_counts() -> None:
    top = raw_codes(0, 4, 1000).astype(np.int8)
    low = (top >> 2).astype(np.int8)
    low[7] += 1
    with pytest.raises(BundleError, match=r"tensor t does not nest: 1 of 1000 weights of level w2 .* at level w4"):
        nest("t", {"w4": top, "w2": low})


# ---- channels with fewer planes --------------------------------------------------------------------------------------


def with_widths(widths: list[int], top: int, size: int = 400, seed: int = 0) -> np.ndarray:
    """Container codes of 7 bits [O, size]: channel o has random codes of widths[o] bits on the grid of that width."""
    random = np.random.default_rng(seed)
    rows = [random.integers(-(1 << w >> 1), 1 << w >> 1, size) << (7 - w) if w else np.zeros(size) for w in widths]
    rows[widths.index(top)][:2] = -64, -64 + (1 << (7 - top))  # the whole grid is in use
    return np.stack(rows).astype(np.int8)


def from_planes(nested: Nested, level: str) -> np.ndarray:
    """A level's codes from the planes alone."""
    parts = split_cheapest(nested.u, nested.bits, lowest(nested), nested.caps)
    raw = [(part.bits, part.layout, b"".join(part.segments)) for part in parts]
    held = nested.levels[level].bits
    prefix = join(raw[: [0, *np.cumsum([bits for bits, _, _ in raw])].index(held)], nested.u.shape, nested.caps)
    return container(prefix, nested.levels[level], "int8", nested.caps)


@pytest.mark.parametrize("widths", [[2, 5, 3, 5, 0, 1, 4], [6, 2, 2, 2], [3, 0, 0]])
def test_caps_are_read_off_the_codes(widths: list[int]) -> None:
    codes = with_widths(widths, max(widths))
    nested = nest("w", {"top": codes})
    assert nested is not None
    found = capped(nested)
    assert found.caps == tuple(widths) and found.levels["top"].bits == max(widths)
    assert np.array_equal(from_planes(found, "top"), codes)


def test_caps_hold_for_every_level_of_a_truncated_ladder() -> None:
    top = with_widths([5, 2, 3, 4], 5)
    levels = {f"w{bits}": ((top.astype(int) >> (7 - bits)) << (7 - bits)).astype(np.int8) for bits in (2, 4, 5)}
    nested = nest("w", levels)
    assert nested is not None
    found = capped(nested)
    assert found.caps == (5, 2, 3, 4) and [found.levels[name].bits for name in levels] == [2, 4, 5]
    for name, codes in levels.items():
        assert np.array_equal(from_planes(found, name), codes)


def test_caps_that_save_nothing_are_left_out() -> None:
    same = nest("w", {"top": with_widths([4, 4], 4)})
    assert same is not None and capped(same) is same
    few = nest("w", {"top": with_widths([3, 4, 3, 4], 4, size=4)})  # a list of caps costs more than 8 zeros
    assert few is not None and capped(few) is few
