"""Draw the picture of the first page: ``python docs/make_demo_picture.py``, about a minute.

It is what ``python -m tiedparam demo`` draws, with fewer colours, so that the file is small. Needs
the extra ``demo``. Numbers in it are those of the machine that drew it; other machines and
versions of torch round otherwise, so no test compares it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tiedparam.cli.demo import demo

PICTURE = Path(__file__).resolve().parent / "pictures" / "demo.png"
MOST_BYTES = 150_000
COLOURS = 96


def main() -> None:
    """Run the demo, and keep its picture."""
    with TemporaryDirectory() as folder:
        drawn = Path(folder) / "demo.png"
        demo(drawn)
        shrink(drawn, PICTURE)
    print(f"drew {PICTURE}, {PICTURE.stat().st_size:,} bytes")


def shrink(drawn: Path, out: Path) -> None:
    """Write a picture with few colours."""
    from PIL import Image  # matplotlib brings it

    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(COLOURS)
    out.parent.mkdir(exist_ok=True)
    few.save(out, optimize=True)


if __name__ == "__main__":
    main()
