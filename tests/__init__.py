"""The tests, in the rooms of the library; see docs/maintainers/testing.md."""
