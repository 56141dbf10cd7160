"""What to type after a scan: the commands of the shell that tie what was found."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from tiedparam.laws.registry import PART, is_pair
from tiedparam.model.next_steps import tables_of
from tiedparam.model.plan import Plan


def after_scan(planned: Plan, arguments: argparse.Namespace, program: str) -> list[str]:
    """The commands of the shell that tie what a scan found, with the names of the user's files.

    Args:
        planned: what was found.
        arguments: of the command ``scan``.
        program: how the shell was called.
    """

    def command(name: str, *options: str) -> str:
        return " ".join([program, name, *_given_again(arguments), *options])

    output = _given("-o", _tied_name(arguments.file))
    if not planned.entries:
        return [command("tie", "--tie 'LAYERS=RULE'", "--init rescale", output)]
    if arguments.plan is not None:
        return [command("tie", _given("--plan", str(arguments.plan)), output)]
    spelled_out = as_options(planned)
    if spelled_out is not None:
        return [command("tie", spelled_out, output)]
    laws = [_given("--rule", rule) for rule in arguments.rule or ()]
    return [
        command("scan", *laws, f"--pairs {arguments.pairs}", "--plan plan.toml"),
        command("tie", "--plan plan.toml", output),
    ]


def _given_again(arguments: argparse.Namespace) -> list[str]:
    """The file of a command and how it is to be read, for another command."""
    options = [("--key", arguments.key)] if arguments.key is not None else []
    options += [("--import", module) for module in arguments.imports]
    options += [("--groups", f"{name}={n}") for name, n in arguments.groups]
    options += [("--transposed", name) for name in arguments.transposed]
    file = str(arguments.file)
    file = f"./{file}" if file.startswith("-") else file
    return [shlex.quote(file), *(_given(name, value) for name, value in options)]


def _given(option: str, value: str) -> str:
    """An option and its value; what begins with a dash would be read as another option."""
    return f"{option}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


def _tied_name(file: Path) -> str:
    """What to call the tied checkpoint of a file or folder: ``model-tied.safetensors``."""
    name = file.resolve().name.removesuffix(".index.json")
    return f"{name if file.is_dir() else Path(name).stem}-tied.safetensors"


def as_options(plan: Plan) -> str | None:
    """The options ``--tie`` that spell the plan out; None if it is long or they cannot say it."""
    options = [_option(table) for table in tables_of(plan) or [{}]]
    if None in options:
        return None
    return " ".join(_given("--tie", str(option)) for option in options)


def _option(table: dict[str, Any]) -> str | None:
    """``layers=rule:key=value,…``; None if a value has one of these signs."""
    if not table or "=" in table["layers"]:
        return None
    laws = table["rule"] if isinstance(table["rule"], list) else [table["rule"]]
    if len(laws) > 1 and "options" in table:
        return None  # they would be the last law's
    *before, last = [law if is_pair(law) else (law, {}) for law in laws]
    own = {key: table[key] for key in ("tensor_name", "init") if key in table}
    members = [*before, (last[0], {**last[1], **table.get("options", {}), **own})]
    spelled = [_law(name, options) for name, options in members]
    return None if None in spelled else f"{table['layers']}={'+'.join(map(str, spelled))}"


def _law(name: Any, given: dict[str, Any]) -> str | None:
    """``rule:key=value,…``; None if a value has one of these signs."""
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in given.items()}
    texts |= {key: ":".join(map(str, given[key])) for key in PART if key in given}
    if not isinstance(name, str) or any({",", "+"} & set(text) for text in texts.values()):
        return None
    options = ",".join(f"{key}={text}" for key, text in texts.items())
    return f"{name}{':' + options if options else ''}"
