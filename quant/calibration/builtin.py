"""The built-in calibration set: drawn images with conversations about them, and plain conversations.

It stands in for data of the user's own domain: every branch of the decoder sees rows of its modality, but drawings do
not represent photographs. Everything is drawn or written by this project and depends only on the code below.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.families.mplug_owl2.template import Message, render

IMAGE_SIDE = 224
IMAGES = 72
QUESTIONS = (
    "Describe the image.",
    "What is in the picture?",
    "Provide a one-sentence caption for the provided image.",
    "What can you see here?",
    "Describe the picture in detail.",
)
COLOURS = {
    "red": (205, 45, 45),
    "green": (50, 150, 70),
    "blue": (45, 85, 200),
    "yellow": (235, 200, 40),
    "purple": (130, 60, 160),
    "orange": (240, 130, 40),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "grey": (128, 128, 128),
    "brown": (120, 80, 45),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image, a caption, and questions about it with their answers."""

    image: Image.Image
    caption: str
    details: tuple[tuple[str, str], ...]


def image_conversation(drawing: Drawing, rng: random.Random) -> str:
    """A conversation about one image in the official template, answers included."""
    caption = (rng.choice(QUESTIONS), drawing.caption)
    turns = [caption, *drawing.details] if rng.random() < 0.7 else [*drawing.details, caption]
    messages = []
    for index, (question, answer) in enumerate(turns):
        asked = question if index else IMAGE_TOKEN + question
        messages += [Message("USER", asked), Message("ASSISTANT", answer)]
    return render(messages)


def text_conversations() -> list[str]:
    """Conversations without images in the official template, from ``texts.txt``: question, tab, answer."""
    lines = files("owl2.quant.calibration").joinpath("texts.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line]
    return [render([Message("USER", asked), Message("ASSISTANT", told)]) for asked, told in pairs]


def drawings(count: int, seed: int) -> list[Drawing]:
    """``count`` different images; the same ones for the same seed."""
    rng = random.Random(f"drawings {seed}")
    draw = (_shapes, _shapes, _landscape, _stripes, _gradient, _texture, _chart)
    return [draw[i % len(draw)](rng) for i in range(count)]


def _two_colours(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(sorted(COLOURS), 2)
    return first, second


def _canvas(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), COLOURS[colour])
    return image, ImageDraw.Draw(image)


Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "circle": lambda pen, box, colour: pen.ellipse(box, fill=colour),
    "square": lambda pen, box, colour: pen.rectangle(box, fill=colour),
    "triangle": lambda pen, box, colour: pen.polygon(
        [((box[0] + box[2]) / 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour
    ),
}


def _shapes(rng: random.Random) -> Drawing:
    ground, *colours = rng.sample(sorted(COLOURS), 3)
    image, pen = _canvas(ground)
    names = [rng.choice(sorted(SHAPES)) for _ in colours]
    for index, (name, colour) in enumerate(zip(names, colours)):
        size = rng.uniform(50, 90)
        left, top = rng.uniform(5, 15) + index * IMAGE_SIDE / 2, rng.uniform(10, IMAGE_SIDE - size - 10)
        SHAPES[name](pen, (left, top, left + size, top + size), COLOURS[colour])
    left_shape, right_shape = (f"{colour} {name}" for colour, name in zip(colours, names))
    return Drawing(
        image,
        f"A {left_shape} on the left and a {right_shape} on the right, on a {ground} background.",
        (
            (f"What colour is the {names[0]} on the left?", f"It is {colours[0]}."),
            ("How many shapes are there?", "There are two shapes."),
            (f"Is the {right_shape} left of the {left_shape}?", "No, it is on the right."),
        ),
    )


def _landscape(rng: random.Random) -> Drawing:
    sky, land = ("blue", "green") if rng.random() < 0.5 else ("orange", "brown")
    image, pen = _canvas(sky)
    horizon = rng.uniform(0.4, 0.7) * IMAGE_SIDE
    pen.rectangle((0, horizon, IMAGE_SIDE, IMAGE_SIDE), fill=COLOURS[land])
    peak = rng.uniform(0.2, 0.8) * IMAGE_SIDE
    pen.polygon([(peak, horizon - 80), (peak + 90, horizon), (peak - 90, horizon)], fill=COLOURS["grey"])
    sun = rng.uniform(20, IMAGE_SIDE - 60)
    pen.ellipse((sun, 15, sun + 40, 55), fill=COLOURS["yellow"])
    time = "at noon" if sky == "blue" else "in the evening"
    return Drawing(
        image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))),
        f"A simple landscape {time}: a grey mountain under the sun, {land} land in front and a {sky} sky.",
        (
            ("What is the weather like?", "The sun is shining and there are no clouds."),
            ("Is there a person in the picture?", "No, there is nobody in the picture."),
        ),
    )


def _stripes(rng: random.Random) -> Drawing:
    ground, stripes = _two_colours(rng)
    image, pen = _canvas(ground)
    width, upright = rng.choice((8, 14, 28)), rng.random() < 0.5
    for start in range(0, IMAGE_SIDE, 2 * width):
        pen.rectangle(
            (start, 0, start + width, IMAGE_SIDE) if upright else (0, start, IMAGE_SIDE, start + width),
            COLOURS[stripes],
        )
    direction = "vertical" if upright else "horizontal"
    return Drawing(
        image,
        f"A pattern of {direction} {ground} and {stripes} stripes.",
        (("Which direction do the stripes have?", f"They are {direction}."),),
    )


def _gradient(rng: random.Random) -> Drawing:
    left, right = _two_colours(rng)
    ramp = np.linspace(0, 1, IMAGE_SIDE)[None, :, None]
    row = (1 - ramp) * np.array(COLOURS[left]) + ramp * np.array(COLOURS[right])
    pixels = np.broadcast_to(row, (IMAGE_SIDE, IMAGE_SIDE, 3)).astype(np.uint8)
    return Drawing(
        Image.fromarray(np.ascontiguousarray(pixels)),
        f"A smooth gradient from {left} on the left to {right} on the right.",
        (("Is the picture sharp or blurry?", "There are no edges; the colours change smoothly."),),
    )


def _texture(rng: random.Random) -> Drawing:
    """Noise of one or several scales, grey or coloured: the high frequencies that drawn shapes lack."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    pixels = np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3))
    scales = rng.choice(((1,), (4, 16), (2, 8, 32)))
    for scale in scales:
        grain = numbers.uniform(0, 255, (IMAGE_SIDE // scale, IMAGE_SIDE // scale, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(grain).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC))
    image = Image.fromarray((pixels / len(scales)).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.convert("L").convert("RGB")
    noise = "fine noise" if scales == (1,) else "cloudy patches"
    return Drawing(
        image,
        f"An abstract texture of {noise} without any objects.",
        (("How would you rate the quality of this image?", "The quality of the image is poor."),),
    )


def _chart(rng: random.Random) -> Drawing:
    image, pen = _canvas("white")
    heights = [rng.uniform(0.2, 0.9) for _ in range(4)]
    colour = rng.choice(("blue", "red", "green"))
    for index, height in enumerate(heights):
        left = 24 + index * 48
        pen.rectangle((left, IMAGE_SIDE - 20 - height * 180, left + 30, IMAGE_SIDE - 20), fill=COLOURS[colour])
        pen.text((left + 8, IMAGE_SIDE - 16), "ABCD"[index], fill=COLOURS["black"])
    tallest = "ABCD"[heights.index(max(heights))]
    return Drawing(
        image,
        f"A bar chart with four {colour} bars labelled A, B, C and D; bar {tallest} is the tallest.",
        (("Which bar is the tallest?", f"Bar {tallest} is the tallest."),),
    )
