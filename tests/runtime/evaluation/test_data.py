"""Reading the data of ``owl2 eval``: every format, and every problem with its line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from owl2.runtime.errors import ConfigError, DataError
from owl2.runtime.evaluation.data import CAPTION_QUESTION, Caption, Choice, Conversation, Question, Text, read_items
from owl2.runtime.families.mplug_owl2.template import Message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / name)
    return tmp_path


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_task(folder: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = written(
        folder,
        {"image": "a.png", "question": "What?", "answers": ["red"], "category": "colour", "id": "q1", "other": 1},
        {
            "image": ["a.png", "b.png"],
            "question": "<|image|> or <|image|>?",
            "choices": ["one", "two"],
            "answer": "two",
        },
        "",
        {"image": "a.png", "captions": ["red", "all red"]},
        {"image": "a.png", "conversations": turns},
        {"text": "Some <|image|> text."},
        {"question": "Why?", "choices": ["a", "b"], "answer": 0, "id": 7},
    )
    items = read_items(path)
    assert [item.line for item in items] == [1, 2, 4, 5, 6, 7]
    assert [item.task for item in items] == [
        Question("<|image|>What?", ("red",)),
        Choice("<|image|> or <|image|>?", ("one", "two"), 1),
        Caption("<|image|>" + CAPTION_QUESTION, ("red", "all red")),
        Conversation((Message("USER", "<|image|>Hi"), Message("ASSISTANT", "Hello"))),
        Text("Some <|image|> text."),
        Choice("Why?", ("a", "b"), 0),
    ]
    assert items[1].images == (folder / "a.png", folder / "b.png")
    assert [(item.category, item.id) for item in items] == [("colour", "q1"), *[("", None)] * 4, ("", 7)]


def test_a_limit_is_spread_over_the_file_and_opens_only_its_images(folder: Path) -> None:
    lines = [{"image": "a.png" if i % 2 == 0 else "gone.png", "captions": ["x"]} for i in range(10)]
    assert [item.line for item in read_items(written(folder, *lines), 5)] == [1, 3, 5, 7, 9]
    with pytest.raises(ConfigError, match="limit 0 must be at least 1"):
        read_items(folder / "data.jsonl", 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ("3", "expected a JSON object, got int"),
        ({}, "must say what to measure; got nothing"),
        ({"question": "q"}, "got question"),
        ({"question": "q", "answer": "red"}, r'a single answer is a list, too: "answers": \["red"\]'),
        ({"text": "x", "captions": ["y"]}, "got captions, text"),
        ({"question": "q", "answers": "red"}, '"answers" must be a list of non-empty strings'),
        ({"question": "q", "answers": []}, '"answers" must be a list of non-empty strings'),
        ({"question": "q", "answers": ["red", 3]}, '"answers" must be a list of non-empty strings'),
        ({"question": "q", "answers": ["<|image|>"]}, "must not contain"),
        ({"answers": ["red"]}, "\"question\" must be a non-empty string, got ''"),
        ({"question": "q", "answers": ["a"], "image": 3}, '"image" must be a file name or a list'),
        ({"question": "<|image|>q", "answers": ["a"]}, "has 1 .* but 0 images given"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two different strings"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "at least two different strings"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, '"answer" must be one of the choices'),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, '"answer" must be one of the choices'),
        ({"question": "q", "choices": ["a", "b"]}, "got None"),
        ({"captions": ["a"]}, '"captions" needs an "image"'),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, 'no turn from "gpt"'),
        ({"conversations": [{"from": "system", "value": "Hi"}]}, 'a turn must be {"from"'),
        ({"text": ""}, '"text" must be a non-empty string'),
        ({"text": "\ud800"}, "is not valid Unicode"),
        ({"text": "x", "image": "a.png"}, '"text" cannot have an "image"'),
        ({"text": "x", "category": 3}, '"category" must be a string'),
        ({"text": "x", "id": 1.5}, '"id" must be a string or a whole number'),
        ({"image": "gone.png", "captions": ["x"]}, "cannot read .*gone.png"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(folder: Path, line: object, message: str) -> None:
    path = written(folder, {"text": "fine"}, line)
    with pytest.raises(DataError, match=rf"(?s)data.jsonl: nothing was measured; 1 problem:\n  line 2: .*{message}"):
        read_items(path)


def test_all_problems_are_named(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_items(written(folder, "x", {"text": "fine"}, "y", *["z"] * 200))
    text = str(caught.value)
    assert "202 problems" in text
    assert "line 1: " in text
    assert "line 3: " in text
    assert text.endswith("… and 102 more")


def test_files_without_data(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_items(folder / "gone.jsonl")
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_items(written(folder, ""))
    with pytest.raises(DataError, match="one JSON array"):
        read_items(written(folder, "[", "{}", "]"))
