"""What the commands of the shell take: their common options, and how their values are read."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tiedparam.cli.model_from_file import LayerHint
from tiedparam.cli.wording import in_one_line, in_shell
from tiedparam.formats.strict_json import read_json
from tiedparam.laws.functions import Functions, find_function, functions_of
from tiedparam.laws.registry import PART, find_rule
from tiedparam.layer.concerns import check_max_residual
from tiedparam.model.plan import OWN_OPTIONS, PlanEntry
from tiedparam.model.plan_file import plan_from_data
from tiedparam.util.errors import TieError

T = TypeVar("T")

CODES = "exit codes: 0 fine, 1 it could not be done, 2 wrong usage"
_FILE = (
    "a .safetensors file, what torch.save wrote of a state dict, a *.index.json, or a folder with "
    "one of them, as save_pretrained writes it"
)


def program() -> str:
    """How the user called this."""
    return "tiedparam" if Path(sys.argv[0]).name == "tiedparam" else "python -m tiedparam"


# Commands and the options that several of them have --------------------------------------------


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """A subcommand with a help text that ends in examples, and ``--help`` to show it."""
    shown = "".join(f"  tiedparam {name} {example}\n" for example in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text[0].lower() + text.partition(".")[0][1:],
        description=text,
        epilog=f"{'examples' if len(examples) > 1 else 'example'}:\n{shown}{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, fail=parser.error)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")


def add_import(parser: argparse.ArgumentParser) -> None:
    """``--import``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, for rules and functions of your own; can be repeated",
    )


def add_file(parser: argparse.ArgumentParser) -> None:
    """``FILE``, and how it is to be read."""
    parser.add_argument("file", type=file_path, metavar="FILE", help=_FILE)
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="the entry of a torch file that holds the state dict, such as 'model'",
    )
    add_import(parser)
    parser.add_argument(
        "--groups",
        action="append",
        type=_groups,
        default=[],
        metavar="LAYERS=N",
        help="convolutions with groups, which shapes do not show: a glob over layer names",
    )
    parser.add_argument(
        "--transposed",
        action="append",
        default=[],
        metavar="LAYERS",
        help="transposed convolutions, and matrices with their inputs first (GPT-2's Conv1D), "
        "which shapes do not show: a glob over layer names",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--output`` and ``--force``."""
    parser.add_argument("-o", "--output", type=file_path, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--force", action="store_true", help="replace existing files, FILE included"
    )


# What a command was given ----------------------------------------------------------------------


def hints(arguments: argparse.Namespace) -> list[LayerHint]:
    """What ``--groups`` and ``--transposed`` say of layers."""
    groups: dict[str, int] = dict(arguments.groups)
    transposed: list[str] = arguments.transposed
    both = [
        LayerHint(pattern, groups[pattern], True) for pattern in transposed if pattern in groups
    ]
    one = [LayerHint(pattern, number) for pattern, number in groups.items()]
    other = [LayerHint(pattern, transposed=True) for pattern in transposed]
    return [*both, *one, *other]


def functions(arguments: argparse.Namespace) -> Functions:
    """What ``fn=`` may name: the functions of the modules that ``--import`` names."""
    modules = [sys.modules[name] for name in arguments.imports]
    return {name: fn for module in modules for name, fn in functions_of(module).items()}


def values_of(
    arguments: argparse.Namespace, option: str, kind: Callable[[str, Functions], T]
) -> list[T]:
    """The values of an option that names rules; only now are the user's own registered."""
    try:
        known = functions(arguments)
        return [kind(text, known) for text in getattr(arguments, option)]
    except argparse.ArgumentTypeError as error:
        arguments.fail(f"argument --{option}: {in_one_line(error)}")
        raise AssertionError("argparse ends the process") from error


# Types of arguments ----------------------------------------------------------------------------


def between(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: the whole numbers from ``low`` to ``high``."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return whole_number


def residual_limit(text: str) -> float:
    """An argparse type: a limit of residuals."""
    try:
        value = float(text)
        check_max_residual(value)
    except (ValueError, TieError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up") from error
    return value


def file_path(text: str) -> Path:
    """An argparse type: the name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is empty")
    return Path(text)


def _groups(text: str) -> tuple[str, int]:
    pattern, found, number = text.rpartition("=")
    if not (found and pattern and number.isdecimal() and int(number) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must look like 'stem*=4'")
    return pattern, int(number)


# Rules and entries of a plan, in one word ------------------------------------------------------


def plan_entry(text: str, known: Functions) -> PlanEntry:
    """``layer*=row_repeat:groups=4``: an entry of a plan."""
    pattern, found, law = text.partition("=")
    if not (found and pattern and law):
        raise argparse.ArgumentTypeError(f"{text!r} must look like 'layer*=flip_sym'")
    laws, own = _laws(law), dict[str, str]()
    for _, options in laws:
        own |= {key: options.pop(key) for key in OWN_OPTIONS if key in options}
    table: dict[str, Any] = {"layers": pattern, **own}
    if len(laws) == 1:
        table |= dict(zip(("rule", "options"), laws[0], strict=True))
    else:
        table["rule"] = [list(pair) for pair in laws]
    try:
        (made,) = plan_from_data({"tie": [table]}, repr(text), known).entries
    except TieError as error:
        raise argparse.ArgumentTypeError(error.worded(in_shell)) from error
    return made


Choice = str | tuple[str, dict[str, Any]]


def rule_choice(text: str, known: Functions) -> Choice | list[Choice]:
    """``row_repeat:groups=4``: a rule for `scan`; ``flip_sym+repeat:outputs=2``: two together."""
    chosen = list[Choice]()
    try:
        for name, options in _laws(text):
            parameters = inspect.signature(find_rule(name)).parameters
            for option in options:
                if option not in (*parameters, *PART):
                    listed = ", ".join(parameters) or "none"
                    raise TieError(
                        f"'{name}'", f"'{name}' has no option '{option}'.", f"It has {listed}."
                    )
            if "fn" in options:
                options["fn"] = find_function(options["fn"], known)
            chosen.append((name, options) if options else name)
    except TieError as error:
        raise argparse.ArgumentTypeError(error.worded(in_shell)) from error
    return chosen if len(chosen) > 1 else chosen[0]


_TEXTS = ("source", "source_name", "fn", *OWN_OPTIONS)  # a layer may be called "0"


def _laws(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``flip_sym+row_repeat:groups=4``: laws that hold together, each with its options."""
    return [_rule_and_options(law) for law in text.split("+")]


def _rule_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """``row_repeat:groups=4``: numbers, truth values and lists as in JSON, all else is text."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, found, value = part.partition("=")
        if not (found and key):
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} must look like 'groups=4'")
        try:
            options[key] = _value(key, value)
        except ValueError:
            options[key] = value
    return name, options


def _value(key: str, text: str) -> Any:
    """What an option's text means.

    Raises:
        ValueError: if it is text and nothing else.
    """
    if key in PART and ":" in text:  # as in Python: 0:64, 64: and -64:
        return [int(number) if number else None for number in text.split(":")]
    return text if key in _TEXTS else read_json(text)
