"""Command ``owl2``: ask, chat, info, plan, eval, verify."""

from __future__ import annotations

import io
import sys

import click

from owl2.runtime.cli.ask import ask
from owl2.runtime.cli.chat import chat
from owl2.runtime.cli.eval import eval_command
from owl2.runtime.cli.info import info
from owl2.runtime.cli.plan import plan_command
from owl2.runtime.cli.verify import verify_command
from owl2.runtime.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="owl2")
def cli() -> None:
    """Ask a model of the mPLUG-Owl2 family about images, on this machine only.

    BUNDLE is a folder written by owl2-export.

    \b
    Examples:
      owl2 info bundle/
      owl2 ask bundle/ "What is in the image?" --image cat.jpg
      owl2 chat bundle/
      owl2 plan bundle/ --device orin-nano-8gb
      owl2 eval bundle/ --data questions.jsonl
      owl2 verify bundle/
    """


for command in (ask, chat, info, plan_command, eval_command, verify_command):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 130 stopped by Ctrl-C."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks must not end an answer.
            stream.reconfigure(errors="replace")
    cli(prog_name="owl2")


if __name__ == "__main__":
    main()
