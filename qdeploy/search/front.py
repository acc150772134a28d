"""The front of a search as a file: what each subnet is said to cost, what was measured, and how to pick one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import ModelError, RecipeError
from qdeploy.files import canonical_json, parse_json, read_bytes
from qdeploy.search.objectives import KEYS, Bound, near, parse_bounds
from qdeploy.space import SubnetSpec

FORMAT = "qdeploy-front/2"
NAME = "front.json"
Bar = tuple[float, float | None]


@dataclass(frozen=True)
class Member:
    """A subnet of a front. `predicted` and `measured`: {Measured.key: value}; `measured` is empty where none was.

    `bars`: {key: (low, high)}, the predicted value's error bar; keys that are counted exactly have none, and a bar
    without an upper end has None there.
    """

    spec: SubnetSpec
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    bars: Mapping[str, Bar] = field(default_factory=dict)

    def value(self, key: str) -> float:
        """Measured where it was, else predicted."""
        return self.measured.get(key, self.predicted[key])


@dataclass(frozen=True)
class Front:
    """Members of one space and run, the objectives of their search, and its targets."""

    space: str
    run: str
    objectives: tuple[str, ...]
    targets: tuple[str, ...]
    members: tuple[Member, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        rows = [
            {
                "spec": m.spec.to_json(),
                "predicted": dict(m.predicted),
                "measured": dict(m.measured),
                "bars": {key: list(bar) for key, bar in m.bars.items()},
            }
            for m in self.members
        ]
        head = {"format": FORMAT, "space": self.space, "run": self.run}
        return canonical_json(
            head | {"objectives": list(self.objectives), "targets": list(self.targets), "members": rows}
        )

    @property
    def measured(self) -> list[Member]:
        """Members that were measured; all where none was."""
        return [m for m in self.members if m.measured] or list(self.members)


def read_front(folder: Path) -> Front:
    """Inverse of `Front.to_bytes`, from a search folder; raises ModelError for anything else."""
    path = Path(folder) / NAME
    value = parse_json(read_bytes(path, "the front", ModelError), str(path), ModelError)
    try:
        if value["format"] != FORMAT:
            raise ModelError(f"{path} has format {value['format']!r}, not {FORMAT}: search again")
        members = tuple(
            Member(
                SubnetSpec.from_json(row["spec"]),
                {k: float(v) for k, v in row["predicted"].items()},
                {k: float(v) for k, v in row["measured"].items()},
                {k: (float(low), None if high is None else float(high)) for k, (low, high) in row["bars"].items()},
            )
            for row in value["members"]
        )
        return Front(
            str(value["space"]), str(value["run"]), tuple(value["objectives"]), tuple(value["targets"]), members
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecipeError) as e:
        raise ModelError(f"{path} is no front of `qdeploy search` ({e}): search again") from e


def minimised(key: str, value: float) -> float:
    """The value with the sign that makes less better."""
    return -value if KEYS[key.partition("@")[0]].maximised else value


def feasible(members: Sequence[Member], bounds: Sequence[Bound]) -> list[Member]:
    """Those that keep all bounds; RecipeError that says the nearest reachable values when there are none."""
    found = [m for m in members if all(b.excess(m.value(b.what.key)) <= 0 for b in bounds)]
    if found:
        return found

    def excess(member: Member) -> float:
        return sum(max(0.0, float(b.excess(member.value(b.what.key)))) for b in bounds)

    nearest, parts = min(members, key=excess), []
    for b in bounds:
        values = [m.value(b.what.key) for m in members]
        reached = f"the greatest is {max(values):.4g}" if b.sign == ">=" else f"the least is {min(values):.4g}"
        has = f"the nearest subnet has {nearest.value(b.what.key):.4g}"
        parts.append(f"{b.what.key} {b.sign} {b.limit:g} ({reached}, {has})")
    said = ", ".join(parts)
    raise RecipeError(f"no subnet of the front keeps {said}: ease a limit, or search with these limits")


def knee(members: Sequence[Member], objectives: Sequence[str]) -> Member:
    """The member farthest from the plane through the extreme members, towards the better side (Das 1999).

    Objectives are scaled to the front's ranges, so the plane's normal is the diagonal.
    """
    table = np.array([[minimised(key, m.value(key)) for key in objectives] for m in members])
    low, high = table.min(0), table.max(0)
    scaled = (table - low) / np.where(high > low, high - low, 1.0)
    return members[int(np.argmin(scaled.sum(1)))]


def pick(front: Front, limits: Sequence[str], at_knee: bool, floors: Sequence[str] = ()) -> Member:
    """The best member within the limits: at the knee, or the one that is best in the first objective."""
    if not front.members:
        raise RecipeError("the front is empty: search again")
    bounds = parse_bounds(limits, front.targets, floors)
    for bound in bounds:
        if bound.what.key not in front.members[0].predicted:
            known = list(front.members[0].predicted)
            raise RecipeError(f"the search has no {bound.what.key}: {near(bound.what.key, known)}")
    members = feasible(front.measured, bounds)
    if at_knee:
        return knee(members, front.objectives)
    return min(members, key=lambda m: [minimised(key, m.value(key)) for key in front.objectives])


@dataclass(frozen=True)
class Foretold:
    """A subnet of a round's front: what was predicted of it before it was measured, and what was measured."""

    round: int
    spec_id: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]


def agreement(rows: Sequence[Foretold], front: Front, keys: Sequence[str]) -> list[str]:
    """A sentence a round: how many of its measured subnets are on the final front, and the mean errors of `keys`."""
    held, lines = {member.spec.id for member in front.members}, []
    for number in sorted({row.round for row in rows}):
        part = [row for row in rows if row.round == number]
        errors = []
        for key in keys:
            pairs = np.array([(row.predicted[key], row.measured[key]) for row in part])
            apart = np.abs(pairs[:, 0] - pairs[:, 1])
            relative = f"{(apart / pairs[:, 1]).mean():.1%}"
            errors.append(f"{key} {f'{apart.mean():.2f} points' if key == 'accuracy' else relative}")
        kept = sum(row.spec_id in held for row in part)
        said = f"round {number + 1}: {len(part)} of its front measured, {kept} of these on the final front"
        lines.append(said + (f"; mean error of what was predicted: {', '.join(errors)}" if errors else ""))
    return lines


def table(front: Front) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the front as CSV has them: spec id, predicted and measured values, error bars."""
    names = list(front.members[0].predicted) if front.members else []
    barred = list(front.members[0].bars) if front.members else []
    head = ["spec_id", *(f"predicted {n}" for n in names), *(f"measured {n}" for n in names)]
    head += [f"{end} {n}" for n in barred for end in ("low", "high")]
    rows = []
    for m in front.members:
        bars = ["" if end is None else end for n in barred for end in m.bars[n]]
        rows.append([m.spec.id, *(m.predicted[n] for n in names), *(m.measured.get(n, "") for n in names), *bars])
    return head, rows
