"""Publish to S3 (moto's server, where it and s3fs are installed), and pull from it over plain HTTP."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.client.pull import climb, pull
from qdeploy.errors import DeviceError
from qdeploy.trust.publish import Wish, publish, refresh
from qdeploy.trust.storage import Store
from tests.client.device import QUICK, file_of
from tests.trust.test_publish import assert_whole
from tests.trust.world import World

pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto[server] is not installed")


# sockets that s3fs and moto's server leave to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
POLICY_ALL = "arn:aws:s3:::bucket/*"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec.config

    simulated = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    simulated.start()
    host, port = simulated.get_host_and_port()
    url = f"http://{host}:{port}"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": url, "key": "a", "secret": "b"})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("bucket")
    readers = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    policy = {"Version": "2012-10-17", "Statement": [readers | {"Resource": ["arn:aws:s3:::bucket", POLICY_ALL]}]}
    store.call_s3("put_bucket_policy", Bucket="bucket", Policy=json.dumps(policy))
    yield url
    simulated.stop()


def test_publish_pull_climb(address: str, tmp_path: Path) -> None:
    world = World(tmp_path, root="1/1", targets="1/1")
    store = Store("s3://bucket/models")
    first = publish(world.bundle(0).root, store, world.keys, Wish())
    device = tmp_path / "dev"
    url = f"{address}/bucket/models"
    pull([url], device, root=world.home / "1.root.json", patience=QUICK)
    climb(device, "w4", patience=QUICK)
    assert file_of(device, "w4") == world.bundle(0).files["w4"]
    second = publish(world.bundle(1).root, store, world.keys, Wish())
    assert publish(world.bundle(0).root, store, world.keys, Wish()).sent < min(first.sent, second.sent)
    refresh(store, world.keys)
    assert pull([url], device, patience=QUICK).release == 3
    assert file_of(device, "w4") == world.bundle(0).files["w4"]
    said = world.hear(device, lambda path, limit: store.read(path) or world.fetch("missing", limit))
    assert_whole(store, said)


def test_taken_names_and_missing_buckets(address: str) -> None:
    store = Store("s3://bucket/models")
    store.create("metadata/1.targets.json", b"1")
    with pytest.raises(DeviceError, match="another publisher is at work"):
        store.create("metadata/1.targets.json", b"2")
    assert store.read("metadata/1.targets.json") == b"1"
    with pytest.raises(DeviceError, match="cannot publish to s3://nowhere/x"):
        Store("s3://nowhere/x").write("release.json", b"")
