"""Reading the data of ``owl2 eval``: every format, and every problem with its line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from owl2.runtime.errors import ConfigError, DataError
from owl2.runtime.evaluation import conversations
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
        ({"question": "q", "answers": ["<|image|>"]}, r'"answers" must not contain <\|image\|>'),
        ({"question": "q", "answers": ["red", "<image>"]}, '"answers" must not contain <image>'),
        ({"question": "q", "choices": ["<image>\n1", "2"], "answer": 1}, '"choices" must not contain <image>'),
        ({"image": "a.png", "captions": [{"caption": "An <image>"}]}, '"captions" must not contain <image>'),
        ({"answers": ["red"]}, "\"question\" must be a non-empty string, got ''"),
        ({"question": "q", "answers": ["a"], "image": 3}, '"image" must be a file name or a list'),
        ({"question": "<|image|>q", "answers": ["a"]}, "occurs once, but there are 0 images"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two different strings"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "at least two different strings"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, '"answer" must be one of the choices'),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, '"answer" must be one of the choices'),
        ({"question": "q", "choices": ["a", "b"]}, "got None"),
        ({"captions": ["a"]}, '"captions" needs an "image"'),
        ({"conversations": []}, "must be a list of turns"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, 'no turn from "gpt"'),
        ({"conversations": [{"from": "system", "value": "Hi"}]}, "it has a system message"),
        ({"conversations": [{"from": "tool", "value": "Hi"}]}, 'a turn must be {"from"'),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, 'has no turn from "human"'),
        ({"conversations": [{"from": "human", "value": "Hi"}] * 2}, "two turns in a row are from the user"),
        ({"conversations": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "a turn must be"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, '"messages" has no turn from "gpt"'),
        ({"image": "a.png", "images": ["b.png"], "captions": ["x"]}, "both given; keep one"),
        ({"image": ["a.png", ""], "captions": ["x"]}, '"image" must be a file name or a list'),
        ({"image": "https://example.org/a.png", "captions": ["x"]}, "must name files, got the URL 'https:"),
        ({"image": "data:image/png;base64,AAAA", "captions": ["x"]}, "must name files, got the URL 'data:"),
        ({"image": "\udcff.png", "captions": ["x"]}, "half of a surrogate pair"),
        ({"image": "a\0.png", "captions": ["x"]}, r"cannot read .*a\\x00\.png"),
        ({"image": "a.png", "question": "<image><|image|>", "answers": ["a"]}, r"both <\|image\|> and <image> occur"),
        ({"image": "a.png", "question": "<image><image>", "answers": ["a"]}, "<image> occurs 2 times, .* is 1 image"),
        ({"question": "What does <image> mean in HTML?", "answers": ["a"]}, "<image> occurs once, .* are 0 images"),
        ({"question": "q", "answers": [{"answer": ""}]}, '"answers" must be a list of non-empty strings'),
        ({"question": "q", "answers": [{"text": "red"}]}, '"answers" must be a list of non-empty strings'),
        ({"text": "x", "category": "\ud800"}, "half of a surrogate pair"),
        ('{"text": "x", "text": "y"}', "the key 'text' occurs more than once"),
        ('{"text": "x",}', "a comma before a closing bracket at column 14"),
        ('{"text": "x", "id": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"text": "a\tb"}', "Invalid control character at column 12"),
        ({"text": ""}, '"text" must be a non-empty string'),
        ({"text": "\ud800"}, "half of a surrogate pair"),
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
    with pytest.raises(DataError, match=r"gone\.jsonl: it is missing"):
        read_items(folder / "gone.jsonl")
    with pytest.raises(DataError, match=r"(Is|it is) a (directory|folder); give UTF-8 text"):
        read_items(folder)
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_items(written(folder, ""))
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_items(written(folder, "[]"))


VQA_V2 = {"question_id": 7, "answer_type": "number", "multiple_choice_answer": "two", "question": "How many?"}


@pytest.mark.parametrize(
    ("record", "task"),
    [
        (
            VQA_V2 | {"answers": [{"answer": text, "answer_confidence": "yes"} for text in ("two", "2")]},
            Question("<|image|>How many?", ("two", "2")),
        ),
        (
            {"captions": [{"caption": "red", "id": 3}, "all red"]},
            Caption("<|image|>" + CAPTION_QUESTION, ("red", "all red")),
        ),
        ({"question": "What?\n<image>", "answers": ["red"]}, Question("What?\n<|image|>", ("red",))),
    ],
)
def test_data_as_its_authors_publish_it(folder: Path, record: dict[str, object], task: object) -> None:
    (item,) = read_items(written(folder, {"image": "a.png"} | record))
    assert item.task == task
    assert item.id == record.get("question_id")


LLAVA = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]
EXPECTED = Conversation((Message("USER", "<|image|>\nHi"), Message("ASSISTANT", "Hello")))


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": LLAVA},
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Hello"}],
        },
        {"image": "a.png", "images": None, "conversations": [{"from": "gpt", "value": "Ask!"}, *LLAVA]},
    ],
)
def test_conversations_as_trainers_read_them(folder: Path, record: dict[str, object]) -> None:
    (item,) = read_items(written(folder, record))
    assert item.task == EXPECTED
    assert item.images == (folder / "a.png",)


@pytest.mark.parametrize("none", ["", None, []])
def test_no_image(folder: Path, none: object) -> None:
    (item,) = read_items(written(folder, {"image": none, "question": "Why?", "answers": ["so"]}))
    assert (item.task, item.images) == (Question("Why?", ("so",)), ())


class TestArray:
    def test_it_is_read_like_lines(self, folder: Path) -> None:
        records = [{"image": "a.png", "captions": ["x"]}, {"text": "y", "id": 4}]
        lines = read_items(written(folder, *records))
        (folder / "data.json").write_text("\n " + json.dumps(records, indent=1))
        array = read_items(folder / "data.json")
        assert [item.task for item in array] == [item.task for item in lines]
        assert [item.where for item in array] == ["record 1", "record 2"]
        assert array[1].id == 4

    def test_its_problems_are_named_by_record(self, folder: Path) -> None:
        records = [{"text": "fine"}, "text", {"text": ""}, {"image": "gone.png", "captions": ["x"]}]
        with pytest.raises(DataError, match=r"(?s)2 problems:\n  record 2: expected .* got str\n  record 3: \"text\""):
            read_items(written(folder, json.dumps(records)))
        with pytest.raises(DataError, match=r"record 2: cannot read .*gone\.png"):
            read_items(written(folder, json.dumps([records[0], records[3]], indent=1)))

    def test_a_fault_in_its_json_has_a_place(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"data\.jsonl: it is not JSON: a comma before a closing bracket at line 3"):
            read_items(written(folder, "[", '{"text": "x"},', "]"))


class TestTextAsItComes:
    def test_marks_and_line_ends(self, folder: Path) -> None:
        (folder / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n  \r\n\t{"text": "\xc3\xa9"} \r\n')
        assert [(item.line, item.task) for item in read_items(folder / "data.jsonl")] == [
            (1, Text("x")),
            (3, Text("é")),
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "é"}'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
            ('{"text": "x"}'.encode("utf-16-le"), "it has a byte 0 in line 1, as UTF-16"),
            ('\n{"text": "é"}'.encode("latin-1"), "it is not UTF-8 text: byte 0xe9 in line 2"),
        ],
    )
    def test_other_encodings_are_named(self, folder: Path, content: bytes, message: str) -> None:
        (folder / "data.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_items(folder / "data.jsonl")

    def test_long_lines_and_files_are_refused_unread(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written(folder, {"text": "x" * 100}, {"text": "x"})
        monkeypatch.setattr(conversations, "LINE_CHARACTERS", 50)
        with pytest.raises(DataError, match="line 1: it has 112 characters, at most 50 are read"):
            read_items(path)
        monkeypatch.setattr(conversations, "DATA_BYTES", 50)
        with pytest.raises(DataError, match="it has 126 bytes, at most 50 are read"):
            read_items(path)


def test_no_message_repeats_what_it_was_given(folder: Path) -> None:
    long = "x" * 10_000
    records: list[dict[str, object]] = [
        {"question": long, "answers": [long, 3]},
        {"question": "q", "choices": [long], "answer": 0},
        {"question": "q", "choices": ["a", "b"], "answer": long},
        {"conversations": [{"from": long, "value": long}]},
        {"conversations": {long: long}},
        {"image": {long: long}, "captions": ["x"]},
        {"image": long, "captions": ["x"]},
        {"text": "x", "category": [long]},
        {"text": "x", "id": [long]},
        {long: long},
        {"text": long + "\ud800"},
        {"text": "x", long: 1, "captions": [long]},
        {"image": f"\x1b[31m{long}.png", "text": "x"},
    ]
    for record in records:
        with pytest.raises(DataError) as caught:
            read_items(written(folder, record))
        assert len(str(caught.value)) < 700, record.keys()
        assert "\x1b" not in str(caught.value)
