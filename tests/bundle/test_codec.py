import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.codec import decode, encode, encode_bits
from qdeploy.errors import BundleError


@given(st.binary(max_size=3000))
def test_round_trip(data: bytes) -> None:
    codec, coded = encode(data)
    assert decode(codec, coded, len(data), "it") == data
    assert len(coded) <= max(len(data), 2)


@given(st.lists(st.binary(max_size=500), max_size=6))
def test_blocks_do_not_matter_to_the_decoder(segments: list[bytes]) -> None:
    codec, coded = encode_bits(segments)
    data = b"".join(segments)
    assert decode(codec, coded, len(data), "it") == data


def test_cuts_pay_where_statistics_change() -> None:
    segments = [bytes(i % 3 for i in range(8000)), bytes(200 + i * i % 5 for i in range(8000))]
    assert encode_bits(segments)[0] == "deflate"


def deflated(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


BAD = {
    "bomb": (deflated(bytes(10_000_000)), 1000),
    "too short": (deflated(b"abc"), 4),
    "too long": (deflated(b"abcd"), 3),
    "truncated": (deflated(bytes(range(256)))[:-3], 256),
    "trailing byte": (deflated(b"abc") + b"\0", 3),
    "no final block": (deflated(b"abc" * 50)[:-1], 150),
    "not deflate": (b"\xff\xff\xff", 3),
    "empty": (b"", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_streams(name: str) -> None:
    coded, raw = BAD[name]
    with pytest.raises(BundleError, match="the piece is damaged"):
        decode("deflate", coded, raw, "the piece")


def test_raw_of_wrong_length() -> None:
    with pytest.raises(BundleError, match="another size than 4 bytes"):
        decode("raw", b"abc", 4, "the piece")
