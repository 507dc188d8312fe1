"""Progress of an export on a terminal."""

import io
import sys

import pytest

from owl2.export.job.progress import Terminal


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_names_change_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither their control characters nor the markup of the library that draws the bars."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with Terminal() as terminal:
        terminal.stage("layers [bold]", 2)
        terminal.note("[red]no\x1b[31m[/red] [link=file:///]x\nowl2-export: error: all is lost")
    shown = screen.getvalue()
    assert r"owl2-export: [red]no\x1b[31m[/red] [link=file:///]x\nowl2-export: error: all is lost" in shown
    assert "layers [bold]" in shown
