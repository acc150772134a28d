"""The JavaScript device beside Python's client: every level byte for byte, and not a byte fetched twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle import write
from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import load_tree, pieces_of
from qdeploy.bundle.write import write_bundle
from qdeploy.client.plan import Extent, Layout
from qdeploy.export.write import qdq_bytes
from qdeploy.files import sha256
from qdeploy.ladder import read_ladder
from qdeploy.serve.app import serving
from tests.bundle.small import TOP, container, model_bytes, small_tree, write_artifact, write_levels
from tests.bundle.test_format import gaussian
from tests.client.tree import make_tree
from tests.nets_frozen import ladder_of, random_frozen
from tests.web.agent import Agent, Publisher, Refused, text

Files = dict[str, bytes]  # by level


def bundled(folder: Path, files: Files) -> Files:
    """Write the levels and the bundle at folder/tree."""
    paths = []
    for name, data in files.items():
        paths.append(folder / f"{name}.onnx")
        paths[-1].write_bytes(data)
    write_bundle(read_ladder(paths), [], folder / "tree")
    return files


def widths(*bits: int, top: np.ndarray) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        paths = write_levels(folder, bits, top)
        return bundled(folder, {path.stem: path.read_bytes() for path in paths})

    return make


def capped(coarse: int) -> np.ndarray:
    """Codes of channels that end at 2 planes, or at 1."""
    top = gaussian(2.0)
    top[10:30] = top[10:30] // coarse * coarse
    return top


def many_tensors(folder: Path) -> Files:
    return bundled(folder, {f"w{n}": qdq_bytes(net) for n, net in zip((2, 3, 4), ladder_of(7), strict=True)})


def eight_bits(folder: Path) -> Files:
    nets = zip((2, 4, 8), ladder_of(5, (2, 4, 8)), strict=True)
    return bundled(folder, {f"w{bits}": qdq_bytes(net) for bits, net in nets})


def mixed(folder: Path) -> Files:
    names = random_frozen(3, bits=4, activation_bits=8).weights
    per_layer = {name: 2 + i % 3 for i, name in enumerate(names)}
    choices: dict[str, int | dict[str, int]] = {"low": 2, "mix": per_layer, "high": 4}
    nets = {name: random_frozen(3, bits=bits, activation_bits=8) for name, bits in choices.items()}
    return bundled(folder, {name: qdq_bytes(net) for name, net in nets.items()})


def crossing(folder: Path) -> Files:
    """Two levels of which neither is below the other."""
    files = {}
    for name, first, second in (("low", 2, 2), ("a", 4, 2), ("b", 2, 4), ("top", 4, 4)):
        scale = 0.1 * first + 0.01 * second
        files[name] = model_bytes(container(first), scale, second=container(second, TOP.T))
    return bundled(folder, files)


def unsigned_codes(folder: Path) -> Files:
    files = {f"w{b}": model_bytes((container(b).astype(np.int64) + 128).astype(np.uint8), 0.1 * b) for b in (2, 4)}
    return bundled(folder, files)


def several_leaves(folder: Path) -> Files:
    return dict(make_tree(folder / "tree", (2, 4, 7), weights=(400_000, 900), artifact_bytes=140_000).files)


LADDERS: dict[str, Callable[[Path], Files]] = {
    "raw planes": widths(2, 3, 4, top=gaussian(1.0)),
    "sorted planes": widths(2, 3, 4, top=gaussian(3.0)),
    "nearly empty planes": widths(2, 3, 4, top=gaussian(30.0)),
    "spaced planes": widths(3, 4, top=gaussian(4.0)),
    "caps at 2": widths(2, 3, 4, top=capped(4)),
    "caps at 1": widths(2, 3, 4, top=capped(8)),
    "one level": widths(4, top=gaussian(2.0)),
    "many tensors": many_tensors,
    "2, 4 and 8 bits": eight_bits,
    "a mixed level": mixed,
    "levels that cross": crossing,
    "uint8 codes": unsigned_codes,
    "several leaves": several_leaves,
}


def lacking(manifest: Manifest, before: list[str], level: str) -> int:
    """Object bytes that Python's client would fetch for a level after others."""
    held = {extent for name in before for extent in _extents(manifest, name)}
    return Layout(manifest, pieces_of(manifest, level)).missing_bytes(held)


def _extents(manifest: Manifest, level: str) -> list[Extent]:
    layout = Layout(manifest, pieces_of(manifest, level))
    return [extent for index in layout.objects for extent in layout.provable(index)]


@pytest.mark.parametrize("name", LADDERS)
def test_every_level_is_rebuilt(agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "many tensors":
        monkeypatch.setattr(write, "PACK_BYTES", 600)
    files = LADDERS[name](tmp_path)
    publisher = Publisher(tmp_path)
    publisher.publish(tmp_path / "tree")
    manifest = load_tree(publisher.tree)
    with serving(publisher.tree) as url:
        found = agent.ask("climb", url=f"{url}/", root=text(publisher.root), store=str(tmp_path))
        again = agent.ask("climb", url=f"{url}/", root=text(publisher.root), store=str(tmp_path))
    assert {step["name"]: step["sha256"] for step in found["steps"]} == {k: sha256(v) for k, v in files.items()}
    before: list[str] = []
    for step in found["steps"]:
        assert step["fetched"] == step["missing"] == lacking(manifest, before, step["name"])
        before.append(step["name"])
    assert [(step["sha256"], step["fetched"]) for step in again["steps"]] == [(s["sha256"], 0) for s in found["steps"]]
    assert [row["path"] for row in again["log"]] == ["release.json"]


def test_any_order_and_down(agent: Agent, tmp_path: Path) -> None:
    crossing(tmp_path)
    publisher = Publisher(tmp_path)
    publisher.publish(tmp_path / "tree")
    manifest = load_tree(publisher.tree)
    order = ["b", "low", "a", "top", "b", "low"]
    with serving(publisher.tree) as url:
        steps = agent.ask("climb", url=f"{url}/", root=text(publisher.root), levels=order)["steps"]
        with pytest.raises(Refused, match="there is no level x: levels are low, a, b, top"):
            agent.ask("climb", url=f"{url}/", root=text(publisher.root), levels=["x"])
    assert [step["fetched"] for step in steps] == [lacking(manifest, order[:i], level) for i, level in enumerate(order)]
    assert steps[1]["fetched"] == 0 and sum(step["fetched"] for step in steps[3:]) == steps[3]["fetched"]


def test_what_the_device_keeps_is_not_trusted(agent: Agent, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", weights=(400_000,))
    publisher = Publisher(tmp_path)
    publisher.publish(tree.root)
    request = {"root": text(publisher.root), "store": str(tmp_path), "levels": ["w2"]}
    with serving(publisher.tree) as url:
        first = agent.ask("climb", url=f"{url}/", **request)
        digest = agent.ask("damage", store=str(tmp_path))
        (mended,) = agent.ask("climb", url=f"{url}/", **request)["steps"]
    assert digest == tree.manifest.objects[0].leaves[0]
    assert mended["sha256"] == first["steps"][0]["sha256"] and mended["fetched"] == 65536


def test_a_new_release_brings_what_differs_and_frees_the_rest(agent: Agent, tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    first = make_tree(tmp_path / "first", weights=(4000,), seed=1)
    publisher.publish(first.root)
    request = {"root": text(publisher.root), "store": str(tmp_path)}
    with serving(publisher.tree) as url:
        assert agent.ask("settle", url=f"{url}/", level="w3", **request) == "w2"
        kept = agent.ask("kept", store=str(tmp_path))
        publisher.publish(first.root)  # the same objects under the next number
        (same,) = agent.ask("climb", url=f"{url}/", levels=["w3"], **request)["steps"]
        publisher.publish(make_tree(tmp_path / "second", weights=(4000,), seed=2).root)
        assert agent.ask("settle", url=f"{url}/", level="w3", **request) == "w3"
    assert same["fetched"] == 0
    assert not set(kept) & set(agent.ask("kept", store=str(tmp_path)))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_changed_byte_is_taken(agent: Agent, tmp_path: Path) -> None:
    """One bit flipped in a byte of a small release: each byte of the objects, every 3rd or 17th of the other files."""
    small_tree(tmp_path, artifact=False)
    publisher = Publisher(tmp_path)
    publisher.publish(tmp_path / "tree")
    steps = {"objects": 1, "release.json": 3, "manifests": 17}
    with serving(publisher.tree) as url:
        for name, step in steps.items():
            files = [publisher.tree / name] if name == "release.json" else sorted((publisher.tree / name).iterdir())
            for path in files:
                data = path.read_bytes()
                for at in range(0, len(data), step):
                    path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
                    with pytest.raises(Refused):
                        agent.ask("climb", url=f"{url}/", root=text(publisher.root))
                path.write_bytes(data)
        agent.ask("climb", url=f"{url}/", root=text(publisher.root))  # nothing else was wrong


def test_signatures(agent: Agent, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", weights=(40,))
    publisher, other = Publisher(tmp_path, "2/3"), Publisher(tmp_path / "other", "2/3")
    publisher.publish(tree.root)
    other.publish(tree.root)
    signatures = publisher.release["signatures"]

    def climb(root: bytes = publisher.root) -> object:
        return agent.ask("climb", url=f"{url}/", root=text(root))["signers"]

    with serving(publisher.tree) as url:
        assert climb() == sorted(entry["keyid"] for entry in signatures)
        with pytest.raises(Refused, match="wrong signature or too few: 0 of 2"):
            climb(other.root)
        publisher.write_release(signatures=[])
        with pytest.raises(Refused, match="nobody signed this release"):
            climb()
        publisher.write_release(signatures=[signatures[0], signatures[0]])
        with pytest.raises(Refused, match="too few: 1 of 2"):
            climb()
        publisher.write_release(signatures=[*other.release["signatures"], *signatures[:2]])
        assert climb() == sorted(entry["keyid"] for entry in signatures[:2])


def test_an_older_release_is_refused_until_the_keys_change(agent: Agent, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", weights=(40,))
    publisher, other = Publisher(tmp_path), Publisher(tmp_path / "other")
    publisher.publish(tree.root)
    old = (publisher.tree / "release.json").read_bytes()
    publisher.publish(tree.root)
    other.publish(tree.root)
    store = str(tmp_path)
    with serving(publisher.tree) as url, serving(other.tree) as other_url:
        agent.ask("climb", url=f"{url}/", root=text(publisher.root), store=store)
        (publisher.tree / "release.json").write_bytes(old)
        with pytest.raises(Refused, match="rollback: the server offers release 1, this device took 2"):
            agent.ask("climb", url=f"{url}/", root=text(publisher.root), store=store)
        agent.ask("climb", url=f"{other_url}/", root=text(other.root), store=store)


def test_a_manifest_of_another_release_number(agent: Agent, tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    publisher.publish(make_tree(tmp_path / "tree", weights=(40,)).root)
    publisher.write_release(release=5)
    with serving(publisher.tree) as url, pytest.raises(Refused, match="says release 5, the manifest 1"):
        agent.ask("climb", url=f"{url}/", root=text(publisher.root))


def test_artifacts_cost_a_browser_nothing(agent: Agent, tmp_path: Path) -> None:
    paths = write_levels(tmp_path)
    ladder = read_ladder(paths)
    write_bundle(ladder, [write_artifact(tmp_path / "a", ladder.graph, library=bytes(70_000))], tmp_path / "tree")
    publisher = Publisher(tmp_path)
    publisher.publish(tmp_path / "tree")
    manifest = load_tree(publisher.tree)
    with serving(publisher.tree) as url:
        found = agent.ask("climb", url=f"{url}/", root=text(publisher.root))
    asked = {row["path"].removeprefix("objects/") for row in found["log"]}
    pieces = {piece for artifact in manifest.artifacts for _, piece in artifact.files}
    assert pieces and not asked & {manifest.objects[manifest.pieces[piece].object].sha256 for piece in pieces}
