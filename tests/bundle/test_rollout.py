"""The rollout: literal bytes, what is refused, and who is a canary."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.rollout import (
    Channels,
    Entry,
    bucket,
    choose,
    metadata_name,
    parse_rollout,
    rollout_bytes,
    rollout_name,
)
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json

DIGEST = "0123456789abcdef" * 4
STABLE = Entry(3, DIGEST, 2048, False, "w3", {"board": "w4"})
ROLLOUT = {"toy": Channels(STABLE, Entry(4, DIGEST, 99, True, percent=10)), "net": Channels()}
GOLDEN = (
    b'{"format":"qdeploy-rollout/1","models":{"net":{"canary":null,"stable":null},"toy":{"canary":{"hold":true,'
    b'"levels":{},"manifest":{"sha256":"' + DIGEST.encode() + b'","size":99},"minimum":null,"percent":10,"release":4},'
    b'"stable":{"hold":false,"levels":{"board":"w4"},"manifest":{"sha256":"' + DIGEST.encode() + b'","size":2048},'
    b'"minimum":"w3","release":3}}}}\n'
)


def test_literal_bytes() -> None:
    assert rollout_bytes(ROLLOUT) == GOLDEN
    assert parse_rollout(GOLDEN) == ROLLOUT
    assert rollout_name(DIGEST) == f"rollout/{DIGEST}.json"
    assert (metadata_name("root", 3), metadata_name("timestamp")) == ("metadata/3.root.json", "metadata/timestamp.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"release":3', b'"release":0'),
        (b'"release":3', b'"release":true'),
        (b'"release":3', b'"release":9007199254740992'),
        (b'"release":3', b'"release":3.0'),
        (b'"release":3', b'"release":3,"x":1'),
        (b'"percent":10', b'"percent":101'),
        (b'"percent":10', b'"percent":0'),
        (b'"percent":10,', b""),
        (b'"size":99', b'"size":16777217'),
        (b'"size":99', b'"size":-1'),
        (b'"hold":true', b'"hold":1'),
        (b'"w3"', b'"../w3"'),
        (b'"w4"', b"4"),
        (b'"board"', b'""'),
        (b'"board"', b'"a\\u0000"'),
        (b'{"canary":null,"stable":null}', b'{"canary":null}'),
        (b'{"canary":null,"stable":null}', b"[]"),
        (b'"net"', b'"a/b"'),
        (b"rollout/1", b"rollout/2"),
        (b'"stable"', b'"beta"'),
        (b"0123", b"0x23"),
        (b'"models":', b'"models": '),
        (b"}\n", b"}"),
        (b'"toy"', b'"net"'),
    ],
)
def test_what_is_refused(old: bytes, new: bytes) -> None:
    assert old in GOLDEN
    with pytest.raises(BundleError, match="rollout"):
        parse_rollout(GOLDEN.replace(old, new, 1))


def test_limits() -> None:
    with pytest.raises(BundleError, match="the limit is 262144"):
        parse_rollout(b" " * 262145)
    with pytest.raises(BundleError, match="models"):
        parse_rollout(rollout_bytes({f"m{i}": Channels() for i in range(65)}))
    with pytest.raises(BundleError, match="out of range"):
        many = {f"c{i}": "w2" for i in range(257)}
        parse_rollout(rollout_bytes({"m": Channels(Entry(1, DIGEST, 1, levels=many))}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["top", "models", "channels", "entry"]))
def test_any_json_is_parsed_or_refused(value: Any, where: str) -> None:
    wrapped = {
        "top": value,
        "models": {"format": "qdeploy-rollout/1", "models": value},
        "channels": {"format": "qdeploy-rollout/1", "models": {"toy": value}},
        "entry": {"format": "qdeploy-rollout/1", "models": {"toy": {"canary": None, "stable": value}}},
    }[where]
    try:
        data = canonical_json(wrapped)
        assert rollout_bytes(parse_rollout(data)) == data
    except BundleError as e:
        assert "\n" not in str(e)


def test_buckets_are_as_the_format_says_and_even() -> None:
    digest = hashlib.sha256(b"toy\ndevice 7").digest()
    assert bucket("toy", "device 7") == int.from_bytes(digest[:8], "big") % 100
    counts = [0] * 100
    for i in range(20000):
        counts[bucket("toy", str(i))] += 1
    assert min(counts) > 120 and max(counts) < 280
    assert any(bucket("toy", str(i)) != bucket("net", str(i)) for i in range(9))


def test_choice() -> None:
    inside = next(str(i) for i in range(999) if bucket("toy", str(i)) == 9)
    outside = next(str(i) for i in range(999) if bucket("toy", str(i)) == 10)
    assert choose(ROLLOUT, "toy", inside, None)[1].release == 4
    assert choose(ROLLOUT, "toy", outside, None) == ("stable", STABLE)
    assert choose(ROLLOUT, "toy", outside, "canary")[0] == "canary"
    assert choose(ROLLOUT, "toy", inside, "stable")[0] == "stable"
    with pytest.raises(BundleError, match="no stable release yet"):
        choose(ROLLOUT, "net", inside, "canary")
    with pytest.raises(BundleError, match="no model 'x' is published: there are net, toy"):
        choose(ROLLOUT, "x", inside, None)
