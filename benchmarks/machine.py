"""What a figure depends on besides the code: the machine, the versions, the commit.

The figures of several machines stand side by side, one folder for each under
``benchmarks/results``. The folder's name is made of the processor (or the GPU) and of the widest
instructions that torch uses. ``--isa avx2`` keeps torch, oneDNN and MKL from using wider ones:
that emulates a smaller processor, and record and name say so.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# glibc's allocator maps large outputs anew at every call, and the page faults drown the
# compute; these keep freed memory in the process. Read at start-up, hence the re-exec.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}

# Likewise. MKL heeds its variable on Intel's processors only. On AMD's it keeps to AVX2 anyway:
# neither this nor "SSE4_2" changes the time of a product there.
INSTRUCTIONS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}

_OF_INTEREST = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "asimd", "sve", "bf16", "i8mm")


def record(device: str) -> dict[str, Any]:
    """The machine: its name, instructions, caches, cores, and the limits set on it."""
    import torch

    facts = _facts()
    capability = torch.backends.cpu.get_cpu_capability()
    limits = {
        name: os.environ[name]
        for variables in INSTRUCTIONS.values()
        for name in variables
        if name in os.environ
    }
    model = facts.get("model name") or platform.processor() or platform.machine()
    found: dict[str, Any] = {
        "name": f"{model}, {os.cpu_count()} cores",
        "processor": model,
        "family": facts.get("cpu family"),
        "model": facts.get("model"),
        "cores": os.cpu_count(),
        "instructions": _instructions(facts.get("flags", facts.get("Features", ""))),
        "used by torch": capability,
        "caches": _caches(),
        "limits": limits,
    }
    parts = [model, facts.get("cpu family"), facts.get("model"), capability]
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["name"] = f"{found['gpu']}, beside {found['name']}"
        parts = [found["gpu"]]
    if limits:
        found["name"] += f", limited to {capability}"
        parts.append("limited")
    return {"key": _slug(" ".join(str(part) for part in parts if part)), **found}


def surroundings(device: str, threads: int) -> dict[str, Any]:
    """The part of a result file that is not figures."""
    import torch

    import tiedparam

    return {
        "device": device,
        "machine": record(device),
        "threads": threads,
        "allocator": {"fixed": ALLOCATOR, "default": "glibc's default"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tiedparam": tiedparam.__version__,
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _instructions(flags: str) -> list[str]:
    """Those that matter to products of matrices."""
    wide = re.compile(r"avx512|amx|avx10")
    return [flag for flag in flags.split() if flag in _OF_INTEREST or wide.match(flag)]


def _caches() -> dict[str, str]:
    """``{"L1d": "32K", "L2": "1024K", "L3": "32768K, shared by 0-1"}``, of the first core."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size, shared = (
                (folder / name).read_text().strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        several = "," in shared or "-" in shared
        found[f"L{level}{letter}"] = f"{size}, shared by {shared}" if several else size
    return found


def _slug(text: str) -> str:
    """``Intel(R) Xeon(R) CPU @ 2.20GHz 6 85 AVX512`` as ``intel-xeon-6-85-avx512``."""
    text = re.sub(r"\((r|tm)\)|\bcpu\b|@.*?hz|\d+-core|processor", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
