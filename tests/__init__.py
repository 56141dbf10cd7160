"""The tests, in the rooms of the library; see docs/design.md, "What is tested"."""
