"""The little world: coloured shapes on a grid of three by three cells, how they are drawn, and the split.

A scene is a set of one to four things, each in a cell of its own. A hash of its canonical description (every thing's
cell, shape, colour and size) decides whether it belongs to the training or the held-out side, so the two sides are
disjoint by construction, whatever the seeds of the generators.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
}
SIZES: dict[str, int] = {"big": 24, "small": 15}
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
GRID = 3
CELL = 28
SIDE = GRID * CELL
MAX_THINGS = 4
HELD_OUT_SHARE = 8
JITTER = 2


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One shape; ``cell`` is 0..8, row by row from the top left."""

    cell: int
    shape: str
    colour: str
    size: str

    @property
    def row(self) -> int:
        """0 is the top row."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """0 is the left column."""
        return self.cell % GRID

    @property
    def name(self) -> str:
        """Colour and shape, as questions refer to it."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The words for its cell."""
        return PLACES[self.cell]


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in the order of their cells."""

    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        """Canonical description: the same for every drawing of the same scene."""
        return ";".join(f"{t.cell},{t.shape},{t.colour},{t.size}" for t in sorted(self.things))

    @property
    def held_out(self) -> bool:
        """Whether the scene is on the held-out side: one in :data:`HELD_OUT_SHARE`, by hash."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:4], "little") % HELD_OUT_SHARE == 0


def random_scene(rng: random.Random, count: int, *, held_out: bool) -> Scene:
    """Draw a scene of ``count`` things from one side of the split.

    In half of the scenes shapes and colours come from two of each, so that there is something to count.
    """
    while True:
        shapes: tuple[str, ...] = SHAPES
        colours: tuple[str, ...] = tuple(COLOURS)
        if rng.random() < 0.5:
            shapes, colours = tuple(rng.sample(shapes, 2)), tuple(rng.sample(colours, 2))
        cells = sorted(rng.sample(range(GRID * GRID), count))
        things = (Thing(cell, rng.choice(shapes), rng.choice(colours), rng.choice(tuple(SIZES))) for cell in cells)
        scene = Scene(tuple(things))
        if scene.held_out == held_out:
            return scene


def _polygon(shape: str, centre: float, radius: float) -> list[tuple[float, float]]:
    """Corners of ``shape`` around (centre, centre), pixels."""
    if shape == "square":
        half = radius * 0.86
        corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return [(centre + half * x, centre + half * y) for x, y in corners]
    if shape == "triangle":
        return [
            (centre, centre - radius),
            (centre + radius, centre + radius * 0.85),
            (centre - radius, centre + radius * 0.85),
        ]
    if shape == "star":
        points = []
        for i in range(10):
            reach, angle = radius * (1.08 if i % 2 == 0 else 0.45), math.pi * i / 5
            points.append((centre + reach * math.sin(angle), centre - reach * math.cos(angle)))
        return points
    arm = radius * 0.34
    upper = ((-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm))
    lower = ((arm, radius), (-arm, radius), (-arm, arm), (-radius, arm), (-radius, -arm), (-arm, -arm))
    return [(centre + x, centre + y) for x, y in upper + lower]


@cache
def _mask(shape: str, size: str, scale: int) -> NDArray[np.float32]:
    """Coverage 0..1 of one cell, [CELL·scale, CELL·scale], drawn four times as large and reduced."""
    fine = 4
    side = CELL * scale
    canvas = Image.new("L", (side * fine, side * fine), 0)
    pen = ImageDraw.Draw(canvas)
    centre, radius = side * fine / 2, SIZES[size] * scale * fine / 2
    if shape == "circle":
        pen.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=255)
    else:
        pen.polygon(_polygon(shape, centre, radius), fill=255)
    reduced = canvas.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(reduced, dtype=np.float32) / np.float32(255)


def draw(scene: Scene, rng: random.Random, *, scale: int = 1) -> NDArray[np.uint8]:
    """Draw ``scene`` on a light background: [84·scale, 84·scale, 3] uint8.

    Background, shades and positions within the cells vary a little with ``rng``.
    """
    side = SIDE * scale
    shade = rng.uniform(222, 250)
    background = [shade + rng.uniform(-5, 5) for _ in range(3)]
    # A margin around the image takes the overhang of shapes moved towards the edge.
    margin = JITTER * scale
    canvas = np.empty((side + 2 * margin, side + 2 * margin, 3), np.float32)
    canvas[:] = background
    for thing in scene.things:
        colour = np.array([c + rng.uniform(-12, 12) for c in COLOURS[thing.colour]], np.float32)
        mask = _mask(thing.shape, thing.size, scale)[:, :, None]
        top = thing.row * CELL * scale + margin + round(rng.uniform(-JITTER, JITTER) * scale)
        left = thing.column * CELL * scale + margin + round(rng.uniform(-JITTER, JITTER) * scale)
        patch = canvas[top : top + CELL * scale, left : left + CELL * scale]
        patch += mask * (colour - patch)
    inner = canvas[margin : margin + side, margin : margin + side]
    return np.clip(np.rint(inner), 0, 255).astype(np.uint8)
