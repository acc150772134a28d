"""Datasets: pins, what is refused, fetching from a server that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdeploy import data
from qdeploy.data import Dataset, IdxFile, fetch_fashion_mnist, idx_bytes, load, parse_idx, unpickle_cifar
from qdeploy.errors import DataError, FetchError, RecipeError


def test_shipped_splits(fashion_test: Dataset, fashion_sample: Dataset) -> None:
    assert fashion_test.images.shape == (10_000, 1, 28, 28) and fashion_sample.images.shape == (5_000, 1, 28, 28)
    assert fashion_test.classes == fashion_sample.classes == 10
    assert fashion_test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert (np.bincount(fashion_test.labels) == 1000).all()
    assert np.bincount(fashion_sample.labels).min() > 450
    # every class looks like itself: the nearest class mean of the sample names most test images
    means = np.stack([fashion_sample.images[fashion_sample.labels == c].mean(0).ravel() for c in range(10)])
    flat = fashion_test.images[:1000].reshape(1000, -1).astype(np.float64)
    nearest = ((flat**2).sum(1)[:, None] - 2 * flat @ means.T + (means**2).sum(1)).argmin(1)
    assert (nearest == fashion_test.labels[:1000]).mean() > 0.6


def test_shipped_files_hold_no_time_and_their_licence() -> None:
    for path in sorted(data.SHIPPED.glob("*.gz")):
        assert path.read_bytes()[4:8] == b"\0\0\0\0"
    assert "Permission is hereby granted" in (data.SHIPPED / "LICENSE").read_text()


def test_take(fashion_test: Dataset) -> None:
    assert len(fashion_test.take(7)) == 7
    for count in (0, 10_001):
        with pytest.raises(DataError, match=f"cannot take {count}"):
            fashion_test.take(count)


def test_dataset_refuses_wrong_arrays() -> None:
    images = np.zeros((2, 1, 4, 4), np.uint8)
    for bad_images, labels in [
        (images.astype(np.float32), np.zeros(2, np.int64)),
        (images, np.zeros(3, np.int64)),
        (images, np.array([0, 10])),
        (images, np.array([-1, 0])),
    ]:
        with pytest.raises(DataError):
            Dataset("cifar-10", "test", bad_images, labels)


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    assert np.array_equal(parse_idx(idx_bytes(array), "x"), array)


@given(st.binary(max_size=40) | st.binary(max_size=30).map(lambda tail: b"\0\0\x08" + tail))
def test_idx_parser_raises_data_errors_only(content: bytes) -> None:
    try:
        array = parse_idx(content, "x")
    except DataError:
        return
    assert idx_bytes(array) == content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01" + bytes(8), "not an IDX file"),
        (b"\0\0\x08\x03\0\0\0\x02", "ends inside its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"3 bytes of content where its header says \(5,\)"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xffabc", "3 bytes of content"),
    ],
)
def test_idx_says_what_is_wrong(content: bytes, text: str) -> None:
    with pytest.raises(DataError, match=text):
        parse_idx(content, "x")


@pytest.fixture
def small_full_set(monkeypatch: pytest.MonkeyPatch, fashion_sample: Dataset) -> dict[str, bytes]:
    """The real loader with pins of a 'full' training set of 300 real images: {file name: uncompressed bytes}."""
    contents = {
        "train-images-idx3-ubyte": idx_bytes(fashion_sample.images[:300, 0]),
        "train-labels-idx1-ubyte": idx_bytes(fashion_sample.labels[:300].astype(np.uint8)),
        "t10k-images-idx3-ubyte": idx_bytes(fashion_sample.images[300:350, 0]),
        "t10k-labels-idx1-ubyte": idx_bytes(fashion_sample.labels[300:350].astype(np.uint8)),
    }
    files = [IdxFile(name, hashlib.sha256(c).hexdigest(), len(c)) for name, c in contents.items()]
    pins = data.FASHION_MNIST | {"train": (files[0], files[1]), "test": (files[2], files[3])}
    monkeypatch.setattr(data, "FASHION_MNIST", pins)
    monkeypatch.setattr(data, "DEBIAN", Path("/nonexistent/debian"))
    return contents


def damage(content: bytes, how: str) -> bytes:
    """A .gz of `content` gone wrong in one way."""
    packed = gzip.compress(content, mtime=0)
    return {
        "truncated": packed[: len(packed) // 2],
        "not gzip": b"<html>not found</html>",
        "empty": b"",
        "flipped": packed[:200] + bytes([packed[200] ^ 1]) + packed[201:],
        "edited": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
        "shorter": gzip.compress(content[:-1]),
        "longer": gzip.compress(content + b"\0"),
        "bomb": gzip.compress(bytes(50 << 20)),
    }[how]


DAMAGE = ("truncated", "not gzip", "empty", "flipped", "edited", "shorter", "longer", "bomb")


def write_set(folder: Path, contents: dict[str, bytes], gz: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(content) if gz else content)


@pytest.mark.parametrize("where", ["plain", "gz", "subfolder", "debian"])
def test_full_train_set_is_found(
    tmp_path: Path, where: str, small_full_set: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "fashion-mnist" if where == "subfolder" else tmp_path, small_full_set, gz=where != "plain")
    if where == "debian":
        monkeypatch.setattr(data, "DEBIAN", tmp_path)
    loaded = load("fashion-mnist", "train", None if where == "debian" else tmp_path)
    assert loaded.images.shape == (300, 1, 28, 28)
    assert loaded.images.tobytes() == small_full_set["train-images-idx3-ubyte"][16:]


def test_debian_package_is_the_same_set() -> None:
    if not data.DEBIAN.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    full = load("fashion-mnist", "train")
    sample = load("fashion-mnist", "sample")
    assert np.array_equal(full.images[:5000], sample.images) and np.array_equal(full.labels[:5000], sample.labels)


def test_absent_train_set_names_three_ways(tmp_path: Path, small_full_set: dict[str, bytes]) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(DataError, match="--data-dir FOLDER.*apt install dataset-fashion-mnist.*fetch") as caught:
            load("fashion-mnist", "train", folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_file_is_refused_and_not_replaced(
    tmp_path: Path, how: str, small_full_set: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "good", small_full_set)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "good")  # a good copy further on is no excuse
    write_set(tmp_path / "bad", small_full_set)
    name = "train-images-idx3-ubyte"
    (tmp_path / "bad" / f"{name}.gz").write_bytes(damage(small_full_set[name], how))
    with pytest.raises(DataError, match="bad/train-images-idx3-ubyte.gz is damaged"):
        load("fashion-mnist", "train", tmp_path / "bad")


def test_swapped_files_are_refused(tmp_path: Path, small_full_set: dict[str, bytes]) -> None:
    swapped = dict(small_full_set)
    swapped["train-labels-idx1-ubyte"] = swapped["t10k-labels-idx1-ubyte"]
    write_set(tmp_path, swapped)
    with pytest.raises(DataError, match="train-labels"):
        load("fashion-mnist", "train", tmp_path)


def test_damaged_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHIPPED", tmp_path)
    with pytest.raises(DataError, match="pip install -e"):
        load("fashion-mnist", "sample")
    (tmp_path / "sample-images-idx3-ubyte.gz").write_bytes(b"junk")
    with pytest.raises(DataError, match="is damaged"):
        load("fashion-mnist", "sample")


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown dataset 'mnist': choose one of cifar-10, fashion-mnist"):
        load("mnist", "test")
    with pytest.raises(RecipeError, match="no split 'sample'"):
        load("cifar-10", "sample")
    with pytest.raises(DataError, match="is not a folder"):
        load("cifar-10", "test", tmp_path / "nowhere")


# --- fetch


@contextmanager
def serving(answers: dict[str, Callable[[BaseHTTPRequestHandler], None]]) -> Iterator[tuple[str, list[str]]]:
    """A loopback server: path -> what it does; yields its address and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path in answers:
                answers[self.path](self)
            else:
                self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/sets", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(body: bytes, promised: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    """Send `body` under a Content-Length of `promised`."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) if promised is None else promised))
        handler.end_headers()
        try:
            handler.wfile.write(body)
        except OSError:  # the client hung up on a file that is too large
            handler.close_connection = True

    return send


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def good_answers(contents: dict[str, bytes]) -> dict[str, Callable[[BaseHTTPRequestHandler], None]]:
    return {f"/sets/{name}.gz": answer(gzip.compress(content)) for name, content in contents.items()}


def test_fetch_then_load_then_nothing_twice(tmp_path: Path, small_full_set: dict[str, bytes]) -> None:
    lines: list[str] = []
    with serving(good_answers(small_full_set)) as (url, asked):
        fetch_fashion_mnist(tmp_path / "new", url, lines.append)
        assert len(asked) == len(lines) == 4
        fetch_fashion_mnist(tmp_path / "new", url + "/")
        assert len(asked) == 4
        (tmp_path / "new" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"rotten")
        fetch_fashion_mnist(tmp_path / "new", url)
        assert asked[4:] == ["/sets/t10k-labels-idx1-ubyte.gz"]
    assert len(load("fashion-mnist", "train", tmp_path / "new")) == 300


@pytest.mark.parametrize("how", DAMAGE)
def test_fetch_refuses_damage_and_resumes(tmp_path: Path, how: str, small_full_set: dict[str, bytes]) -> None:
    answers = good_answers(small_full_set)
    name = "t10k-images-idx3-ubyte"
    answers[f"/sets/{name}.gz"] = answer(damage(small_full_set[name], how))
    with serving(answers) as (url, asked):
        with pytest.raises(FetchError, match=name):
            fetch_fashion_mnist(tmp_path, url)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
        answers[f"/sets/{name}.gz"] = answer(gzip.compress(small_full_set[name]))
        fetch_fashion_mnist(tmp_path, url)
        assert len(asked) == 5
    assert len(list(tmp_path.iterdir())) == 4


def test_fetch_stops_reading_an_oversized_file(tmp_path: Path, small_full_set: dict[str, bytes]) -> None:
    with serving({"/sets/train-images-idx3-ubyte.gz": answer(bytes(8 << 20))}) as (url, _):
        with pytest.raises(FetchError, match="is larger than"):
            fetch_fashion_mnist(tmp_path, url)
    assert not list(tmp_path.iterdir())


def test_fetch_from_a_server_that_vanishes(tmp_path: Path, small_full_set: dict[str, bytes]) -> None:
    body = gzip.compress(small_full_set["train-images-idx3-ubyte"])
    with serving({"/sets/train-images-idx3-ubyte.gz": answer(body[:1000], promised=len(body))}) as (url, _):
        with pytest.raises(FetchError, match=r"cannot fetch|ended after 1000"):
            fetch_fashion_mnist(tmp_path, url)
    with pytest.raises(FetchError, match="cannot fetch"):
        fetch_fashion_mnist(tmp_path, url)  # nobody listens any more
    with pytest.raises(FetchError, match="not an http"):
        fetch_fashion_mnist(tmp_path, "file:///etc")
    assert not list(tmp_path.iterdir())


# --- CIFAR-10


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The real loader with pins of a set of 20 images a batch: {batch: uint8 [20, 3073]}."""
    rng = np.random.default_rng(0)
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    batches = {}
    for name in names["train"] + names["test"]:
        batches[name] = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        batches[name][:, 0] %= 10
    pins = {split: {n: hashlib.sha256(batches[n].tobytes()).hexdigest() for n in names[split]} for split in names}
    monkeypatch.setattr(data, "CIFAR_10", pins)
    monkeypatch.setattr(data, "CIFAR_COUNT", 20)
    return batches


def python3_pickle(records: np.ndarray) -> bytes:
    """A batch as Python 3 and this numpy write it under protocol 2 (through _codecs.encode)."""
    return pickle.dumps({"labels": records[:, 0].tolist(), "data": records[:, 1:].copy()}, protocol=2)


def python2_pickle(records: np.ndarray) -> bytes:
    """A batch in the opcodes that Python 2 and its numpy wrote: byte strings, numpy.core.multiarray."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    labels = b"](" + b"".join(number(int(v)) for v in records[:, 0]) + b"e"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = number(len(records)) + number(3072) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(records[:, 1:].tobytes()) + b"tb"
    label = text(b"batch_label") + text(b"testing batch 1 of 1")
    return b"\x80\x02}(" + label + text(b"labels") + labels + text(b"data") + array + b"u."


FORMS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "bin": (".bin", lambda records: records.tobytes()),
    "python2": ("", python2_pickle),
    "python3": ("", python3_pickle),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin", "cifar-10-batches-py"])
def test_cifar_forms(tmp_path: Path, small_cifar: dict[str, np.ndarray], form: str, inside: str) -> None:
    suffix, write = FORMS[form]
    (tmp_path / inside).mkdir(exist_ok=True)
    for name, records in small_cifar.items():
        (tmp_path / inside / f"{name}{suffix}").write_bytes(write(records))
    train, test = load("cifar-10", "train", tmp_path), load("cifar-10", "test", tmp_path)
    assert train.images.shape == (100, 3, 32, 32) and train.images.flags.writeable and train.classes == 10
    assert np.array_equal(test.images.reshape(20, -1), small_cifar["test_batch"][:, 1:])
    assert np.array_equal(test.labels, small_cifar["test_batch"][:, 0])


@pytest.mark.parametrize("form", FORMS)
def test_cifar_damage(tmp_path: Path, small_cifar: dict[str, np.ndarray], form: str) -> None:
    suffix, write = FORMS[form]
    good = {name: write(records) for name, records in small_cifar.items()}
    path = tmp_path / f"data_batch_2{suffix}"
    flipped = bytearray(good["data_batch_2"])
    flipped[len(flipped) // 2] ^= 4
    broken = [b"", good["data_batch_2"][:-9], bytes(flipped), good["data_batch_3"], bytes(2 * 20 * 3073 + 1)]
    for content in broken:
        for name in small_cifar:
            (tmp_path / f"{name}{suffix}").write_bytes(good[name])
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name}.* (is damaged|is not a python batch|is too large)"):
            load("cifar-10", "train", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read .*{path.name}"):
        load("cifar-10", "train", tmp_path)


def test_cifar_absent_names_three_ways(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(DataError, match=r"python batches.*binary batches.*tools/make_cifar10\.py"):
            load("cifar-10", "test", folder)


class Hostile:
    """Pickles to a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.marker}",)


def test_cifar_runs_nothing_that_a_pickle_names(tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    content = pickle.dumps({"labels": [1], "data": Hostile(marker)}, protocol=2)
    with pytest.raises(DataError, match=r"system is not allowed"):
        unpickle_cifar(content, "x")
    assert not marker.exists()
    for name in (b"numpy\nload", b"builtins\neval", b"numpy.core.multiarray\nscalar", b"qdeploy.data\nload"):
        with pytest.raises(DataError, match="is not allowed"):
            unpickle_cifar(b"\x80\x02c" + name + b"\n)R.", "x")
    with pytest.raises(DataError, match="is not allowed"):
        unpickle_cifar(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "x")


@given(st.binary(max_size=60).map(lambda tail: b"\x80\x02" + tail))
def test_cifar_pickle_parser_raises_data_errors_only(content: bytes) -> None:
    with pytest.raises(DataError):
        unpickle_cifar(content, "x")


def test_cifar_other_arrays_are_refused() -> None:
    for array in (np.zeros((3072, 20), np.uint8).T, np.zeros((20, 3072), np.int16), np.zeros((20, 3072), object)):
        content = pickle.dumps({"labels": [0] * 20, "data": array}, protocol=2)
        with pytest.raises(DataError):
            unpickle_cifar(content, "x")
    assert io.BytesIO(unpickle_cifar(python3_pickle(np.ones((2, 3073), np.uint8)), "x")).read() == b"\1" * 6146
