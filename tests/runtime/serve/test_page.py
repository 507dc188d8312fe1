"""The page in a real browser."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from numpy.typing import NDArray
from playwright.sync_api import Browser, Locator, Page, Request, expect, sync_playwright
from serving import RunningServer, serving

from owl2 import Owl2
from owl2.runtime.preprocess import as_seen, read_image

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
IMAGES = sorted((GOLDEN / "images").glob("*.png"))
SECONDS = 20_000
REFUSED = re.compile("status of (400|412)").search
"""What the page asks for and the server refuses, as it should."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    yield from opened(browser, server.address)


def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page, which must ask nobody but its server and report no error."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    # A refusal is told on the page; the browser writes it to its console as well.
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" and not REFUSED(message.text) else None,
    )
    page.goto(address)
    yield page
    own = (address.partition("/#")[0], "data:", "blob:")
    foreign = [url for url in asked if not url.startswith(own)]
    context.close()
    assert (foreign, errors) == ([], [])


LIST_TIME = 30_000
"""Milliseconds: the list is read again once an answer is saved, after its end is shown."""


def ask(page: Page, text: str) -> None:
    page.get_by_label("Question", exact=True).fill(text)
    turns = page.locator("#turns .assistant")
    before = turns.count()
    page.get_by_role("button", name="Ask").click()
    turns.nth(before).wait_for()  # it has begun: before, too, nothing can be stopped
    page.get_by_role("button", name="Stop").wait_for(state="hidden")


def answers(page: Page) -> list[str]:
    return list(page.locator("#turns .assistant .text").all_inner_texts())


def short(page: Page, tokens: int = 12) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens of an answer").fill(str(tokens))
    page.get_by_text("Settings").click()


def test_ask_about_pictures_and_go_on_after_a_reload(page: Page) -> None:
    short(page)
    page.get_by_label("Images", exact=True).set_input_files([str(path) for path in IMAGES[:2]])
    page.locator("#pending img").nth(1).wait_for()
    ask(page, "What are these?")
    assert len(answers(page)) == 1
    assert page.locator("#turns .user img").count() == 2
    page.locator("#turns .figures").last.wait_for()
    ask(page, "Why?")
    assert "tokens reused" in page.locator("#turns .figures").last.inner_text()
    before = answers(page)
    page.reload()
    page.locator("#turns .assistant").nth(1).wait_for()
    assert answers(page) == before
    expect(page.locator("#list .open").first).to_have_text("What are these?", timeout=LIST_TIME)
    ask(page, "And then?")
    assert "tokens reused" in page.locator("#turns .figures").last.inner_text()


def test_a_dropped_picture(page: Page) -> None:
    short(page)
    drop = """async ([bytes, name]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, [list(IMAGES[0].read_bytes()), "dropped.png"])
    page.get_by_role("img", name="dropped.png").wait_for()
    page.get_by_role("button", name="Remove dropped.png").click()
    assert page.locator("#pending img").count() == 0
    page.evaluate(drop, [[1, 2, 3], "broken.png"])
    page.get_by_text("broken.png:").wait_for()


TURNED = Path(__file__).parent.parent / "images" / "turned.jpg"
HEIC = Path(__file__).parent.parent / "images" / "scene.heic"
PIXELS = """image => image.decode().then(() => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const drawn = canvas.getContext("2d");
  drawn.drawImage(image, 0, 0);
  return [canvas.width, canvas.height, [...drawn.getImageData(0, 0, canvas.width, canvas.height).data]];
})"""


def pixels(image: Locator) -> NDArray[np.uint8]:
    width, height, values = image.evaluate(PIXELS)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def sent(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.post_data or "")
    return body


def test_pictures_are_shown_as_the_model_sees_them(page: Page, owl: Owl2) -> None:
    def seen(mode: str) -> NDArray[np.uint8]:
        return np.asarray(as_seen(read_image(TURNED).image, owl.config.preprocess, mode))

    short(page)
    page.get_by_label("Images", exact=True).set_input_files([str(TURNED)])
    waiting = page.locator("#pending img")
    for mode in ("pad", "crop", "resize", "pad"):
        page.get_by_label("How turned.jpg is fitted").select_option(mode)
        page.locator(f"#pending img[src$='seen={mode}']").wait_for()
        np.testing.assert_array_equal(pixels(waiting), seen(mode))
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What is it?")
    [part, _] = sent(asked.value)["messages"][0]["content"]
    assert part["image_url"]["preprocess"] == "pad"
    chat = owl.chat()
    assert answers(page) == [chat.ask("What is it?", [TURNED], preprocess="pad", max_new_tokens=12).text]
    shown = page.locator("#turns .user img")
    assert pixels(shown).shape[:2] == read_image(TURNED).image.size[::-1]
    toggle = page.get_by_role("button", name="As the model sees it")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "true"
    np.testing.assert_array_equal(pixels(shown), seen("pad"))
    toggle.click()
    assert pixels(shown).shape[:2] == read_image(TURNED).image.size[::-1]


def test_a_picture_that_browsers_do_not_know(page: Page) -> None:
    page.get_by_label("Images", exact=True).set_input_files([str(HEIC)])
    page.get_by_label("How scene.heic is fitted").wait_for()
    page.locator("#pending img").evaluate("image => image.decode()")  # raises if it cannot be shown
    short(page, 4)
    ask(page, "What is it?")
    assert pixels(page.locator("#turns .user img")).shape[:2] == read_image(HEIC).image.size[::-1]


def test_settings(page: Page) -> None:
    page.get_by_text("Settings").click()
    facts = page.locator("#facts").inner_text().split("\n")
    assert {"Weights", "fp32", "K/V cache", "Context", "2048 positions", "Device", "cpu, native"} <= set(facts)
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens of an answer").fill("5")
    page.get_by_label("Instructions before the first question").fill("Answer in verse.")
    page.get_by_label("Pictures are fitted by").select_option("crop")
    page.reload()  # they stay
    page.get_by_text("Settings").click()
    assert page.get_by_label("Pictures are fitted by").input_value() == "crop"
    page.get_by_label("Images", exact=True).set_input_files([str(IMAGES[0])])
    page.locator("#pending img[src$='seen=crop']").wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What is it?")
    request = sent(asked.value)
    assert (request["temperature"], request["max_tokens"]) == (0.7, 5)
    assert request["messages"][0] == {"role": "system", "content": "Answer in verse."}
    assert request["messages"][1]["content"][0]["image_url"]["preprocess"] == "crop"


def test_stop_continue_again_and_edit(page: Page) -> None:
    short(page, 900)
    page.get_by_label("Question", exact=True).fill("Tell me a long story.")
    # The small model is quicker than a hand.
    page.evaluate("""new MutationObserver((_, observer) => {
      if ((document.querySelector("#turns .assistant .text")?.textContent.length ?? 0) < 20) return;
      observer.disconnect();
      document.getElementById("stop").click();
    }).observe(document.getElementById("turns"), { childList: true, subtree: true, characterData: true })""")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Continue").wait_for()
    [begun] = answers(page)
    short(page, 8)
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    [longer] = answers(page)
    assert longer.startswith(begun)
    assert len(longer) > len(begun)
    page.get_by_role("button", name="Again").click()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    [another] = answers(page)
    assert another != longer
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Question", exact=True).input_value() == "Tell me a long story."
    ask(page, "Tell me a short story.")
    assert page.locator("#turns .user .text").all_inner_texts() == ["Tell me a short story."]


def test_the_page_asks_for_the_key(browser: Browser, bundle_a1: Path, tmp_path: Path) -> None:
    with serving(bundle_a1, tmp_path / "store", "--api-key", "päss word;1") as server:
        context = browser.new_context()
        page = context.new_page()
        page.on("dialog", lambda dialog: dialog.accept("päss word;1"))
        page.goto(server.address)
        short(page)
        page.get_by_label("Images", exact=True).set_input_files(str(IMAGES[0]))
        page.locator("#pending img").evaluate("image => image.decode()")  # raises if it cannot be shown
        ask(page, "What is this?")
        assert len(answers(page)) == 1
        context.close()


def test_nothing_is_lost_when_something_else_is_done_meanwhile(page: Page) -> None:
    short(page, 200)
    for number in range(3):
        page.get_by_label("Question", exact=True).fill(f"Unfinished {number}")
        page.get_by_role("button", name="Ask").click()
        page.get_by_role("button", name="New conversation").click()
    for number in range(3):
        page.locator("#list").get_by_text(f"Unfinished {number}").wait_for()
    # One conversation is opened right after another: the later one is shown.
    names = ["Unfinished 0", "Unfinished 2", "Unfinished 1"]
    for name in names:
        page.locator("#list").get_by_text(name, exact=True).click()
    page.locator("#turns .user .text", has_text=names[-1]).wait_for()
    short(page, 6)
    # Again and Edit, while an answer runs.
    ask(page, "Second")
    before = page.locator("#turns > li").count()
    for _ in range(3):
        page.get_by_role("button", name="Again").last.click()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    assert page.locator("#turns > li").count() == before
    assert page.locator("#turns .bad").count() == 0
    shown = answers(page)  # the last may be empty: a random model ends where it likes
    page.reload()
    page.locator("#turns > li").nth(before - 1).wait_for()
    assert answers(page) == shown


HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>[x](javascript:alert(1))'


def answered(text: str) -> str:
    """A stream that says this, as the server writes it."""
    said: dict[str, Any] = {"delta": {"content": text}, "finish_reason": None}
    events = [json.dumps({"choices": [part]}) for part in (said, {"delta": {}, "finish_reason": "stop"})]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


def answer_with(page: Page, text: str) -> None:
    """Let the model say this."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=answered(text), content_type="text/event-stream"),
    )


def test_hostile_texts_are_text(page: Page) -> None:
    """Of people, and of the model."""
    answer_with(page, HOSTILE)
    ask(page, HOSTILE)
    for _ in range(2):
        assert page.locator("#turns .user .text").inner_text() == HOSTILE
        assert answers(page) == [HOSTILE]
        expect(page.locator("#list .open").first).to_have_text(HOSTILE[:80], timeout=LIST_TIME)
        assert page.title() == "owl2"
        assert page.locator("#turns img, #turns script, #turns .text a").count() == 0
        page.reload()
        page.locator("#turns .assistant").wait_for()


def test_stopped_before_the_first_word(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_label("Question", exact=True).fill("First")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Continue").wait_for()
    page.unroute("**/v1/chat/completions")
    short(page, 6)
    ask(page, "Second")
    assert page.locator("#turns .user .text").all_inner_texts() == ["First", "Second"]
    assert page.locator("#turns .bad").count() == 0


def test_an_answer_with_a_placeholder(page: Page) -> None:
    answer_with(page, "see <|image|>")
    ask(page, "What is <|image|>?")
    page.unroute("**/v1/chat/completions")
    short(page, 6)
    ask(page, "And now?")
    assert page.locator("#turns .bad").count() == 0


def test_two_tabs_at_once(browser: Browser, server: RunningServer) -> None:
    tabs = [opened(browser, server.address) for _ in range(2)]
    pages = [next(tab) for tab in tabs]
    for number, page in enumerate(pages):
        short(page, 40)
        page.get_by_label("Question", exact=True).fill(f"Question {number}")
        page.get_by_role("button", name="Ask").click()
    for number, page in enumerate(pages):
        page.get_by_role("button", name="Stop").wait_for(state="hidden")
        assert page.locator("#turns .user .text").all_inner_texts() == [f"Question {number}"]
        assert len(answers(page)) == 1
    for tab in tabs:
        assert next(tab, None) is None  # the checks behind its end


def test_two_tabs_on_one_conversation_lose_nothing(browser: Browser, server: RunningServer) -> None:
    first = opened(browser, server.address)
    page = next(first)
    short(page, 6)
    ask(page, "Base")
    page.locator("#list [aria-current=true]").wait_for()
    time.sleep(0.3)
    second = opened(browser, page.url)
    other = next(second)
    other.locator("#turns .assistant").wait_for()
    short(other, 6)
    ask(page, "From one")
    time.sleep(0.3)
    ask(other, "From the other")
    other.get_by_text("as a copy").wait_for()
    assert other.url != page.url
    for shown, last in ((page, "From one"), (other, "From the other")):
        shown.reload()
        shown.locator("#turns .assistant").nth(1).wait_for()
        assert shown.locator("#turns .user .text").all_inner_texts() == ["Base", last]
    for tab in (first, second):
        next(tab, None)


def test_keys_and_history(page: Page) -> None:
    short(page, 6)
    ask(page, "One")
    place = page.url
    page.get_by_role("link", name="Skip to the question").focus()
    page.keyboard.press("Enter")
    assert page.url == place
    assert page.evaluate("document.activeElement.id") == "question"
    page.get_by_label("Images", exact=True).set_input_files(str(IMAGES[0]))
    fit = page.get_by_label(f"How {IMAGES[0].name} is fitted")
    fit.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.get_by_role("button", name="New conversation").click()
    page.go_back()
    page.locator("#turns .assistant").wait_for()
    assert page.locator("#turns .user .text").all_inner_texts() == ["One"]
    assert page.locator("#told").inner_text().startswith("The answer ")


def test_a_refused_picture_is_told_beside_a_good_one(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.get_by_label("Images", exact=True).set_input_files([str(broken), str(IMAGES[0])])
    page.locator("#pending img").wait_for()
    assert page.locator("#state").inner_text().startswith("broken.png:")


def test_a_restarted_server_goes_on(browser: Browser, bundle_a1: Path, tmp_path: Path) -> None:
    options = ("--disk-cache", "100MiB")
    with serving(bundle_a1, tmp_path / "store", *options, log=tmp_path / "first.log") as first:
        for page in opened(browser, first.address):
            short(page)
            page.get_by_label("Images", exact=True).set_input_files(str(IMAGES[0]))
            page.locator("#pending img").wait_for()
            ask(page, "What is this?")
            before, place = answers(page), page.url.partition("#")[2]
            time.sleep(0.5)  # until it is saved
        assert first.stop() == 0
    with serving(bundle_a1, tmp_path / "store", *options, log=tmp_path / "second.log") as second:
        for page in opened(browser, f"{second.address}/#{place}"):
            page.locator("#turns .assistant").wait_for()
            assert answers(page) == before
            ask(page, "Why?")
            assert len(answers(page)) == 2
            assert "tokens reused" in page.locator("#turns .figures").last.inner_text()
        second.process.kill()
    with serving(bundle_a1, tmp_path / "store", *options, log=tmp_path / "third.log") as third:
        for page in opened(browser, f"{third.address}/#{place}"):
            page.locator("#turns .assistant").nth(1).wait_for()
            ask(page, "And now?")  # killed at once: the text is whole, its cache is not
            assert len(answers(page)) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_it_fits_every_width(browser: Browser, server: RunningServer, tmp_path: Path, width: int, scheme: str) -> None:
    for page in opened(browser, server.address, viewport={"width": width, "height": 800}, color_scheme=scheme):
        page.get_by_label("Images", exact=True).set_input_files(str(IMAGES[0]))
        page.locator("#pending img").wait_for()
        ask(page, "What is this? " + "wideword" * 30)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 390:
            page.get_by_role("button", name="Conversations").click()
            page.locator("#list .open").first.wait_for()
            page.mouse.click(width - 10, 400)
            page.locator("#list .open").first.wait_for(state="hidden")
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png")
