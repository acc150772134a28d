"""Writing a report: the page, and the plots beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qdeploy.errors import ModelError
from qdeploy.files import write_atomic
from qdeploy.report.page import Block, names, report_page
from qdeploy.report.svg import png

MOST_BYTES = 3_000_000


def write_page(
    title: str, sources: Sequence[str], blocks: Sequence[Block], missing: Mapping[str, str], out: Path,
    plots: Path | None,
) -> list[Path]:  # fmt: skip
    """Write a page to `out`, and each plot as NAME.png and NAME.svg to the folder `plots`; the plots' files.

    ModelError when the page is larger than a report should be; nothing is written then.
    """
    page = report_page(title, sources, blocks, missing).encode()
    if len(page) > MOST_BYTES:
        raise ModelError(f"the report would have {len(page):,} bytes, more than {MOST_BYTES:,}: name fewer folders")
    files = []
    for name, plot in names(plot for block in blocks for plot in block.plots).items() if plots is not None else ():
        for ending, data in (("png", png(plot.figure)), ("svg", plot.svg)):
            assert plots is not None
            files.append(plots / f"{name}.{ending}")
            write_atomic(files[-1], data)
    write_atomic(out, page)
    return files
