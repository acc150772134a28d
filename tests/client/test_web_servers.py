"""Any static web server publishes a tree."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from qdeploy.client.pull import climb
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import damage, file_of, pull
from tests.client.tree import Tree, make_tree
from tests.nginx import running


@contextlib.contextmanager
def python_server(root: Path) -> Iterator[str]:
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().split(" port ")[1].split()[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def test_a_server_without_ranges_works(tree: Tree, dev: Path) -> None:
    with python_server(tree.root) as url:
        assert pull(url, dev, "w2").skipped == 0
        climb(dev, "w4")
        assert file_of(dev, "w4") == tree.files["w4"]
        first = tree.manifest.objects[0]
        damage(dev / "objects" / first.sha256, first.size - 1)
        report = pull(url, dev, "w4")
    assert report.skipped > 0 and "knows no ranges" in "\n".join(report.lines())


NGINX = """
pid {prefix}/pid; error_log {prefix}/error warn; worker_processes 1; {user}
events {{ worker_connections 64; }}
http {{
  log_format bytes '{{"method":"$request_method","path":"$uri","range":"$http_range","status":$status,"start":0,'
                   '"size":$body_bytes_sent,"sent":$body_bytes_sent}}';
  access_log {prefix}/access bytes; gzip on; gzip_types application/json; gzip_min_length 1; gzip_proxied any;
  client_body_temp_path {prefix}/t; proxy_temp_path {prefix}/t; fastcgi_temp_path {prefix}/t;
  uwsgi_temp_path {prefix}/t; scgi_temp_path {prefix}/t; types {{ application/json json; }}
  server {{ listen 127.0.0.1:{port}; location /models/toy/ {{ alias {root}/; }} }}
}}
"""


@contextlib.contextmanager
def nginx(root: Path, prefix: Path) -> Iterator[str]:
    with running(prefix, lambda port, user: NGINX.format(prefix=prefix, port=port, root=root, user=user)) as port:
        yield f"http://127.0.0.1:{port}/models/toy/"


def test_nginx_serves_the_same_tree(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(500_000,))
    with nginx(tree.root, tmp_path / "nginx") as url:
        assert urlsplit(url).path == "/models/toy/"
        reports = [pull(url, dev, "w2"), climb(dev, "w3"), climb(dev, "w4")]
        damage(dev / "objects" / tree.manifest.objects[0].sha256, 3)
        reports.append(pull(url, dev, "w4"))
    assert file_of(dev, "w4") == tree.files["w4"]
    assert all(report.skipped == 0 for report in reports)
    rows = read_byte_log(tmp_path / "nginx" / "access")
    assert sum(row.sent for row in rows) == sum(report.total_fetched for report in reports)
    assert {row.status for row in rows if "/objects/" in row.path} == {206}
