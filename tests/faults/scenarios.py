"""What is interrupted: pull, climb, drop, an update to a newer release, evict, each from a prepared folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qdeploy.client.evict import evict
from qdeploy.client.pull import climb, drop, pull
from qdeploy.serve.app import serving
from tests.faults.host import Job
from tests.faults.releases import SignedFiles, SignedNets

Release = SignedNets | SignedFiles


@dataclass(frozen=True)
class Scenario:
    """A command, the folder that it starts from (None: there is none yet), and (release, level) before and after it.

    Before the first pull that is (0, ""); `allowed` holds both.
    """

    job: Job
    start: Path | None
    before: tuple[int, str]
    after: tuple[int, str]

    @property
    def allowed(self) -> set[tuple[int, str]]:
        return {self.before, self.after}

    def on(self, folder: Path) -> Job:
        """The command on a fresh copy of the start."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, folder)
        return self.again(folder)

    def again(self, folder: Path) -> Job:
        """The command on what is there."""
        return Job(self.job.verb, folder, self.job.url, self.job.level, self.job.root)


@dataclass(frozen=True)
class Stage:
    """Scenarios by name, the servers' URLs by release, and their byte logs."""

    release: Release
    scenarios: Mapping[str, Scenario]
    urls: Mapping[int, str]
    logs: Mapping[int, Path]


@contextmanager
def staged(release: Release, folder: Path) -> Iterator[Stage]:
    """Serve both trees and prepare the folders that scenarios start from."""
    logs = {number: folder / f"log{number}" for number in (1, 2)}
    with serving(release.trees[1], log=logs[1]) as one, serving(release.trees[2], log=logs[2]) as two:
        starts = {name: folder / name for name in ("low", "high", "middle", "full")}
        pull(one, starts["low"], "w2", root=release.root)
        shutil.copytree(starts["low"], starts["high"])
        climb(starts["high"], "w4")
        shutil.copytree(starts["low"], starts["middle"])
        climb(starts["middle"], "w3")
        shutil.copytree(starts["high"], starts["full"])
        pull(two, starts["full"])
        drop(starts["full"], "w2")
        nowhere = Path("nowhere")
        yield Stage(
            release,
            {
                "pull": Scenario(Job("pull", nowhere, one, "w2", release.root), None, (0, ""), (1, "w2")),
                "climb": Scenario(Job("climb", nowhere, level="w4"), starts["low"], (1, "w2"), (1, "w4")),
                "drop": Scenario(Job("drop", nowhere, level="w2"), starts["high"], (1, "w4"), (1, "w2")),
                "update": Scenario(Job("pull", nowhere, two), starts["middle"], (1, "w3"), (2, "w3")),
                "evict": Scenario(Job("evict", nowhere), starts["full"], (2, "w2"), (2, "w2")),
            },
            {1: one, 2: two},
            logs,
        )


def do(job: Job) -> None:
    """Run a command in this process."""
    if job.verb == "pull":
        pull(job.url, job.folder, job.level, root=job.root)
    elif job.verb == "climb":
        assert job.level is not None
        climb(job.folder, job.level)
    elif job.verb == "drop":
        assert job.level is not None
        drop(job.folder, job.level)
    else:
        evict(job.folder)
