import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.manifest import (
    Artifact,
    Initializer,
    Level,
    Manifest,
    Object,
    Part,
    Piece,
    Release,
    Tensor,
    TensorLevel,
    is_below,
    levels_below,
    manifest_bytes,
    parse_manifest,
    parse_release,
    problems,
    release_bytes,
)
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json

A, B, C = "a" * 64, "b" * 64, "c" * 64


def legal() -> Manifest:
    """Two levels of one 4x2 tensor: 2 bits and 3 bits, one side tensor, one artifact."""
    pieces = (
        Piece(0, 0, 9, 100, "deflate", A),
        Piece(0, 9, 2, 2, "raw", B),
        Piece(0, 11, 4, 4, "raw", C),
        Piece(1, 0, 1, 1, "raw", A),
        Piece(1, 1, 4, 4, "raw", B),
        Piece(2, 0, 70000, 90000, "deflate", C),
    )
    levels = (
        Level("low", A, (TensorLevel(2, 5, 8),), 2, {"input_sha256": A, "output_sha256": B}, {"accuracy": 90.5}),
        Level("high", B, (TensorLevel(3, 4, 0),), 4),
    )
    return Manifest(
        model="net",
        release=3,
        graph=C,
        size=112,
        objects=(Object(A, 15), Object(B, 5), Object(C, 70000, (A, B))),
        pieces=pieces,
        skeleton=0,
        initializers=(
            Initializer("fixed", "int64", (1,), 10, "fixed"),
            Initializer("scale", "float32", (), 50, "side"),
            Initializer("weight", "int8", (4, 2), 60, "planes"),
        ),
        tensors=(Tensor("weight", 3, (Part(2, "tight", 1, 0), Part(1, "sorted", 3, 0))),),
        levels=levels,
        artifacts=(Artifact({"name": "host", "features": ["avx2"], "threads": 2}, (("lib.so", 5),)),),
    )


LITERAL = (
    b'{"artifacts":[{"files":[["lib.so",5]],"target":{"features":["avx2"],"name":"host","threads":2}}],'
    b'"format":"qdeploy-bundle/1","graph":"C","initializers":[["fixed","int64",[1],10,"fixed"],'
    b'["scale","float32",[],50,"side"],["weight","int8",[4,2],60,"planes"]],"levels":['
    b'{"golden":{"input_sha256":"A","output_sha256":"B"},"info":{"accuracy":90.5},"name":"low","sha256":"A","side":2,'
    b'"tensors":[[2,5,8]]},{"name":"high","sha256":"B","side":4,"tensors":[[3,4,0]]}],"model":"net","objects":['
    b'{"leaves":[],"sha256":"A","size":15},{"leaves":[],"sha256":"B","size":5},'
    b'{"leaves":["A","B"],"sha256":"C","size":70000}],"pieces":[[0,0,9,100,"deflate","A"],[0,9,2,2,"raw","B"],'
    b'[0,11,4,4,"raw","C"],[1,0,1,1,"raw","A"],[1,1,4,4,"raw","B"],[2,0,70000,90000,"deflate","C"]],"release":3,'
    b'"size":112,"skeleton":0,"tensors":[{"bits":3,"name":"weight","parts":[[2,"tight",1,0],[1,"sorted",3,0]]}]}\n'
)


def test_literal_bytes() -> None:
    expected = LITERAL
    for short, digest in ((b'"A"', A), (b'"B"', B), (b'"C"', C)):
        expected = expected.replace(short, b'"' + digest.encode() + b'"')
    assert manifest_bytes(legal()) == expected
    assert parse_manifest(expected) == legal()
    assert problems(legal()) == []


def test_literal_release() -> None:
    expected = b'{"format":"qdeploy-release/1","manifest":{"sha256":"%s","size":12},"release":3,"signatures":[]}\n'
    data = expected % A.encode()
    assert release_bytes(Release(A, 12, 3)) == data
    assert parse_release(data) == Release(A, 12, 3)
    signed = Release(A, 12, 3, ({"keyid": "k", "signature": "s"},))
    assert parse_release(release_bytes(signed)) == signed


def test_caps_round_trip() -> None:
    manifest = legal()
    tensor = replace(manifest.tensors[0], caps=(3, 3, 2, 3))
    levels = tuple(
        replace(level, tensors=(replace(level.tensors[0], offset=(0, 0, 0, level.tensors[0].offset)),))  # type: ignore[arg-type]
        for level in manifest.levels
    )
    capped = replace(manifest, tensors=(tensor,), levels=levels)
    assert parse_manifest(manifest_bytes(capped)) == capped


def test_order_of_levels() -> None:
    manifest = legal()
    low, high = manifest.levels
    assert is_below(low, high) and not is_below(high, low)
    assert levels_below(manifest, "high") == [low, high]
    assert levels_below(manifest, "low") == [low]


Change = Callable[[dict[str, Any]], object]
# name -> (edit of the JSON value, words of the one problem)
BREACHES: dict[str, tuple[Change, str]] = {
    "format": (lambda m: m.update(format="qdeploy-bundle/2"), "format is not qdeploy-bundle/1"),
    "unknown key": (lambda m: m.update(url="http://x"), "unknown key 'url'"),
    "missing key": (lambda m: m.pop("graph"), "lacks the key 'graph'"),
    "float": (lambda m: m.update(size=112.0), "size is not an integer"),
    "bool": (lambda m: m.update(skeleton=False), "skeleton is not an integer"),
    "huge": (lambda m: m.update(release=1 << 60), "release is not an integer"),
    "text for list": (lambda m: m.update(pieces="x"), "pieces is not a list"),
    "row too long": (lambda m: m["pieces"][0].append(1), "piece 0 has 7 entries, the limit is 6"),
    "model": (lambda m: m.update(model="a/b"), "model name 'a/b'"),
    "release": (lambda m: m.update(release=0), "release number 0"),
    "graph": (lambda m: m.update(graph="A" * 64), "graph: digest"),
    "size": (lambda m: m.update(size=1 << 31), "size 2147483648 is not"),
    "no levels": (lambda m: m.update(levels=[]), "there are no levels"),
    "path for digest": (lambda m: m["objects"][0].update(sha256="../../etc/passwd"), "object 0: digest"),
    "leaves": (lambda m: m["objects"][2].update(leaves=[A]), "1 leaves for 70000 bytes, not 2"),
    "empty object": (lambda m: m["objects"][0].update(size=0), "object 0: size 0"),
    "codec": (lambda m: m["pieces"][1].__setitem__(4, "zstd"), "codec 'zstd'"),
    "raw length": (lambda m: m["pieces"][1].__setitem__(3, 3), "raw but 2 is not 3"),
    "gap": (lambda m: m["pieces"][1].__setitem__(1, 10), "piece 1: begins at (0, 10), not at (0, 9)"),
    "overrun": (lambda m: m["pieces"][2].__setitem__(2, 5), "piece 2: raw but 5 is not 4"),
    "no object": (lambda m: m["objects"].pop(), "there is no object 2"),
    "unfilled object": (lambda m: m["objects"][1].update(size=6), "begins at (2, 0), not at (1, 5)"),
    "unused object": (lambda m: m["objects"].append({"sha256": A, "size": 1, "leaves": []}), "do not fill"),
    "name": (lambda m: m["initializers"][0].__setitem__(0, "a\nb"), "printable"),
    "two names": (lambda m: m["initializers"][0].__setitem__(0, "scale"), "'scale' appears twice"),
    "dtype": (lambda m: m["initializers"][0].__setitem__(1, "object"), "dtype 'object'"),
    "kind": (lambda m: m["initializers"][0].__setitem__(4, "x"), "kind 'x'"),
    "overlap": (lambda m: m["initializers"][1].__setitem__(3, 17), "overlap the one before"),
    "outside": (lambda m: m["initializers"][2].__setitem__(3, 105), "leave the file"),
    "many axes": (lambda m: m["initializers"][0].__setitem__(2, [1] * 9), "9 entries, the limit is 8"),
    "negative axis": (lambda m: m["initializers"][0].__setitem__(2, [-1]), "impossible axes"),
    "huge shape": (lambda m: m["initializers"][0].__setitem__(2, [1 << 30, 1 << 30]), "leave the file"),
    "float weight": (lambda m: m["initializers"][2].__setitem__(1, "float32"), "int8 or uint8"),
    "tensor order": (lambda m: m["tensors"][0].update(name="other"), "not the initializers of kind 'planes'"),
    "bits": (lambda m: m["tensors"][0].update(bits=4), "do not add up to 4"),
    "first sorted": (
        lambda m: m["tensors"][0].update(parts=[[1, "sorted", 3, 0], [2, "tight", 1, 0]]),
        "does not suit",
    ),
    "layout": (lambda m: m["tensors"][0]["parts"][0].__setitem__(1, "gray"), "layout 'gray'"),
    "part overlap": (lambda m: m["tensors"][0]["parts"][0].__setitem__(3, 1), "begins at 1, not at 0"),
    "part piece": (lambda m: m["tensors"][0]["parts"][0].__setitem__(2, 99), "no piece 99"),
    "part length": (lambda m: m["tensors"][0]["parts"][0].__setitem__(2, 4), "has 4 raw bytes, not 2"),
    "cap count": (lambda m: m["tensors"][0].update(caps=[3]), "caps are not 4 numbers"),
    "cap inside": (lambda m: m["tensors"][0].update(caps=[3, 3, 3, 1]), "a cap lies inside"),
    "level name": (lambda m: m["levels"][0].update(name="../x"), "level '../x'"),
    "same name": (lambda m: m["levels"][0].update(name="high"), "level 'high' appears twice"),
    "same level": (lambda m: m["levels"][0].update(sha256=B), "appears twice"),
    "order": (lambda m: m["levels"].reverse(), "below the earlier level 'high'"),
    "between parts": (lambda m: m["levels"][0].update(tensors=[[1, 5, 8]]), "bits 1, shift 5"),
    "code range": (lambda m: m["levels"][0].update(tensors=[[2, 6, 64]]), "leave the range of int8"),
    "shift": (lambda m: m["levels"][0].update(tensors=[[2, 9, 0]]), "shift 9"),
    "offset": (lambda m: m["levels"][0].update(tensors=[[2, 5, 300]]), "offset 300"),
    "offset list": (lambda m: m["levels"][0].update(tensors=[[2, 5, [0, 0, 0, 0]]]), "one number without caps"),
    "tensors": (lambda m: m["levels"][0].update(tensors=[]), "0 tensors, not 1"),
    "no side": (lambda m: m["levels"][0].update(side=None), "a side piece is there exactly"),
    "side length": (lambda m: m["levels"][0].update(side=1), "has 2 raw bytes, not 4"),
    "golden": (lambda m: m["levels"][0].update(golden={"input_sha256": A}), "lacks the key 'output_sha256'"),
    "golden digest": (lambda m: m["levels"][0]["golden"].update(input_sha256="x"), "digest 'x'"),
    "info": (lambda m: m["levels"][0].update(info={"a": ["b"]}), "info is more than"),
    "empty info": (lambda m: m["levels"][0].update(info={}), "info is not an object with entries"),
    "target": (lambda m: m["artifacts"][0].update(target={}), "its target is not"),
    "file name": (lambda m: m["artifacts"][0].update(files=[["a/b", 5]]), "file name 'a/b'"),
    "dot file": (lambda m: m["artifacts"][0].update(files=[["..", 5]]), "file name '..'"),
    "file piece": (lambda m: m["artifacts"][0].update(files=[["a", 6]]), "no piece 6"),
    "no files": (lambda m: m["artifacts"][0].update(files=[]), "0 files"),
    "unused piece": (lambda m: m.update(artifacts=[]), "piece 5 is not used"),
    "skeleton": (lambda m: m.update(skeleton=1), "has 2 raw bytes, not 100"),
    "negative skeleton": (lambda m: m.update(skeleton=-1), "no piece -1"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breaches_are_named(name: str) -> None:
    change, words = BREACHES[name]
    value = json.loads(manifest_bytes(legal()))
    change(value)
    with pytest.raises(BundleError) as e:
        parse_manifest(canonical_json(value))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_all_problems_are_named_at_once() -> None:
    value = json.loads(manifest_bytes(legal()))
    value["levels"][0]["name"] = "/"
    value["artifacts"][0]["files"] = [["a/b", 5]]
    with pytest.raises(BundleError, match="level '/'.*file name 'a/b'"):
        parse_manifest(canonical_json(value))


def test_only_canonical_bytes() -> None:
    data = manifest_bytes(legal())
    for other in (data + b"\n", data.replace(b",", b", ", 1), b" " + data, data.replace(b'"model"', b'"m\\u006fdel"')):
        with pytest.raises(BundleError, match=r"canonical|not valid JSON"):
            parse_manifest(other)
    with pytest.raises(BundleError, match="a key appears twice"):
        parse_manifest(data.replace(b'"release":3', b'"release":3,"release":3'))
    with pytest.raises(BundleError, match="the limit is"):
        parse_manifest(bytes((16 << 20) + 1))


@given(st.data())
def test_any_edit_is_refused_or_parsed(data: st.DataObject) -> None:
    """Nothing but BundleError leaves the parser, whatever stands where."""
    value = json.loads(manifest_bytes(legal()))
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
            spots.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(value)
    node, key = data.draw(st.sampled_from(spots))
    odd = st.sampled_from([None, True, -1, 0, 1, 7, 10**400, 1.5, "", "../..", "a", A, [], [[]], {}, {"a": 1}, [1, 2]])
    node[key] = data.draw(odd | st.integers() | st.text(max_size=5))
    try:
        parsed = parse_manifest(canonical_json(value))
    except BundleError:
        return
    assert manifest_bytes(parsed) == canonical_json(value)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    for parse in (parse_manifest, parse_release):
        with pytest.raises(BundleError):
            parse(data)


@pytest.mark.parametrize(
    "edit",
    [
        {"format": "x"},
        {"release": 0},
        {"release": "1"},
        {"signatures": None},
        {"signatures": [{}]},
        {"signatures": [{"keyid": "k", "signature": "s" * 1025}]},
        {"signatures": [{"keyid": "k", "signature": "s"}] * 17},
        {"manifest": {"sha256": A, "size": 0}},
        {"manifest": {"sha256": "../x", "size": 1}},
        {"manifest": {"sha256": A, "size": 1, "url": "x"}},
        {"expires": "never"},
    ],
)
def test_bad_releases(edit: dict[str, Any]) -> None:
    value = json.loads(release_bytes(Release(A, 12, 3))) | edit
    with pytest.raises(BundleError, match="release.json"):
        parse_release(canonical_json(value))


def test_format_page_names_every_limit() -> None:
    page = (Path(__file__).parents[2] / "qdeploy" / "bundle" / "FORMAT.md").read_text()
    for word in ("65,536; 262,144", "16,384; 64; 64; 64", "16 MiB, 64 KiB", "100 characters", "512 characters"):
        assert word in page
