"""The shell: ``tiedparam <command>``, or ``python -m tiedparam <command>``.

Results go to stdout, as text or with ``--json`` as JSON and nothing else; progress, warnings
and errors go to stderr. Exit codes: 0 fine, 1 it could not be done (stderr says why, with a line
for each reason), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import glob
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tiedparam import (
    Plan,
    PlanEntry,
    Rule,
    TieError,
    __version__,
    available_rules,
    export_dense,
    read_plan,
    report,
    save,
    scan,
    tie_model,
    write_plan,
)
from tiedparam.cli.model_from_file import LayerHint, open_model, read_hints
from tiedparam.formats.checkpoint_files import files_of
from tiedparam.formats.exports import left_by_older
from tiedparam.formats.safetensors import refuse_foreign_suffix
from tiedparam.formats.strict_json import read_json
from tiedparam.laws.functions import Functions, find_function, functions_of
from tiedparam.laws.registry import find_rule
from tiedparam.layer.concerns import TO_TIE_AGAIN, check_max_residual
from tiedparam.model.next_steps import after_scan
from tiedparam.model.plan import plan_from_data
from tiedparam.tie.lookup import ties_of
from tiedparam.util.errors import visible
from tiedparam.util.table import Column, Table, TableReport

INTERRUPTED = 130

T = TypeVar("T")

_PICTURE = Path("tiedparam-demo.png")
_CODES = "exit codes: 0 fine, 1 it could not be done, 2 wrong usage"
_FILE = (
    "a .safetensors file, what torch.save wrote of a state dict, a *.index.json, or a folder with "
    "one of them, as save_pretrained writes it"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 after a `TieError` or `OSError`, whose message is printed, with a
        line for each reason; 130 if it was interrupted. Without a command the help goes to stderr
        and the code is 2.

    Raises:
        SystemExit: from argparse, with 2 for wrong usage and 0 after ``--help``.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        _import_modules(getattr(arguments, "imports", ()))
        with _warnings_in_one_line():
            code: int | None = arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is still an error that can be told
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TieError, OSError) as error:
        reason = visible(_in_words_of_the_shell(str(error)), keep="\n")
        print(f"{parser.prog} {arguments.command}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog} {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def _one_line(error: object) -> str:
    """A message in one line; names from files may hold control characters, which terminals obey."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return visible(_in_words_of_the_shell(text.replace(":; ", ": ").replace(".; ", ". ")))


_WORDS = {
    "Call remove_tie first": "Run tiedparam untie first",
    "call remove_tie first": "run tiedparam untie first",
    "If it is a rule of your own, import its module first.": "Rules of your own need --import.",
    "pass on_unfit='skip'": "pass --skip-unfit",
    "pass init='rescale'": "pass --init rescale",
    "with tiedparam.residual or tiedparam.scan, or set a limit with max_residual=": (
        "with tiedparam scan, or set a limit with --max-residual"
    ),
    f" {TO_TIE_AGAIN}": " To tie again pass --force.",
    "are in rows() and to_markdown()": "are in the output of --json",
    "above max_residual=": "above --max-residual ",
    "tiedparam.scan": "tiedparam scan",
}


def _in_words_of_the_shell(text: str) -> str:
    """A message of the library, with the next steps that a shell has."""
    for said, meant in _WORDS.items():
        text = text.replace(said, meant)
    return text


def _import_modules(names: Iterable[str]) -> None:
    """Import the user's modules, which register their rules.

    Raises:
        TieError: if one cannot be imported.
    """
    for name in names:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where the console script does not look
        try:
            import_module(name)
        except Exception as error:  # code of the user's
            raise TieError(
                f"--import {name}: {type(error).__name__}: {error}. Give the dotted name of a "
                "module in this folder, or of one that is installed."
            ) from error


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: object, *_: object, **__: object) -> None:
        print(f"warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _program() -> str:
    """How the user called this."""
    return "tiedparam" if Path(sys.argv[0]).name == "tiedparam" else "python -m tiedparam"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_program(),
        description=(
            "Weight tying for stock PyTorch layers. Works on checkpoint files, from names and "
            "shapes alone, without the code of their models."
        ),
        epilog=(
            "examples:\n"
            "  tiedparam demo\n"
            "  tiedparam scan model.safetensors --plan plan.toml\n"
            "  tiedparam tie model.safetensors --plan plan.toml -o tied.safetensors\n"
            "  tiedparam report tied.safetensors\n"
            "  tiedparam untie tied.safetensors -o dense.safetensors\n"
            f"{_CODES}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tiedparam {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="<command>")
    for add in (_add_rules, _add_scan, _add_tie, _add_untie, _add_report, _add_demo):
        add(commands)
    return parser


def _command(
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
        epilog=f"{'examples' if len(examples) > 1 else 'example'}:\n{shown}{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, fail=parser.error)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="import this module first, for rules and functions of your own; can be repeated",
    )  # fmt: skip


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=_path, metavar="FILE", help=_FILE)
    parser.add_argument(
        "--key", metavar="NAME",
        help="the entry of a torch file that holds the state dict, such as 'model'",
    )  # fmt: skip
    _add_import(parser)
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


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=_path, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there, FILE included"
    )


def _hints(arguments: argparse.Namespace) -> list[LayerHint]:
    groups: dict[str, int] = dict(arguments.groups)
    transposed: list[str] = arguments.transposed
    both = [
        LayerHint(pattern, groups[pattern], True) for pattern in transposed if pattern in groups
    ]
    one = [LayerHint(pattern, number) for pattern, number in groups.items()]
    other = [LayerHint(pattern, transposed=True) for pattern in transposed]
    return [*both, *one, *other]


def _open(arguments: argparse.Namespace, hints: Iterable[LayerHint] = ()) -> nn.Module:
    """The model of the command's file."""
    all_hints = [*_hints(arguments), *hints]
    return open_model(arguments.file, all_hints, arguments.key, _functions(arguments))


def _functions(arguments: argparse.Namespace) -> Functions:
    """What ``fn=`` may name: the functions of the modules that --import names."""
    modules = [sys.modules[name] for name in arguments.imports]
    return {name: fn for module in modules for name, fn in functions_of(module).items()}


def _print(result: TableReport[Any], as_json: bool, **more: Any) -> None:
    """A report on stdout, with more facts about files, or the shell's own steps to take."""
    if as_json:
        print(json.dumps({**result.to_data(), **more}, indent=2, ensure_ascii=False))
        return
    print(_in_words_of_the_shell(result.text(more.get("next_steps", ()))))
    if "files" in more:
        sizes = f"{more['bytes']:,} B, from {more['bytes_before']:,} B"
        print(f"Wrote {', '.join(more['files'])}: {sizes}.")


def _print_written(
    report: TableReport[Any], arguments: argparse.Namespace, files: Sequence[Path], before: int
) -> None:
    """A report, and which files were written; ``before`` counts the bytes of the input."""
    _print(report, arguments.json, files=[str(file) for file in files], bytes=_size(files),
           bytes_before=before)  # fmt: skip


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _refuse_existing(arguments: argparse.Namespace, *others: Path) -> None:
    for path in (arguments.output, *left_by_older(arguments.output), *others):
        if path.exists() and not arguments.force:
            raise TieError(f"'{path}' exists already. Pass --force to replace it.")
    refuse_foreign_suffix(arguments.output)


# rules -------------------------------------------------------------------------------------


def _meaning(rule: type[Rule]) -> str:
    """The first line of its docstring, without the marks of reStructuredText."""
    return (inspect.getdoc(rule) or "").split("\n")[0].replace("``", "")


class _RuleTable(TableReport[type[Rule]]):
    """The registered rules."""

    def table(self) -> Table[type[Rule]]:
        """One row for every rule."""
        columns: list[Column[type[Rule]]] = [
            Column("rule", "rule", lambda rule: rule.name),
            Column("law", "law", lambda rule: rule.law),
            Column("options", "options", _options_text),
            Column("meaning", "meaning", _meaning),
        ]
        return Table(columns, available_rules().values())

    def notes(self) -> list[str]:
        """None."""
        return []

    def to_data(self) -> dict[str, Any]:
        """Rows."""
        return {"kind": "rules", "rows": self.rows()}


def _options_text(rule: type[Rule]) -> str:
    shown = []
    for parameter in inspect.signature(rule).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            shown.append(f"{parameter.name}=")
        else:
            value = getattr(parameter.default, "__name__", repr(parameter.default))
            shown.append(f"{parameter.name}={value}")
    return ", ".join(shown)


def _add_rules(commands: Any) -> None:
    text = "List the laws. What they mean in detail is in docs/rules.md."
    parser = _command(commands, "rules", _run_rules, text, "", "--import my_rules", "--json")
    _add_import(parser)
    _add_json(parser)


def _run_rules(arguments: argparse.Namespace) -> None:
    _print(_RuleTable(), arguments.json)


# scan --------------------------------------------------------------------------------------


def _add_scan(commands: Any) -> None:
    parser = _command(
        commands,
        "scan",
        _run_scan,
        "Look how far each tensor of a checkpoint is from each law. A residual far below that of "
        "a random\nweight is a symmetry that training found. Nothing is changed.",
        "model.safetensors",
        "model.pt --rule flip_sym --rule row_repeat:groups=4",
        "model.safetensors --plan plan.toml --json",
        "checkpoint.pt --key model --import my_rules",
    )
    _add_file(parser)
    parser.add_argument(
        "--rule",
        action="append",
        metavar="RULE[:OPTION=VALUE,…]",
        help="only this law; can be repeated (default: all laws, with all of their variants)",
    )
    parser.add_argument(
        "--pairs",
        type=between(0, 10**6),
        default=2,
        metavar="N",
        help="with how many others each tensor is compared for copies (default: 2)",
    )
    parser.add_argument(
        "--plan", type=_path, metavar="PLAN", help="write what was found to a plan (.toml or .json)"
    )
    parser.add_argument("--force", action="store_true", help="replace a plan that is there")
    _add_json(parser)


def _run_scan(arguments: argparse.Namespace) -> None:
    plan: Path | None = arguments.plan
    if plan is not None and plan.exists() and not arguments.force:
        raise TieError(f"'{plan}' exists already. Pass --force to replace it.")
    rules = None if arguments.rule is None else _each(arguments, "rule", _rule)
    model = _open(arguments)
    with _wrong_types_are_told():
        found = scan(model, rules, pairs=arguments.pairs)
    planned = found.plan()
    if plan is not None and planned.entries:
        write_plan(planned, plan)
    _print(found, arguments.json, next_steps=after_scan(planned, arguments, _program()))
    if plan is not None and not planned.entries:
        raise TieError("nothing was found that chance does not explain, so there is no plan.")


# tie and untie -----------------------------------------------------------------------------


def _add_tie(commands: Any) -> None:
    parser = _command(
        commands,
        "tie",
        _run_tie,
        "Tie the tensors of a checkpoint by a plan. Writes one safetensors file with the free "
        "values\nand the laws, for tiedparam.load. All or nothing.",
        "model.safetensors --plan plan.toml -o tied.safetensors",
        "model.pt --tie 'layer*.conv2=flip_sym' --dry-run",
        "model.pt --tie 'head=row_repeat:groups=4' --groups 'stem=8' -o tied.safetensors",
    )
    _add_file(parser)
    parser.add_argument("--plan", type=_path, metavar="PLAN", help="a plan (.toml or .json)")
    parser.add_argument(
        "--tie",
        action="append",
        default=[],
        metavar="LAYERS=RULE[:OPTION=VALUE,…]",
        help="an entry of a plan: a glob over layer names, and a law; goes before --plan",
    )
    parser.add_argument(
        "--init", choices=("project", "rescale", "exact"), default="project",
        help="the nearest lawful weight, that times the root of the multiplicity, or only "
        "weights that are lawful already (default: project)",
    )  # fmt: skip
    parser.add_argument(
        "--max-residual", type=_limit, metavar="R",
        help="refuse tensors further from their law than this, as scan measures it (0 to 1)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-unfit", action="store_true", help="leave out tensors that cannot carry their law"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be tied")
    _add_output(parser)
    _add_json(parser)


def _run_tie(arguments: argparse.Namespace) -> None:
    if arguments.plan is None and not arguments.tie:
        arguments.fail("say what to tie: --plan or --tie")
    if arguments.output is None and not arguments.dry_run:
        arguments.fail("say where to write: -o, or --dry-run")
    entries = _each(arguments, "tie", _entry)
    functions = _functions(arguments)
    read = read_plan(arguments.plan, functions=functions).entries if arguments.plan else ()
    plan = Plan((*entries, *read))
    if not arguments.dry_run:
        _refuse_existing(arguments)
    model = _open(arguments, read_hints(arguments.plan) if arguments.plan else [])
    with _wrong_types_are_told():
        tied = tie_model(
            model,
            plan,
            init=arguments.init,
            max_residual=arguments.max_residual,
            dry_run=arguments.dry_run,
            on_unfit="skip" if arguments.skip_unfit else "error",
        )
    if arguments.dry_run:
        _print(tied, arguments.json)
        return
    before = _size(files_of(arguments.file))
    save(model, arguments.output)
    _print_written(tied, arguments, [arguments.output], before)


def _add_untie(commands: Any) -> None:
    parser = _command(
        commands,
        "untie",
        _run_untie,
        "Write the dense checkpoint of a tied one. A safetensors file that every plain copy of "
        "the model loads,\nwritten one tensor at a time.",
        "tied.safetensors -o dense.safetensors",
        "tied.safetensors -o dense.safetensors --max-shard-size 5GB",
    )
    _add_file(parser)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="several files with an index, such as 5GB each"
    )
    _add_output(parser)
    _add_json(parser)


def _run_untie(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        arguments.fail("say where to write: -o")
    output: Path = arguments.output
    shards = f"{glob.escape(output.stem)}-*-of-*{glob.escape(output.suffix)}"
    others = output.parent.glob(shards) if arguments.max_shard_size else ()
    _refuse_existing(arguments, *others)
    model = _open(arguments)
    if not any(ties_of(layer) for layer in model.modules()):
        raise TieError(f"'{arguments.file}' holds no ties. It is dense already.")
    untied = report(model)
    before = _size(files_of(arguments.file))
    files = export_dense(model, arguments.output, max_shard_size=arguments.max_shard_size)
    _print_written(untied, arguments, files, before)


# report, demo ------------------------------------------------------------------------------


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        _run_report,
        "Show what the ties of a checkpoint store and save. A row for each tied tensor, and "
        "totals.",
        "tied.safetensors",
        "tied.safetensors --markdown",
    )
    _add_file(parser)
    parser.add_argument("--markdown", action="store_true", help="a table for Markdown pages")
    _add_json(parser)


def _run_report(arguments: argparse.Namespace) -> None:
    shown = report(_open(arguments))
    if arguments.markdown and not arguments.json:
        print(shown.to_markdown())
    else:
        _print(shown, arguments.json)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small CNN on real digits, tie it by every law, show what that costs",
        description=(
            "Train a small CNN of stock layers on scikit-learn's digits, tie a copy of it by "
            "each law, fine-tune the copies, and print one table (stdout; a terminal shows "
            "progress). Writes a picture of the tied kernels. No network, fixed seeds. "
            "Needs pip install 'tiedparam[demo]'."
        ),
        epilog="example: tiedparam demo --epochs 5 --out kernels.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--out", type=_path, default=_PICTURE, metavar="PNG",
        help="the picture; under another name than this, it replaces none",
    )  # fmt: skip
    demo.add_argument("--force", action="store_true", help="replace a picture that is there")
    demo.add_argument(
        "--seed", type=between(0, 2**32 - 1), default=0, help="of split, weights and order"
    )
    demo.add_argument(
        "--epochs",
        type=between(1, 1000),
        default=30,
        help="of the training, and of each fine-tuning",
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> None:
    # here: the other commands need not load it
    from tiedparam.cli.demo import demo

    out: Path = arguments.out
    if out != _PICTURE and out.is_file() and not arguments.force:
        raise TieError(f"'{out}' exists already. Pass --force to replace it.")
    demo(out, seed=arguments.seed, epochs=arguments.epochs)


# Arguments ---------------------------------------------------------------------------------


def between(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: the whole numbers from ``low`` to ``high``."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return whole_number


def _limit(text: str) -> float:
    try:
        value = float(text)
        check_max_residual(value)
    except (ValueError, TieError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up") from error
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is empty")
    return Path(text)


def _each(
    arguments: argparse.Namespace, option: str, kind: Callable[[str, Functions], T]
) -> list[T]:
    """The values of an option that names rules; only now are the user's own registered."""
    try:
        functions = _functions(arguments)
        return [kind(text, functions) for text in getattr(arguments, option)]
    except argparse.ArgumentTypeError as error:
        arguments.fail(f"argument --{option}: {_one_line(error)}")
        raise AssertionError("argparse ends the process") from error


def _groups(text: str) -> tuple[str, int]:
    pattern, found, number = text.rpartition("=")
    if not (found and pattern and number.isdecimal() and int(number) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'stem*=4'")
    return pattern, int(number)


def _entry(text: str, functions: Functions) -> PlanEntry:
    pattern, found, law = text.partition("=")
    if not (found and pattern and law):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'layer*=flip_sym'")
    rule, options = _rule_and_options(law)
    table: dict[str, Any] = {"layers": pattern, "rule": rule, "options": options}
    table |= {key: options.pop(key) for key in ("tensor_name", "init") if key in options}
    try:
        (entry,) = plan_from_data({"tie": [table]}, repr(text), functions).entries
    except TieError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return entry


def _rule(text: str, functions: Functions) -> str | tuple[str, dict[str, Any]]:
    name, options = _rule_and_options(text)
    try:
        known = inspect.signature(find_rule(name)).parameters
        for option in options:
            if option not in known:
                listed = ", ".join(known) or "none"
                raise TieError(f"'{name}' has no option '{option}'. It has {listed}.")
        if "fn" in options:
            options["fn"] = find_function(options["fn"], functions)
    except TieError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return (name, options) if options else name


_TEXTS = ("source", "source_name", "fn", "tensor_name", "init")  # a layer may be called "0"


def _rule_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """``row_repeat:groups=4``: numbers, truth values and lists as in JSON, all else is text."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, found, value = part.partition("=")
        if not (found and key):
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} is not like 'groups=4'")
        try:
            options[key] = value if key in _TEXTS else read_json(value)
        except ValueError:
            options[key] = value
    return name, options


@contextmanager
def _wrong_types_are_told() -> Iterator[None]:
    """A plan's option of a wrong type is the user's error, and no traceback."""
    try:
        yield
    except TypeError as error:
        raise TieError(str(error)) from error
