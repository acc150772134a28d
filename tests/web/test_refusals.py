"""Both parsers give the same verdict on every manifest, release pointer and piece, sound or not."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import pytest

from qdeploy.bundle.codec import decode
from qdeploy.bundle.manifest import Release, manifest_bytes, parse_manifest, parse_release, release_bytes
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json
from tests.bundle.test_manifest import BREACHES, A, legal
from tests.web.agent import Agent, Refused, text

ODD: list[Any] = [None, True, False, -1, 0, 1, 2, 3, 7, 255, 1 << 31, (1 << 53) - 1, 1 << 53, 1.0, 1.5, 0.0, -0.0, 1e-5]
ODD += [1e16, 1e300, "", "../..", "a", "é", "a\n", "😀", A, A.upper(), "x" * 101, [], [[]], [0], {}, {"a": 1}, [1, 2]]


def python_accepts(parse: Any, data: bytes) -> bool:
    try:
        parse(data)
    except BundleError:
        return False
    return True


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
            found += [(value, key), *spots(child)]
    return found


@pytest.mark.parametrize("name", BREACHES)
def test_every_known_breach(agent: Agent, name: str) -> None:
    value = json.loads(manifest_bytes(legal()))
    BREACHES[name][0](value)
    assert not agent.accepts("manifest", canonical_json(value))


def test_a_legal_manifest_and_other_forms_of_it(agent: Agent) -> None:
    data = manifest_bytes(legal())
    assert agent.accepts("manifest", data)
    for other in (
        *(data + b"\n", data[:-1], b" " + data, data.replace(b",", b", ", 1), b"\xef\xbb\xbf" + data, b"", b"null\n"),
        data.replace(b'"model"', b'"m\\u006fdel"'),
        data.replace(b'"release":3', b'"release":3,"release":3'),
        data.replace(b"90.5", b"9.05e+1"),
        bytes((16 << 20) + 1),
    ):
        assert not python_accepts(parse_manifest, other)
        assert not agent.accepts("manifest", other)


def test_edits_of_a_manifest(agent: Agent) -> None:
    """Each edit puts something odd in one place, or takes it away."""
    rng = np.random.default_rng(5)
    verdicts = {True: 0, False: 0}
    for _ in range(2500):
        value = json.loads(manifest_bytes(legal()))
        places = spots(value)
        node, key = places[rng.integers(len(places))]
        if rng.random() < 0.15:
            node.pop(key)
        else:
            node[key] = ODD[rng.integers(len(ODD))]
        data = canonical_json(value)
        accepted = python_accepts(parse_manifest, data)
        assert agent.accepts("manifest", data) == accepted, (key, data)
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 20


def test_numbers_and_texts_of_info(agent: Agent) -> None:
    """`info` is where real numbers and texts in any script may stand: their canonical form is the same in both."""
    rng = np.random.default_rng(7)
    numbers = [float(x) for x in rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200)]
    numbers += [0.0, -0.0, 1e15, 1e16, 123456789012345.6, 1e22, 5e-324, math.nextafter(math.inf, 0), 1e-4, 1e-5, 0.1]
    for n in numbers:
        value = json.loads(manifest_bytes(legal()))
        value["levels"][0]["info"] = {"é": n, "\U0001f600": 1, "\uff10": "Größe \U0001f680"}
        data = canonical_json(value)
        assert python_accepts(parse_manifest, data)
        assert agent.accepts("manifest", data), data
        assert not agent.accepts("manifest", data.replace(b"\\u00e9", "é".encode()))


def test_edits_of_a_release(agent: Agent) -> None:
    sound = release_bytes(Release(A, 12, 3, ({"keyid": "k", "signature": "s"},)))
    assert agent.accepts("release", sound)
    rng = np.random.default_rng(6)
    for _ in range(400):
        value = json.loads(sound)
        places = spots(value)
        node, key = places[rng.integers(len(places))]
        node[key] = ODD[rng.integers(len(ODD))]
        data = canonical_json(value)
        assert agent.accepts("release", data) == python_accepts(parse_release, data), data
    for many in ([{"keyid": "k", "signature": "s"}] * 17, [{"keyid": "k", "signature": "s" * 1025}]):
        assert not agent.accepts("release", canonical_json(json.loads(sound) | {"signatures": many}))


def deflated(data: bytes, level: int = 9) -> bytes:
    coder = zlib.compressobj(level, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


def test_pieces(agent: Agent) -> None:
    """Streams cut, extended and with flipped bits decode to the same bytes in both, or in neither."""
    rng = np.random.default_rng(8)
    raw = (rng.integers(0, 4, 300) ** 3).astype(np.uint8).tobytes()
    tries = [(deflated(raw, level), len(raw)) for level in (0, 1, 9)]
    tries += [(coded + more, size) for coded, size in tries for more in (b"\0", coded)]
    tries += [(coded[:cut], size) for coded, size in tries[:3] for cut in (0, 1, len(coded) // 2, len(coded) - 1)]
    tries += [(coded, size + change) for coded, size in tries[:3] for change in (-1, 1)]
    for coded, size in tries[:3]:
        for at in rng.integers(0, len(coded), 60):
            tries.append((coded[:at] + bytes([coded[at] ^ (1 << int(rng.integers(8)))]) + coded[at + 1 :], size))
    taken = 0
    for coded, size in tries:
        try:
            wanted: str | None = text(decode("deflate", coded, size, "it"))
        except BundleError:
            wanted = None
        try:
            found = agent.ask("piece", codec="deflate", data=text(coded), raw=size)
        except Refused:
            found = None
        assert found == wanted, (coded.hex(), size)
        taken += found is not None
    assert 3 <= taken < len(tries) - 20
