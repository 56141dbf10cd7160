"""Draw the pictures of docs/recipes/finding-symmetries.md: ``python docs/make_scan_pictures.py``.

They are what its example draws: the example runs in an empty folder, and its pictures are kept. It
trains a network, so another machine or torch may draw a shade that differs; `differ` says whether
one sees it.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import tempfile
from pathlib import Path

import numpy as np
from matplotlib import image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "finding-symmetries.py"
PICTURES = ROOT / "docs" / "pictures"
NAMES = ("scan.png", "residuals.png")
COMMAND = "python docs/make_scan_pictures.py"


def draw(folder: Path) -> None:
    """Run the example in a folder, which has its pictures then."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(EXAMPLE))
    finally:
        os.chdir(before)


def differ(one: Path, other: Path) -> bool:
    """Whether one sees that two pictures differ: in size, or in a hundredth of their area."""
    pixels, others = image.imread(one), image.imread(other)
    if pixels.shape != others.shape:
        return True
    unlike = np.abs(pixels - others).max(axis=2) > 0.15
    return bool(unlike.mean() > 0.01)


def main() -> None:
    """Draw them anew; one that looks the same is left as it is."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for name in NAMES:
            old, new = PICTURES / name, Path(folder) / name
            if not old.exists() or differ(old, new):
                shutil.copyfile(new, old)
                print(f"drew {old.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
