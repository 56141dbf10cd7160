"""The tests, in the rooms of the library; see docs/maintainers/design.md, "What is tested"."""
