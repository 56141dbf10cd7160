"""The demo, run as a user runs it, with shorter training."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiedparam as tp
from tiedparam.__main__ import main
from tiedparam.cli import demo as _demo
from tiedparam.cli import demo_picture
from tiedparam.util import progress as _progress

LAWS = ("flip_sym", "joint", "channel_shared", "row_repeat", "copy", "squared_copy")
TITLES = tuple("two laws at once" if law == "joint" else law for law in LAWS)
ROWS = ("(dense)", *TITLES, "four at once")
SHORT = ("demo", "--epochs", "4")


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tiedparam", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=200
    )


def table_row(stdout: str, title: str) -> list[float]:
    """The numbers of one row of the table, which comes before every other use of the title."""
    (line, *_) = [line for line in stdout.splitlines() if line.startswith(title + " ")]
    cells = line.removeprefix(title).split()
    return [float(cell.replace(",", "")) for cell in cells if not cell[0].isalpha()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return shell(*SHORT, folder=folder), folder


@pytest.fixture
def tied_models():
    """For each tie the model with it, untrained."""
    torch.manual_seed(0)
    models = []
    for tie in _demo.TIES:
        model = _demo.build_model()
        tie.apply(model)
        models.append((tie, model))
    return models


def test_the_demo_shows_each_law():
    assert tuple(tie.title for tie in _demo.TIES) == TITLES
    assert set(LAWS) <= tp.available_rules().keys()


def test_stdout_has_the_table_and_a_log_no_bars(run):
    done, _ = run
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\r" not in done.stdout
    assert done.stderr == ""  # it is no terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_a_terminal_shows_a_bar_for_every_training(tmp_path, monkeypatch):
    monkeypatch.setattr(_progress, "PATIENCE", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path / "p.png")]) == 0
    bars = re.findall(r"(\S[^\r\n]*) \[#+\] 100%", terminal.getvalue())
    assert list(dict.fromkeys(bars)) == ["training", *ROWS]


def test_the_numbers_of_the_table(run, tied_models):
    done, _ = run
    dense_parameters, dense_file, dense_optimizer, before, tuned = table_row(done.stdout, "(dense)")
    assert dense_parameters == 11_770
    assert tuned > 60  # guessing gives 10
    for tie, model in tied_models:
        residual, parameters, file, optimizer, same, _, tuned = table_row(done.stdout, tie.title)
        assert residual > 0.1  # a trained weight, not a lawful one
        assert parameters == sum(p.numel() for p in model.parameters()) < dense_parameters
        assert file < dense_file - 4 * 0.8 * (dense_parameters - parameters)
        # Adam: two values of four bytes per parameter, and a step per tensor
        steps = 4 * len(list(model.parameters()))
        assert optimizer == 8 * parameters + steps < dense_optimizer
        assert same == before
        assert tuned > 60, tie.title
    parameters, *_ = table_row(done.stdout, "four at once")
    assert parameters == 3_074


def test_every_law_was_checked(run):
    done, _ = run
    # one symmetry for each tensor, and four laws together; flip_sym with the seven of d4
    assert "every law holds bit for bit (19 comparisons by torch.equal)" in done.stdout


def test_it_ends_with_six_lines_that_run(run):
    done, _ = run
    lines = done.stdout.rstrip().splitlines()
    assert lines[-7] == ""
    for line, law in zip(lines[-6:], LAWS, strict=True):
        model = _demo.build_model()
        exec(line, {"tp": tp, "model": model})
        ((_, rule),) = [
            (path, tp.get_tie(layer)) for path, layer in model.named_children() if tp.is_tied(layer)
        ]
        assert rule.name == law


def test_the_picture_has_content(run):
    image = pytest.importorskip("matplotlib.image")
    _, folder = run
    (file,) = folder.iterdir()  # and nothing else was written
    assert file.name == "tiedparam-demo.png"
    pixels = torch.from_numpy(image.imread(file))
    height, width, _ = pixels.shape
    assert height > 500
    assert width > 1000
    colours = pixels.reshape(-1, pixels.shape[-1])[:, :3].unique(dim=0)
    reds = colours[(colours[:, 0] - colours[:, 2]) > 0.3]
    blues = colours[(colours[:, 2] - colours[:, 0]) > 0.3]
    assert len(reds) > 50
    assert len(blues) > 50


def test_equal_labels_are_equal_values_in_the_picture(tied_models):
    for tie, model in tied_models:
        if "source" in tie.options:
            panel = demo_picture.corner_of(model.get_submodule(tie.layer), 6)
            assert panel.values.shape == (7, 15)  # 2 × 4 kernels of 3 × 3, with gaps
            assert not panel.stored.any()
            continue
        panel = demo_picture.corner_of(model.get_submodule(tie.layer), demo_picture.CELLS)
        assert (~panel.values.isnan()).sum() == demo_picture.CELLS**2
        by_label: dict[int, set[float]] = {}
        for label, value in zip(panel.labels.flatten(), panel.values.flatten(), strict=True):
            if label:
                by_label.setdefault(int(label), set()).add(float(value))
        assert all(len(values) == 1 for values in by_label.values())
        assert 1 < len(by_label) < panel.values.numel()
        assert sorted(panel.labels[panel.stored].tolist()) == sorted(by_label)  # one frame each
        assert len(demo_picture.busiest([panel])) == 3


@pytest.mark.slow
def test_deterministic_and_nothing_global_is_left_changed(run, tmp_path, monkeypatch, capsys):
    done, _ = run
    monkeypatch.chdir(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(SHORT) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out == done.stdout
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("images", [[], ["wrong"]])
def test_a_broken_law_would_be_reported(images, tied_models, monkeypatch):
    tie, model = tied_models[0]
    assert _demo.check_law(model, tie) == 1
    rule = type(tp.get_tie(model.get_submodule(tie.layer)))
    monkeypatch.setattr(rule, "symmetries", lambda self, weight: [weight + 1 for _ in images])
    with pytest.raises(tp.TieError, match=r"conv1\.weight.*W\[j, i, flip\(x\)\]"):
        _demo.check_law(model, tie)


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_one_line(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"python -m tiedparam demo: the demo needs '{package}', which is not installed. "
        "Run pip install 'tiedparam[demo]'.\n"
    )


@pytest.mark.slow
def test_from_the_shell_an_error_is_one_line_and_code_1(tmp_path):
    done = shell("demo", "--out", "nowhere/picture.png", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("python -m tiedparam demo: cannot write 'nowhere")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "reason"), [("picture.svg", r"ends in \.png"), ("folder.png", "it is a folder")]
)
def test_what_cannot_be_written_is_refused_before_training(
    out, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(_demo, "train", None)
    (tmp_path / "folder.png").mkdir()
    assert main(["demo", "--out", str(tmp_path / out)]) == 1
    assert re.search(reason, capsys.readouterr().err)


def test_no_command_prints_help_and_exits_2(tmp_path):
    done = shell(folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: python -m tiedparam" in done.stderr
    assert "\n  tiedparam demo\n" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["demo", "--epochs", "0"], ["demo", "--seed", "-1"], ["demo", "--epochs", "ten"]],
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--help"], "commands:"), (["demo", "--help"], "example:"), (["--version"], tp.__version__)],
)
def test_help_and_version_exit_0(arguments, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert text in capsys.readouterr().out
