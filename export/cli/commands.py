"""The command ``owl2-export`` as a whole."""

from __future__ import annotations

import sys
from typing import Any

import click

from owl2.export.cli.convert import convert
from owl2.export.tensorrt.cli import engine
from owl2.runtime.cli.console import notice
from owl2.runtime.version import __version__

EXTRAS = {"convert": "cpu,export", "engine": "tensorrt' or 'owl2[tensorrt-rtx"}
"""Extras that bring the modules of a command."""


class Commands(click.Group):
    """Runs ``convert`` if the first argument is neither a command nor an option of the group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if not args or args[0] not in own | set(self.commands):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - as click has it
        """Run the command; says how to install a module that it misses."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("owl2"):
                raise
            extra = EXTRAS[str(ctx.invoked_subcommand)]
            notice(f"error: {error.name} is not installed; this needs: pip install 'owl2[{extra}]'")
            sys.exit(1)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="[convert] CHECKPOINT BUNDLE | engine BUNDLE",
)
@click.version_option(__version__, prog_name="owl2-export")
def cli() -> None:
    """Convert official mPLUG-Owl2 checkpoints to bundles that the command owl2 runs, and build TensorRT engines.

    Without the name of a command, the arguments are those of convert.

    \b
    Examples:
      owl2-export mplug-owl2-llama2-7b/ owl2-int4/
      owl2-export one-align/ one-align-int4/ --calibration photos/
      owl2-export checkpoint/ bundle-tensorrt/ --dialect onnx
      owl2-export engine bundle-tensorrt/
      owl2-export convert engine bundle/             # a checkpoint in a folder called like a command
      owl2-export convert --help                     # all options
    """


cli.add_command(convert)
cli.add_command(engine)
