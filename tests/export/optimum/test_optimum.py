"""The subcommand of optimum-cli: what Optimum imports at every start, and where the wheel puts it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

REGISTER = ROOT / "export" / "optimum" / "register_owl2.py"


def test_nothing_heavy_is_imported_when_optimum_starts() -> None:
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(REGISTER.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names == {"__future__", "argparse", "optimum.commands.base", "optimum.commands.export.base"}


def test_the_wheel_adds_one_file_to_optimum_and_no_package() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"export/optimum/register_owl2.py" = "optimum/commands/register/register_owl2.py"' in settings
    assert not list((ROOT / "export" / "optimum").glob("__init__.py"))


def test_optimum_cli_hands_everything_on() -> None:
    pytest.importorskip("optimum.commands.base")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "owl2"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.startswith("Usage: optimum-cli export owl2 [OPTIONS] [convert] CHECKPOINT BUNDLE")
    failed = subprocess.run(
        [*command, "--weights", "int8", "nowhere", "bundle"], capture_output=True, text=True, check=False, timeout=120
    )
    assert failed.returncode == 1
    assert "optimum-cli export owl2: error: nowhere is not a folder" in failed.stderr
