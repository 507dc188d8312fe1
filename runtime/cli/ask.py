"""``owl2 ask``: one question, one answer."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from owl2.runtime.cli.console import (
    describe,
    duration,
    notice_context,
    notice_image,
    reports_errors,
    say_json,
    tell,
    write,
)
from owl2.runtime.cli.input import read_text
from owl2.runtime.cli.options import Options, bundle_argument, model_options
from owl2.runtime.cli.types import PATH
from owl2.runtime.images import open_image


@click.command()
@bundle_argument
@click.argument("question")
@click.option("--image", "images", type=PATH, multiple=True, help="An image; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Write text, token counts and timings as JSON.")
@reports_errors
@model_options
def ask(options: Options, bundle: Path, question: str, images: tuple[Path, ...], as_json: bool) -> None:
    """Ask one question, with or without images, and stream the answer.

    QUESTION may be - to read it from stdin. Images go before the question, in the given order, unless it says where
    with one <|image|> for each.

    \b
    Examples:
      owl2 ask bundle/ "What is in the image?" --image cat.jpg
      owl2 ask bundle/ "What changed?" --image before.png --image after.png --stats
      owl2 ask bundle/ "Tell a story." --temperature 0.8 --seed 1
      owl2 ask bundle/ "What is it?" --image cat.jpg --device cuda
      owl2 ask bundle/ - --image page.png --json < question.txt
    """
    text = read_text().strip() if question == "-" else question
    opened = [open_image(path, options.reading) for path in images]  # before the model, which may take long to load
    for path, image in zip(images, opened):
        notice_image(str(path), image.record)
    began = time.perf_counter()
    with options.load(bundle) as owl:
        load_seconds = time.perf_counter() - began
        stream = owl.chat().stream(text, opened, preprocess=options.preprocess, config=options.generation)
        if as_json:
            answer = stream.read()
            record = {"text": answer.text, "finish_reason": answer.finish_reason, **asdict(answer.stats)}
            record |= {"images": [asdict(image) for image in answer.images]}
            record |= {"tokens_per_second": answer.stats.tokens_per_second, "load_seconds": load_seconds}
            say_json(record)
        else:
            write(stream)
            answer = stream.answer
        notice_context(answer, owl.context)
    if options.stats:
        tell(f"loaded in {duration(load_seconds)}\n{describe(answer)}")
