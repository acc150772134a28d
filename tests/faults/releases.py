"""Signed releases for the fault suites, and what a device folder must be like after any fault."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.bundle.write import write_bundle
from qdeploy.client.runtime import LevelRunner
from qdeploy.client.settings import read_settings
from qdeploy.client.state import Current, DeviceFolder, open_choice
from qdeploy.compile.pipeline import compile_model
from qdeploy.export.write import qdq_bytes
from qdeploy.files import canonical_json, sha256
from qdeploy.ladder import read_ladder
from qdeploy.target import Target
from qdeploy.trust import publish as publishing
from qdeploy.trust.publish import Wish
from tests.client.conftest import LEVELS, reference
from tests.client.device import file_of
from tests.nets_frozen import ladder_of
from tests.trust.world import World

Counters = dict[str, int]


@dataclass(frozen=True)
class SignedNets:
    """Trees in which release 1, and then release 2, is the newest; what each level of each says to `images`."""

    root: Path  # root metadata to pin
    trees: Mapping[int, Path]
    images: np.ndarray  # uint8 [n, C, H, W]
    outputs: Mapping[tuple[int, str], np.ndarray]  # (release, level) -> float32 [n, classes]

    def check(self, folder: Path, allowed: set[tuple[int, str]], before: Counters) -> Counters:
        """A device folder after a fault: everything parses, counters did not fall, and the level in force, if there is
        one, is one of `allowed` and runs with its own output. The counters now."""
        now = sound(folder, before)
        if (found := in_force(folder)) is None:
            assert not allowed or (0, "") in allowed, "the level in force is lost"
            return now
        assert found in allowed, f"{found} is in force, not one of {sorted(allowed)}"
        output, level = LevelRunner(folder).run_with_level(self.images)
        assert level == found[1]
        np.testing.assert_array_equal(output, self.outputs[found])
        return now


@dataclass(frozen=True)
class SignedFiles:
    """As SignedNets, of small invented files: the assembled file of a level stands for its output."""

    root: Path
    trees: Mapping[int, Path]
    files: Mapping[tuple[int, str], bytes]

    def check(self, folder: Path, allowed: set[tuple[int, str]], before: Counters) -> Counters:
        """See SignedNets."""
        now = sound(folder, before)
        if (found := in_force(folder)) is None:
            assert not allowed or (0, "") in allowed, "the level in force is lost"
            return now
        assert found in allowed, f"{found} is in force, not one of {sorted(allowed)}"
        assert file_of(folder, found[1]) == self.files[found]
        return now


def make_nets(folder: Path, **shape: int) -> SignedNets:
    """Export, bundle, compile and sign two releases; `shape` goes to `tests.nets_frozen.random_frozen`."""
    (folder).mkdir(exist_ok=True)
    world = World(folder, root="1/1", targets="1/1")
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 8, 8), np.uint8)
    trees, outputs = {}, {}
    for release in (1, 2):
        made = folder / f"made{release}"
        made.mkdir()
        nets = dict(zip(LEVELS, ladder_of(release, (2, 3, 4), blocks=1, **shape), strict=True))
        paths = [made / f"{name}.onnx" for name in LEVELS]
        for path, net in zip(paths, nets.values(), strict=True):
            path.write_bytes(qdq_bytes(net))
        if release == 1:
            compile_model(paths[0], Target("here", platform.machine(), "llvm", "host"), folder / "artifact")
        write_bundle(read_ladder(paths), [folder / "artifact"], made / "root")
        publishing.publish(made / "root", world.storage, world.keys, Wish(), None)
        trees[release] = shutil.copytree(world.storage.root, folder / f"tree{release}")
        outputs |= {(release, name): reference(net, images) for name, net in nets.items()}
    return SignedNets(world.home / "1.root.json", trees, images, outputs)


def make_files(folder: Path) -> SignedFiles:
    """Two signed releases of a small invented ladder."""
    (folder).mkdir(exist_ok=True)
    world = World(folder, root="1/1", targets="1/1")
    trees, files = {}, {}
    for release in (1, 2):
        world.publish(seed=release)
        trees[release] = shutil.copytree(world.storage.root, folder / f"tree{release}")
        files |= {(release, name): data for name, data in world.bundle(release).files.items()}
    return SignedFiles(world.home / "1.root.json", trees, files)


def counters(folder: Path) -> Counters:
    """The counters in trust/state.json; empty before the root is pinned. The file must be whole."""
    path = folder / "trust" / "state.json"
    if not path.exists():
        return {}
    top = json.loads(path.read_bytes())
    state = top["state"]
    assert sha256(canonical_json(state)) == top["sha256"]
    rows = {f"{kind} {name}": row[0] for kind in ("roles", "releases") for name, row in state[kind].items()}
    return rows | {"root": state["root"]}


def in_force(folder: Path) -> tuple[int, str] | None:
    """(release, level) that the pointer names; None when there is no pointer."""
    device = DeviceFolder(folder)
    if device.current() is None:
        return None
    current, manifest = open_choice(device)
    return manifest.release, current.level


def sound(folder: Path, before: Counters) -> Counters:
    """Every file of state parses, the journal is true, no counter fell or lies below what is in force."""
    now = counters(folder)
    for name, value in before.items():
        assert now.get(name, -1) >= value, f"the counter of {name} fell from {value} to {now.get(name)}"
    if not folder.exists():
        return now
    read_settings(folder)
    device = DeviceFolder(folder)
    current: Current | None = device.current()
    if current is not None and now:
        manifest = device.manifest(current.manifest)
        assert manifest.release <= now[f"releases {manifest.model}"], "the counter is below the release in force"
    lies = [extent for extent in device.journal() if not device.intact(extent)]
    assert not lies, f"the journal names {len(lies)} extents that are not on disk"
    return now
