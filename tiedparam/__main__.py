"""``python -m tiedparam <command>``; see `tiedparam._shell`."""

from __future__ import annotations

import sys

from tiedparam._shell import main

if __name__ == "__main__":
    sys.exit(main())
