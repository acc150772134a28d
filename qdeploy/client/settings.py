"""DIR/device.json: what a device was told, and what the publisher's policy said when it was last heard."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qdeploy.client.disk import write_file
from qdeploy.client.trust import has_root
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json, parse_json, read_bytes

FORMAT = "qdeploy-device-settings/1"


@dataclass(frozen=True)
class Settings:
    """`id` is random and made once; it decides whether the device is a canary.

    `mirrors` are the URLs of the last pull, `quota` the most bytes that the folder may take. From the signed rollout:
    `minimum` is the level below which none may be chosen, `wanted` the level and `wanted_release` the release that the
    device is to run, `hold` and `stale` why it does not take that release. `received` counts body bytes since the
    device was set up.
    """

    id: str
    mirrors: tuple[str, ...] = ()
    model: str | None = None
    channel: str | None = None
    quota: int | None = None
    minimum: str | None = None
    wanted: str | None = None
    wanted_release: int | None = None
    hold: bool = False
    stale: str | None = None
    received: int = 0


def new_settings() -> Settings:
    """Of a device that was never set up: an id of 128 random bits."""
    return Settings(secrets.token_hex(16))


def settings_bytes(settings: Settings) -> bytes:
    """Canonical JSON; inverse of `parse_settings`."""
    return canonical_json({"format": FORMAT} | asdict(settings))


def parse_settings(data: bytes) -> Settings:
    """Inverse of `settings_bytes`; raises BundleError."""
    value = parse_json(data, "device.json of the device folder", BundleError)
    try:
        if value.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if set(value) - {field.name for field in fields(Settings)} or type(value["mirrors"]) is not list:
            raise ValueError("it has an unknown key, or its mirrors are no list")
        value["mirrors"] = tuple(value["mirrors"])
        found = Settings(**value)
        texts = (found.model, found.channel, found.minimum, found.wanted, found.stale)
        numbers = (found.quota, found.wanted_release)
        sound = all(isinstance(text, str) for text in (found.id, *found.mirrors))
        sound = sound and all(text is None or isinstance(text, str) for text in texts)
        sound = sound and all(number is None or type(number) is int for number in numbers)
        if not sound or type(found.hold) is not bool or type(found.received) is not int:
            raise ValueError("a field has the wrong type")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        hint = "remove it and run `qdeploy pull` again; the device then gets a new id"
        raise BundleError(f"device.json of the device folder is damaged ({e}): {hint}") from e
    return found


def read_settings(folder: Path) -> Settings | None:
    """The settings of a device folder; None when there are none. Raises BundleError."""
    path = Path(folder) / "device.json"
    return parse_settings(read_bytes(path, "the device's settings", BundleError)) if path.exists() else None


def write_settings(folder: Path, settings: Settings) -> None:
    """Keep settings, if they differ from what is there; the caller holds the folder. Raises DeviceError."""
    if read_settings(folder) != settings:
        write_file(Path(folder) / "device.json", settings_bytes(settings))


def signed(folder: Path) -> bool:
    """True when this folder only takes what is signed."""
    return has_root(folder)
