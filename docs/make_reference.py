"""Write the pages of docs/reference: ``python docs/make_reference.py``.

Here stands on which page each public name is; mkdocstrings fills the pages from the docstrings when
the site is built. A law has its section by being registered, and a command of the shell by being
one. `tests/house/test_site.py` says that the pages are what this writes, and that no name is
missing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from make_tables import FAMILY_PAGES, shipped_rules

from tiedparam.cli.main import parser
from tiedparam.laws.rule_table import by_family

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
COMMAND = "python docs/make_reference.py"


@dataclass(frozen=True)
class Topic:
    """A page of the reference.

    Attributes:
        file: its name.
        title: its heading, and what the table of contents calls it.
        text: what stands above the names.
        names: what it explains, in this order; names of a room begin with the room's.
        options: how mkdocstrings shows these names, where it differs.
    """

    file: str
    title: str
    text: str
    names: tuple[str, ...]
    options: tuple[str, ...] = ()


TOPICS = (
    Topic(
        "ties.md",
        "Ties",
        "Tie a tensor, look at it, set its values, and take the tie away.",
        (
            *("register_tie", "remove_tie", "residual", "is_tied", "get_tie", "free_values"),
            *("owner", "Owner", "assign_", "init_", "frozen", "tie_bank", "recluster"),
            *("available_rules", "TieError", "TieWarning"),
        ),
    ),
    Topic(
        "models.md",
        "Whole models",
        "Find what is worth tying in a model, tie it by a plan, and measure it.",
        (
            *("scan", "tie_model", "untie_model", "tie_block", "share_heads", "export_gqa"),
            *("tune", "Plan", "PlanEntry", "read_plan", "write_plan"),
        ),
    ),
    Topic(
        "state.md",
        "State, optimizers and files",
        "What becomes of state dicts, optimizers and files when a model is tied.",
        (
            *("save", "load", "export_dense", "dense_state_dict", "tie_state_dict"),
            *("untie_state_dict", "register_optimizer"),
        ),
    ),
    Topic(
        "reports.md",
        "Reports and pictures",
        "Tables, which print and show themselves in notebooks, and pictures, with matplotlib.",
        (
            *("report", "Report", "TieReport", "ScanReport", "TuneReport"),
            *("draw_orbits", "draw_weights", "draw_residuals", "draw_scan"),
        ),
        ("inherited_members: true",),
    ),
    Topic(
        "writing-laws.md",
        "Writing laws",
        "What a law of your own derives from, and what it may state. "
        "[A law of your own](../laws/your-own.md) shows how.",
        (
            *("register_rule", "Rule", "Layout", "Example", "laws.Reason", "laws.Orbits"),
            *("laws.Broadcast", "laws.Blocks", "laws.Compute", "laws.Coded", "laws.Linked"),
            *("laws.form", "laws.Call", "laws.Use", "laws.Reduction", "laws.Making"),
        ),
    ),
    Topic(
        "testing.md",
        "Testing laws",
        "The contract of a law, for the library's and for yours.",
        (
            *("testing.check_rule", "testing.RuleReport", "testing.Case", "testing.Statement"),
            "testing.STATEMENTS",
        ),
    ),
)
RULES, SHELL, INDEX = "rules.md", "shell.md", "index.md"


# The pages ------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Every page by its name."""
    made = {topic.file: "\n".join(topic_page(topic)) + "\n" for topic in TOPICS}
    made |= {RULES: "\n".join(rules_page()) + "\n", SHELL: "\n".join(shell_page()) + "\n"}
    return made | {INDEX: "\n".join(index_page()) + "\n"}


def directive(name: str, *options: str) -> Iterator[str]:
    """What mkdocstrings replaces by the documentation of a name."""
    yield f"::: tiedparam.{name}"
    if options:
        yield "    options:"
        yield from (f"      {option}" for option in options)
    yield ""


def topic_page(topic: Topic) -> Iterator[str]:
    """A page of names."""
    yield from (f"# {topic.title}", "", topic.text, "")
    for name in topic.names:
        yield from directive(name, *topic.options)


def rules_page() -> Iterator[str]:
    """The laws of the library, family by family."""
    yield from ("# All laws", "", _RULES_TEXT, "")
    for family, rules in groupby(by_family(shipped_rules().values()), key=lambda r: r.family):
        page, what = FAMILY_PAGES[family]
        heading = family[0].upper() + family[1:]
        text = f"{what[0].upper()}{what[1:]}: [examples and pictures](../{page})."
        yield from (f"## {heading}", "", text, "")
        for rule in rules:
            own = (f"heading: {rule.name}", f"toc_label: {rule.name}", "heading_level: 3")
            yield from directive(f"rules.{rule.__name__}", *own, "members: false")


_RULES_TEXT = """\
Every law that `register_tie` knows by name. What stands in the brackets of a law are its options:
you give them to `register_tie`, as in `tp.register_tie(layer, "flip_sym", sign=-1)`; the class
itself is in `tiedparam.rules`. `compute` is how the layer computes, and can be left alone.
[The table of all laws](../laws/table.md) has them on one screen."""


def index_page() -> Iterator[str]:
    """The table of contents: all names with the first sentence of each."""
    yield from ("# Reference", "", _INDEX_TEXT, "")
    for topic in TOPICS:
        yield from (f"## {topic.title}", "", topic.text, "")
        yield from ("| name | what it is |", "|---|---|")
        for name in topic.names:
            place = f"{topic.file}#tiedparam.{name}"
            yield f"| [`{name}`]({place}) | {in_a_cell(summary(name))} |"
        yield ""
    text = f"By the names that `register_tie` takes: [all of them]({RULES})."
    yield from ("## All laws", "", text, "")
    yield from ("| family | laws |", "|---|---|")
    for family, rules in groupby(by_family(shipped_rules().values()), key=lambda r: r.family):
        names = (f"[`{r.name}`]({RULES}#tiedparam.rules.{r.__name__})" for r in rules)
        yield f"| {family} | {', '.join(names)} |"
    text = f"Commands on checkpoint files, and [what they take]({SHELL})."
    yield from ("", "## The shell", "", text, "")
    yield from ("| command | what it does |", "|---|---|")
    for name, command in commands().items():
        line = re.split(r"(?<=\.)\s", command.description)[0]
        yield f"| [`tiedparam {name}`]({SHELL}#tiedparam-{name}) | {in_a_cell(line)} |"


_INDEX_TEXT = """\
Every public name: how it is called, what it takes, what it raises, and an example. The examples
begin after `import torch`, `from torch import nn` and `import tiedparam as tp`; the tests run them.
Names that begin with `laws.` or `testing.` are in the modules `tiedparam.laws` and
`tiedparam.testing`, and `tiedparam.__version__` is the version.

`help` shows the same: `help(tp.register_tie)`. Of a rule, `help(tp.available_rules()["flip_sym"])`
shows the law, the options and the rule's methods, of yours too, and leaves out what every layer
has.

Errors are a `TieError`, which names the place, the fact and the next step: as one text, and as
`error.where`, `error.fact` and `error.remedy`. Arguments of a wrong type, and options that a rule
does not have, are a `TypeError`. Nothing has changed when either is raised."""


def summary(name: str) -> str:
    """The first paragraph of a docstring, in one line."""
    room, _, own = name.rpartition(".")
    module = importlib.import_module(f"tiedparam.{room}" if room else "tiedparam")
    value = getattr(module, own)
    if name in WITHOUT_DOCSTRING:
        return WITHOUT_DOCSTRING[name]
    first = inspect.cleandoc(value.__doc__).partition("\n\n")[0].replace("\n", " ")
    return first.replace("``", "`")


WITHOUT_DOCSTRING = {
    "laws.Compute": 'The forms of a `Broadcast`, and `"auto"` for the fastest.',
    "testing.STATEMENTS": "All statements by their names, in the order in which they are judged.",
}
"""Data, which Python gives no docstring of its own."""


def in_a_cell(text: str) -> str:
    """A text as a cell of a table."""
    return text.replace("|", "\\|")


# The shell ------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of the shell by their names."""
    (found,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def shell_page() -> Iterator[str]:
    """What ``tiedparam <command> --help`` says."""
    yield from ("# The shell", "", _SHELL_TEXT, "")
    for name, command in commands().items():
        text = re.sub(
            r"\bdocs/(laws/table\.md)", r"[the table of laws](../\1)", command.description
        )
        yield from (f"## tiedparam {name}", "", text, "")
        actions = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
        yield from ("| argument | what it is |", "|---|---|")
        yield from (f"| {written(action)} | {in_a_cell(meaning(action))} |" for action in actions)
        yield ""
        shown = re.findall(r"^  (tiedparam.*\S)", command.epilog or "", re.MULTILINE)
        if shown:
            yield from ("```sh", *shown, "```", "")


_SHELL_TEXT = """\
`tiedparam <command>`, or `python -m tiedparam <command>`; `--help` shows what stands here. Results
go to stdout, as text or with `--json` as JSON; progress, warnings and errors go to stderr. Exit
codes: 0 fine, 1 it could not be done (stderr says why), 2 wrong usage."""


def written(action: argparse.Action) -> str:
    """An argument as one writes it: ``-o, --output OUT``."""
    value = str(action.metavar or action.dest.upper())
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == 0:
        value = ""
    names = ", ".join(action.option_strings)
    return f"`{in_a_cell(' '.join(filter(None, (names, value))))}`"


def meaning(action: argparse.Action) -> str:
    """What the help of an argument says."""
    return (action.help or "") % {**vars(action), "prog": "tiedparam"}


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {(FOLDER / name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
