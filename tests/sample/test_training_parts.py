"""Tokenizer, batches and the training forward pass against the plain model and the runtime's tokenizer."""

import random
from typing import Any

import pytest
import torch
from batches import Mix, batches, collate
from conftest import ROOT
from encoder import EOS, Encoder
from initial import initialise
from network import hidden_rows, predictions, sample_config
from probes import SKILLS, as_example, probes
from quality import WORDS
from questions import ASK

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime.config import IMAGE_TOKEN_ID
from owl2.runtime.families.mplug_owl2.tokenizer import Tokenizer

CHECKPOINT = ROOT / "sample" / "checkpoint"
MIX = Mix(0.6, 0.1, 0.1, 0.2, (1, 1, 1, 1), dict.fromkeys((*ASK, "second", "caption"), 1.0), 3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(CHECKPOINT / "tokenizer.model")


@pytest.fixture(scope="module")
def model() -> Owl2Model:
    model = Owl2Model(sample_config())
    initialise(model, 0)
    return model


def test_prompts_have_the_ids_of_the_runtime_s_tokenizer(encoder: Encoder) -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    for skill in SKILLS:
        for probe in probes(skill, 20, 0):
            ids = as_example(encoder, probe, with_answer=False).ids
            assert ids == tokenizer.encode_prompt(probe.prompt)
            given = f"{probe.prompt} {probe.answer}</s>"
            assert as_example(encoder, probe).ids == tokenizer.encode_prompt(given)


def test_each_rating_word_is_one_piece_of_its_own(encoder: Encoder) -> None:
    pieces = [encoder.encode(word) for word in WORDS]
    assert all(len(piece) == 1 for piece in pieces)
    assert len(set(pieces)) == len(WORDS)


def test_training_forward_equals_the_plain_model(encoder: Encoder, model: Owl2Model) -> None:
    (batch,) = batches(encoder, MIX, random.Random(0), 6, 10, 1)
    with torch.no_grad():
        fast = hidden_rows(model, batch).view(*batch.ids.shape, -1)
        images = iter(model.encode_images(batch.pixels))
        embeds, modality = model.embed(batch.ids), torch.zeros_like(batch.ids)
        for row, start in enumerate(batch.starts.tolist()):
            if start >= 0:
                embeds[row, start : start + 10] = next(images)
                modality[row, start : start + 10] = 1
        plain, _ = model.decode(embeds, modality)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=0)


def test_loss_counts_answers_and_their_end_only(encoder: Encoder, model: Owl2Model) -> None:
    asked = probes("place", 3, 0)
    examples = [as_example(encoder, probe) for probe in asked]
    with torch.no_grad():
        predicted = predictions(model, collate(examples, 10))
    for row, probe in enumerate(asked):
        assert predicted.targets[predicted.owners == row].tolist() == [*encoder.encode(probe.answer), EOS]


def test_batches_are_the_same_for_the_same_seed(encoder: Encoder) -> None:
    first, second = (batches(encoder, MIX, random.Random(5), 4, 10, 2) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.pixels, b.pixels)


def test_placeholder_is_the_runtime_s(encoder: Encoder) -> None:
    assert IMAGE_TOKEN_ID in encoder.prompt("USER: <|image|>What is it? ASSISTANT:")


def test_queries_start_by_attending_to_their_own_cells(model: Owl2Model) -> None:
    abstractor = model.model.visual_abstractor
    block: Any = abstractor.encoder.layers[0].crossattention
    with torch.no_grad():
        patches = block.normk(model.model.vision_model(torch.zeros(1, 3, 84, 84)))
        queries = block.norm1(abstractor.query_embeds)
        part = block.attention
        keys = part.key(torch.cat([queries, patches], 1) + torch.cat([part.q_pos_embed, part.k_pos_embed]))
        scores = part._split(part.query(queries + part.q_pos_embed)) @ part._split(keys).transpose(2, 3)
        weights = (scores / 32**0.5).softmax(-1)[0, :, :, 10:]
    cells = weights.view(-1, 9, 3, 2, 3, 2).sum((3, 5)).flatten(2)
    assert cells.diagonal(dim1=1, dim2=2).min() > 0.8
