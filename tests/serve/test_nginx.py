"""The nginx configuration of docs/serving.md, as it stands there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from qdeploy.client.pull import climb, pull
from qdeploy.client.status import DeviceState, report
from qdeploy.serve.app import Options, serving
from qdeploy.serve.fleet import read_fleet
from tests.client.tree import make_tree
from tests.nginx import running
from tests.serve.trees import CONTENT, NAME, ask, make_root

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


@contextlib.contextmanager
def nginx(tree: Path, prefix: Path, behind: str = "") -> Iterator[str]:
    (block,) = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert "listen 80;" in block and "root /srv/qdeploy/tree;" in block and "proxy_pass http://127.0.0.1:8000;" in block
    block = block.replace("/srv/qdeploy/tree", str(tree)).replace(
        "http://127.0.0.1:8000", behind or "http://127.0.0.1:1"
    )
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{name}_temp_path {prefix}/t;" for name in names)

    def config(port: int, user: str) -> str:
        # what surrounds a server block in a distribution's nginx.conf, gzip included
        return (
            f"pid {prefix}/pid; error_log {prefix}/error; worker_processes 1; {user}\n"
            f"events {{ worker_connections 64; }}\nhttp {{ access_log off; {temporary}\n"
            "gzip on; gzip_min_length 1; gzip_proxied any; gzip_types *;\n"
            + block.replace("listen 80;", f"listen 127.0.0.1:{port};")
            + "\n}\n"
        )

    with running(prefix, config) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_device_pulls_and_climbs(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(500_000,))
    with nginx(tree.root, tmp_path / "nginx") as url:
        reports = [pull(url, tmp_path / "dev", "w2", unsigned=True), climb(tmp_path / "dev", "w4")]
    assert all(report.skipped == 0 for report in reports)


def test_it_serves_what_the_built_in_server_does_and_no_more(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    digest = "a" * 64
    (root / "objects" / digest).symlink_to(tmp_path / "outside")
    with nginx(root, tmp_path / "nginx") as url:
        for path in (
            f"/objects/{NAME}",
            f"/manifests/{NAME}.json",
            f"/rollout/{NAME}.json",
            "/metadata/3.targets.json",
        ):
            status, headers, _ = ask(url, path, {"Accept-Encoding": "gzip"})
            assert (status, headers["cache-control"]) == (200, "public, max-age=31536000, immutable"), path
            assert "content-encoding" not in headers and headers["x-content-type-options"] == "nosniff"
        for path in ("/release.json", "/metadata/timestamp.json"):
            status, headers, _ = ask(url, path, {"Accept-Encoding": "gzip"})
            assert (status, headers["cache-control"]) == (200, "no-cache")
            assert "content-encoding" not in headers
            assert ask(url, path, {"If-None-Match": headers["etag"]})[0] == 304
        status, headers, body = ask(url, f"/objects/{NAME}", {"Range": "bytes=1000-299999"})
        assert (status, body) == (206, CONTENT[1000:300000])
        assert headers["content-range"] == f"bytes 1000-299999/{len(CONTENT)}"
        for path in (
            "/",
            "/objects/",
            "/objects/.hidden",
            "/other.txt",
            "/metadata/keys.json",
            "/metadata/4.root.json",
        ):
            assert ask(url, path)[0] == 404, path
        assert ask(url, f"/objects/{digest}")[0] in (403, 404)
        assert ask(url, "/release.json", method="POST", body=b"")[0] in (403, 405)


def test_reports_go_to_the_server_behind_it(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    state = DeviceState("cam-1", "m", "t", 1, "w4", "w4")
    with serving(root, options=Options(port=0, devices=tmp_path / "states")) as behind:
        with nginx(root, tmp_path / "nginx", behind) as url:
            assert report(url, state) is None
            assert (report(url, state) or "").startswith("the server answered 429")
            status, _, _ = ask(url, "/devices/cam-2/state", method="POST", body=b"x" * 5000)
            assert status == 413
            assert ask(url, "/devices")[0] == 404
    assert [found for _, found in read_fleet(str(tmp_path / "states"))] == [state]
