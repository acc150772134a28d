"""TLS that proves nothing: wrong, expired, foreign or no certificates, and lines that break off in the handshake."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from qdeploy.client.fetch import Patience
from qdeploy.client.pull import pull
from qdeploy.errors import FetchError
from qdeploy.serve.app import serving
from tests.client.device import file_of
from tests.client.tree import make_tree

QUICK = Patience(timeout_s=20, attempts=2, pause_s=0.001)
DAY = timedelta(days=1)


def named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """Signs certificates for servers; its own is in `path`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.path = folder / "ca.pem"
        made = self.builder(self.key, DAY, "ca").add_extension(x509.BasicConstraints(True, None), critical=True)
        self.path.write_bytes(made.sign(self.key, SHA256()).public_bytes(Encoding.PEM))

    @staticmethod
    def builder(key: ec.EllipticCurvePrivateKey, valid: timedelta, name: str) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        made = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named("ca")).public_key(key.public_key())
        return (
            made.serial_number(x509.random_serial_number()).not_valid_before(now - 9 * DAY).not_valid_after(now + valid)
        )

    def context(self, name: str, address: str, valid: timedelta = DAY) -> ssl.SSLContext:
        """A server's context with a certificate for `address`."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        made = self.builder(key, valid, "server").add_extension(names, critical=False).sign(self.key, SHA256())
        path = self.folder / f"{name}.pem"
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(made.public_bytes(Encoding.PEM) + text)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@contextlib.contextmanager
def listening(context: ssl.SSLContext | bytes | None) -> Iterator[str]:
    """A server that answers with TLS, or with these bytes, or hangs up; yields an https URL."""

    def talk(line: socket.socket) -> None:
        with contextlib.suppress(OSError), line:
            line.settimeout(20)
            if isinstance(context, ssl.SSLContext):
                with context.wrap_socket(line, server_side=True) as secure:
                    secure.recv(65536)
                    secure.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")
            elif context:
                line.recv(65536)
                line.sendall(context)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """One that the device trusts, and another one."""
    return Authority(tmp_path_factory.mktemp("ours")), Authority(tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("foreign", "certificate is not trusted"),
        ("other address", "certificate is not trusted"),
        ("expired", "certificate is not trusted: certificate has expired"),
        ("no TLS", "resume"),
        ("rubbish", "resume"),
        ("hang up", "resume"),
        ("right", "is not there"),  # it is the certificate that is judged above, nothing else
    ],
)
def test_tls_that_proves_nothing(
    what: str, match: str, authorities: tuple[Authority, Authority], work: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, foreign = authorities
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.path))
    contexts: dict[str, ssl.SSLContext | bytes | None] = {
        "foreign": foreign.context("foreign", "127.0.0.1"),
        "other address": ours.context("other", "127.0.0.2"),
        "expired": ours.context("expired", "127.0.0.1", -DAY),
        "no TLS": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "rubbish": bytes(range(256)) * 100,
        "hang up": None,
        "right": ours.context("right", "127.0.0.1"),
    }
    tree = make_tree(tmp_path / "root", weights=(40,), gap=10)
    with listening(contexts[what]) as bad, serving(tree.root) as good:
        with pytest.raises(FetchError, match=match) as error:
            pull(bad, work, unsigned=True, patience=QUICK)
        assert str(error.value).isprintable() and not work.exists()
        report = pull([bad, good], work, "w4", unsigned=True, patience=QUICK)
    assert file_of(work, "w4") == tree.files["w4"] and report.received == report.total_fetched
