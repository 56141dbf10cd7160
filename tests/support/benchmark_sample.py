"""A result file of the benchmarks, small, for what is made of them."""

from __future__ import annotations

from typing import Any

SAMPLE: dict[str, Any] = {
    "case": "channel_shared",
    "title": "A title",
    "quick": False,
    "device": "cpu",
    "machine": {
        "key": "one",
        "name": "a processor",
        "instructions": ["avx2"],
        "used by torch": "AVX2",
        "caches": {"L2": "1024K"},
        "cores": 2,
        "family": "1",
        "model": "2",
        "limits": {},
    },
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13.0", "tiedparam": "0"},
    "commit": "0123456789abcdef",
    "date": "2026-01-01",
    "seconds": 1.0,
    "comparisons": [
        {
            "shapes": "Conv2d(64, 64, 3) on 28²",
            "mode": mode,
            "batch": 32,
            "contenders": {
                "dense": {
                    allocator: {"ratio": 1, "lower": 1, "upper": 1, "ms": 40, "extra_us": 0}
                    for allocator in ("fixed", "default")
                },
                "tiedparam": {
                    "fixed": {"ratio": tied, "lower": 0.1, "upper": 0.3, "ms": 8, "extra_us": -3e4},
                    "default": {"ratio": 0.5, "lower": 0.4, "upper": 0.6, "ms": 20, "extra_us": -2},
                },
                "hand-written": {
                    "fixed": {"ratio": 0.16, "lower": 0.1, "upper": 0.3, "ms": 8, "extra_us": -3e4},
                },
            },
        }
        for mode, tied in (("inference", 0.2), ("training", 0.1))
    ],
}
