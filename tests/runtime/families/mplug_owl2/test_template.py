"""The conversation template is the original's to the character; placeholders and images must agree."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from owl2.runtime.config import IMAGE_TOKEN
from owl2.runtime.errors import PromptError
from owl2.runtime.families.mplug_owl2.template import Message, check_placeholders, render, with_images

CASES = ["a1_base_bin", "a2_fp16_safetensors", "a3_tokenizer_plain_special_map"]


@pytest.mark.parametrize("case", CASES)
def test_conversations_are_rendered_as_the_original_does(golden: Path, case: str) -> None:
    entries = json.loads((golden / case / "prompts.json").read_text())
    conversations = [entry for entry in entries if entry["kind"] == "conversation"]
    assert len(conversations) > 20
    for entry in conversations:
        messages = [Message(role, text) for role, text in entry["messages"]]
        assert render(messages) == entry["prompt"], entry["id"]


def test_two_turns() -> None:
    messages = [
        Message("USER", "q1"),
        Message("ASSISTANT", "a1"),
        Message("USER", "q2"),
        Message("ASSISTANT"),
    ]
    assert render(messages) == "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"
    assert render([]) == ""


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(PromptError, match="unknown role 'SYSTEM' of a message; use one of USER, ASSISTANT"):
        Message("SYSTEM", "Be nice.")  # type: ignore[arg-type]


def test_placeholders_go_in_front_of_the_question() -> None:
    assert with_images("What is this?", 0) == "What is this?"
    assert with_images("What is this?", 1) == "<|image|>What is this?"
    assert with_images("Compare.", 2) == "<|image|><|image|>Compare."


def test_placeholders_of_the_question_stay_where_they_are() -> None:
    question = f"Is {IMAGE_TOKEN} sharper than {IMAGE_TOKEN}?"
    assert with_images(question, 2) == question


@pytest.mark.parametrize("function", [with_images, check_placeholders])
def test_too_many_placeholders(function: Callable[[str, int], object]) -> None:
    with pytest.raises(PromptError, match=r"has 2 .* placeholders, but 1 image given; give the missing"):
        function(IMAGE_TOKEN * 2 + "Why?", 1)
    with pytest.raises(PromptError, match=r"has 1 .* placeholder, but 0 images"):
        function(IMAGE_TOKEN + "Why?", 0)


@pytest.mark.parametrize("function", [with_images, check_placeholders])
def test_too_few_placeholders(function: Callable[[str, int], object]) -> None:
    with pytest.raises(PromptError, match=r"3 images given, but the prompt has 1 .* write one placeholder"):
        function(IMAGE_TOKEN + "Why?", 3)


def test_a_raw_prompt_gets_no_placeholders_by_itself() -> None:
    check_placeholders("no image", 0)
    check_placeholders(f"a{IMAGE_TOKEN}b", 1)
    with pytest.raises(PromptError, match="1 image given, but the prompt has 0"):
        check_placeholders("no image", 1)
