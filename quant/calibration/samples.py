"""Calibration data: the prompts and images that weights are quantized for.

Three sources: a folder of images, each with an optional text of the same name; a file of conversations, JSON lines or
one JSON array (:mod:`owl2.runtime.evaluation.conversations`); or the built-in set.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from owl2.quant.calibration import builtin
from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import CalibrationError, ConfigError, DataError
from owl2.runtime.evaluation.conversations import (
    Record,
    conversation,
    evenly,
    image_names,
    image_problems,
    list_problems,
    placeholders,
    read_records,
)
from owl2.runtime.families.mplug_owl2.template import Message, render
from owl2.runtime.foreign import ForeignError, read_text, reason
from owl2.runtime.harmless import harmless
from owl2.runtime.image_files import ImageInput
from owl2.runtime.preprocess import load_image

# Whatever people have images in, readable here or not: one that is not is named, not passed over.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
# Of systems and cameras; files and folders that begin with a dot are theirs as well.
FOREIGN_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
CAPTION_BYTES = 1 << 20
"""Largest text of an image that is read."""
BUILT_IN = "built-in"


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration prompt.

    Attributes:
        prompt: rendered text with one ``<|image|>`` per image.
        images: paths or PIL images.
        where: its place in a file, for people, as in ``line 3``; empty where images name themselves.
    """

    prompt: str
    images: tuple[ImageInput, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Samples and their source.

    Attributes:
        source: ``built-in``, or the name of the folder or file.
        samples: in a fixed order.
        notes: for readers of the report, a sentence each.
    """

    source: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return sum(len(sample.images) for sample in self.samples)


def load_calibration(path: Path | None, limit: int, *, need_images: bool = True) -> CalibrationSet:
    """Read at most ``limit`` samples, spread evenly over the source; the built-in set without a ``path``.

    At least one sample has an image if any does. Only the images of the chosen samples are opened.

    Raises:
        CalibrationError: the path is missing, empty or unreadable, lines are malformed or images unusable (each
            is named), or no sample has an image though ``need_images``.
        ConfigError: the limit is not positive.
    """
    if limit < 1:
        raise ConfigError(f"{limit} calibration samples were asked for; at least 1 is needed")
    if path is None:
        whole = builtin_set()
    elif path.is_dir():
        whole = _from_folder(path)
    elif path.is_file():
        whole = _from_file(path)
    else:
        raise CalibrationError(
            f"{harmless(str(path))} does not exist or is no file; give a folder of images or a file of conversations, "
            "or leave the option out for the built-in set"
        )
    if need_images and whole.images == 0:
        raise CalibrationError(
            f"{whole.source}: none of its {len(whole.samples)} samples has an image. This model has keys, values and "
            "norms of their own for image rows; without images these would be rounded blindly. Add conversations "
            "with images, or use a folder of images"
        )
    samples = evenly(whole.samples, limit)
    with_image = next((sample for sample in whole.samples if sample.images), None)
    if with_image is not None and not any(sample.images for sample in samples):
        samples[0] = with_image
    files = [(sample.where, image) for sample in samples for image in sample.images if isinstance(image, Path)]
    _raise_problems(whole.source, image_problems(files, load_image))
    return CalibrationSet(whole.source, tuple(samples), whole.notes)


def builtin_set() -> CalibrationSet:
    """Drawn images and short conversations that ship with the project."""
    rng = random.Random("built-in calibration")
    samples = [
        Sample(builtin.image_conversation(drawing, rng), (drawing.image,))
        for drawing in builtin.drawings(builtin.IMAGES, 0)
    ]
    samples += [Sample(text) for text in builtin.text_conversations()]
    rng.shuffle(samples)
    note = (
        "the built-in calibration set was used: drawn images and short texts, no photographs; "
        "data of your own domain usually gives a better model (--calibration)"
    )
    return CalibrationSet(BUILT_IN, tuple(samples), (note,))


def probe_samples() -> tuple[Sample, ...]:
    """Prompts on which every exported graph is compared with torch: with no image, with one, with two amid text.

    A wide image, a tall one and a square: the modes of preprocessing differ in the first two only.
    """
    first, second, third = (drawing.image for drawing in builtin.drawings(3, 1))
    half, quarter = builtin.IMAGE_SIDE // 2, builtin.IMAGE_SIDE // 4
    first = first.crop((0, quarter, first.width, quarter + half))
    second = second.crop((quarter, 0, quarter + half, second.height))
    return (
        Sample("USER: What is the capital of Portugal? ASSISTANT: The capital of Portugal is Lisbon.</s>"),
        Sample(
            f"USER: {IMAGE_TOKEN}What is in the picture? ASSISTANT: A drawing.</s>USER: And why? ASSISTANT:", (first,)
        ),
        Sample(f"USER: Compare {IMAGE_TOKEN} and {IMAGE_TOKEN}, please. ASSISTANT: They differ.</s>", (second, third)),
    )


def _from_folder(folder: Path) -> CalibrationSet:
    paths = _image_files(folder)
    if not paths:
        raise CalibrationError(
            f"{harmless(str(folder))} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}, "
            "each with an optional text of the same name ending in .txt; names that begin with a dot are skipped"
        )
    samples, problems, without = [], [], 0
    for index, path in enumerate(paths):
        question = Message("USER", IMAGE_TOKEN + builtin.QUESTIONS[index % len(builtin.QUESTIONS)])
        text = path.with_suffix(".txt")
        try:
            answer = _caption(text)
        except (ValueError, OSError) as error:
            problems.append(f"{text.relative_to(folder)}: {reason(error)}")
            continue
        without += not answer
        samples.append(Sample(render([question, Message("ASSISTANT", answer or None)]), (path,)))
    _raise_problems(str(folder), problems)
    if not without:
        return CalibrationSet(folder.name, tuple(samples))
    # Images without texts leave the text branch with a handful of questions.
    texts = [Sample(text) for text in builtin.text_conversations()]
    note = f"{without} of {len(paths)} images have no text of their own; {len(texts)} built-in conversations were added"
    return CalibrationSet(folder.name, tuple(samples + texts), (note,))


def _image_files(folder: Path) -> list[Path]:
    """Image files in a folder and those below it, in order; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise CalibrationError(f"cannot read the folder {harmless(str(error.filename))}: {reason(error)}") from error

    found: list[Path] = []
    entered: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in FOREIGN_FOLDERS)
        visible = [Path(root, name) for name in names if not name.startswith(".")]
        found += [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def _caption(path: Path) -> str:
    """The text of an image, empty without one; raises ValueError or OSError if it cannot be used."""
    if not path.is_file():
        return ""
    text = read_text(path, CAPTION_BYTES).strip()
    if found := placeholders([text]):
        raise ForeignError(f"it must not contain {found[0]}")
    return text


def _from_file(path: Path) -> CalibrationSet:
    def sample(unit: str, number: int, record: Record) -> Sample:
        names = image_names(record)
        images = tuple(path.parent / name for name in names)
        return Sample(render(conversation(record, len(names))), images, f"{unit} {number}")

    try:
        samples, problems = read_records(path, sample)
    except DataError as error:
        raise CalibrationError(str(error)) from error
    _raise_problems(str(path), problems)
    return CalibrationSet(path.name, tuple(samples))


def _raise_problems(source: str, problems: Sequence[str]) -> None:
    if problems:
        raise CalibrationError(f"{harmless(source)}: {list_problems(problems)}")
