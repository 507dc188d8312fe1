"""Prompts and questions: Unicode, special strings, placeholders, very long ones."""

import random
from pathlib import Path

from fuzz import mutate
from fuzz.bundles import BUNDLE, PICTURE
from fuzz.surface import Input, Surface
from owl2 import Owl2

PARTS = (
    "<|image|>", "<|image|", "<image>", "</s>", "<s>", "<unk>", "USER: ", " ASSISTANT:", "\u2581", "<0x0A>", "<0xZZ>",
    "###", "\n", " ", "What is it?", "Describe the image.",
)  # fmt: skip
TARGETS = ("generate",) * 4 + ("ask",) * 3 + ("logits", "stop", "messages")


def open_surface(folder: Path, _: Path) -> Surface:
    """Asked of the loaded base bundle."""
    owl = Owl2.load(folder / BUNDLE)

    def make(rng: random.Random) -> Input:
        parts = [rng.choice(PARTS) if rng.random() < 0.5 else mutate.text(rng) for _ in range(rng.choice((1, 2, 3, 8)))]
        text = "".join(parts) * (rng.choice((1000, 30_000)) if rng.random() < 0.004 else 1)
        return Input(
            f"{rng.choice(TARGETS)}.{rng.choice((0, 0, 1, 1, 2))}", text[: 50 << 20].encode("utf-8", "surrogatepass")
        )

    def run(given: Input) -> None:
        target, images = given.target.split(".")
        text, pictures = given.content.decode("utf-8", "surrogatepass"), [PICTURE] * int(images)
        match target:
            case "generate":
                owl.generate(text, images=pictures, max_new_tokens=2)
            case "ask":
                owl.chat().ask(text, pictures, max_new_tokens=2)
            case "logits":
                owl.logits(text, images=pictures)
            case "stop":
                owl.generate("USER: Hi ASSISTANT:", stop=[text, text[1:]], max_new_tokens=3)
            case _:
                said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
                owl.chat(said).ask("And?", max_new_tokens=1)

    return Surface(make, run)
