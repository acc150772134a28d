"""Decoders on arbitrary bytes: the right size or a BundleError, no memory for what is only claimed."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.bundle.codec import decode
from qdeploy.bundle.manifest import Initializer, Level, Manifest, Object, Part, Piece, Tensor, TensorLevel, check
from qdeploy.bundle.planes import container, join, unpack
from qdeploy.bundle.tables import LAYOUTS
from qdeploy.errors import BundleError
from qdeploy.files import sha256, write_atomic
from tests.client.tree import publish
from tests.faults.conftest import SHARE

EXAMPLES = max(60, round(20_000 * SHARE))
any_bytes = st.binary(max_size=80)


def deflate(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(data) + coder.flush()


@settings(max_examples=EXAMPLES)
@given(any_bytes | any_bytes.map(deflate), st.integers(0, 200), st.sampled_from(["raw", "deflate", "zstd"]))
def test_a_piece_has_its_raw_length_or_is_refused(data: bytes, raw: int, codec: str) -> None:
    try:
        assert len(decode(codec, data, raw, "a piece")) == raw
    except BundleError as e:
        assert str(e).isprintable()


def test_a_bomb_does_not_grow() -> None:
    bomb = deflate(bytes(1 << 26))
    tracemalloc.start()
    try:
        with pytest.raises(BundleError):
            decode("deflate", bomb, 1000, "a piece")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=EXAMPLES)
@given(any_bytes, st.integers(0, 700), st.integers(1, 8), st.sampled_from(["tight", "spaced"]))
def test_symbols_are_as_many_and_as_small_as_they_must_be(data: bytes, count: int, bits: int, layout: str) -> None:
    if bits not in LAYOUTS[layout]:
        layout = "tight"
    per = 8 // bits
    exact = -(-count // per) if layout == "spaced" else -(-count * bits // 8)
    for given_ in (data, data[:exact].ljust(exact, b"\0")):
        try:
            symbols = unpack(given_, count, bits, layout)
        except BundleError:
            continue
        assert len(given_) == exact and symbols.shape == (count,) and not (symbols >> bits).any()


@settings(max_examples=EXAMPLES)
@given(st.data(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 9))
def test_planes_of_any_bytes_make_codes_in_range(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    """Sorted, spaced and tight parts, with caps and without: the prefix is below 2^bits, the codes are the level's."""
    first = data.draw(st.integers(1, bits))
    widths = [first] + [1] * (bits - first)
    allowed = [0, *range(first, bits + 1)]
    caps = data.draw(st.none() | st.lists(st.sampled_from(allowed), min_size=rows, max_size=rows))
    parts, held = [], 0
    for width in widths:
        count = columns * (rows if caps is None else sum(cap > held for cap in caps))
        layout = data.draw(
            st.sampled_from(["tight", *(["sorted"] if held else ["spaced"] if width in (3, 5, 6, 7) else [])])
        )
        length = -(-count // (8 // width)) if layout == "spaced" else -(-count * width // 8)
        parts.append((width, layout, data.draw(st.binary(min_size=length, max_size=length + 1))))
        held += width
    try:
        prefix = join(parts, (rows, columns), caps)
    except BundleError:
        return
    assert prefix.shape == (rows, columns) and prefix.dtype == np.uint8 and not (prefix.astype(int) >> bits).any()
    offset: int | tuple[int, ...] = 0 if caps is None else (0,) * (bits + 1)
    codes = container(prefix, TensorLevel(bits, 0, offset), "int8", caps)
    assert codes.dtype == np.int8 and codes.min() >= -(1 << (bits - 1)) and codes.max() < 1 << (bits - 1)


# --- a manifest that claims much -------------------------------------------------------------------------------------

HUGE = 1 << 30
PULL = """
import sys
from qdeploy.client.pull import pull
from qdeploy.errors import QDeployError
from tests.faults import fuzzing
fuzzing.LIMIT = 256 << 20
fuzzing.confine()
try:
    pull(sys.argv[1], sys.argv[2], unsigned=True)
except QDeployError as e:
    print(type(e).__name__, e)
"""


def claiming(root: Path, weights: bytes, skeleton: bytes = b"s") -> Manifest:
    """A tree of one tensor of HUGE weights, 2 bits each, whose coded planes are `weights`."""
    data = skeleton + weights
    shape = (HUGE // 1024, 1024)
    manifest = Manifest(
        model="huge",
        release=1,
        graph="0" * 64,
        size=HUGE + len(skeleton),
        objects=(Object(sha256(data), len(data)),),
        pieces=(
            Piece(0, 0, len(skeleton), len(skeleton), "raw", sha256(skeleton)),
            Piece(0, len(skeleton), len(weights), HUGE // 4, "deflate", sha256(weights)),
        ),
        skeleton=0,
        initializers=(Initializer("w", "int8", shape, 0, "planes"),),
        tensors=(Tensor("w", 2, (Part(2, "tight", 1, 0),)),),
        levels=(Level("w2", "1" * 64, (TensorLevel(2, 5, 0),), None),),
    )
    assert math.prod(shape) == HUGE
    write_atomic(root / "objects" / manifest.objects[0].sha256, data)
    publish(root, check(manifest))
    return manifest


@pytest.mark.parametrize("weights", [deflate(b""), deflate(bytes(1000)), b"\xff" * 40], ids=["none", "few", "rubbish"])
def test_nothing_is_kept_for_a_size_that_is_only_claimed(weights: bytes, tmp_path: Path) -> None:
    from tests.client.scripted import scripted
    from tests.faults.hostile_http import serving_files

    manifest = claiming(tmp_path / "root", weights)
    assert replace(manifest) == manifest
    with scripted(serving_files(tmp_path / "root")) as (url, _):
        command = [sys.executable, "-c", PULL, url, str(tmp_path / "dev")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("BundleError "), done.stdout + done.stderr
    assert not (tmp_path / "dev" / "current.json").exists()
