"""``python -m benchmarks``: measure, write results, and generate the pages of docs."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ALLOCATOR, INSTRUCTIONS, ROOT, record, surroundings
from benchmarks.result_files import write

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parser().parse_args(arguments)
    if options.report:
        from benchmarks import report

        report.write(options.out or RESULTS, options.docs)
        if options.out is None:
            report.write_readme(RESULTS, ROOT / "README.md")
        return 0
    if options.list:
        from benchmarks.cases import CASES

        for case in CASES.values():
            print(f"{case.name:20} {case.title}")
        return 0
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    wanted = {**threads, **INSTRUCTIONS.get(options.isa, {})}
    if not options.default_allocator:
        wanted |= ALLOCATOR
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "benchmarks", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, {**os.environ, **wanted, **_path()})
    return _measure(options)


def _parser() -> argparse.ArgumentParser:
    from_here = RESULTS.relative_to(ROOT)
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, rough figures")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--only", action="append", default=[], metavar="THEME",
                        help="of the case `goals`, only this module; repeatable")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--isa", choices=tuple(INSTRUCTIONS),
                        help="no wider instructions: emulates a smaller processor")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out",
        type=Path,
        help=f"where results go: the machine's folder in {from_here}, "
        f"with --quick in {from_here}/quick",
    )
    parser.add_argument("--report", action="store_true", help="results to docs and README")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "speed.md",
                        help="the page that --report writes")  # fmt: skip
    parser.add_argument("--default-allocator", action="store_true", help=argparse.SUPPRESS)
    return parser


def _measure(options: argparse.Namespace) -> int:
    import torch

    from benchmarks import goal_cases
    from benchmarks.cases import CASES

    if options.only:
        options.case = ["goals"]
    names = options.case or [c.name for c in CASES.values() if c.in_quick or not options.quick]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"no case {', '.join(unknown)}; there are: {', '.join(CASES)}", file=sys.stderr)
        return 2
    try:
        goal_cases.themes(options.only)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this torch sees no CUDA device", file=sys.stderr)
        return 2
    folder = RESULTS / "quick" if options.quick else RESULTS
    out = options.out or folder / record(options.device)["key"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    failed = False
    for name in names:
        if name == "goals":
            failed |= not _measure_goals(options, out)
            continue
        started = time.perf_counter()
        case = CASES[name]
        comparisons = measure(name, options.quick, options.device, options.default_allocator)
        path = out / f"{options.device}-{name}.json"
        if options.default_allocator:  # the second column: the parent process reads this
            write(path, {"comparisons": comparisons})
            continue
        if case.default_allocator and options.device == "cpu":
            _merge(comparisons, _with_default_allocator(name, options))
        goals = [goal.evaluate(comparisons) for goal in case.goals]
        write(
            path,
            {
                "case": name,
                "title": case.title,
                "quick": options.quick,
                **surroundings(options.device, options.threads),
                "seconds": round(time.perf_counter() - started, 1),
                "goals": goals,
                "comparisons": comparisons,
            },
        )
        met = [goal["met"] for goal in goals if goal["met"] is not None]
        print(f"{name}: {time.perf_counter() - started:.0f} s, {len(comparisons)} comparisons, "
              f"{sum(met)} of {len(met)} goals met", flush=True)  # fmt: skip
    return int(failed)


def _measure_goals(options: argparse.Namespace, out: Path) -> bool:
    """The case `goals`, module by module: each replaces what the file had of it.

    Returns whether all could be measured; one that fails does not stop the others.
    """
    from benchmarks import goal_cases
    from benchmarks.cases import CASES

    path = out / f"{options.device}-goals.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    there = {theme.name for theme in goal_cases.themes()}
    comparisons = [c for c in found.get("comparisons", []) if c["theme"] in there]
    themes = {name: about for name, about in found.get("themes", {}).items() if name in there}
    failed = []
    for theme in goal_cases.themes(options.only):
        started = time.perf_counter()
        try:
            new = measure("goals", options.quick, options.device, only=(theme.name,))
        except Exception:
            traceback.print_exc()
            failed.append(theme.name)
            continue
        comparisons = [c for c in comparisons if c["theme"] != theme.name] + new
        around = surroundings(options.device, options.threads)
        seconds = round(time.perf_counter() - started, 1)
        themes[theme.name] = {"seconds": seconds, "commit": around["commit"],
                              "date": around["date"], "versions": around["versions"]}  # fmt: skip
        print(f"{theme.name}: {seconds:.0f} s, {len(new)} comparisons", flush=True)
        write(
            path,
            {
                "case": "goals",
                "title": CASES["goals"].title,
                "quick": options.quick,
                **around,
                "seconds": round(sum(t["seconds"] for t in themes.values()), 1),
                "themes": themes,
                "goals": goal_cases.evaluate(comparisons),
                "comparisons": comparisons,
            },
        )
    for line in goal_cases.table(goal_cases.evaluate(comparisons)):
        print("| " + " | ".join(line) + " |")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return not failed


def measure(
    name: str, quick: bool, device: str, times_only: bool = False, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run one case in this process; its comparisons."""
    import torch

    from benchmarks.cases import CASES
    from benchmarks.measuring import Run, Setting

    torch.manual_seed(0)
    setting = Setting.quick() if quick else Setting()
    run = Run(quick, torch.device(device), setting, times_only=times_only, only=only)
    gc.collect()
    gc.freeze()  # the modules of torch, which every collection would walk through
    try:
        CASES[name].measure(run)
    finally:
        gc.unfreeze()
    return run.comparisons


def _with_default_allocator(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | _path()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "--case", name, "--out", folder,
                   "--threads", str(options.threads), "--default-allocator"]  # fmt: skip
        command += ["--quick"] if options.quick else []
        subprocess.run(command, env=environment, check=True)
        found = json.loads((Path(folder) / f"cpu-{name}.json").read_text())
    comparisons: list[dict[str, Any]] = found["comparisons"]
    return comparisons


def _merge(fixed: list[dict[str, Any]], default: list[dict[str, Any]]) -> None:
    timed = [c for c in fixed if all("ms" in f["fixed"] for f in c["contenders"].values())]
    for mine, other in zip(timed, default, strict=True):
        assert (mine["shapes"], mine["mode"]) == (other["shapes"], other["mode"])
        for name, figures in mine["contenders"].items():
            figures["default"] = other["contenders"][name]["fixed"]


def _path() -> dict[str, str]:
    """So that child processes find this package from any folder."""
    found = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{found}" if found else str(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
