"""Every command of the documentation runs, in the order of its page, in a folder that has what the page takes as given.

Minutes: `make test-docs`. That each command parses is tested with the other tests, tests/test_docs.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdeploy.compile.codegen import linker
from qdeploy.compile.cuda.toolchain import find_compiler
from qdeploy.errors import QDeployError
from tests.docs.documents import PAGES, ROOT, Session, blocks, commands, key
from tests.docs.workshop import make_workshop

# What is at hand in place of what a reader brings, and less of the same work: seconds in place of hours.
STAND_INS = (
    (r"models/fashion-resnet8\.toml", "vertical.toml"),  # trainings of some steps
    (r"models/fashion-mobilenetv3\.toml", "elastic.toml"),
    (r"models/fashion-resnet8 (.*)--budget-kib 26", r"models/fashion-resnet8 \1--budget-kib 1"),
    (r"models/fashion-resnet8(?= )", "RUN"),
    (r"(--scored models\S+)", r"\1 --measure 0"),
    (r"(qdeploy search (?!.*--population).*)", r"\1 --population 8 --generations 2 --samples 16 --noise 1000"),
    (r"(qdeploy search RUN .*)", r"\1 --measure 1"),
    (r"(qdeploy init (?!.*--network).*)", r"\1 --network tiny --size 8,8"),
    (r"--sample 100", "--sample 6"),
    (r"--reconstruct \d+", "--reconstruct 2"),
    (r"(qdeploy search .*--target )targets/raspberry-pi-5.toml", r"\1host"),  # this machine is the board
    (r"10\.0\.0\.1", "127.0.0.1"),
    (r"https://[ab]\.example/toy", "http://127.0.0.1:8000"),
)
# What a page takes as given and the workshop has under another name, or must not have yet.
NAMES = {"docs/cuda.md": {"model.onnx": "any.onnx"}}
ABSENT = {"README.md": ("site", "keys"), "docs/delivery.md": ("site", "keys")}
# What stands in a page's text and not in its commands.
BEFORE = {
    "qdeploy pull https://a.example/toy https://b.example/toy device --root root.json": (
        "qdeploy serve site --port 8000 &",
    ),
    "qdeploy refresh site --keys online": (
        "mkdir online stick1 stick2",
        "cp keys/1.root.json keys/online-*.pem online",
    ),
    "qdeploy package arm --target targets/raspberry-pi-5.toml --device device -o ladder.tar.gz": (
        "qdeploy bundle w2.onnx w4.onnx --artifact arm -o boards",
        "qdeploy serve boards --port 8000 &",
        "qdeploy pull http://127.0.0.1:8000 -o device --unsigned --target raspberry-pi-5 --level w2",
    ),
    "qdeploy search RUN --target targets/raspberry-pi-5.toml --device 127.0.0.1:9190/rpi5 --objective accuracy"
    " --objective latency -o DIR": (
        "python -m tvm.exec.rpc_server --host 127.0.0.1 --port 9191 --port-end 65535 --tracker"
        " 127.0.0.1:9190 --key rpi5 &",
    ),
    "qdeploy devices --tracker 127.0.0.1:9190": (
        "python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port 9190 --port-end 65535 &",
    ),
    "qdeploy evaluate RUN --specs specs.jsonl -o scores.jsonl --workers tcp://10.0.0.1:8786": (
        "qdeploy space RUN --sample 100 -o specs.jsonl",
        "dask scheduler --host 127.0.0.1 --port 8786 --no-dashboard &",
        "dask worker tcp://127.0.0.1:8786 --nthreads 1 --no-dashboard &",
    ),
    "qdeploy report front tree artifact -o report.html": (
        "qdeploy search models/fashion-mobilenetv3 --scored models/fashion-mobilenetv3/samples.json --mirror"
        " --objective accuracy --objective bitops -o front",
        "cp -r ladder tree",
    ),
    "qdeploy fleet http://127.0.0.1:9100 --device cam-17": ("python report.py http://127.0.0.1:8001/",),
}


# Not run on their page: beginnings of commands, the file that does run them, and why not here.
ELSEWHERE = (
    (
        r"qdeploy search RUN --target targets/x86-64-avx512\.toml --target",
        "tests/search/test_chain.py",
        "a supernet whose widths nest, and minutes of measuring it for two targets",
    ),
    (r"qdeploy .*(DIR/levels|low\.onnx|high\.onnx|low -o|high -o)", "README.md", "the levels that this search finds"),
)


def arm_compiler() -> bool:
    try:
        linker("aarch64")
    except QDeployError:
        return False
    return True


BROWSER = ROOT / "qdeploy" / "web" / "device" / "vendor"

# Run where the machine can.
NEEDS: tuple[tuple[str, Callable[[], bool], str], ...] = (
    (
        r"t4\.toml|jetson-orin\.toml|docs/cuda\.md",
        lambda: find_compiler() is not None,
        "a compiler for GPUs: qdeploy[cuda]",
    ),
    (r"raspberry-pi|board\.toml|jetson-orin\.toml", arm_compiler, "a compiler for ARM: make cross"),
    (r"serve site --browser", BROWSER.is_dir, "ONNX Runtime for browsers: make web"),
)

WITH_COMMANDS = [page for page in PAGES if page.name != "tutorial.md" and commands(page.read_text())]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def adapted(line: str, page: str) -> str:
    """A command with the stand-ins; a server gets a port of its own and does not hold up the page."""
    for pattern, replacement in STAND_INS:
        line = re.sub(pattern, replacement, line)
    for name, other in NAMES.get(page, {}).items():
        line = line.replace(name, other)
    if line.startswith("qdeploy serve"):
        line = line.rstrip(" &") + ("" if "--port" in line else " --port 8001") + " &"
    return line


def run(session: Session, line: str, page: str) -> None:
    line = adapted(line, page)
    out = re.search(r"(?: -o|--out|keys init) (\S+)", line)
    if out and not line.startswith("qdeploy pull"):  # pages show several ways to make one thing
        remove(session.folder / out[1])
        remove(session.folder / f"{out[1]}.json")
    ended = session.run(line)
    assert ended.code == 0, f"{page}: {line}\n{ended.said}{ended.output}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=key)
def test_the_commands_of_a_page_run(page: Path, workshop: Path, tmp_path: Path) -> None:
    """In their order, in a folder that has what the page takes as given; those of ELSEWHERE excepted."""
    folder, name, text = tmp_path / "page", key(page), page.read_text()
    shutil.copytree(workshop, folder, symlinks=True)
    for absent in ABSENT.get(name, ()):
        remove(folder / absent)
    for block in blocks(text):
        if block.title:
            (folder / block.title).write_text(block.text)
    left_out: set[str] = set()
    with Session(folder, ports=(8000, 8001, 8002, 8443, 8786, 9100, 9101, 9190, 9191)) as session:
        for line in commands(text):
            lacking = {reason for words, able, reason in NEEDS if re.search(words, f"{line} {name}") and not able()}
            left_out |= lacking
            if lacking or any(re.match(pattern, line) for pattern, _, _ in ELSEWHERE):
                continue
            for before in BEFORE.get(line, ()):
                run(session, before, name)
            run(session, line, name)
    if left_out:
        pytest.skip(f"some of the commands need {', '.join(sorted(left_out))}; the others ran")


def test_the_tables_above_are_about_commands_of_the_pages() -> None:
    every = {line for page in PAGES for line in commands(page.read_text())}
    apart = [{line for line in every if re.match(pattern, line)} for pattern, _, _ in ELSEWHERE]
    assert all(apart) and len(set().union(*apart)) <= 0.1 * len(every), "commands that no page runs"
    assert all((ROOT / where).is_file() for _, where, _ in ELSEWHERE)
    assert set(BEFORE) <= every
    assert {*NAMES, *ABSENT} <= set(map(key, WITH_COMMANDS))
    for pattern, _ in STAND_INS:
        assert any(re.search(pattern, adapted(line, "")) or re.search(pattern, line) for line in every), pattern
