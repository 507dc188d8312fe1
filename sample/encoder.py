"""The sample's tokenizer: a sentencepiece BPE model trained on the generator's text, and prompts to ids.

The ids are those of the official image-aware tokenization (each chunk between images by itself, BOS only before the
first; the text after an end of sequence by itself), built from cached pieces because the same questions come again and
again.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import sentencepiece
from facts import FACTS
from quality import PROMPT, WORDS
from questions import ASK, converse, in_words
from world import random_scene

BOS, EOS, IMAGE = 1, 2, -200
VOCAB_SIZE = 1024


def corpus(seed: int, conversations: int) -> Iterator[str]:
    """Lines of text to train the tokenizer on: about the little world, and a little general English."""
    rng = random.Random(seed)
    weights = dict.fromkeys((*ASK, "caption", "second"), 1.0)
    for _ in range(conversations):
        scene = random_scene(rng, rng.randint(1, 4), held_out=False)
        yield in_words(scene, rng)
        for turn in converse(scene, rng, turns=5, weights=weights):
            yield f"USER: {turn.question} ASSISTANT: {turn.answer}"
            yield turn.question
    for _ in range(20):
        yield from (f"USER: {fact.question} ASSISTANT: {fact.answer}" for fact in FACTS)
        yield PROMPT.split("\n")[0]
        yield from (f"{PROMPT.split(chr(10))[0]} ASSISTANT: The quality of the image is {word}" for word in WORDS)
        yield from (Path(__file__).parent / "english.txt").read_text(encoding="utf-8").splitlines()


def train_tokenizer(path: Path, seed: int = 0) -> None:
    """Write a sentencepiece model with LLaMA's settings to ``path``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(seed, 2000),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


class Encoder:
    """Text to ids, cached."""

    def __init__(self, path: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.pieces.encode(text))

    def decode(self, ids: list[int]) -> str:
        """Ids without special ones to text."""
        return str(self.pieces.decode([i for i in ids if i > EOS]))

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt without special strings, ``IMAGE`` for each image."""
        ids = [BOS]
        for i, chunk in enumerate(text.split("<|image|>")):
            ids += [IMAGE] if i else []
            ids += self.encode(chunk) if chunk else ()
        return ids
