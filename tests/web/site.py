"""The page on a real server: its files, the publisher's root and a sample of images beside them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qdeploy.data import CLASSES, Dataset
from qdeploy.serve import app
from qdeploy.serve.app import Options, serving
from qdeploy.serve.pages import Pages

DEVICE = Path(app.__file__).parents[1] / "web" / "device"
VENDOR = DEVICE / "vendor"


def copy_page(folder: Path, root: bytes | None, data: Dataset | None) -> Path:
    """A copy of the page with `root.json` and `sample/` beside it, where they are given."""
    shutil.copytree(DEVICE, folder)
    if root is not None:
        (folder / "root.json").write_bytes(root)
    if data is not None:
        (folder / "sample").mkdir()
        np.save(folder / "sample" / "images.npy", data.images)
        np.save(folder / "sample" / "labels.npy", data.labels)
        np.save(folder / "sample" / "classes.npy", np.array(CLASSES[data.name]))
    return folder


@contextlib.contextmanager
def serving_page(tree: Path, page: Path, log: Path | None = None) -> Iterator[str]:
    """Serve a published tree and a copy of the page; yields the page's URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "packaged", lambda _, prefix, wasm, beside: Pages(page, prefix, wasm, beside))
        with serving(tree, options=Options(port=0, log=log, browser=True)) as url:
            yield f"{url}{app.BROWSER_PREFIX}"
