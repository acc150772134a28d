from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qdeploy.errors import DataError
from qdeploy.serve.byte_log import ByteLog, Sent, read_byte_log
from qdeploy.serve.logs import LineFile, common_line


def test_a_full_disk_costs_lines_and_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    with LineFile(Path("/dev/full"), "byte log") as log:
        for _ in range(3):
            log.write("x")
        assert log.lost == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert "No space left" in line and "serving goes on" in line


CHILD = """
import resource, sys
from pathlib import Path
from qdeploy.serve.logs import LineFile
path = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with LineFile(path, "access log") as log:
    log.write("first")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    log.write("torn line")
    log.write("lost line")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.write("whole again")
    print(log.lost)
"""


def test_a_torn_line_is_ended_and_the_log_recovers(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "log"], capture_output=True, text=True, check=True)
    assert (tmp_path / "log").read_text() == "first\ntorn\nwhole again\n"
    assert done.stdout == "2\n"
    failed, again = done.stderr.splitlines()
    assert "lines are lost" in failed and "written again; 2 lines" in again


def test_rows_come_back(tmp_path: Path) -> None:
    row = Sent("GET", "/objects/\udcff\u20ac", None, 200, 0, 5, 5)
    with ByteLog(tmp_path / "log") as log:
        log.row(row)
    assert read_byte_log(tmp_path / "log") == [row]
    with open(tmp_path / "log", "a") as file:
        file.write('{"method": "GE')
    with pytest.raises(DataError, match="byte log"):
        read_byte_log(tmp_path / "log")


def test_a_line_in_the_common_format_cannot_be_forged() -> None:
    line = common_line("::1", 'GET /"\\\r\n127.0.0.1 - - \x1b[2J\udcff HTTP/1.1', 404, 0)
    assert "\n" not in line and "\r" not in line and "\x1b" not in line
    assert line.startswith("::1 - - [") and line.endswith('" 404 0')
    assert line.count('"') - line.count('\\"') == 2
