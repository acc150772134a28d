"""Parsers of what comes from a network or lies on a disk, under a coverage-guided fuzzer with bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults.conftest import SHARE, Amount, Record
from tests.faults.fuzzing import PARSERS


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_brings_a_parser_down(name: str, amount: Amount, record: Record) -> None:
    seconds = amount(1, 600)
    command = [sys.executable, "-m", "tests.faults.fuzzing", name, str(seconds), "1" if SHARE else "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout)
    assert counts["trials"] > 100 and counts["kept"] > 2
    record(f"fuzzing of the parser {name}", **counts)
