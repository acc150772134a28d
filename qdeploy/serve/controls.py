"""Changes of the rollout that an operator asks for on the fleet page: what each would do, and doing it.

Everything goes through qdeploy/trust/publish.py, as the command line does, and is rehearsed first. What was confirmed
is what is done: a tree that changed in between is refused.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets

from qdeploy.bundle.manifest import release_bytes
from qdeploy.bundle.rollout import ROLLOUT_TARGET, Channels, Entry, metadata_name, parse_rollout, rollout_name
from qdeploy.bundle.store import RELEASE_NAME, manifest_name
from qdeploy.bundle.tables import Release
from qdeploy.errors import DataError, DeviceError, TrustError
from qdeploy.files import read_bytes, sha256
from qdeploy.trust.keys import KeyFolder
from qdeploy.trust.publish import Published, Wish, change_rollout, publish
from qdeploy.trust.rehearse import Rehearsal, RehearsedKeys
from qdeploy.trust.repository import Repository
from qdeploy.trust.storage import Folder, Storage

RECENT = 50  # versions of the rollout that are searched for releases to go back to
NEVER_CONFIRMED = "the tree has changed since the change was reviewed: review it again"


class Changed(DeviceError):
    """The tree is no longer the one that the change was reviewed for."""


@dataclass(frozen=True)
class Change:
    """What an operator asks for: a `wish` about the canary if there is one, else about the stable release; the canary
    `promote`d to all; or the content of release `back` under the next number."""

    model: str
    wish: Wish
    promote: bool = False
    back: int | None = None


def parse_change(value: Any) -> Change:
    """{"model", and any of "hold", "percent", "minimum", "levels", "promote", "back"}, as parsed from JSON; raises
    DataError."""
    kinds: dict[str, type] = {"model": str, "hold": bool, "percent": int, "minimum": str, "levels": dict}
    kinds |= {"promote": bool, "back": int}
    if not isinstance(value, dict) or "model" not in value or set(value) - set(kinds):
        raise DataError(f"a change is an object with a model and some of {', '.join(sorted(set(kinds) - {'model'}))}")
    for name, entry in value.items():
        if type(entry) is not kinds[name] or entry == "":
            raise DataError(f"{name} of a change must be a {kinds[name].__name__} that is not empty")
    levels = value.get("levels", {})
    if not all(isinstance(level, str) for level in levels.values()):
        raise DataError("levels of a change map hardware classes to levels")
    if not 1 <= value.get("percent", 1) <= 100:
        raise DataError("percent of a change must be a whole number from 1 to 100")
    wish = Wish(value.get("hold"), value.get("minimum"), levels or None, value.get("percent"))
    change = Change(value["model"], wish, value.get("promote", False), value.get("back"))
    if change.back is not None and (change.promote or wish != Wish()):
        raise DataError("going back to a release is a change of its own: ask for nothing else with it")
    if change.back is None and not change.promote and wish == Wish():
        raise DataError("nothing is to change: choose something first")
    return change


class _Confirmed(Folder):
    """A folder that is only written while its timestamp is the one that was reviewed."""

    def __init__(self, root: Path, confirm: str) -> None:
        super().__init__(root)
        self._confirm = confirm

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with super().locked():
            if _timestamp(self) != self._confirm:
                raise Changed(NEVER_CONFIRMED)
            yield


def _timestamp(storage: Folder) -> str:
    """What names the state of a tree: the digest of its timestamp."""
    return sha256(storage.read(metadata_name("timestamp")) or b"")


def _row(entry: Entry | None, channel: str | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    row = asdict(entry) | {"channel": channel, "levels": dict(entry.levels)}
    return {name: row[name] for name in ("channel", "release", "percent", "hold", "minimum", "levels")}


class Controls:
    """Changes of the tree `root`, signed with the keys in `folders`; without any, only the commands for them.

    Methods block and are to be called one at a time. They raise QDeployError's subclasses, Changed among them.
    """

    def __init__(self, root: Path, folders: Sequence[Path], passphrase_file: Path | None) -> None:
        self._root, self._folders, self._passphrase_file = root, list(folders), passphrase_file
        self._passphrase = None if passphrase_file is None else _read_passphrase(passphrase_file)
        if folders:
            self._keys().root  # noqa: B018 - it says what is missing before anything is served

    def _keys(self) -> KeyFolder:
        return KeyFolder(self._folders, self._passphrase)  # read anew: keys are replaced while a server runs

    @property
    def signs(self) -> bool:
        """True when changes can be made here."""
        return bool(self._folders)

    def command(self, change: Change) -> str:
        """What does the same on the command line, where the keys are."""
        keys = [text for folder in self._folders or [Path("KEYS")] for text in ("--keys", str(folder))]
        if self._passphrase_file is not None:
            keys += ["--passphrase-file", str(self._passphrase_file)]
        if change.back is not None:
            return shlex.join(["qdeploy", "publish", "BUNDLE", "--to", str(self._root), *keys])
        wish, words = change.wish, ["qdeploy", "rollout", str(self._root), *keys, "--model", change.model]
        words += ["--promote"] * change.promote
        words += [] if wish.hold is None else ["--hold" if wish.hold else "--no-hold"]
        words += [] if wish.percent is None else ["--canary", f"{wish.percent}%"]
        words += [] if wish.minimum is None else ["--minimum", wish.minimum]
        for name, level in (wish.levels or {}).items():
            words += ["--level", f"{name}={level}"]
        return shlex.join(words)

    def plan(self, change: Change) -> dict[str, Any]:
        """What the change would do: "before" and "after" of the channel (without keys: None), "command", and "confirm",
        which `apply` wants."""
        found: dict[str, Any] = {"command": self.command(change), "before": None, "after": None, "confirm": None}
        if not self.signs:
            return found
        folder, keys = Folder(self._root), RehearsedKeys(self._folders, self._passphrase)
        confirm = _timestamp(folder)
        channels = Repository(folder, keys).read().rollout.get(change.model, Channels())
        done = self._run(change, Rehearsal(folder), keys)
        canary = channels.canary is not None
        before = _row(channels.canary or channels.stable, "canary" if canary else "stable")
        return found | {"before": before, "after": _row(done.entry, done.channel), "confirm": confirm}

    def apply(self, change: Change, confirm: str) -> dict[str, Any]:
        """Make the change; returns the channel as it is now."""
        if not self.signs:
            raise TrustError("this server has no keys: run the command where they are")
        done = self._run(change, _Confirmed(self._root, confirm), self._keys())
        row = _row(done.entry, done.channel)
        assert row is not None
        return row | {"model": done.model, "expires": f"{done.expires:%Y-%m-%dT%H:%M:%SZ}"}

    def _run(self, change: Change, storage: Storage, keys: KeyFolder) -> Published:
        if change.back is None:
            return change_rollout(storage, keys, change.wish, change.model, change.promote)
        entry = self._earlier(storage, keys).get((change.model, change.back))
        if entry is None:
            raise TrustError(
                f"no earlier release {change.back} of {change.model} is signed here: publish its bundle again"
            )
        with tempfile.TemporaryDirectory(prefix="qdeploy-back-") as folder:
            bundle = Path(folder)
            path = manifest_name(entry.sha256)
            (bundle / path).parent.mkdir()
            (bundle / path).write_bytes(read_bytes(self._root / path, "the manifest", TrustError))
            (bundle / RELEASE_NAME).write_bytes(release_bytes(Release(entry.sha256, entry.size, entry.release)))
            (bundle / "objects").symlink_to(self._root.absolute() / "objects")
            return publish(bundle, storage, keys, Wish())

    def earlier(self) -> dict[str, list[int]]:
        """{model: releases to go back to, the latest first}; none without keys."""
        found: dict[str, list[int]] = {}
        if self.signs:
            for model, release in sorted(self._earlier(Folder(self._root), self._keys()), reverse=True):
                found.setdefault(model, []).append(release)
        return found

    def _earlier(self, storage: Storage, keys: KeyFolder) -> dict[tuple[str, int], Entry]:
        """Releases that were in force and are not now. Only rollouts that the keys of today signed count: what a
        replaced key once signed may be its thief's."""
        state = Repository(storage, keys).read()
        if state.targets is None:
            return {}
        last = state.targets.signed.version
        found: dict[tuple[str, int], Entry] = {}
        for version in range(max(1, last - RECENT), last):
            for model, channels in _signed_rollout(storage, keys, version).items():
                for entry in (channels.stable, channels.canary):
                    if entry is not None:
                        found[model, entry.release] = entry
        for model, channels in state.rollout.items():
            for entry in (channels.stable, channels.canary):
                if entry is not None:
                    found.pop((model, entry.release), None)
        return found


def _signed_rollout(storage: Storage, keys: KeyFolder, version: int) -> dict[str, Channels]:
    """The rollout of an older version of targets metadata; empty when it is gone, damaged or not by today's keys."""
    data = storage.read(metadata_name("targets", version))
    if data is None:
        return {}
    try:
        metadata = Metadata[Targets].from_bytes(data)
        keys.root.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
        entry = metadata.signed.targets[ROLLOUT_TARGET]
        rollout = storage.read(rollout_name(entry.hashes["sha256"])) or b""
        entry.verify_length_and_hashes(rollout)
    except (RepositoryError, KeyError):
        return {}
    return parse_rollout(rollout)


def _read_passphrase(path: Path) -> bytes:
    """The first line of a file; raises TrustError when it is empty."""
    words = read_bytes(path, "the passphrase", TrustError).split(b"\n")[0].rstrip(b"\r")
    if not words:
        raise TrustError(f"the first line of {path} is empty: write a passphrase there")
    return words
