"""What tied layers cost and save: ``python -m benchmarks``. See docs/speed.md."""
