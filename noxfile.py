"""What is checked, one command each: ``nox --list`` names them, ``nox -s lint types`` runs two.

Each session makes an environment of its own. `.ci/run` runs some of them in the environment that it
has, by ``nox --no-venv --no-install``. Those with the tag "ci" are the jobs of
`.github/workflows/tests.yml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types"]
nox.options.error_on_missing_interpreters = True

CONSTRAINTS = ("-c", "tests/constraints.txt")
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
GITHUB = Path(".github")

PAIRS = [
    ("3.10", "2.6.0"),
    ("3.11", "2.7.1"),
    ("3.12", "2.8.0"),
    ("3.12", "2.10.0"),
    ("3.11", "2.13.0"),
    ("3.13", "2.15.0"),
]
"""Python and torch: the oldest, the newest, and each Python at least once."""

PINNED = "2.13.0"
"""The torch of tests/constraints.txt, which also pins everything else."""

OLDEST_WITH_PEERS = (2, 11)
"""The present torchao asks for it; beside torch before 2.10 others do not even import."""


@nox.session(tags=["ci"])
@nox.parametrize("python,torch", PAIRS, ids=map("-".join, PAIRS))
def tests(session: nox.Session, torch: str) -> None:
    """All tests, noted in docs/tested if nothing fails. Arguments go to pytest: a part of them."""
    pins = CONSTRAINTS if torch == PINNED else ()
    peers = tuple(map(int, torch.split(".")[:2])) >= OLDEST_WITH_PEERS
    extras = "test,ecosystem" if peers else "test"
    session.install(*pins, f"torch=={torch}", "-e", f".[{extras}]")
    record = ("-p", "tests.support.record", "--record", "docs/tested")
    session.run("pytest", "-n", "2", *(session.posargs or record))


@nox.session(tags=["ci"])
def lint(session: nox.Session) -> None:
    """Style, rooms, spelling, and files for a code host. ``-- --fix`` mends what tools can mend."""
    session.install(*CONSTRAINTS, *EXTRAS["lint"])  # no torch: none of these imports the library
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    session.run("lint-imports", "--no-cache")
    session.run("codespell", *(["--write-changes"] if fix else []))
    for schema, files in files_with_a_schema():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    session.run("pre-commit", "validate-config", ".pre-commit-config.yaml")
    session.run("zizmor", "--offline", "--no-progress", "--quiet", str(GITHUB))


def files_with_a_schema() -> Iterator[tuple[str, list[str]]]:
    """Each schema, and the files that must follow it."""
    forms = GITHUB / "ISSUE_TEMPLATE"
    yield "github-workflows", paths(GITHUB.glob("workflows/*.yml"))
    yield "github-issue-forms", paths(set(forms.glob("*.yml")) - {forms / "config.yml"})
    yield "github-issue-config", [str(forms / "config.yml")]
    yield "dependabot", [str(GITHUB / "dependabot.yml")]
    yield "citation-file-format", ["CITATION.cff"]


def paths(files: Iterable[Path]) -> list[str]:
    """As arguments of a command, in an order that does not change."""
    return sorted(map(str, files))


@nox.session(tags=["ci"])
def types(session: nox.Session) -> None:
    """The library's own types, by mypy in strict mode; mypy and pyright on what users write."""
    testing = ("pytest", "pytest-timeout", "hypothesis")  # not all that the other tests need
    session.install(*CONSTRAINTS, "-e", ".[lint,demo]", *testing)
    session.run("mypy")
    required = {"TIEDPARAM_TYPE_CHECKERS": "required"}
    session.run("python", "-m", "pytest", "-q", "tests/house/test_type_checkers.py", env=required)


@nox.session(tags=["ci"])
def docs(session: nox.Session) -> None:
    """The pages: their code, outputs, tables, pictures, links and examples."""
    session.install(*CONSTRAINTS, "-e", ".[test,ecosystem,examples]")
    pages = ("docs", "start", "shell_page", "notebooks", "deployment", "scan_pictures")
    pages += ("examples", "examples_of_recipes", "joining", "typed_surface")
    files = [f"tests/house/test_{page}.py" for page in pages]
    session.run("pytest", *files, "tests/ecosystem/test_minilm.py")


@nox.session(tags=["ci"])
def site(session: nox.Session) -> None:
    """The manual as a site, strictly, with its notebooks run. ``-- FOLDER``: not into site/."""
    testing = ("pytest", "pytest-timeout", "hypothesis")
    session.install(*CONSTRAINTS, "-e", ".[site]", *testing)
    (folder,) = session.posargs or ("site",)
    # a note of the theme's makers, to those who choose what comes next
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "--site-dir", folder, env=quiet)
    # links, anchors and hosts of what was built
    found = {"TIEDPARAM_SITE": folder}
    session.run("python", "-m", "pytest", "-q", "tests/house/test_site.py", env=found)


@nox.session(tags=["ci"])
def benchmarks(session: nox.Session) -> None:
    """Every benchmark on small shapes: that it works and agrees with the dense layer."""
    session.install(*CONSTRAINTS, "-e", ".[bench]")
    results = session.create_tmp()
    session.run("python", "-m", "benchmarks", "--quick", "--out", results)
