"""The command ``owl2`` as a whole."""

from __future__ import annotations

import click

from owl2.runtime.cli.ask import ask
from owl2.runtime.cli.bench import bench_command
from owl2.runtime.cli.chat import chat
from owl2.runtime.cli.eval import eval_command
from owl2.runtime.cli.info import info
from owl2.runtime.cli.plan import plan_command
from owl2.runtime.cli.score import score
from owl2.runtime.cli.serve import serve
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
      owl2 score bundle/ photos/ --out scores.csv
      owl2 plan bundle/ --device orin-nano-8gb
      owl2 eval bundle/ --data questions.jsonl
      owl2 verify bundle/
      owl2 bench bundle/
      owl2 serve bundle/
    """


for command in (ask, chat, info, plan_command, eval_command, verify_command, bench_command, score, serve):
    cli.add_command(command)
