"""A coverage-guided fuzzer in plain Python for the parsers of what comes from a network or lies on a disk.

    python -m tests.faults.fuzzing PARSER SECONDS [SEED]

Inputs begin with legal ones; JSON is mutated as a tree and as text, the rest as bytes. An input that runs a pair of
lines of qdeploy that none ran before is kept and mutated further. Each parser must answer, or raise a QDeployError of
one printable line; what it accepts must be right, see `PARSERS`. Runs in LIMIT bytes of address space beyond those at
its start, and prints counts as JSON; the first breach ends it with the input's bytes.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from qdeploy.bundle.manifest import manifest_bytes, parse_manifest, parse_release, release_bytes
from qdeploy.bundle.rollout import parse_rollout, rollout_bytes
from qdeploy.client import trust
from qdeploy.client.journal import format_record, parse_journal
from qdeploy.client.plan import Extent
from qdeploy.client.settings import parse_settings, settings_bytes
from qdeploy.client.state import current_bytes, parse_current
from qdeploy.errors import QDeployError
from qdeploy.files import canonical_json

LIMIT = 512 << 20
MOST_TEXT = 16_000  # characters of an error
MOST_INPUT = 1 << 18
A, B = "a" * 64, "0123456789abcdef" * 4
CORPUS = 400


class Breach(Exception):
    """A parser did what it must not do."""


def canonical(parse: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> Callable[[bytes], None]:
    """What is accepted has one byte form: these bytes."""

    def check(data: bytes) -> None:
        if write(parse(data)) != data:
            raise Breach("accepted bytes that are not the value's own")

    return check


def same_again(parse: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> Callable[[bytes], None]:
    """What is accepted is written as bytes that mean the same."""

    def check(data: bytes) -> None:
        value = parse(data)
        if parse(write(value)) != value:
            raise Breach("a value does not come back")

    return check


def check_journal(data: bytes) -> None:
    """Only whole records count, and never one whose bytes are not there."""
    for extent in parse_journal(data):
        if format_record(extent).rstrip(b"\n") not in data:
            raise Breach("an extent without a record")


def check_state(data: bytes) -> None:
    """The device's counters."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trust").mkdir()
        (Path(folder) / "trust" / "state.json").write_bytes(data)
        state = trust._read_state(Path(folder))
        if trust._state_bytes(state) != data and type(state.root) is not int:
            raise Breach("counters that are no numbers")


ENTRY = {"hold": False, "levels": {"pi": "w4"}, "manifest": {"sha256": A, "size": 9}, "minimum": "w2", "release": 7}
STATE = {"releases": {"net": [7, ["k1", "k2"]]}, "roles": {"targets": [3, ["k1"]]}, "rollout": None, "root": 1}


def seeds(name: str) -> list[bytes]:
    """Legal inputs of a parser."""
    if name == "manifest":
        from tests.bundle.test_manifest import legal

        return [manifest_bytes(legal())]
    if name == "release":
        entry = {"keyid": "k", "signature": "s"}
        pointer = {"format": "qdeploy-release/1", "manifest": {"sha256": A, "size": 9}, "release": 7}
        return [canonical_json(pointer | {"signatures": rows}) for rows in ([], [entry])]
    if name == "rollout":
        channels = {"canary": ENTRY | {"percent": 10}, "stable": ENTRY}
        return [canonical_json({"format": "qdeploy-rollout/1", "models": {"net": channels}})]
    if name == "current":
        row = {"url": "http://h", "manifest": A, "level": "w2", "artifact": 0, "target": None, "previous": [B, "w3"]}
        return [canonical_json({"format": "qdeploy-device/1"} | row)]
    if name == "settings":
        from qdeploy.client.settings import Settings

        return [settings_bytes(Settings("id", ("http://h",), "net", "canary", 9, "w2", "w4", 7, False, None, 3))]
    if name == "state":
        return [trust._state_bytes(trust._State()), signed_state(STATE)]
    records = [format_record(Extent(A, 0, 65536, B), held) for held in (True, False)]
    return [b"".join(records), records[0] * 3]


def signed_state(value: Any) -> bytes:
    """The file of counters with a right digest, whatever they are."""
    from qdeploy.files import sha256

    return canonical_json({"format": trust.FORMAT, "sha256": sha256(canonical_json(value)), "state": value})


PARSERS: dict[str, Callable[[bytes], None]] = {
    "manifest": canonical(parse_manifest, manifest_bytes),
    "release": canonical(parse_release, release_bytes),
    "rollout": canonical(parse_rollout, rollout_bytes),
    "current": same_again(parse_current, current_bytes),
    "settings": same_again(parse_settings, settings_bytes),
    "state": check_state,
    "journal": check_journal,
}


# --- mutation --------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 8, 255, 1 << 31, (1 << 31) - 1, 1 << 53, (1 << 53) - 1, -(1 << 63), 10**400),
    *(0.5, -0.0, 1e308, 5e-324, "", "a", "A" * 64, A, B, "../../etc/passwd", "\x00", "\n", "\ud800", "x" * 600, "é"),
    *([], [[]], {}, {"": {}}, [0] * 9, ["raw"], "deflate", "sorted", "spaced", "planes", "side", "w2", "\u202e"),
]


def spots(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            found.append((node, key))
            waiting.append(node[key])
    return found


def odd(rng: random.Random) -> Any:
    """One of ODD, the caller's to change."""
    return copy.deepcopy(rng.choice(ODD))


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value."""
    places = spots(value)
    if not places or len(places) > 5000:
        return odd(rng)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        node[key] = odd(rng)
    elif kind == 1 and isinstance(node[key], int):
        node[key] += rng.choice((-1, 1, 1 << rng.randrange(60), -(1 << rng.randrange(60))))
    elif kind == 2:
        other, where = rng.choice(places)
        node[key] = json.loads(json.dumps(other[where]))
    elif kind == 3 and isinstance(node, dict):
        node[rng.choice(["", "x", "format", "caps", "golden", "info", "percent"])] = node.pop(key)
    elif kind == 4 and isinstance(node, dict):
        node[rng.choice(["x", "caps", "golden", "info", "percent", "\u202e"])] = odd(rng)
    elif kind == 5:
        del node[key]
    elif kind == 6 and isinstance(node, list):
        node[key:key] = [node[key]] * rng.choice((1, 2, 9, 70))
    elif isinstance(node[key], str):
        text = node[key]
        at = rng.randrange(len(text) + 1)
        node[key] = text[:at] + rng.choice(("", "a", "0", "\x7f", "g", text)) + text[at + rng.randrange(2) :]
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change bytes: flips, cuts, repeats, deep nests, doubled keys, numbers and constants that JSON writers avoid."""
    at = rng.randrange(len(data) + 1)
    stop = min(len(data), at + rng.choice((0, 1, 1, 4, 40)))
    depth = rng.choice((300, 900, 960, 980, 20_000))
    new = rng.choice(
        (
            b"",
            bytes([rng.randrange(256)]),
            data[at:stop] * 2,
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth,
            b'"a":1,"a":2,',
        )
        + (b"1e999", b"-0", b"NaN", b"Infinity", b"1" * 5000, b"1.0", b"\\ud800", b"\xef\xbb\xbf", b"\x00", b"\n")
    )
    return data[:at] + new + data[stop:]


def mutate(data: bytes, name: str, rng: random.Random) -> bytes:
    """A neighbour of `data`."""
    if name != "journal" and len(data) < 20_000 and rng.random() < 0.8:
        try:
            value = json.loads(data)
            inner = value["state"] if name == "state" and rng.random() < 0.8 else value
            for _ in range(rng.choice((1, 1, 2, 5))):
                inner = mutate_tree(inner, rng)
            return (signed_state(inner) if name == "state" else canonical_json(inner))[:MOST_INPUT]
        except (ValueError, RecursionError, TypeError, KeyError):
            pass
    return mutate_bytes(data, rng)[:MOST_INPUT]


# --- the loop --------------------------------------------------------------------------------------------------------


class Coverage:
    """Pairs of consecutive lines of qdeploy that an input runs."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.fresh = False

    def _global(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if "/qdeploy/" not in name:
            return None
        last = 0

        def lines(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            pair = (name, last, frame.f_lineno)
            if pair not in self.seen:
                self.seen.add(pair)
                self.fresh = True
            last = frame.f_lineno
            return lines

        return lines

    def run(self, check: Callable[[bytes], None], data: bytes) -> bool:
        """True when it was refused; raises Breach."""
        self.fresh = False
        sys.settrace(self._global)
        try:
            check(data)
        except QDeployError as e:
            sys.settrace(None)
            text = str(e)
            if not text.isprintable() or not text or len(text) > MOST_TEXT:
                raise Breach(f"an error that is not one line: {text[:300]!r}") from e
            return True
        except Breach:
            raise
        except Exception as e:
            sys.settrace(None)
            raise Breach(f"{type(e).__name__}: {e}"[:500]) from e
        finally:
            sys.settrace(None)
        return False


def fuzz(name: str, seconds: float, seed: int = 0) -> dict[str, int]:
    """Counts of what was tried in so many seconds of processor time; raises Breach with the input's bytes."""
    rng, coverage, check = random.Random(seed), Coverage(), PARSERS[name]
    corpus, runs, refused = seeds(name), 0, 0
    for data in corpus:
        if coverage.run(check, data):
            raise Breach(f"a legal input is refused: {data[:300]!r}")
    end = time.process_time() + seconds
    while time.process_time() < end:
        data = mutate(rng.choice(corpus), name, rng)
        try:
            refused += coverage.run(check, data)
        except Breach as e:
            raise Breach(f"{e} after {data[:4000]!r} ({len(data)} bytes)") from e
        runs += 1
        if coverage.fresh and len(data) < MOST_INPUT:
            corpus.append(data)
            if len(corpus) > CORPUS:
                del corpus[len(seeds(name))]
    return {"trials": runs, "refused": refused, "lines": len(coverage.seen), "kept": len(corpus), "wrong": 0}


def confine() -> None:
    """LIMIT bytes more than now, no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT,) * 2)


def main() -> None:
    name, seconds, *seed = sys.argv[1:]
    seeds(name)  # what they import counts for nothing
    confine()
    try:
        print(json.dumps(fuzz(name, float(seconds), *map(int, seed))))
    except Breach as e:
        raise SystemExit(f"{name}: {e}") from e


if __name__ == "__main__":
    main()
