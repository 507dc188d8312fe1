"""Usage of the commands, and their options."""

import re
from collections.abc import Sequence
from dataclasses import asdict

import pytest
from conftest import RunCommand

from owl2 import GenerationConfig, __version__
from owl2.runtime.cli.commands import cli


@pytest.mark.parametrize(
    "args",
    [
        ("ask", "bundle"),
        ("ask", "bundle", "q", "--device", "abacus"),
        ("ask", "bundle", "q", "--preprocess", "stretch"),
        ("ask", "bundle", "q", "--top-k", "few"),
        ("answer", "bundle"),
        ("ask", "bundle", "q", "--seed", "1" * 400),
        ("ask", "bundle", "q", "--seed", "9" * 5000),
        ("ask", "bundle", "q", "--top-k", "1_000"),
        ("ask", "bundle", "q", "--threads", "\u0663"),
        ("plan", "bundle", "--images", "-" + "1" * 400),
        ("ask", "", "q"),
        ("info", "x" * 5000),
        ("ask", "bundle", "q", "--image", ""),
        ("eval", "bundle", "--data", ""),
    ],
)
def test_wrong_usage(run: RunCommand, args: Sequence[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: owl2" in result.stderr
    assert len(result.stderr) < 1000


@pytest.mark.parametrize("command", [(), *((name,) for name in cli.commands)])
def test_help_gives_examples(run: RunCommand, command: Sequence[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples:\n +owl2 {' '.join(command)}", result.stdout)


def test_version(run: RunCommand) -> None:
    assert run("--version").stdout == f"owl2, version {__version__}\n"


@pytest.mark.parametrize(("name", "arguments"), [("ask", ["bundle", "q"]), ("chat", ["bundle"])])
def test_defaults_are_those_of_the_library(name: str, arguments: list[str]) -> None:
    given = cli.commands[name].make_context(name, arguments).params
    config = asdict(GenerationConfig())
    del config["top_logprobs"]  # nothing that the commands could show
    assert {field: given[field] for field in config} == config
