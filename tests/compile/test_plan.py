"""The memory plan: tensors that live at once never share bytes, and the arena is near what none can go below."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qdeploy.compile.plan import plan
from qdeploy.compile.program import ALIGNMENT, aligned

Spans = dict[str, tuple[int, int]]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[dict[str, int], Spans]:
    count = draw(st.integers(0, 30))
    sizes = {f"t{i}": draw(st.integers(1, 5000)) for i in range(count)}
    firsts = [draw(st.integers(0, 20)) for _ in range(count)]
    return sizes, {f"t{i}": (first, first + draw(st.integers(0, 8))) for i, first in enumerate(firsts)}


@given(tensors())
def test_tensors_that_live_at_once_share_nothing(given_tensors: tuple[dict[str, int], Spans]) -> None:
    sizes, lives = given_tensors
    found = plan(sizes, lives)
    assert set(found.offsets) == set(lives)
    assert all(offset % ALIGNMENT == 0 for offset in found.offsets.values())
    names = list(lives)
    for i, a in enumerate(names):
        assert found.offsets[a] + sizes[a] <= found.bytes
        for b in names[:i]:
            if lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]:
                below = found.offsets[a] + sizes[a] <= found.offsets[b]
                assert below or found.offsets[b] + sizes[b] <= found.offsets[a], (a, b)
    most = max((sum(aligned(sizes[n]) for n, (f, t) in lives.items() if f <= s <= t) for s in range(30)), default=0)
    assert found.bound == most <= found.bytes <= found.by_size


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = {"a": 640, "b": 6400, "c": 3200, "d": 1280}
    lives = {"a": (0, 1), "b": (1, 2), "c": (2, 3), "d": (3, 4)}
    assert plan(sizes, lives).bytes == plan(sizes, lives).bound == 9600


def test_nothing_to_plan() -> None:
    assert plan({}, {}).bytes == 0
