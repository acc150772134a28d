"""What is installed here against what qdeploy asks for, from the packages' own metadata: nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

# modules whose name is not their package's, for packages that may be absent
DISTRIBUTIONS = {
    "PIL": "pillow",
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "google": "protobuf",
    "dask": "distributed",
    "securesystemslib": "tuf",
    "prometheus_client": "prometheus-client",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*)(?:;\s*(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_CLAUSE = re.compile(r"(==|>=|<=|<|>)\s*([^\s,]+)")


@dataclass(frozen=True)
class Requirement:
    """A package that qdeploy asks for: `asked` as written (">=3.14"), `extra` that brings it, "" for all installs.

    `extras` of the package itself: qdeploy's own extras name each other so.
    """

    package: str
    asked: str
    extra: str
    extras: tuple[str, ...] = ()

    @property
    def installed(self) -> str | None:
        """The version that is installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def met(self) -> bool:
        """Whether what is installed is what is asked for."""
        found = self.installed
        return found is not None and all(_fits(found, sign, wanted) for sign, wanted in _CLAUSE.findall(self.asked))


def normal(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(line: str) -> Requirement:
    """One Requires-Dist line of a package's metadata."""
    match = _REQUIREMENT.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{line!r} is no requirement")
    name, extras, asked, marker = match.groups()
    found = _EXTRA.search(marker or "")
    own = tuple(normal(part.strip()) for part in (extras or "").split(",") if part.strip())
    return Requirement(normal(name), asked.strip(" ()"), found[1] if found else "", own)


def requirements() -> list[Requirement]:
    """All that qdeploy asks for; empty when it runs from a folder that was never installed."""
    try:
        return [parse(line) for line in requires("qdeploy") or []]
    except PackageNotFoundError:
        return []


def _release(text: str) -> tuple[int, ...]:
    """ "2.13.0.post1" -> (2, 13, 0): what decides between versions that are not equal."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _fits(found: str, sign: str, wanted: str) -> bool:
    """Whether version `found` meets one clause; the build ("+cpu") does not count."""
    found, have, want = found.partition("+")[0], _release(found), _release(wanted)
    if sign == "==":
        return found == wanted
    return {">=": have >= want, "<=": have <= want, ">": have > want, "<": have < want}[sign]


def extra_packages(extra: str, among: Iterable[Requirement]) -> dict[str, Requirement]:
    """Packages that an extra brings, those of the extras that it names too."""
    among, found, todo, seen = list(among), dict[str, Requirement](), [extra], set[str]()
    while todo:
        name = todo.pop(0)
        seen.add(name)
        for one in among:
            if one.extra != name:
                continue
            if one.package == "qdeploy":
                todo += [other for other in one.extras if other not in seen]
            else:
                found.setdefault(one.package, one)
    return found


def extras_of(package: str) -> list[str]:
    """Extras that bring a package, those with the fewest packages first."""
    among = requirements()
    sizes = {name: extra_packages(name, among) for name in {one.extra for one in among if one.extra}}
    names = [name for name, packages in sizes.items() if normal(package) in packages]
    return sorted(names, key=lambda name: (len(sizes[name]), name))


def distribution_of(module: str) -> str:
    """The package that a module is in, or would be."""
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    return normal((packages_distributions().get(module) or [module])[0])
