"""The process of one device run (process.py): `python -m qdeploy.farm.child local|rpc JOB`, JOB a JSON object."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from qdeploy.errors import QDeployError
from qdeploy.farm.process import read_params, say

Job = dict[str, Any]


def idlest_cpu(seconds: float = 0.1) -> int | None:
    """Of the processors that this process may use, the one that was idle longest just now; None where /proc is not."""

    def idle() -> dict[int, int]:
        lines = Path("/proc/stat").read_text().splitlines()
        rows = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
        return {int(row[0][3:]): int(row[4]) for row in rows}

    try:
        before = idle()
        time.sleep(seconds)
        after = idle()
        mine = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    return max(mine & after.keys(), key=lambda cpu: after[cpu] - before.get(cpu, 0), default=None)


def local(job: Job) -> dict[str, Any]:
    """Time an artifact here, pinned to one processor where it uses one thread."""
    from qdeploy.compile.artifact import load_artifact
    from qdeploy.profile.timing import timed

    loaded, params = load_artifact(Path(job["artifact"])), read_params(Path(job["params"]))
    cpu = idlest_cpu() if loaded.description["threads"] == 1 else None
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    say(stage="measure")
    return timed(loaded, params, job["noise"])


def rpc(job: Job) -> dict[str, Any]:
    """Time an artifact on a server that the tracker handed out: `host`, `port`, `match` (the key that it expects)."""
    from tvm import rpc as tvm_rpc

    from qdeploy.farm.remote import timed_there

    say(stage="connect")
    session = tvm_rpc.connect(job["host"], job["port"], job["match"], session_timeout=int(job["seconds"]))
    say(stage="measure")
    return timed_there(session, Path(job["artifact"]), read_params(Path(job["params"])), job["noise"])


def main() -> None:
    """Run the job of the command line; the last line on standard output is its result."""
    kind, path = sys.argv[1:]
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM loads it where there is one; seconds that no run needs
    job = json.loads(Path(path).read_bytes())
    try:
        say(found={"local": local, "rpc": rpc}[kind](job))
    except QDeployError as e:
        say(error=str(e))
    except (RuntimeError, OSError, EOFError) as e:  # what TVM raises when the other side goes away
        text = str(e).strip().splitlines()
        say(error=text[-1] if text else type(e).__name__, lost=True)


if __name__ == "__main__":
    main()
