"""Write the tables of rules, optimizers and versions into the documents.

``python docs/make_tables.py`` does it.

Every row comes from a registry, so a new rule has its row without an edit here. A rule whose
options change its law has one row for each law among its examples. The formulas of `FORMULAS`
are the only thing written by hand; `tests/house/test_docs.py` checks them against the rules.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import tiedparam as tp
from tiedparam.laws.rule_table import by_family
from tiedparam.state.optimizer_laws import OptimizerLaw, known_optimizers

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/laws/table.md"
FAMILY_PAGE = "README.md"
COMMAND = "python docs/make_tables.py"
OPTIMIZER_PAGE = "docs/recipes/optimizers.md"
VERSION_PAGES = ("README.md", "docs/maintainers/versions.md")
RECORDS = ROOT / "docs" / "tested"
"""What the session `tests` of noxfile.py writes: a file for each pair of Python and torch."""


@dataclass(frozen=True)
class Row:
    """One law: a rule, and the options of one of its examples.

    Attributes:
        name: the registered name.
        rule: the rule, bound to the example's tensor.
        varies: whether the rule has more laws than this one.
    """

    name: str
    rule: tp.Rule
    varies: bool

    @property
    def key(self) -> str:
        """``flip_sym``, or ``channel_shared(over='in')`` where the options choose the law."""
        return str(self.rule) if self.varies else self.name

    @property
    def options(self) -> str:
        """All options with their defaults; where they choose the law, with the chosen values."""
        chosen = self.rule.options() if self.varies else {}
        parameters = list(inspect.signature(type(self.rule).__init__).parameters.values())[1:]
        return ", ".join(_option(parameter, chosen) for parameter in parameters) or "–"


# Free values by law. O outputs, C inputs, g groups of the convolution, P kernel positions;
# the functions take a bound rule and give the same number.
FORMULAS: dict[str, tuple[str, Callable[[Any], int]]] = {
    "flip_sym": (
        "`g·(c²P ± f)/2`, `c = C/g`, `f = c` if all kernel sizes are odd, else 0",
        lambda r: (
            _groups(r) * (_inputs(r) ** 2 * _positions(r) + r.sign * _odd(r) * _inputs(r)) // 2
        ),
    ),
    "symmetric": ("`n(n + 1)/2`", lambda r: _inputs(r) * (_inputs(r) + 1) // 2),
    "skew": ("`n(n − 1)/2`", lambda r: _inputs(r) * (_inputs(r) - 1) // 2),
    "row_repeat": (
        "`groups` × the values of one row",
        lambda r: r.groups * prod(_canonical(r)[1:]),
    ),
    "channel_shared(over='in')": ("`O·P`", lambda r: _canonical(r)[0] * _positions(r)),
    "channel_shared(over='out')": ("`(C/g)·P`", lambda r: _inputs(r) * _positions(r)),
    "channel_shared(over='all')": ("`P`", lambda r: _positions(r)),
    "channel_shared(over='groups')": (
        "`(O/g)·(C/g)·P`",
        lambda r: _canonical(r)[0] // _groups(r) * _inputs(r) * _positions(r),
    ),
    "repeat": (
        "all entries / (`outputs·inputs`)",
        lambda r: prod(_canonical(r)) // (r.outputs * r.inputs),
    ),
    "group_conv": (
        "a fourth of the entries, with `p4m` an eighth",
        lambda r: prod(_canonical(r)) // (8 if r.group == "p4m" else 4),
    ),
    "reverse_complement": (
        "`(N + f)/2`, `N` entries, `f` of them their own partners",
        lambda r: (prod(_canonical(r)) + _own_partners(r)) // 2,
    ),
    "centrosymmetric": ("`⌈O·C/2⌉`", lambda r: (prod(_canonical(r)) + 1) // 2),
    "persymmetric": ("`n(n + 1)/2`", lambda r: _inputs(r) * (_inputs(r) + 1) // 2),
    "set_equivariant": (
        "`2/items²` of the entries",
        lambda r: 2 * prod(_canonical(r)) // r.items**2,
    ),
    "hypercomplex": (
        "half of the entries, of quaternions a fourth",
        lambda r: prod(_canonical(r)) // (2 if r.algebra == "complex" else 4),
    ),
    "kernel_symmetry": (
        "`O·(C/g)` × those of one kernel `a×b`: `a·⌈b/2⌉`, `⌈a/2⌉·b`, `⌈a/2⌉·⌈b/2⌉`, `⌈P/2⌉`, "
        "`⌈a²/4⌉`, `m(m+1)/2` with `m = ⌈a/2⌉`",
        lambda r: prod(_canonical(r)[:2]) * _of_kernel(r),
    ),
    "head_share": (
        "all entries · `groups/heads`",
        lambda r: prod(_canonical(r)) * r.groups // r.heads,
    ),
    "block_circulant": ("`O·C/block`", lambda r: prod(_canonical(r)) // r.block),
    "circulant": ("`n`", lambda r: _canonical(r)[0]),
    "toeplitz": ("`O + C − 1`", lambda r: sum(_canonical(r)) - 1),
    "hankel": ("`O + C − 1`", lambda r: sum(_canonical(r)) - 1),
    "masked": ("the entries that are True", lambda r: int(r.free_entries.sum())),
    "fixed": ("the entries that are False", lambda r: int((~r.fixed_entries).sum())),
    "index": ("the largest number + 1", lambda r: int(r.index.max()) + 1),
    "cluster": (
        "`n`, or `O·n`",
        lambda r: r.n * (_canonical(r)[0] if r.per == "output" else 1),
    ),
    "hashed": ("`n`", lambda r: r.n),
    "orbit": (
        "the orbits that do not meet their negatives",
        lambda r: len(r.orbit_labels().abs().unique()) - int((r.orbit_labels() == 0).any()),
    ),
    "within": (
        "those of the law in the block, and all entries outside of it",
        lambda r: r.inner.free_count + prod(_canonical(r)) - prod(r.inner.bound_layout.shape),
    ),
    "copy": ("0", lambda r: 0),
    "squared_copy": ("0", lambda r: 0),
    "transposed_copy": ("0", lambda r: 0),
    "scaled_copy": ("1, or the outputs or inputs", lambda r: prod(r.free_shapes()[0])),
    "shared_delta": (
        "`rank·(O + I·P)`, `I` inputs of a group, `P` positions",
        lambda r: r.rank * (_canonical(r)[0] + prod(_canonical(r)[1:])),
    ),
    "bank": (
        "`templates`; the first layer of a bank has the templates as well",
        lambda r: r.templates,
    ),
}


FAMILY_PAGES = {
    "repetition": ("laws/repetition.md", "rows, filters or heads that are equal"),
    "symmetries": ("laws/symmetries.md", "a weight or its kernels that equal their own images"),
    "equivariance": ("laws/equivariance.md", "layers that commute with a group"),
    "matrices": (
        "laws/matrices.md",
        "matrices with constant diagonals, or equal to their transpose up to sign",
    ),
    "zeros and fixed values": ("laws/zeros-and-patterns.md", "entries that are given"),
    "patterns of your own": ("laws/zeros-and-patterns.md", "any equalities, by numbers or moves"),
    "from trained weights": ("laws/clusters.md", "few values, which the weight's clusters share"),
    "shared by chance": (
        "laws/zeros-and-patterns.md",
        "few values, dealt to the entries by a hash",
    ),
    "laws together": ("laws/together.md", "several laws at once, or on a part of a tensor"),
    "copies": (
        "laws/copies.md",
        "another layer's weight, or a function of it; sums of templates for several layers",
    ),
}
"""The page of each family, and what its laws say."""


def shipped_rules() -> dict[str, type[tp.Rule]]:
    """The library's own rules; a process may know more that a user has registered."""
    known = tp.available_rules()
    return {n: rule for n, rule in known.items() if rule.__module__.startswith("tiedparam.rules.")}


def bound_examples(rule: type[tp.Rule]) -> Iterator[tp.Rule]:
    """The rule, tied to each of its examples."""
    for example in rule.examples():
        model = example.build()
        layer = model.get_submodule(example.path)
        tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options)
        yield tp.get_tie(layer, example.tensor_name)


def rows() -> list[Row]:
    """One row for each law, in the order of families, names and examples."""
    result = []
    for rule in by_family(shipped_rules().values()):
        name = rule.name
        laws: dict[str, tp.Rule] = {}
        for bound in bound_examples(rule):
            laws.setdefault(bound.law, bound)
        result += [Row(name, bound, len(laws) > 1) for bound in laws.values()]
    return result


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| family | rule | law | options | free values | for example |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows():
        shape = row.rule.bound_layout.shape
        found = FORMULAS.get(row.key) or FORMULAS.get(row.name)
        formula = found[0] if found else "see its docstring"
        lines.append(
            f"| {row.rule.family} | `{row.name}` | `{row.rule.law}` | {row.options} | {formula} "
            f"| {row.rule.free_count} of {prod(shape)}, weight `{shape}` |"
        )
    return "\n".join(lines)


def family_table() -> str:
    """One line for each family, in Markdown: what it ties, its rules, and the page about it."""
    lines = ["| laws | what they say | rules |", "|---|---|---|"]
    for family, rules in groupby(by_family(shipped_rules().values()), lambda rule: rule.family):
        page, what = FAMILY_PAGES[family]
        names = ", ".join(f"`{rule.name}`" for rule in rules)
        lines.append(f"| [{family}](docs/{page}) | {what} | {names} |")
    return "\n".join(lines)


def optimizer_table() -> str:
    """Torch's own optimizers in Markdown: how their state and their decay follow a tie."""
    lines = [
        "| `torch.optim.` | its state, by kind | decay that moves along | steps of a tied weight |",
        "|---|---|---|---|",
    ]
    laws = known_optimizers().items()  # a process may know more that a user has registered
    for kind, law in sorted(laws, key=lambda item: item[0].__name__.lower()):
        if kind.__module__.startswith("torch.optim"):
            lines.append(f"| `{kind.__name__}` | {' | '.join(_optimizer_cells(law))} |")
    return "\n".join(lines)


def _optimizer_cells(law: OptimizerLaw) -> tuple[str, str, str]:
    if law.refused:
        when = "refused" if law.even_fresh else "refused after a step"
        return f"{when}: {law.refused}", "–", "–"
    entries: dict[str, list[str]] = {}
    for name, kind in law.state.items():
        entries.setdefault(kind, []).append(f"`{name}`")
    state = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in entries.items())
    decay = ", ".join(f"`{name}`" for name in law.coupled_decay) or "–"
    unless = f", unless `{law.decoupled_if}`" if law.decoupled_if else ""
    return state, decay + unless, "as dense" if law.normalized else "`m` times as long"


def with_table(page: str) -> str:
    """The text of a page with its table of rules brought up to date.

    Raises:
        ValueError: if the page has no place for it.
    """
    return filled(page, "rules", table())


def with_family_table(page: str) -> str:
    """The text of a page with its table of families brought up to date.

    Raises:
        ValueError: if the page has no place for it.
    """
    return filled(page, "families", family_table())


def with_optimizer_table(page: str) -> str:
    """The text of a page with its table of optimizers brought up to date.

    Raises:
        ValueError: if the page has no place for it.
    """
    return filled(page, "optimizers", optimizer_table())


def records() -> list[dict[str, Any]]:
    """The runs of all tests, from the oldest torch to the newest."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")]
    return sorted(found, key=lambda run: _numbers(run["torch"]) + _numbers(run["python"]))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def version_table() -> str:
    """The runs in Markdown: which pairs were tested, and what came of it."""
    lines = [
        "| torch | Python | passed | skipped | libraries beside it | date | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in records():
        figures = f"{run['passed']:,} | {run['skipped']:,} | {len(run['peers']) or 'none'}"
        lines.append(
            f"| {run['torch']} | {run['python']} | {figures} | {run['date']} | `{run['commit']}` |"
        )
    return "\n".join(lines)


def version_line() -> str:
    """The runs in one sentence."""
    runs = records()
    pairs = [f"{run['torch'].partition('+')[0]} (on {_two(run['python'])})" for run in runs]
    passed = [run["passed"] for run in runs]
    return (
        f"All tests were run with torch {', '.join(pairs[:-1])} and {pairs[-1]}: "
        f"{min(passed):,} to {max(passed):,} passed, none failed."
    )


def _two(version: str) -> str:
    return ".".join(version.split(".")[:2])


def with_version_table(page: str) -> str:
    """The text of a page with its table of versions, or its sentence, brought up to date.

    Raises:
        ValueError: if the page has no place for it.
    """
    if "table of versions in short" in page:
        return filled(page, "versions in short", version_line())
    return filled(page, "versions", version_table())


def filled(page: str, what: str, content: str) -> str:
    """The text of a page with other content in its place for a table.

    Raises:
        ValueError: if the page has no such place, or several.
    """
    begin, end = (f"<!-- table of {what}: {edge} -->" for edge in ("begin", "end"))
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have one place between {begin!r} and {end!r}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", page)


def _option(parameter: inspect.Parameter, chosen: dict[str, Any]) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"`{parameter.name}=`"
    value = chosen.get(parameter.name, parameter.default)
    return f"`{parameter.name}={getattr(value, '__name__', repr(value))}`"


def _canonical(rule: tp.Rule) -> tuple[int, ...]:
    return rule.bound_layout.canonical_shape


def _groups(rule: tp.Rule) -> int:
    return rule.bound_layout.groups


def _inputs(rule: tp.Rule) -> int:
    return _canonical(rule)[1]


def _positions(rule: tp.Rule) -> int:
    return prod(rule.bound_layout.kernel)


def _odd(rule: tp.Rule) -> int:
    return _positions(rule) % 2


def _of_kernel(rule: Any) -> int:
    """The free values of one kernel under `kernel_symmetry`."""
    up = rule.sign == 1
    *_, b = rule.bound_layout.kernel
    a = _positions(rule) // b
    half_a, half_b, half = ((n + up) // 2 for n in (a, b, a * b))
    of_group = {"h": a * half_b, "v": half_a * b, "hv": half_a * half_b, "point": half}
    of_group["c4"] = (a * a + 3 * up * (a % 2)) // 4
    of_group["d4"] = half_a * (half_a + (1 if up else -1)) // 2
    return of_group[rule.group]


def _own_partners(rule: Any) -> int:
    """How many entries `reverse_complement` pairs with themselves."""
    if len(_canonical(rule)) == 1:
        sides = [list(range(_canonical(rule)[0]))[::-1]]
    elif rule.pairs is None:
        inputs = _inputs(rule) * _groups(rule)
        sides = [list(range(size))[::-1] for size in (inputs, _canonical(rule)[0])]
    else:
        sides = rule.pairs
    own = prod(sum(c == p for c, p in enumerate(side)) for side in sides)
    return own if len(_canonical(rule)) == 1 else own * _odd(rule)


def main() -> None:
    """Rewrite the tables in place."""
    page = ROOT / PAGE
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the table of rules in {PAGE}")
    page = ROOT / FAMILY_PAGE
    page.write_text(with_family_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the table of families in {FAMILY_PAGE}")
    page = ROOT / OPTIMIZER_PAGE
    page.write_text(with_optimizer_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the table of optimizers in {OPTIMIZER_PAGE}")
    for name in VERSION_PAGES:
        page = ROOT / name
        page.write_text(with_version_table(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the table of versions in {name}")


if __name__ == "__main__":
    main()
