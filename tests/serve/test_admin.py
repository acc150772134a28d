"""The operators' port over HTTP: who may ask, and changes of the rollout behind a token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp.test_utils import make_mocked_request
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.errors import DataError
from qdeploy.serve.app import Options, serve, serving_both
from qdeploy.serve.catalogue import read_signed
from qdeploy.serve.gate import GUESSES, GUESSES_PER_S, Gate, host_allowed
from qdeploy.serve.limits import Limits
from tests.serve.trees import ask
from tests.trust.world import World

TOKEN = "sesame-open-1"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
CHANGE = RIGHT | {"Content-Type": "application/json"}
QUICK = Limits(stop_s=1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, "1/1", "1/1")
    world.publish(0)
    return world


def options(world: World, **more: object) -> Options:
    given = {"port": 0, "admin_port": 0, "limits": QUICK, "devices": world.folder / "states.sqlite"}
    return Options(**(given | more))  # type: ignore[arg-type]


@pytest.fixture
def admin(world: World) -> Iterator[str]:
    with serving_both(world.storage.root, options(world, control_token=TOKEN, keys=(world.home,))) as (_, admin):
        assert admin is not None
        yield admin


def post(url: str, path: str, value: object, headers: dict[str, str] | None = None) -> tuple[int, str]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    status, _, answer = ask(url, path, CHANGE if headers is None else headers, "POST", body)
    return status, answer.decode()


def test_the_page_and_its_document(admin: str) -> None:
    assert ask(admin, "/")[1]["location"] == "/ui/fleet/"
    status, headers, body = ask(admin, "/ui/fleet/")
    assert status == 200 and b"<title>Fleet" in body
    assert "script-src 'self';" in headers["content-security-policy"] and "unsafe" not in str(headers)
    assert ask(admin, "/ui/fleet/page.mjs")[1]["content-type"] == "text/javascript; charset=utf-8"
    status, headers, body = ask(admin, "/fleet.json?sort=seen&order=desc")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert json.loads(body)["controls"] is True and TOKEN.encode() not in body
    assert ask(admin, "/fleet.json?sort=nothing")[0] == 400
    assert ask(admin, "/ui/fleet/nothing.mjs")[0] == ask(admin, "/ui/device/")[0] == 404


def test_a_change_from_plan_to_device(world: World, admin: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = {"model": "toy", "hold": True}
    status, text = post(admin, "/control/plan", asked)
    plan = json.loads(text)
    assert status == 200 and plan["after"]["hold"] is True
    status, text = post(admin, "/control/apply", {"change": asked, "confirm": plan["confirm"]})
    assert status == 200 and json.loads(text)["hold"] is True
    assert world.hear(world.device()).hold is True
    status, text = post(admin, "/control/apply", {"change": asked, "confirm": plan["confirm"]})
    assert (status, "review it again" in text) == (409, True)
    said = capfd.readouterr().err
    assert "the rollout was changed from 127.0.0.1" in said and '"hold": true' in said and TOKEN not in said


def test_two_at_once_are_one_after_the_other(world: World, admin: str) -> None:
    """Both were reviewed for the same tree: one is made, the other is to be reviewed again."""
    changes = [{"model": "toy", "minimum": name} for name in ("w3", "w4")]
    plans = [json.loads(post(admin, "/control/plan", change)[1])["confirm"] for change in changes]
    answers: list[int] = []
    threads = [
        threading.Thread(
            target=lambda c=change, p=confirm: answers.append(
                post(admin, "/control/apply", {"change": c, "confirm": p})[0]
            )
        )
        for change, confirm in zip(changes, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 409]
    assert read_signed(world.storage.root).versions["targets"] == 2


@pytest.mark.parametrize("path", ["/control", "/control/plan", "/control/apply", "/control/x"])
def test_nothing_without_the_token(world: World, admin: str, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = world.storage.read("metadata/timestamp.json")
    method = "GET" if path == "/control" else "POST"
    for value in (None, "", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN} "[:-2] + "0"):
        headers = {"Content-Type": "application/json"} | ({} if value is None else {"Authorization": value})
        body = b'{"model":"toy","hold":true}' if method == "POST" else None
        assert ask(admin, path, headers, method, body)[0] == 401
    assert world.storage.read("metadata/timestamp.json") == before
    assert TOKEN[:-1] not in capfd.readouterr().err
    assert ask(admin, f"{path}?token={TOKEN}", {}, method, b"" if method == "POST" else None)[0] in (401, 429)


def test_guessing_shuts_the_gate_for_all(admin: str) -> None:
    for _ in range(int(GUESSES)):
        assert ask(admin, "/control", {"Authorization": "Bearer wrong-wrong"})[0] == 401
    status, headers, _ = ask(admin, "/control", RIGHT)
    assert (status, headers["retry-after"]) == (429, "5")
    assert ask(admin, "/fleet.json")[0] == 200


def test_the_gate_opens_again() -> None:
    now = [0.0]
    gate = Gate(TOKEN, lambda: now[0])

    def answer(token: str) -> int | None:
        refusal = gate.refusal(make_mocked_request("GET", "/control", {"Authorization": f"Bearer {token}"}))
        return None if refusal is None else refusal.status

    assert [answer("wrong") for _ in range(7)] == [401] * 5 + [429] * 2
    assert answer(TOKEN) == 429
    now[0] += 1 / GUESSES_PER_S
    assert answer(TOKEN) is None and answer(TOKEN) is None  # who has it may ask as often as they like
    assert [answer("wrong"), answer("wrong")] == [401, 429]


def test_another_sites_page_is_refused(admin: str) -> None:
    host = urlsplit(admin).netloc
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
                    {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://127.0.0.1:1"}):  # fmt: skip
        assert post(admin, "/control/plan", {"model": "toy", "hold": True}, CHANGE | headers)[0] == 403
    own = CHANGE | {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert post(admin, "/control/plan", {"model": "toy", "hold": True}, own)[0] == 200


def test_a_name_of_another_site_is_refused(world: World) -> None:
    """DNS rebinding: a page of evil.example whose name points here."""
    with serving_both(world.storage.root, options(world, admin_names=("ops.example",))) as (_, admin):
        assert admin is not None
        for path in ("/", "/fleet.json", "/devices", "/devices/a", "/ui/fleet/", "/control"):
            assert ask(admin, path, {"Host": "evil.example"})[0] == 421, path
            assert ask(admin, path, {"Host": "ops.example:9100"})[0] != 421
        assert ask(admin, "/metrics", {"Host": "scraped.example"})[0] == 200


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:9100", True), ("localhost", True), ("LOCALHOST:1", True), ("[::1]:9100", True), ("10.0.0.7", True),
        ("ops.example", True), ("ops.example.evil", False), ("evil", False), ("", False), (None, False),
        ("localhost.evil", False), ("127.0.0.1.evil", False), ("[::1", False), ("evil@localhost.x", False),
    ],
)  # fmt: skip
def test_hosts(host: str | None, allowed: bool) -> None:
    assert host_allowed(host, ("ops.example",)) is allowed


def test_bodies_and_methods(admin: str) -> None:
    assert post(admin, "/control/plan", {"model": "toy", "hold": True}, RIGHT)[0] == 415
    assert post(admin, "/control/plan", b"x" * 70_000)[0] == 413
    for value in (b"", b"{", b"[]", b'{"model":"toy","model":"x","hold":true}'):
        assert post(admin, "/control/plan", value)[0] == 400
    for value in ({}, {"change": {"model": "toy", "hold": True}}, {"change": 1, "confirm": "x"},
                  {"change": {"model": "toy", "hold": True}, "confirm": 1}):  # fmt: skip
        assert post(admin, "/control/apply", value)[0] == 400
    assert post(admin, "/control/plan", {"model": "other", "hold": True})[0] == 409
    assert ask(admin, "/control/plan", RIGHT)[0] == 405 and post(admin, "/control", {})[0] == 405
    assert post(admin, "/control/else", {})[0] == 404
    assert ask(admin, "/fleet.json", method="POST", body=b"")[0] == 405


def test_no_controls_without_a_token_file(world: World) -> None:
    with serving_both(world.storage.root, options(world)) as (url, admin):
        assert admin is not None
        assert json.loads(ask(admin, "/fleet.json")[2])["controls"] is False
        assert ask(admin, "/control", RIGHT)[0] == 404 and post(admin, "/control/plan", {})[0] == 405
        assert ask(url, "/control", RIGHT)[0] == ask(url, "/fleet.json")[0] == ask(url, "/ui/fleet/")[0] == 404


def test_controls_without_keys(world: World) -> None:
    with serving_both(world.storage.root, options(world, control_token=TOKEN)) as (_, admin):
        assert admin is not None
        assert json.loads(ask(admin, "/control", RIGHT)[2]) == {"signs": False, "earlier": {}}
        asked = {"model": "toy", "hold": True}
        plan = json.loads(post(admin, "/control/plan", asked)[1])
        assert plan["command"].endswith("--keys KEYS --model toy --hold") and plan["confirm"] is None
        assert post(admin, "/control/apply", {"change": asked, "confirm": "x"})[0] == 409


def test_options_that_do_not_fit(world: World) -> None:
    root = world.storage.root
    with pytest.raises(DataError, match="--admin-port"):
        serve(root, Options(control_token=TOKEN))
    with pytest.raises(DataError, match="--control-token-file"):
        serve(root, Options(admin_port=0, keys=(world.home,)))
    done = CliRunner().invoke(main, ["serve", str(root), "--admin-port", "0", "--keys", str(world.home)])
    assert done.exit_code == 2 and "--control-token-file" in done.output
