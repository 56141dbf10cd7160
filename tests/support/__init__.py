"""What tests of several rooms share; no test stands here."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ROOT", "tomllib"]

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
