"""A publisher with keys, a tree, devices that fetch from it, and hands to tamper with what they are served."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from qdeploy.bundle.rollout import Rollout, metadata_name, parse_rollout, rollout_bytes, rollout_name
from qdeploy.client.fetch import GoneError
from qdeploy.client.trust import Trusted, install_root, refresh
from qdeploy.errors import FetchError
from qdeploy.files import sha256
from qdeploy.trust import publish as publishing
from qdeploy.trust.keys import KeyFolder, Quorum, expiry, init_keys
from qdeploy.trust.publish import Published, Wish
from qdeploy.trust.storage import Folder
from tests.client.tree import Tree, make_tree

LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)

LONGEST_NAME = 255  # of a file; a tree has none with a longer one


class World:
    """Everything below one folder. `served` replaces files of the tree; `asked` lists what devices asked for."""

    def __init__(self, folder: Path, root: str = "2/3", targets: str = "2/2") -> None:
        self.folder = folder
        self.home = folder / "keys"
        init_keys(self.home, Quorum.parse(root), Quorum.parse(targets), None)
        self.storage = Folder(folder / "root")
        self.served: dict[str, bytes | None] = {}
        self.asked: list[str] = []
        self._bundles: dict[int, Tree] = {}

    # --- publisher ---------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> KeyFolder:
        return KeyFolder([self.home])

    def bundle(self, seed: int = 0) -> Tree:
        if seed not in self._bundles:
            self._bundles[seed] = make_tree(self.folder / f"bundle{seed}", seed=seed, weights=(300,), gap=10)
        return self._bundles[seed]

    def publish(self, seed: int = 0, release: int | None = None, now: datetime | None = None, **wish: Any) -> Published:
        root = self.bundle(seed).root
        return publishing.publish(root, self.storage, self.keys, Wish(**wish), release, now=now)

    def rollout(self, promote: bool = False, **wish: Any) -> Published:
        return publishing.change_rollout(self.storage, self.keys, Wish(**wish), promote=promote)

    def refresh(self, days: float = 7, now: datetime | None = None) -> None:
        publishing.refresh(self.storage, self.keys, days, now)

    # --- device ------------------------------------------------------------------------------------------------------

    def fetch(self, path: str, limit: int) -> bytes:
        """As a mirror would: bounded, with what was tampered with in place of the tree's."""
        self.asked.append(path)
        named = len(path.rpartition("/")[2]) <= LONGEST_NAME
        data = self.served[path] if path in self.served else self.storage.read(path) if named else None
        if data is None:
            raise GoneError(f"{path} is not there")
        if len(data) > limit:
            raise FetchError(f"{path} has more than {limit} bytes")
        return data

    def device(self, name: str = "dev") -> Path:
        """A device folder with the first root pinned."""
        install_root(self.folder / name, (self.home / "1.root.json").read_bytes())
        return self.folder / name

    def hear(self, device: Path, fetch: Callable[[str, int], bytes] | None = None, **who: Any) -> Trusted:
        return refresh(device, fetch or self.fetch, **who)

    # --- tampering ---------------------------------------------------------------------------------------------------

    def tree(self) -> dict[str, bytes]:
        """All files of metadata and rollout, as they are now."""
        root = self.storage.root
        names = [p.relative_to(root).as_posix() for f in ("metadata", "rollout") for p in (root / f).glob("*.json")]
        return {name: (root / name).read_bytes() for name in names}

    def replay(self, old: dict[str, bytes]) -> None:
        """Serve this earlier state of the tree and nothing newer."""
        self.served = {name: None for name in self.tree()} | dict(old)

    def signed(self, role: str) -> Any:
        """The metadata of a role that is in force in the tree."""
        data = self.storage.read(metadata_name("timestamp"))
        assert data is not None
        metadata: Any = Metadata.from_bytes(data)
        if role == "timestamp":
            return metadata.signed
        version = metadata.signed.snapshot_meta.version
        metadata = Metadata.from_bytes(self.storage.read(metadata_name("snapshot", version)) or b"")
        if role == "snapshot":
            return metadata.signed
        version = metadata.signed.meta["targets.json"].version
        return Metadata.from_bytes(self.storage.read(metadata_name(role, version)) or b"").signed

    def sign(self, signed: Any, keys: KeyFolder | None = None, most: int | None = None) -> bytes:
        """Signed by all of a role's keys, or by the first `most`."""
        metadata: Any = Metadata(signed)
        holder = keys or self.keys
        for signer in holder.signers(holder.root.roles[signed.type], signed.type)[:most]:
            metadata.sign(signer, append=True)
        return bytes(metadata.to_bytes())

    def serve_state(
        self,
        *,
        timestamp: int | None = None,
        snapshot: int | None = None,
        targets: int | None = None,
        change: Callable[[Targets], None] | None = None,
        keys: KeyFolder | None = None,
        most: int | None = None,
        mangle: Callable[[bytes], bytes] = bytes,
        expires: dict[str, datetime] | None = None,
    ) -> None:
        """Serve metadata made from the tree's, the numbers being new versions; by `keys`, with `most` signatures on
        targets, whose bytes are passed through `mangle`."""
        late = expires or {}
        mine: Targets = self.signed("targets")
        mine.version = targets or mine.version
        mine.expires = late.get("targets", mine.expires)
        if change is not None:
            change(mine)
        data = mangle(self.sign(mine, keys, most))
        self.served[metadata_name("targets", mine.version)] = data
        meta = {"targets.json": MetaFile.from_data(mine.version, data, ["sha256"])}
        number = snapshot or self.signed("snapshot").version
        middle = Snapshot(number, None, late.get("snapshot", expiry(9)), meta)
        data = self.sign(middle, keys)
        self.served[metadata_name("snapshot", number)] = data
        number = timestamp or self.signed("timestamp").version + 1
        top = Timestamp(
            number, None, late.get("timestamp", expiry(9)), MetaFile.from_data(middle.version, data, ["sha256"])
        )
        self.served[metadata_name("timestamp")] = self.sign(top, keys)

    def serve_rollout(self, change: Callable[[dict[str, Any]], Rollout], also: tuple[TargetFile, ...] = ()) -> None:
        """Serve another rollout, signed by all keys, and more targets."""
        entry = self.signed("targets").targets["rollout.json"]
        rollout = parse_rollout(self.storage.read(rollout_name(entry.hashes["sha256"])) or b"")
        data = rollout_bytes(change(rollout))
        self.served[rollout_name(sha256(data))] = data

        def name(targets: Targets) -> None:
            targets.targets["rollout.json"] = TargetFile.from_data("rollout.json", data, ["sha256"])
            targets.targets |= {target.path: target for target in also}

        version = self.signed("targets").version + 1
        self.serve_state(snapshot=self.signed("snapshot").version + 1, targets=version, change=name)
