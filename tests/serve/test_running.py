"""How a server starts and ends: TLS, graceful stops, downloads that resume."""

from __future__ import annotations

import hashlib
import signal
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from qdeploy.client.fetch import Patience, Source, Span
from qdeploy.client.status import DeviceState, report
from qdeploy.errors import DataError, FetchError
from qdeploy.serve.app import Options, serve, serving, serving_both
from qdeploy.serve.byte_log import read_byte_log
from qdeploy.serve.limits import Limits
from tests.serve.trees import CONTENT, NAME, ask, connect, make_root, read_all

BIG = "d" * 64
SIZE = 64 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_root(tmp_path)
    with open(root / "objects" / BIG, "wb") as file:
        file.truncate(SIZE)
    return root


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(locked)
    return folder / "cert.pem", folder / "key.pem"


def test_tls(root: Path, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate
    options = Options(port=0, cert=cert, key=key, log=tmp_path / "log", devices=tmp_path / "states")
    with serving(root, options=options) as url:
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(cert))
        status, _, body = ask(url, f"/objects/{NAME}", {"Range": "bytes=3-700000"}, tls=trusting)
        assert (status, body) == (206, CONTENT[3:700001])
        assert len(ask(url, f"/objects/{BIG}", tls=trusting)[2]) == SIZE
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(url, "/release.json", tls=ssl.create_default_context())
        with connect(url) as line:  # no TLS at all
            line.sendall(b"GET /release.json HTTP/1.1\r\n\r\n")
            assert b"200" not in read_all(line)
        with pytest.raises(FetchError, match="not trusted"), Source(url) as source:
            source.small("release.json", 1000)
        state = DeviceState("a", "m", "t", 1, "w4", "w4")
        assert "certificate" in (report(url, state) or "")
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        with Source(url) as source:
            got = b"".join(chunk for _, chunk in source.ranges(f"objects/{NAME}", len(CONTENT), [Span(5, 900_000)]))
        assert got == CONTENT[5:900_000]
        assert report(url, state) is None
    sent = [row.sent for row in read_byte_log(tmp_path / "log") if row.path.startswith("/objects/")]
    assert sent == [699_998, SIZE, 899_995]


def test_certificates_that_are_of_no_use(root: Path, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "text").write_text("text")
    for options, text in (
        (Options(cert=cert), "needs both"),
        (Options(cert=cert, key=tmp_path / "no"), "for TLS"),
        (Options(cert=tmp_path / "text", key=key), "for TLS"),
        (Options(cert=key, key=cert), "for TLS"),
        (Options(cert=cert, key=cert.with_name("locked.pem")), "unencrypted"),
        (Options(token="secret-token"), "--devices"),
    ):
        with pytest.raises(DataError, match=text):
            serve(root, options)


SERVER = """
import sys
from pathlib import Path
from qdeploy.serve.app import Options, serve
from qdeploy.serve.limits import Limits
port, stop = int(sys.argv[2]), float(sys.argv[3])
serve(Path(sys.argv[1]), Options(port=port, log=Path(sys.argv[4]), limits=Limits(stop_s=stop)), print)
"""


def start(root: Path, stop_s: float, log: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-u", "-c", SERVER, str(root), str(port), str(stop_s), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split(" at ")[1].split()[0]


def test_a_stop_lets_running_downloads_finish(root: Path, tmp_path: Path) -> None:
    process, url = start(root, 30, tmp_path / "log")
    with process, connect(url) as line, connect(url) as idle:
        idle.sendall(b"GET /release.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(10) == b"HTTP/1.1 2"
        line.sendall(f"GET /objects/{BIG} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = line.recv(100_000)
        process.send_signal(signal.SIGTERM)
        read_all(idle)  # ends at once: nothing runs on it
        assert len((head + read_all(line)).partition(b"\r\n\r\n")[2]) == SIZE
        assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    assert [row.sent for row in read_byte_log(tmp_path / "log") if row.path.endswith(BIG)] == [SIZE]


def test_a_stop_cuts_what_takes_too_long_and_the_client_resumes(root: Path, tmp_path: Path) -> None:
    """The same client goes on with the server that takes its place, and no byte that it has comes twice."""
    process, url = start(root, 0, tmp_path / "log")
    port = int(url.rsplit(":", 1)[1])
    servers = [process]
    digest, seen = hashlib.sha256(), 0

    def replace() -> None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        servers.append(start(root, 1, tmp_path / "log2", port)[0])

    with Source(url, Patience(attempts=8, pause_s=0.2)) as source:
        for offset, chunk in source.ranges(f"objects/{BIG}", SIZE, [Span(0, SIZE)]):
            assert offset == seen
            digest.update(chunk)
            seen += len(chunk)
            if len(servers) == 1 and seen > 1 << 20:
                replace()
    assert digest.hexdigest() == hashlib.sha256(bytes(SIZE)).hexdigest()
    assert source.received == SIZE and source.skipped == 0
    servers[1].send_signal(signal.SIGTERM)
    for one in servers:
        with one:
            assert one.wait(30) == 0
    (first,), (second,) = read_byte_log(tmp_path / "log"), read_byte_log(tmp_path / "log2")
    assert first.sent < SIZE and second.start <= first.sent and second.sent == SIZE - second.start


def test_a_second_signal_ends_it_at_once(root: Path, tmp_path: Path) -> None:
    process, url = start(root, 3000, tmp_path / "log")
    with process, connect(url) as line:
        line.sendall(f"GET /objects/{BIG} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert line.recv(10)
        process.send_signal(signal.SIGTERM)
        while True:  # until it no longer listens
            try:
                connect(url).close()
            except ConnectionError:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_many_connections_at_once(root: Path, tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(url: str) -> None:
        for _ in range(5):
            answer = ask(url, f"/objects/{NAME}", {"Range": "bytes=1-200000"})
            if answer[::2] != (206, CONTENT[1:200001]):
                wrong.append(answer[0])

    with serving(root, log=tmp_path / "log") as url:
        threads = [threading.Thread(target=work, args=(url,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert [row.sent for row in read_byte_log(tmp_path / "log")] == [200_000] * 200


def test_health_and_metrics(root: Path) -> None:
    with serving_both(root, Options(port=0, admin_port=0, limits=Limits(stop_s=1))) as (url, admin):
        assert admin is not None
        ask(url, f"/objects/{NAME}", {"Range": "bytes=0-99999"})
        assert ask(url, "/healthz")[::2] == (200, b"200\n")
        text = ask(admin, "/metrics")[2].decode()
        assert 'qdeploy_http_requests_total{kind="object",status="206"} 1.0' in text
        assert 'qdeploy_http_sent_bytes_total{kind="object"} 100000.0' in text
        assert "process_resident_memory_bytes" in text
        for name in ("release.json", "metadata/timestamp.json"):
            (root / name).unlink()
        assert ask(url, "/healthz")[0] == ask(admin, "/healthz")[0] == 503
        assert ask(admin, "/metrics", method="POST", body=b"")[0] == 405
        assert ask(admin, "/release.json")[0] == 404
