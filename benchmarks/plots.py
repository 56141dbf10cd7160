"""Pictures of results; matplotlib is imported here only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_AXES = {
    "channels": "channels (batch 8, 3×3)",
    "batch": "batch (64 channels, 3×3)",
    "kernel": "kernel size (64 channels, batch 8)",
}


def scaling(result: Path, picture: Path) -> bool:
    """Draw the scaling case on log axes. Returns False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    comparisons = json.loads(result.read_text(encoding="utf-8"))["comparisons"]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels: Any = figure.subplots(2, 3, sharey="row")
    for row, mode in zip(panels, ("inference", "training"), strict=True):
        for panel, (axis, label) in zip(row, _AXES.items(), strict=True):
            points = [c for c in comparisons if c["mode"] == mode and c["axis"] == axis]
            at = [p["at"] for p in points]
            for name in points[0]["contenders"] if points else ():
                times = [p["contenders"][name]["fixed"]["ms"] for p in points]
                panel.plot(at, times, marker="o", markersize=3, label=name)
            limit = [
                next(iter(p["contenders"].values()))["fixed"]["ms"] * p["limit"] for p in points
            ]
            panel.plot(at, limit, "k:", label="limit: dense / channels")
            panel.set(xscale="log", yscale="log", xlabel=label, title=mode)
            panel.set_xticks(at, [str(a) for a in at], minor=False)
            panel.minorticks_off()
        row[0].set_ylabel("ms per call")
    panels[0][0].legend(fontsize=7)
    figure.savefig(picture, dpi=80, metadata={"Software": None})
    return True
