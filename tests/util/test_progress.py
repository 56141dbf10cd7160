"""Bars for what takes long."""

from __future__ import annotations

import sys

from tiedparam.util.progress import progress


def test_without_a_console_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    for shown in (None, True):
        with progress(2, "working", shown) as advance:
            advance(2)
    assert capsys.readouterr().out == ""
