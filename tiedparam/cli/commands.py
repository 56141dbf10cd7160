"""The commands of the shell: how each is called, and what it does."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import Any

from tiedparam.cli.arguments import (
    add_command,
    add_file,
    add_import,
    add_json,
    add_output,
    between,
    file_path,
    functions,
    plan_entry,
    program,
    residual_limit,
    rule_choice,
    values_of,
)
from tiedparam.cli.in_and_out import (
    exists_already,
    model_of,
    print_report,
    print_written,
    refuse_to_overwrite,
    size_of,
    wrong_types_are_told,
)
from tiedparam.cli.model_from_file import read_hints
from tiedparam.cli.next_steps import after_scan
from tiedparam.files.export import export_dense
from tiedparam.files.save import save
from tiedparam.formats.checkpoint_files import files_of
from tiedparam.laws.registry import available_rules
from tiedparam.model.plan import Plan
from tiedparam.model.plan_file import read_plan, write_plan
from tiedparam.model.report import report
from tiedparam.model.scan import scan
from tiedparam.model.tie_model import tie_model
from tiedparam.tie.lookup import is_tied
from tiedparam.util.errors import TieError

_PICTURE = Path("tiedparam-demo.png")


def add_all(commands: Any) -> None:
    """Add every command to the shell's."""
    for add in (_add_rules, _add_scan, _add_tie, _add_untie, _add_report, _add_demo):
        add(commands)


# rules -------------------------------------------------------------------------------------


def _add_rules(commands: Any) -> None:
    text = "List the laws. What they mean in detail is in docs/laws/table.md."
    parser = add_command(commands, "rules", _run_rules, text, "", "--import my_rules", "--json")
    add_import(parser)
    add_json(parser)


def _run_rules(arguments: argparse.Namespace) -> None:
    print_report(available_rules(), arguments.json)


# scan --------------------------------------------------------------------------------------


def _add_scan(commands: Any) -> None:
    parser = add_command(
        commands,
        "scan",
        _run_scan,
        "Show how far each tensor of a checkpoint is from each law. A residual far below that of "
        "a random\nweight is a symmetry that training found. Nothing is changed.",
        "model.safetensors",
        "model.pt --rule flip_sym --rule row_repeat:groups=4",
        "model.safetensors --plan plan.toml --json",
        "checkpoint.pt --key model --import my_rules",
    )
    add_file(parser)
    parser.add_argument(
        "--rule",
        action="append",
        metavar="RULE[:OPTION=VALUE,…]",
        help="only this law, or a+b for two that hold together; can be repeated (default: all "
        "laws, with all of their variants)",
    )
    parser.add_argument(
        "--pairs",
        type=between(0, 10**6),
        default=2,
        metavar="N",
        help="how many others each tensor is compared with, to find copies (default: 2)",
    )
    parser.add_argument(
        "--plan",
        type=file_path,
        metavar="PLAN",
        help="write what was found to a plan (.toml or .json)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing plan")
    add_json(parser)


def _run_scan(arguments: argparse.Namespace) -> None:
    plan: Path | None = arguments.plan
    if plan is not None and plan.exists() and not arguments.force:
        raise exists_already(plan)
    rules = None if arguments.rule is None else values_of(arguments, "rule", rule_choice)
    model = model_of(arguments)
    with wrong_types_are_told():
        found = scan(model, rules, pairs=arguments.pairs)
    planned = found.plan()
    if plan is not None and planned.entries:
        write_plan(planned, plan)
    print_report(found, arguments.json, next_steps=after_scan(planned, arguments, program()))
    if plan is not None and not planned.entries:
        raise TieError(
            f"'{plan}'",
            f"nothing was found beyond what chance explains, so '{plan}' was not written.",
            "",
        )


# tie and untie -----------------------------------------------------------------------------


def _add_tie(commands: Any) -> None:
    parser = add_command(
        commands,
        "tie",
        _run_tie,
        "Tie the tensors of a checkpoint by a plan. Writes one safetensors file with the free "
        "values\nand the laws, for tiedparam.load. All or nothing.",
        "model.safetensors --plan plan.toml -o tied.safetensors",
        "model.pt --tie 'layer*.conv2=flip_sym' --dry-run",
        "model.pt --tie 'head=row_repeat:groups=4' --groups 'stem=8' -o tied.safetensors",
    )
    add_file(parser)
    parser.add_argument("--plan", type=file_path, metavar="PLAN", help="a plan (.toml or .json)")
    parser.add_argument(
        "--tie",
        action="append",
        default=[],
        metavar="LAYERS=RULE[:OPTION=VALUE,…]",
        help="an entry of a plan: a glob over layer names, and a law, or a+b for two that hold "
        "together; goes before --plan",
    )
    parser.add_argument(
        "--init",
        choices=("project", "rescale", "exact"),
        default="project",
        help="the nearest lawful weight; the same times the root of the multiplicity; or only "
        "weights that are lawful already (default: project)",
    )
    parser.add_argument(
        "--max-residual",
        type=residual_limit,
        metavar="R",
        help="refuse tensors further from their law than this, as scan measures it (0 to 1)",
    )
    parser.add_argument(
        "--target-size",
        type=lambda size: int(size) if size.isdecimal() else size,
        metavar="SIZE",
        help="a share of the dense checkpoint, such as 25%%, or bytes: choose each cluster's n",
    )
    parser.add_argument(
        "--skip-unfit", action="store_true", help="leave out tensors that cannot carry their law"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be tied")
    add_output(parser)
    add_json(parser)


def _run_tie(arguments: argparse.Namespace) -> None:
    if arguments.plan is None and not arguments.tie:
        arguments.fail("say what to tie: --plan or --tie")
    if arguments.output is None and not arguments.dry_run:
        arguments.fail("say where to write: -o, or --dry-run")
    entries = values_of(arguments, "tie", plan_entry)
    if arguments.plan:
        entries += read_plan(arguments.plan, functions=functions(arguments)).entries
    if not arguments.dry_run:
        refuse_to_overwrite(arguments)
    model = model_of(arguments, read_hints(arguments.plan) if arguments.plan else [])
    with wrong_types_are_told():
        tied = tie_model(
            model,
            Plan(tuple(entries)),
            init=arguments.init,
            max_residual=arguments.max_residual,
            dry_run=arguments.dry_run,
            on_unfit="skip" if arguments.skip_unfit else "error",
            target_size=arguments.target_size,
        )
    if arguments.dry_run:
        print_report(tied, arguments.json)
        return
    before = size_of(files_of(arguments.file))
    save(model, arguments.output)
    print_written(tied, arguments, [arguments.output], before)


def _add_untie(commands: Any) -> None:
    parser = add_command(
        commands,
        "untie",
        _run_untie,
        "Write the dense checkpoint of a tied one. A safetensors file that every plain copy of "
        "the model loads,\nwritten one tensor at a time.",
        "tied.safetensors -o dense.safetensors",
        "tied.safetensors -o dense.safetensors --max-shard-size 5GB",
    )
    add_file(parser)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="several files with an index, such as 5GB each"
    )
    add_output(parser)
    add_json(parser)


def _run_untie(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        arguments.fail("say where to write: -o")
    output: Path = arguments.output
    shards = f"{glob.escape(output.stem)}-*-of-*{glob.escape(output.suffix)}"
    others = output.parent.glob(shards) if arguments.max_shard_size else ()
    refuse_to_overwrite(arguments, *others)
    model = model_of(arguments)
    if not is_tied(model):
        raise TieError(
            f"'{arguments.file}'", f"'{arguments.file}' holds no ties.", "It is dense already."
        )
    untied = report(model)
    before = size_of(files_of(arguments.file))
    files = export_dense(model, arguments.output, max_shard_size=arguments.max_shard_size)
    print_written(untied, arguments, files, before)


# report, demo ------------------------------------------------------------------------------


def _add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        _run_report,
        "Show what the ties of a checkpoint store and save. A row for each tied tensor, and "
        "totals.",
        "tied.safetensors",
        "tied.safetensors --markdown",
    )
    add_file(parser)
    parser.add_argument("--markdown", action="store_true", help="a table for Markdown pages")
    add_json(parser)


def _run_report(arguments: argparse.Namespace) -> None:
    shown = report(model_of(arguments))
    if arguments.markdown and not arguments.json:
        print(shown.to_markdown())
    else:
        print_report(shown, arguments.json)


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
        "--out",
        type=file_path,
        default=_PICTURE,
        metavar="PNG",
        help="the picture; only under this name is an older one replaced without --force",
    )
    demo.add_argument("--force", action="store_true", help="replace an existing picture")
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
        raise exists_already(out)
    demo(out, seed=arguments.seed, epochs=arguments.epochs)
