"""OpenAI's own client against a real server: the same answers as in Python."""

import base64
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import GOLDEN
from serving import RunningServer, serving

from owl2 import Owl2

IMAGES = sorted((GOLDEN / "images").glob("*.png"))
QUESTION = "What is this?"
LENGTH = 12


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    settings = {"model": "bundle", "max_tokens": LENGTH, "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, **settings)


def test_an_answer_is_that_of_python(owl: Owl2, client: openai.OpenAI) -> None:
    expected = owl.chat().ask(QUESTION, max_new_tokens=LENGTH)
    answer = ask(client, [{"role": "user", "content": QUESTION}])
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert answer.usage.completion_tokens == expected.stats.generated_tokens


def test_images_and_streaming(owl: Owl2, client: openai.OpenAI) -> None:
    expected = owl.chat().ask(QUESTION, images=IMAGES[:2], max_new_tokens=LENGTH)
    content = [*(picture(data_uri(path)) for path in IMAGES[:2]), {"type": "text", "text": QUESTION}]
    stream = ask(
        client,
        [{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected.text
    assert chunks[-1].usage.completion_tokens == expected.stats.generated_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == expected.finish_reason
    told = [entry.logprob for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content]  # fmt: skip
    assert told == pytest.approx(expected.logprobs)


def test_a_second_question_reuses_the_first(owl: Owl2, client: openai.OpenAI) -> None:
    chat = owl.chat()
    first = chat.ask("What is that?", images=[IMAGES[2]], max_new_tokens=LENGTH)
    second = chat.ask("Why?", max_new_tokens=LENGTH)
    asked = {"role": "user", "content": [picture(data_uri(IMAGES[2])), {"type": "text", "text": "What is that?"}]}
    answer = ask(client, [asked])
    assert answer.choices[0].message.content == first.text
    history = [asked, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
    again = ask(client, history)
    assert again.choices[0].message.content == second.text
    assert again.usage.prompt_tokens_details.cached_tokens >= second.stats.reused_tokens - 2


def test_logprobs(owl: Owl2, client: openai.OpenAI) -> None:
    expected = owl.chat().ask(QUESTION, max_new_tokens=LENGTH)
    answer = ask(client, [{"role": "user", "content": QUESTION}], logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs)
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )


def test_seed_stop_and_system(owl: Owl2, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    expected = owl.chat().ask(f"Be short.\n{QUESTION}", max_new_tokens=LENGTH, **options)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    answer = ask(client, messages, **options)
    assert answer.choices[0].message.content == expected.text
    if len(expected.text) > 4:
        stop = expected.text[2:4]
        stopped = ask(client, messages, stop=[stop], **options)
        assert stopped.choices[0].message.content == expected.text[: expected.text.index(stop)]


def test_completions_and_models(owl: Owl2, client: openai.OpenAI) -> None:
    expected = owl.generate("USER: hello ASSISTANT:", max_new_tokens=LENGTH)
    answer = client.completions.create(model="x", prompt="USER: hello ASSISTANT:", max_tokens=LENGTH, temperature=0)
    assert answer.choices[0].text == expected.text
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="only bundle"):
        client.models.retrieve("other")


def test_files_of_the_allowed_folder_and_no_others(client: openai.OpenAI, tmp_path: Path) -> None:
    def answer(url: str) -> Any:
        return ask(client, [{"role": "user", "content": [picture(url), {"type": "text", "text": QUESTION}]}])

    assert answer(IMAGES[0].name).choices[0].message.content == answer(data_uri(IMAGES[0])).choices[0].message.content
    for url in (
        "../a1_base_bin/prompts.json",
        f"file:///{tmp_path}/x.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "%2e%2e/x",
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            answer(url)
        assert refused.value.status_code in (400, 403)
        assert "root:" not in str(refused.value)
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        answer("http://127.0.0.1/x.png")


def test_json_that_follows_a_schema(owl: Owl2, client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sharp": {"type": "boolean"}}, "required": ["sharp"]}
    expected = owl.chat().ask(QUESTION, schema=schema, max_new_tokens=200)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, [{"role": "user", "content": QUESTION}], response_format=wanted, max_tokens=200)
    assert answer.choices[0].message.content == expected.text
    chosen = ask(client, [{"role": "user", "content": QUESTION}], extra_body={"choices": ["yes", "no"]})
    assert chosen.choices[0].message.content in ("yes", "no")
    unicorn = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "unicorn"}}}
    for bad in (unicorn, {"type": "xml"}):
        with pytest.raises(openai.BadRequestError, match=r"unicorn|xml"):
            ask(client, [{"role": "user", "content": QUESTION}], response_format=bad)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 2}, "one answer"),
    "temperature": ({"temperature": -1}, "temperature"),
    "top_logprobs alone": ({"top_logprobs": 3}, "needs logprobs"),
    "penalty": ({"presence_penalty": 1}, "not supported"),
    "unknown": ({"extra_body": {"wings": 2}}, "wings"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 5000}]}, "positions"),
    "broken image": ({"messages": [{"role": "user", "content": [picture("data:image/png;base64,AAAA")]}]}, "data: URI"),
    "two questions": ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "turns"),
    "role": ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "role"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said(client: openai.OpenAI, case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, **{"messages": [{"role": "user", "content": QUESTION}], **options})
    assert set(refused.value.response.json()["error"]) == {"message", "type", "param", "code"}


def test_many_clients_get_what_each_would_alone(owl: Owl2, client: openai.OpenAI) -> None:
    questions = [
        f"Question {number} about {word}?" for number, word in enumerate(["one", "two", "three", "four", "five", "six"])
    ]
    expected = [owl.chat().ask(text, max_new_tokens=24).text for text in questions]
    got: dict[int, str] = {}

    def one(index: int) -> None:
        answer = ask(client, [{"role": "user", "content": questions[index]}], max_tokens=24)
        got[index] = answer.choices[0].message.content

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(len(questions))] == expected


def test_a_client_that_goes_away_ends_its_answer(server: RunningServer, client: openai.OpenAI) -> None:
    stream = ask(client, [{"role": "user", "content": QUESTION}], max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 5
    while "owl2_requests_open 0.0" not in _get(f"{server.address}/metrics"):
        assert time.monotonic() < until
        time.sleep(0.02)


def _get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        return str(response.read().decode())


def test_other_sites_and_names_are_refused(server: RunningServer) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(f"{server.address}/v1/models", **headers)
        assert refused.value.code == 403
        refused.value.close()
    assert json.loads(_get(f"{server.address}/health", Origin=server.address))["loaded"] is True


def test_the_page_is_served_with_a_strict_policy(server: RunningServer) -> None:
    with urllib.request.urlopen(server.address) as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert b"owl2" in response.read()


def test_sigterm_ends_it_cleanly(bundle_a1: Path, tmp_path: Path) -> None:
    with serving(bundle_a1, tmp_path / "store") as it:
        assert it.stop(signal.SIGTERM) == 0, it.log.read_text()
