"""Metadata of any form, signed by the right keys: one line or the published release, and the device is not wedged."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical

from qdeploy.bundle.rollout import metadata_name, rollout_name
from qdeploy.client.trust import _read_state
from qdeploy.errors import BundleError, FetchError, TrustError
from tests.faults.conftest import Amount, Record
from tests.faults.fuzzing import mutate_bytes, mutate_tree
from tests.trust.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"), root="1/1", targets="1/1")
    world.publish()
    return world


def signed_rubbish(world: World, role: str, rng: random.Random) -> Callable[[bytes], bytes]:
    """Metadata -> metadata with something changed inside, and right signatures over it."""

    def change(data: bytes) -> bytes:
        if rng.random() < 0.1:
            return mutate_bytes(data, rng)[:400_000]
        top = json.loads(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            top["signed"] = mutate_tree(top["signed"], rng)
        try:
            payload = (encode_canonical(top["signed"]) or "").encode()
        except (FormatError, TypeError, ValueError, AttributeError):  # a value that cannot be signed: as it is
            return json.dumps(top).encode()
        keys = world.keys
        top["signatures"] = [s.sign(payload).to_dict() for s in keys.signers(keys.root.roles[role], role)]
        return json.dumps(top).encode()

    return change


def serve(world: World, role: str, change: Callable[[bytes], bytes], rng: random.Random) -> None:
    """Tamper with one file of the tree; what names it names the changed one."""
    if role == "targets":
        more = {"snapshot": world.signed("snapshot").version + 1, "targets": world.signed("targets").version + 1}
        world.serve_state(mangle=change, **more)
    elif role == "rollout":
        digest = world.signed("targets").targets["rollout.json"].hashes["sha256"]
        path = rollout_name(digest)
        world.served[path] = mutate_bytes(world.storage.read(path) or b"", rng)
    elif role == "root":
        top: dict[str, Any] = json.loads((world.home / "1.root.json").read_bytes())
        top["signed"]["version"] = 2
        world.served[metadata_name("root", 2)] = change(json.dumps(top).encode())
    else:
        top = json.loads(world.storage.read(metadata_name("timestamp")) or b"")
        top["signed"]["version"] += 1
        world.served[metadata_name("timestamp")] = change(json.dumps(top).encode())


@pytest.mark.parametrize("role", ["timestamp", "targets", "root", "rollout"])
def test_signed_rubbish(role: str, world: World, tmp_path: Path, amount: Amount, record: Record) -> None:
    world.served = {}
    device = world.device(f"fresh-{role}")
    right = world.hear(world.device(f"right-{role}"))
    if role != "rollout":  # one that is held is not fetched again
        world.hear(device)
    trials, refused = amount(15, 5000), 0
    for seed in range(trials):
        rng, folder = random.Random(seed), tmp_path / "dev"
        shutil.copytree(device, folder)
        before = _read_state(folder)
        world.served = {}
        serve(world, role, signed_rubbish(world, role, rng), rng)
        try:
            found = world.hear(folder)
        except (TrustError, FetchError, BundleError) as e:
            refused += 1
            assert str(e).isprintable() and len(str(e)) < 8000, (seed, str(e))
            after = _read_state(folder)
            assert after.rollout == before.rollout and after.releases == before.releases, seed
            if after.root == before.root:  # no new keys were taken: nothing that was refused stays in the way
                world.served = {}
                if isinstance(e, FetchError):  # newer metadata was rightly signed, so the old is refused once
                    with contextlib.suppress(TrustError):
                        world.hear(folder)
                assert world.hear(folder).manifest == right.manifest, seed
        else:  # a change that says nothing else
            assert (found.manifest, found.release, found.level) == (right.manifest, right.release, right.level), seed
        shutil.rmtree(folder)
    assert refused > trials // 3
    record(f"signed rubbish as {role}", trials=trials, refused=refused, wrong=0)
