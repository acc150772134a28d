"""Running the built-in HTTP server: what it listens on, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from qdeploy.errors import DataError, DeviceError
from qdeploy.serve.byte_log import ByteLog
from qdeploy.serve.database import StateDatabase
from qdeploy.serve.limits import Limits, allow_files
from qdeploy.serve.logs import LineFile
from qdeploy.serve.metrics import Metrics
from qdeploy.serve.pages import Pages, packaged
from qdeploy.serve.reports import Reports
from qdeploy.serve.site import Site
from qdeploy.serve.tree import check_published

BACKLOG = 1024
HANDSHAKE_S = 10.0
BROWSER_PREFIX = "/ui/device/"  # no name of a published tree begins so


@dataclass(frozen=True)
class Options:
    """How to serve. `port` 0 picks a free one.

    `log` gets one JSON line a request (`byte_log.Sent`), `access_log` one in the common log format (`-` is standard
    error). `cert` and `key` are PEM files: TLS. `devices` is the SQLite file for what devices report; they need
    `token` if it is set. `admin_port` has metrics and the fleet (admin.py), on 127.0.0.1 only.
    `browser` serves the page that makes a browser a device (qdeploy/web/device) at BROWSER_PREFIX, with the keys and
    sample images of the folder `browser_files`, if there is one (pages.BESIDE). The operators' port also answers to
    `admin_names`, and with `control_token` takes changes of the rollout, which it signs with `keys` (controls.py) where
    there are any.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    log: Path | None = None
    access_log: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    devices: Path | None = None
    token: str | None = None
    admin_port: int | None = None
    limits: Limits = field(default_factory=Limits)
    browser: bool = False
    browser_files: Path | None = None
    admin_names: tuple[str, ...] = ()
    control_token: str | None = None
    keys: tuple[Path, ...] = ()
    passphrase_file: Path | None = None


def _browser_pages(options: Options) -> Pages | None:
    if not options.browser and options.browser_files is None:
        return None
    return packaged("device", BROWSER_PREFIX, wasm=True, beside=options.browser_files)


def _tls(options: Options) -> ssl.SSLContext | None:
    if options.cert is None and options.key is None:
        return None
    if options.cert is None or options.key is None:
        raise DataError("TLS needs both files: --cert FILE and --key FILE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # an empty password: an encrypted key is an error here, not a prompt
        context.load_cert_chain(options.cert, options.key, password="")
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        files = f"{options.cert} and {options.key}"
        raise DataError(f"cannot use {files} for TLS ({e}): name a PEM certificate and its unencrypted key") from e
    return context


async def _listen(server: web.Server, host: str, port: int, tls: ssl.SSLContext | None) -> asyncio.Server:
    """Raises DeviceError."""
    loop = asyncio.get_running_loop()
    handshake = None if tls is None else HANDSHAKE_S
    try:
        return await loop.create_server(
            server, host, port, ssl=tls, backlog=BACKLOG, ssl_handshake_timeout=handshake, reuse_address=True
        )
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            hint = "stop the program that holds it or choose another (0 picks a free one)"
            raise DeviceError(f"port {port} on {host} is in use: {hint}") from e
        raise DeviceError(f"cannot listen on {host} port {port}: {e.strerror or e}") from e


@contextlib.asynccontextmanager
async def _listening(
    server: web.Server, host: str, port: int, tls: ssl.SSLContext | None, stop_s: float
) -> AsyncIterator[str]:
    """Listen while the block runs; yields the URL. At its end running answers have `stop_s` seconds."""
    line = await _listen(server, host, port, tls)
    try:
        bound_host, bound_port = line.sockets[0].getsockname()[:2]
        name = f"[{bound_host}]" if ":" in bound_host else bound_host
        yield f"{'http' if tls is None else 'https'}://{name}:{bound_port}"
    finally:
        line.close()
        await asyncio.sleep(0)  # requests that have arrived begin
        server.pre_shutdown()
        # aiohttp waits for an answer, then as long for its connection; 0 would be for ever
        await server.shutdown(max(stop_s, 0.01) / 2)


Ready = Callable[[str, str | None], None]  # gets the URL and the operators' one


async def _run(root: Path, options: Options, tls: ssl.SSLContext | None, ready: Ready, stop: asyncio.Event) -> None:
    metrics = Metrics()
    limits = options.limits
    async with contextlib.AsyncExitStack() as stack:
        byte_log = None if options.log is None else stack.enter_context(ByteLog(options.log))
        access = None if options.access_log is None else LineFile(options.access_log, "access log")
        if access is not None:
            stack.enter_context(access)
        reports = None
        if options.devices is not None:
            database = stack.enter_context(contextlib.closing(StateDatabase(options.devices)))
            reports = Reports(database, options.token, limits, metrics)
            stack.push_async_callback(reports.close)
        pages = _browser_pages(options)
        site = Site(root, limits, metrics, byte_log, access, reports, pages).server()
        url = await stack.enter_async_context(_listening(site, options.host, options.port, tls, limits.stop_s))
        admin_url = None
        if options.admin_port is not None:
            admin = _admin(root, options, metrics)
            admin_url = await stack.enter_async_context(
                _listening(admin, "127.0.0.1", options.admin_port, None, limits.stop_s)
            )
        ready(url, admin_url)
        await stop.wait()


def _admin(root: Path, options: Options, metrics: Metrics) -> web.Server:
    """The operators' server; it reads manifests, and changes need TUF: imports that a plain server does without."""
    from qdeploy.serve.admin import Admin

    controls = None
    if options.control_token is not None:
        from qdeploy.serve.controls import Controls

        controls = Controls(root, options.keys, options.passphrase_file)
    return Admin(root, metrics, options.devices, options.control_token, controls, options.admin_names).server()


def _checked(root: Path, options: Options) -> tuple[Path, ssl.SSLContext | None]:
    """What must be right before anything is opened."""
    if options.token is not None and options.devices is None:
        raise DataError("a token is for reports of devices: add --devices FILE")
    if options.admin_port is None and (options.control_token is not None or options.admin_names):
        raise DataError("the fleet page is on the operators' port: add --admin-port N")
    if options.keys and options.control_token is None:
        raise DataError("whoever changes the rollout needs a token: add --control-token-file FILE")
    allow_files(options.limits.connections)
    return check_published(root), _tls(options)


def serve(root: Path, options: Options | None = None, echo: Callable[[str], None] | None = None) -> None:
    """Serve the published tree `root` until SIGINT or SIGTERM, then stop gracefully; a second signal ends it at once.

    `echo` gets one line with the URL once the server listens. Raises BundleError when `root` is not a published tree,
    DataError when certificate or key are of no use, DeviceError when the port is in use or a file cannot be written.
    """
    options = options or Options()
    root, tls = _checked(root, options)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            if stop.is_set():
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number)

        def ready(url: str, admin: str | None) -> None:
            if echo is not None:
                echo(f"serving {root} at {url} (Ctrl-C stops)" + (f", operators at {admin}" if admin else ""))

        await _run(root, options, tls, ready, stop)

    asyncio.run(main())


@contextlib.contextmanager
def serving(
    root: Path, host: str = "127.0.0.1", port: int = 0, log: Path | None = None, options: Options | None = None
) -> Iterator[str]:
    """Serve `root` from a thread of this process while the block runs; yields the URL. Errors as `serve`.

    `options` stands for the other arguments when there is more to say.
    """
    with serving_both(root, options or Options(host, port, log, limits=Limits(stop_s=2.0))) as (url, _):
        yield url


@contextlib.contextmanager
def serving_both(root: Path, options: Options) -> Iterator[tuple[str, str | None]]:
    """As `serving`; yields the URL and the operators' one."""
    root, tls = _checked(root, options)
    started = threading.Event()
    urls: list[tuple[str, str | None]] = []
    failure: list[BaseException] = []
    control: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def ready(url: str, admin: str | None) -> None:
        urls.append((url, admin))
        started.set()

    async def main() -> None:
        stop = asyncio.Event()
        control.append((asyncio.get_running_loop(), stop))
        await _run(root, options, tls, ready, stop)

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as e:  # noqa: BLE001 - carried over to the caller's thread
            failure.append(e)
        finally:
            started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started.wait()
    try:
        if not urls:
            raise failure[0]
        yield urls[0]
    finally:
        if urls and thread.is_alive():
            loop, stop = control[0]
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop.set)
        thread.join()
