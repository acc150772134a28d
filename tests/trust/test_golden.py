"""Literal bytes of what is signed: another implementation written from FORMAT.md must come to the same."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from qdeploy.bundle.manifest import Release, parse_release, release_bytes
from qdeploy.trust.keys import KeyFolder
from qdeploy.trust.repository import Repository, State
from qdeploy.trust.storage import Folder

MANIFEST = b'{"format":"qdeploy-bundle/1"}\n'
PUBLIC = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"  # of the private key 00 01 02 .. 1f
KEYID = "63d00ee3cf4f5c61ad94efa696c68f13b608fe56ecea13fb144a6fd18e9235b9"
SIGNATURE = (
    "77af1760dc2a08460518ceeebf5ed1f24c036a9a5bb0f591a12c299397fd7e6a"
    "d36cfee90e5afef9849efe093a711d9defd4e40d03f737efb3feb00e872b080e"
)
RELEASE = (
    b'{"format":"qdeploy-release/1","manifest":{"sha256":"163cc6715c6c3cbfb5c0f6045a8931f7c29817bab0c28dd99ae54672b2736fe9",'
    b'"size":30},"release":7,"signatures":[{"keyid":"' + KEYID.encode() + b'","signature":"' + SIGNATURE.encode()
    + b'"}]}\n'
)  # fmt: skip
TARGETS = (
    b'{"_type":"targets","expires":"2002-01-01T00:00:00Z","spec_version":"1.0.31","targets":{"rollout.json":{"hashes":'
    b'{"sha256":"472029d9fcfbed89b8df00aaad7795a11ae170fc119c0299d14b4a9c7799edf2"},"length":43}},"version":1}'
)


def repository(folder: Path) -> Repository:
    """Of one well-known key for every role."""
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    signer = CryptoSigner(private)
    root = Root(version=1, expires=datetime(2090, 1, 1, tzinfo=UTC))
    for role in root.roles:
        root.add_key(signer.public_key, role)
    metadata = Metadata(root)
    metadata.sign(signer)
    folder.mkdir()
    (folder / "1.root.json").write_bytes(metadata.to_bytes())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"all-{signer.public_key.keyid[:12]}.pem").write_bytes(pem)
    return Repository(Folder(folder / "tree"), KeyFolder([folder]), datetime(2001, 1, 1, tzinfo=UTC))


def test_the_signature_of_release_json(tmp_path: Path) -> None:
    signatures = repository(tmp_path / "keys").manifest_signatures(MANIFEST)
    assert signatures == ({"keyid": KEYID, "signature": SIGNATURE},)
    release = Release(hashlib.sha256(MANIFEST).hexdigest(), len(MANIFEST), 7, signatures)
    assert release_bytes(release) == RELEASE
    assert parse_release(RELEASE) == release
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC))
    public.verify(bytes.fromhex(SIGNATURE), MANIFEST)


def test_a_key_id_is_the_hash_of_the_key() -> None:
    """TUF specification, 4.2: SHA-256 of the canonical JSON of the key."""
    text = '{"keytype":"ed25519","keyval":{"public":"' + PUBLIC + '"},"scheme":"ed25519"}'
    assert hashlib.sha256(text.encode()).hexdigest() == KEYID


def test_targets_metadata(tmp_path: Path) -> None:
    made = repository(tmp_path / "keys")
    metadata = made.sign_targets(State(), {})
    assert metadata.signed_bytes == TARGETS
    value = json.loads(metadata.to_bytes())
    assert json.dumps(value["signed"], sort_keys=True, separators=(",", ":")).encode() == TARGETS
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC))
    public.verify(bytes.fromhex(value["signatures"][0]["sig"]), TARGETS)
