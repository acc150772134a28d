from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.serve.ranges import Span, UnsatisfiableRange, not_modified, parse_range, range_applies


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", Span(0, 1)),
        ("bytes=2-5", Span(2, 6)),
        ("BYTES=2-5", Span(2, 6)),
        ("bytes= 7- ", Span(7, 10)),
        ("bytes=7-999999999999", Span(7, 10)),
        ("bytes=-3", Span(7, 10)),
        ("bytes=-99", Span(0, 10)),
    ],
)
def test_a_single_range(header: str, span: Span) -> None:
    assert parse_range(header, 10) == span


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "lines=0-1", "bytes=a-b", "bytes=0-" + "9" * 30,
     "bytes=\u0661-\u0662", "bytes 0-1", "bytes=--1"],
)  # fmt: skip
def test_what_is_no_single_range_asks_for_the_whole_file(header: str | None) -> None:
    assert parse_range(header, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=-1", 0)]
)
def test_a_range_behind_the_end(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableRange):
        parse_range(header, size)


@given(st.text(max_size=30), st.integers(0, 50))
def test_any_header_gives_a_span_inside_the_file(text: str, size: int) -> None:
    try:
        span = parse_range("bytes=" + text, size)
    except UnsatisfiableRange:
        return
    assert span is None or 0 <= span.start < span.stop <= size


@pytest.mark.parametrize(
    ("header", "answer"),
    [(None, False), ("*", True), ('"a"', True), ('W/"a"', True), ('"b", "a"', True), ('"b"', False), ("a", False)],
)
def test_if_none_match(header: str | None, answer: bool) -> None:
    assert not_modified(header, "a") is answer


@pytest.mark.parametrize(
    ("header", "answer"),
    [(None, True), ('"a"', True), ('W/"a"', False), ('"b"', False), ("Wed, 21 Oct 2015 07:28:00 GMT", False)],
)
def test_if_range(header: str | None, answer: bool) -> None:
    assert range_applies(header, "a") is answer
