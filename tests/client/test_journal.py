from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qdeploy.client.journal import format_record, format_records, parse_journal
from qdeploy.client.plan import Extent

digests = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
extents = st.builds(Extent, digests, st.integers(0, 2**31), st.integers(0, 2**31), digests)
A = Extent("a" * 64, 0, 10, "b" * 64)
B = Extent("a" * 64, 10, 99, "c" * 64)


def test_the_bytes_of_a_record() -> None:
    assert format_record(A) == b"+ " + b"a" * 64 + b" 0 10 " + b"b" * 64 + b" 5093b160\n"
    assert parse_journal(format_record(A)) == {A}


@given(st.lists(extents, max_size=5))
def test_round_trip(rows: list[Extent]) -> None:
    assert parse_journal(format_records(rows)) == set(rows)


def test_struck_records_are_gone_and_may_come_back() -> None:
    data = format_records([A, B]) + format_record(A, held=False)
    assert parse_journal(data) == {B}
    assert parse_journal(data + format_record(A)) == {A, B}


def test_a_torn_record_says_nothing() -> None:
    data = format_records([A, B])
    cut = len(format_record(A))
    for end in range(len(data)):
        assert parse_journal(data[:end]) == ({A} if end >= cut else set())


def test_a_record_behind_a_torn_one_counts() -> None:
    assert parse_journal(format_record(A)[:50] + b"\n" + format_record(B)) == {B}


@given(st.integers(0, len(format_record(A)) - 2), st.integers(1, 255))
def test_a_changed_byte_says_nothing(at: int, change: int) -> None:
    data = bytearray(format_record(A))
    data[at] ^= change
    assert parse_journal(bytes(data)) == set()


@given(st.binary(max_size=300))
def test_noise_holds_nothing(noise: bytes) -> None:
    assert parse_journal(noise) == set()
