"""Work spread over processes and hosts by Dask distributed (extra `scale`), the same way on one machine and on many.

Every item is computed at least once and its result is taken exactly once. What a worker that dies was doing is given to
another one; a result that comes twice has the same key and counts once. Only the caller writes files.
Functions, items and results travel as pickles, which run code: use a trusted network, or tls:// with certificates in
Dask's own configuration.
"""

from __future__ import annotations

import logging
import pickle
import platform
import queue
import re
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from qdeploy.errors import DeviceError, QDeployError, RecipeError
from qdeploy.files import sha256

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")
Result = TypeVar("Result")
Echo = Callable[[str], None]
CONNECT_SECONDS = 15.0
ALONE_SECONDS = 60.0  # how long a scheduler may be without any worker
GATHER_SECONDS = 20.0  # for a result to come from the worker that computed it
POLL_SECONDS = 1.0
TRIES = 5  # how often a result may be lost
SETTINGS = {"distributed.admin.large-graph-warning-threshold": "1GiB"}  # a trained network travels as one
MOST = 1024  # local processes
PACKAGES = ("qdeploy", "torch", "numpy", "distributed")  # whose versions decide results, or whether pickles load
ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


def parse_workers(text: str) -> int | str:
    """A number of local processes, or a scheduler's address as it is; RecipeError for anything else."""
    if text.isascii() and text.isdigit() and 0 < int(text) <= MOST:
        return int(text)
    found = ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[3]) < 65536:  # noqa: PLR2004
        raise RecipeError(
            f"workers {text!r} are neither a number of processes (1 to {MOST}) nor a Dask scheduler's address: "
            "write tcp://HOST:PORT or tls://HOST:PORT"
        )
    return text


def versions() -> dict[str, str]:
    """Versions of Python and PACKAGES here."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


# ---- in a worker -----------------------------------------------------------------------------------------------------

_ALONE = threading.Lock()  # a worker may have several threads; what computes here shares its state
_MADE: dict[str, Callable[[Any], Any]] = {}  # what `make` returned in this process, by digest; the last one


def _same(value: bytes) -> bytes:
    return value


def _compute(item: Any, content: bytes, digest: str, expected: Mapping[str, str]) -> Any:
    """One item in a worker; DeviceError where the worker's versions are not the caller's."""
    held = versions()
    if different := [f"{name} {held[name]}, not {want}" for name, want in expected.items() if held[name] != want]:
        raise DeviceError(f"worker on {platform.node()} has {'; '.join(different)}: install the same versions there")
    with _ALONE:
        if digest not in _MADE:
            _MADE.clear()
            _MADE[digest] = pickle.loads(content)()  # noqa: S301
        return _MADE[digest](item)


# ---- in the caller ---------------------------------------------------------------------------------------------------


class Workers:
    """A connection to a scheduler. `where`: how errors name it."""

    def __init__(self, client: Client, where: str) -> None:
        self._client, self._where = client, where

    def map(
        self, make: Callable[[], Callable[[Item], Result]], items: Mapping[str, Item]
    ) -> Iterator[tuple[str, Result]]:
        """Key and result of every item, as they come; each key once.

        `make` is pickled, and called once in each worker process; what it returns must be pure: an item may be computed
        more than once. Errors of qdeploy are raised here; DeviceError when workers or scheduler fail for good.
        """
        if not items:
            return
        content = pickle.dumps(make)
        digest = sha256(content)[:16]
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        held: list[Future] = []  # a future that is forgotten is cancelled
        waiting: dict[str, str] = {}  # Dask's name of a task -> key
        tries = dict.fromkeys(items, 0)

        def submit(keys: Sequence[str]) -> None:
            named = {f"qdeploy-{digest}-{key}-{tries[key]}": key for key in keys}
            waiting.update(named)
            work = [items[key] for key in keys]
            futures = self._client.map(
                _compute, work, key=list(named), content=held[0], digest=digest, expected=versions()
            )
            held.extend(futures)
            for future in futures:
                future.add_done_callback(done.put)

        try:
            held.append(self._client.submit(_same, content, key=f"qdeploy-{digest}"))
            submit(list(items))
            while waiting:
                future = self._next(done)
                if (key := waiting.pop(str(future.key), None)) is None:
                    continue
                if (found := self._result(future)) is not None:
                    yield key, found[0]
                    continue
                tries[key] += 1
                if tries[key] == TRIES:
                    raise DeviceError(
                        f"{self._where} lost the result of {key} {TRIES} times: are workers out of memory?"
                    )
                submit([key])
        except (OSError, RuntimeError, TypeError, ValueError) as e:
            raise DeviceError(f"{self._where} takes no work ({_line(e)}): has it qdeploy in these versions?") from e
        finally:
            if self._client.status == "running":
                self._client.cancel(held)

    def _next(self, done: queue.SimpleQueue[Future]) -> Future:
        """The next future that ended; DeviceError when none can end any more."""
        seen = time.monotonic()
        while True:
            try:
                return done.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._client.status != "running":
                    raise DeviceError(f"{self._where} went away: run again, what is finished is kept") from None
            if self._client.scheduler_info(n_workers=-1)["workers"]:
                seen = time.monotonic()
            elif time.monotonic() - seen > ALONE_SECONDS:
                raise DeviceError(
                    f"{self._where} has had no worker for {ALONE_SECONDS:.0f} s: start some with `dask worker ADDRESS`"
                )

    def _result(self, future: Future) -> tuple[Any] | None:
        """What a future holds; None where it went with the worker that had computed it."""
        if future.status == "error":
            error = future.exception()
            if isinstance(error, QDeployError):
                raise error
            raise DeviceError(f"a worker of {self._where} failed ({type(error).__name__}: {_line(error)})") from error
        try:
            return (future.result(timeout=GATHER_SECONDS),)
        except (CancelledError, TimeoutError):
            return None


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _greeted(address: str) -> None:
    """Raise OSError unless a scheduler speaks at `address`: Dask's client waits for ever where one only listens."""
    found = ADDRESS.fullmatch(address)
    assert found is not None
    with socket.create_connection((found[2].strip("[]"), int(found[3])), CONNECT_SECONDS) as probe:
        if found[1] == "tcp" and not probe.recv(1):  # over TLS the client speaks first
            raise ConnectionError("it closes the connection")


@contextmanager
def connected(text: str, echo: Echo) -> Iterator[Workers]:
    """Workers as `parse_workers` has them, until the block ends: local ones are ended, a scheduler is left as it is.

    Raises RecipeError for a bad address, DeviceError when `distributed` is not installed or nothing answers.
    """
    where = parse_workers(text)
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as e:
        raise DeviceError(f"--workers needs Dask ({e}): pip install 'qdeploy[scale]'") from e
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is raised here
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS | {"distributed.comm.timeouts.connect": CONNECT_SECONDS}))
        address: Any = where
        name = f"the scheduler at {where}"
        if isinstance(where, int):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qdeploy-workers-"))
            name = f"the pool of {where} local workers"
            try:
                address = stack.enter_context(
                    LocalCluster(
                        n_workers=where,
                        threads_per_worker=1,
                        processes=True,
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",
                        memory_limit=None,
                        local_directory=scratch,
                        silence_logs=logging.CRITICAL,
                    )
                )
            except (OSError, RuntimeError) as e:
                raise DeviceError(f"{name} does not start ({_line(e)}): ask for fewer") from e
        try:
            if isinstance(where, str):
                _greeted(where)
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # versions are compared by every worker
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except (OSError, ImportError, ValueError, TypeError, KeyError, RuntimeError) as e:
            raise DeviceError(f"{name} does not answer ({_line(e)}): start one with `dask scheduler`") from e
        echo(f"{name}: {len(client.scheduler_info(n_workers=-1)['workers'])} workers")
        yield Workers(client, name)
