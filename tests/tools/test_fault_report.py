"""The page of fault counts."""

from __future__ import annotations

from tools.fault_report import merge, page

ROWS = [
    {"suite": "kills", "test": "a[0]", "seconds": 1.0, "kills": 900, "worst_bytes": 7, "calls": 3},
    {"suite": "kills", "test": "a[1]", "seconds": 2.0, "kills": 200, "worst_bytes": 9, "calls": 3, "pull": 1},
    {"suite": "flips", "test": "b", "seconds": 1.0, "flips": 5},
    {"suite": "flips", "test": "b", "seconds": 1.0, "flips": 6},
]


def test_counts_add_up() -> None:
    assert merge(ROWS) == {
        "kills": (2, {"kills": 1100, "worst_bytes": 9, "calls": 3, "pull": 1}),
        "flips": (1, {"flips": 6}),
    }


def test_page() -> None:
    text = page(ROWS, "a machine", "2026-01-02")
    assert "2026-01-02, a machine." in text
    assert text.index("| flips | 1 | flips 6 |") < text.index(
        "| kills | 2 | kills 1,100, worst bytes 9, calls 3, pull 1 |"
    )
