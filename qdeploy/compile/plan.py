"""Where activations lie in the arena: two that live at the same time never share bytes.

Placing tensors so that the arena is least is NP-hard (dynamic storage allocation). Placing them one after another, each
at the lowest offset that is free while it lives, is near the bound for networks; which order is best depends on the
network, so several are tried (Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdeploy.compile.program import aligned


@dataclass(frozen=True)
class Interval:
    """A tensor of `size` bytes that lives from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Interval) -> bool:
        """Whether both live at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offset of each tensor, bytes in all, and two figures to judge them by."""

    offsets: dict[str, int]
    bytes: int
    by_size: int  # what placing the largest first needs
    bound: int  # the largest sum of tensors that live at once: no plan needs less


def lowest_offset(interval: Interval, placed: Sequence[tuple[int, Interval]]) -> int:
    """The lowest offset where `interval` meets none of those `placed`."""
    taken = sorted((offset, offset + other.size) for offset, other in placed if interval.meets(other))
    start = 0
    for low, high in taken:
        if low - start >= interval.size:
            break
        start = max(start, high)
    return start


def place(order: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """Offsets when tensors are placed in `order`, and bytes in all."""
    placed: list[tuple[int, Interval]] = []
    for interval in order:
        placed.append((lowest_offset(interval, placed), interval))
    return {i.name: offset for offset, i in placed}, max((offset + i.size for offset, i in placed), default=0)


def orders(intervals: Sequence[Interval], live: Mapping[int, int]) -> list[list[Interval]]:
    """Orders worth trying, largest first being the first; `live`: bytes that live at each step."""

    def breadth(i: Interval) -> int:
        return max(live[step] for step in range(i.first, i.last + 1))

    keys = [
        lambda i: (-i.size, i.first),
        lambda i: (-breadth(i), -i.size, i.first),
        lambda i: (-i.size * (i.last - i.first + 1), i.first),
        lambda i: (i.first - i.last, -i.size, i.first),
        lambda i: (i.first, -i.size),
        lambda i: (-i.last, -i.size),
    ]
    return [sorted(intervals, key=key) for key in keys]


def plan(sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]) -> Plan:
    """The best of several greedy plans. `sizes`: bytes of each tensor; `lives`: first and last step of each."""
    intervals = [Interval(name, aligned(sizes[name]), *span) for name, span in lives.items()]
    live: dict[int, int] = {}
    for interval in intervals:
        for step in range(interval.first, interval.last + 1):
            live[step] = live.get(step, 0) + interval.size
    found = [place(order) for order in orders(intervals, live)]
    offsets, total = min(found, key=lambda one: one[1])
    return Plan(offsets, total, found[0][1], max(live.values(), default=0))
