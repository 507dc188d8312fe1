"""Functions that tests run in other processes."""

from owl2 import Owl2


def overflow(bundle: str) -> str:
    """Runs in a worker process."""
    return Owl2.load(bundle, context=20).chat().ask("word " * 50).text
