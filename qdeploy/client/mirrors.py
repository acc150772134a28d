"""Several servers of one published tree: which one to ask, and when to give one up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from qdeploy.client.fetch import GoneError, Pace, Patience, Source
from qdeploy.errors import BundleError, FetchError, QDeployError

T = TypeVar("T")


class Mirrors:
    """Sources in the order of their preference; a context manager.

    A mirror that fails rests while another one answers; once bytes came from elsewhere, it may be asked again. One
    that lacks a file, or serves bytes that are not those that were signed, is set aside for the run. The last one left
    may serve a wrong leaf once, which then comes again: a line can damage bytes too.
    """

    def __init__(self, urls: Sequence[str], patience: Patience | None = None, pace: Pace | None = None) -> None:
        self.urls = list(dict.fromkeys(urls))
        self._sources = [Source(url, patience, pace) for url in self.urls]
        self.set_aside: dict[str, str] = {}  # URL -> why
        self._resting: dict[str, QDeployError] = {}
        self._errors: dict[str, QDeployError] = {}
        self._suspected: str | None = None
        self._progress = False
        self._stack = ExitStack()

    def __enter__(self) -> Mirrors:
        for source in self._sources:
            self._stack.enter_context(source)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def requests(self) -> int:
        """Exchanges in all."""
        return sum(source.requests for source in self._sources)

    @property
    def received(self) -> int:
        """Body bytes read in all, also those that were of no use."""
        return sum(source.received for source in self._sources)

    @property
    def skipped(self) -> int:
        """Body bytes that came because a server knows no ranges."""
        return sum(source.skipped for source in self._sources)

    def _usable(self) -> list[Source]:
        return [s for s in self._sources if s.url not in self.set_aside and s.url not in self._resting]

    def source(self) -> Source:
        """The one to ask now."""
        return self._usable()[0]

    def verified(self) -> None:
        """Good bytes came: whoever failed before may be asked again."""
        self._progress, self._suspected = True, None

    def failed(self, source: Source, error: FetchError) -> None:
        """Rest a mirror; raises when there is no other one to ask."""
        self._errors[source.url] = error
        if isinstance(error, GoneError):
            self.set_aside[source.url] = str(error)
        else:
            self._resting[source.url] = error
        if not self._usable() and len(self._sources) > 1 and self._resting and self._progress:
            self._resting, self._progress = {}, False
        self._check()

    def wrong(self, source: Source, error: QDeployError) -> None:
        """Set aside a mirror that served wrong bytes; raises when it is the last one and did so before."""
        self._errors[source.url] = error
        others = len(self._usable()) > 1 or self._resting
        if not others and self._suspected != source.url:
            self._suspected = source.url
            return
        self.set_aside[source.url] = str(error)
        if not self._usable():
            self._resting = {}
        self._check()

    def distrusted(self, source: Source, error: QDeployError) -> None:
        """Set aside a mirror whose metadata or small file is wrong; raises when it is the last one."""
        self._suspected = source.url  # small files are not asked for twice
        self.wrong(source, error)

    def others(self, source: Source) -> bool:
        """Whether another mirror can be asked."""
        return any(other is not source for other in self._usable())

    def _check(self) -> None:
        if self._usable():
            return
        errors = list(self._errors.values())
        if len(errors) == 1:
            raise errors[0]
        text = "; ".join(f"{url}: {error}" for url, error in self._errors.items())
        kind = type(errors[0]) if len({type(error) for error in errors}) == 1 else FetchError
        raise kind(f"no mirror is left: {text}") from errors[-1]

    def first(self, ask: Callable[[Source], T]) -> T:
        """What the first mirror says that can answer; one whose answer is a BundleError is set aside."""
        while True:
            source = self.source()
            try:
                return ask(source)
            except FetchError as e:
                self.failed(source, e)
            except BundleError as e:
                self.distrusted(source, e)
