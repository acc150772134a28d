"""The rollout: which release the devices of a fleet run (FORMAT.md). Strict parser, serialiser, and the choice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdeploy.bundle.tables import DIGEST, FILE_NAME, MAX_MANIFEST
from qdeploy.bundle.validate import is_label
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json, parse_json

ROLLOUT_FORMAT = "qdeploy-rollout/1"
MAX_ROLLOUT = 1 << 18
MAX_MODELS = 64
MAX_CLASSES = 256
CHANNELS = ("stable", "canary")
METADATA = "metadata"  # folder of TUF's metadata in a published tree
ROLLOUT_TARGET = "rollout.json"  # its path among TUF's targets; it is stored under `rollout_name`
METADATA_LIMITS = {"root": 512000, "timestamp": 16384, "snapshot": 65536, "targets": 4 << 20}  # bytes


@dataclass(frozen=True)
class Entry:
    """What one channel runs: a release and its manifest (SHA-256, bytes).

    On `hold` no device takes it that does not run it yet. `minimum` is the level that no device may go below.
    `levels` maps hardware classes to the level that each is to run. `percent` of the devices are on a canary channel;
    None on the stable one.
    """

    release: int
    sha256: str
    size: int
    hold: bool = False
    minimum: str | None = None
    levels: Mapping[str, str] = field(default_factory=dict)
    percent: int | None = None


@dataclass(frozen=True)
class Channels:
    """The channels of one model; None where nothing was published."""

    stable: Entry | None = None
    canary: Entry | None = None


Rollout = Mapping[str, Channels]  # by model


def metadata_name(role: str, version: int | None = None) -> str:
    """Path of a metadata file below the tree's root; the timestamp's has no version."""
    return f"{METADATA}/{role}.json" if version is None else f"{METADATA}/{version}.{role}.json"


def rollout_name(digest: str) -> str:
    """Path of a rollout below the tree's root."""
    return f"rollout/{digest}.json"


def bucket(model: str, device_id: str) -> int:
    """0..99, evenly spread over devices: a device is a canary at every percentage above its bucket."""
    digest = hashlib.sha256(f"{model}\n{device_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def choose(rollout: Rollout, model: str, device_id: str, channel: str | None) -> tuple[str, Entry]:
    """(channel, entry) for a device. Without a `channel` its bucket decides; "canary" and "stable" are its own choice.

    A device on canary runs the stable release where there is no canary. Raises BundleError when nothing is for it.
    """
    if channel not in (None, *CHANNELS):
        raise BundleError(f"there is no channel {channel!r}: channels are {' and '.join(CHANNELS)}")
    if model not in rollout:
        raise BundleError(f"no model {model!r} is published: there are {', '.join(sorted(rollout)) or 'none'}")
    channels = rollout[model]
    canary = channels.canary
    if canary is not None and channel is None:
        channel = "canary" if bucket(model, device_id) < (canary.percent or 0) else "stable"
    if canary is not None and channel == "canary":
        return "canary", canary
    if channels.stable is None:
        raise BundleError(f"{model} has no stable release yet: wait for it, or choose the channel canary")
    return "stable", channels.stable


# --- serialise and parse ---------------------------------------------------------------------------------------------


def _entry_json(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    value: dict[str, Any] = {
        "hold": entry.hold,
        "levels": dict(entry.levels),
        "manifest": {"sha256": entry.sha256, "size": entry.size},
        "minimum": entry.minimum,
        "release": entry.release,
    }
    return value if entry.percent is None else value | {"percent": entry.percent}


def rollout_json(rollout: Rollout) -> dict[str, Any]:
    """The JSON value of a rollout; inverse of `rollout_of`."""
    models = {
        name: {"canary": _entry_json(channels.canary), "stable": _entry_json(channels.stable)}
        for name, channels in rollout.items()
    }
    return {"format": ROLLOUT_FORMAT, "models": models}


def rollout_bytes(rollout: Rollout) -> bytes:
    """Canonical JSON of a rollout; inverse of `parse_rollout`."""
    return canonical_json(rollout_json(rollout))


def _is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(FILE_NAME.fullmatch(value))


def _entry(value: Any, what: str, canary: bool) -> Entry | None:
    if value is None:
        return None
    keys = {"hold", "levels", "manifest", "minimum", "release"} | ({"percent"} if canary else set())
    if not isinstance(value, dict) or set(value) != keys:
        raise BundleError(f"the rollout is damaged: {what} has other keys than {', '.join(sorted(keys))}")
    manifest, levels = value["manifest"], value["levels"]
    sound = isinstance(manifest, dict) and set(manifest) == {"sha256", "size"}
    sound = sound and isinstance(manifest["sha256"], str) and bool(DIGEST.fullmatch(manifest["sha256"]))
    sound = sound and _is_count(manifest["size"], 1, MAX_MANIFEST)
    sound = sound and isinstance(value["hold"], bool) and _is_count(value["release"], 1, (1 << 53) - 1)
    sound = sound and (value["minimum"] is None or _is_name(value["minimum"]))
    sound = sound and isinstance(levels, dict) and len(levels) <= MAX_CLASSES
    sound = sound and all(is_label(name) and _is_name(level) for name, level in levels.items())
    if not sound or not _is_count(value.get("percent", 1), 1, 100):
        raise BundleError(f"the rollout is damaged: a value of {what} is out of range")
    size, percent = manifest["size"], value.get("percent")
    return Entry(value["release"], manifest["sha256"], size, value["hold"], value["minimum"], levels, percent)


def rollout_of(value: Any) -> dict[str, Channels]:
    """Inverse of `rollout_json`; raises BundleError."""
    if not isinstance(value, dict) or set(value) != {"format", "models"} or value["format"] != ROLLOUT_FORMAT:
        raise BundleError(f"the rollout is damaged: its format is not {ROLLOUT_FORMAT}")
    models = value["models"]
    if not isinstance(models, dict) or len(models) > MAX_MODELS or not all(_is_name(name) for name in models):
        raise BundleError(f"the rollout is damaged: its models are not at most {MAX_MODELS} named ones")
    found = {}
    for name, channels in models.items():
        if not isinstance(channels, dict) or set(channels) != set(CHANNELS):
            raise BundleError(f"the rollout is damaged: {name} has other channels than {' and '.join(CHANNELS)}")
        found[name] = Channels(
            _entry(channels["stable"], f"{name} stable", False), _entry(channels["canary"], f"{name} canary", True)
        )
    return found


def parse_rollout(data: bytes) -> dict[str, Channels]:
    """Inverse of `rollout_bytes`; raises BundleError."""
    if len(data) > MAX_ROLLOUT:
        raise BundleError(f"the rollout has {len(data)} bytes, the limit is {MAX_ROLLOUT}")
    rollout = rollout_of(parse_json(data, "the rollout", BundleError))
    if rollout_bytes(rollout) != data:
        raise BundleError("the rollout is damaged: it is not canonical JSON")
    return rollout
