"""What tests of several rooms share; no test stands here."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
