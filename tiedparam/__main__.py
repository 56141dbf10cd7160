"""``python -m tiedparam <command>``; see `tiedparam.cli.main`."""

from __future__ import annotations

import sys

from tiedparam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
