"""Exports that are killed over older ones, and what can be read afterwards.

Run by test_exports.py in a process of its own, which forks::

    python tests/support/killed_exports.py random 200 FOLDER  # at random moments
    python tests/support/killed_exports.py steps 0 FOLDER     # before each step on the file system

All values of generation n are n, so a mixture shows. Prints what was seen, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import tiedparam as tp

torch.set_num_threads(1)

FORMS = {"one file": None, "3 shards": "530KB", "6 shards": "270KB"}


def model(generation: float) -> nn.Sequential:
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    for parameter in layers.parameters():
        parameter.data.fill_(generation)
    return layers


def export(generation: int, form: str, path: Path) -> None:
    tp.export_dense(model(generation), path, max_shard_size=FORMS[form])


def doors(path: Path) -> dict[str, float | None]:
    """The generation that each reader finds, or None where it is refused."""
    index = path.with_name(path.name + ".index.json")
    return {
        "the file": by_tiedparam(path),
        "the index": by_tiedparam(index),
        "a reader of shards that knows no marks": by_weight_map(index),
    }


def by_tiedparam(path: Path) -> float | None:
    loaded = model(-1.0)
    try:
        tp.load(path, loaded)
    except (tp.TieError, FileNotFoundError):
        return None
    return the_one(torch.cat([p.detach().flatten() for p in loaded.parameters()]))


def by_weight_map(index: Path) -> float | None:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = {name: safetensors.torch.load_file(index.with_name(name))
                  for name in set(places.values())}  # fmt: skip
    except FileNotFoundError:
        return None
    return the_one(torch.cat([shards[name][key].flatten() for key, name in places.items()]))


def the_one(values: torch.Tensor) -> float:
    least, most = (value.item() for value in values.aminmax())
    assert least == most, f"one model made of the exports {values.unique().tolist()}"
    return least


def judge(path: Path, before: dict, generation: int, finished: bool, seen: Counter) -> dict:
    after = doors(path)
    lawful = {None, float(generation), *before.values()}
    assert set(after.values()) <= lawful, f"{before} became {after}"
    found = {value for value in after.values() if value is not None}
    if finished:
        assert found == {float(generation)}, f"{before} became {after}"
        assert None in after.values()  # the other form is gone
    kinds = sorted("new" if value == generation else "old" for value in found)
    seen["finished" if finished else " and ".join(kinds) or "refused"] += 1
    return after


def forked(work) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def at_random(count: int, path: Path) -> Counter:
    dice, seen = random.Random(0), Counter()
    durations = {}
    for form in FORMS:
        export(0, form, path)
        start = time.perf_counter()
        export(0, form, path)
        durations[form] = time.perf_counter() - start
    before = doors(path)
    for generation in range(1, count + 1):
        form = dice.choice(list(FORMS))
        child = forked(lambda: export(generation, form, path))  # noqa: B023
        time.sleep(dice.uniform(0, 1.5 * durations[form]))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        before = judge(path, before, generation, status == 0, seen)
        if set(before.values()) == {None}:  # the next is to be killed over an older one
            export(generation, dice.choice(list(FORMS)), path)
            before = doors(path)
    return seen


def at_each_step(path: Path) -> Counter:
    seen = Counter()
    generation = 1
    for old, new in product(FORMS, FORMS):
        status, step = 1, 0
        while status != 0:
            export(generation, old, path)
            before = doors(path)
            step, generation = step + 1, generation + 1
            child = forked(lambda: stopped(step, generation, new, path))  # noqa: B023
            _, status = os.waitpid(child, 0)
            judge(path, before, generation, status == 0, seen)
            generation += 1
        assert step > 4
    return seen


def stopped(step: int, generation: int, form: str, path: Path) -> None:
    """Export, and stop without a word before the given step."""
    left = [step]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for name in ("replace", "unlink", "fsync", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    export(generation, form, path)


def main() -> None:
    how, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    path = folder / "model.safetensors"
    bystanders = [folder / name for name in ("model-00001-of-00003.bin", "model.safetensors.txt",
                  "model2-00001-of-00003.safetensors", "model-1-of-3.safetensors")]  # fmt: skip
    for bystander in bystanders:
        bystander.write_text("of another name")
    seen = at_random(count, path) if how == "random" else at_each_step(path)
    for form in FORMS:
        export(7, form, path)
        assert set(doors(path).values()) == {7.0, None}
    shown = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    expected = {f"model-{n:05}-of-00006.safetensors" for n in range(1, 7)}
    expected |= {"model.safetensors.index.json", *(bystander.name for bystander in bystanders)}
    assert shown == expected, shown
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
