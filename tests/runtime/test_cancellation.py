"""Stopping an answer: at any statement, in the middle of a step, from another thread and by Ctrl-C."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from owl2 import Chat, Owl2, Owl2Error
from owl2.runtime.backends.ort.session import OrtOptions, open_session
from owl2.runtime.backends.ort.stoppable import run_stoppable
from owl2.runtime.cancellation import Cancellation, StoppedError
from owl2.runtime.errors import BackendError

LIMIT = 10.0
"""Seconds in which a step must have stopped that would run for hours; how soon it does is measured elsewhere."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    """A graph that multiplies matrices for hours."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("MatMul", ["before", "before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [64, 64]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [64, 64]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["steps", "", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor("steps", TensorProto.INT64, [], [1 << 40])],
    )
    path = tmp_path_factory.mktemp("graphs") / "endless.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return open_session(path, OrtOptions(threads=1))


def run_endless(session: ort.InferenceSession, cancellation: Cancellation) -> Any:
    feeds = {"x": np.eye(64, dtype=np.float32)}
    return run_stoppable("the graph", cancellation, lambda options: session.run(None, feeds, options))


class TestSteps:
    @pytest.mark.parametrize("aside", [False, True], ids=["main thread", "another thread"])
    def test_cancelling_stops_a_step_that_runs(self, endless: ort.InferenceSession, aside: bool) -> None:
        cancellation, asked = Cancellation(), list[float]()

        def cancel() -> None:
            asked.append(time.monotonic())
            cancellation.cancel()

        timer = threading.Timer(0.2, cancel)
        timer.start()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(run_endless, endless, cancellation).result if aside else None
            with pytest.raises(StoppedError):
                run() if run else run_endless(endless, cancellation)
        assert time.monotonic() - asked[0] < LIMIT

    def test_a_cancelled_step_does_not_begin(self, endless: ort.InferenceSession) -> None:
        cancellation = Cancellation()
        cancellation.cancel()
        with pytest.raises(StoppedError):
            run_endless(endless, cancellation)

    def test_ctrl_c_stops_a_step_that_runs(self, endless: ort.InferenceSession) -> None:
        asked: list[float] = []

        def interrupt() -> None:
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(0.2, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_endless(endless, Cancellation())
        assert time.monotonic() - asked[0] < LIMIT

    def test_a_failure_is_no_cancellation(self, endless: ort.InferenceSession) -> None:
        with pytest.raises(BackendError, match=r"^the graph failed: "):
            run_stoppable("the graph", Cancellation(), lambda options: endless.run(["nothing"], {}, options))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_runs_its_own_steps(self) -> None:
        assert run_stoppable("a step", Cancellation(), lambda _: 1) == 1
        if (child := os.fork()) == 0:
            os._exit(run_stoppable("a step", Cancellation(), lambda _: 7))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class Tracer:
    """Notes where Python looks for signals in the runtime's own code; raises KeyboardInterrupt at place number ``at``.

    It looks when a function begins, and when a function of another language has returned.
    """

    def __init__(self, at: int = -1) -> None:
        self.at, self.places = at, list[tuple[str, int, int]]()

    def __enter__(self) -> "Tracer":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        # What is raised while Python closes a generator is lost, a real interrupt too.
        known = frame.f_code.co_name != "<genexpr>" and frame.f_globals.get("__name__", "").startswith("owl2.runtime")
        if known and event in ("call", "c_return"):
            self.places.append((frame.f_code.co_filename, frame.f_lineno, frame.f_lasti))
            if len(self.places) == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    @property
    def ends(self) -> list[int]:
        """Numbers, from 1, at which a place is passed for the first or the last time."""
        first = {place: number for number, place in reversed(list(enumerate(self.places, 1)))}
        last = {place: number for number, place in enumerate(self.places, 1)}
        return sorted({*first.values(), *last.values()})


@pytest.fixture(scope="module")
def model(bundle_a1: Path) -> Iterator[Owl2]:
    with Owl2.load(bundle_a1, threads=1) as owl:
        yield owl


ACTIONS: dict[str, Callable[[Chat, Path], object]] = {
    "ask": lambda chat, image: chat.ask("And this?", images=image, max_new_tokens=3),
    "undo": lambda chat, _: chat.undo(),
    "reset": lambda chat, _: chat.reset(),
    "fork": lambda chat, _: chat.fork(),
}


# A file that is being opened when the interrupt comes is closed by Python itself, which then warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_anywhere_leaves_the_chat_as_before_or_after(model: Owl2, golden: Path, action: str) -> None:
    """Each place at which a signal can be seen is interrupted, the first and the last time that it is passed."""
    image = sorted((golden / "images").glob("*.png"))[0]
    model.chat().ask("What is this?", images=image, max_new_tokens=1)  # opens what is opened with the first image
    begun = model.chat()
    begun.ask("What is this?", max_new_tokens=3)

    def follow(chat: Chat) -> tuple[int, ...]:
        return chat.ask("Why?", max_new_tokens=3).ids

    done = begun.fork()
    model.model.encoder.clear()
    with Tracer() as tracer:
        ACTIONS[action](done, image)
    before, after = begun.messages, done.messages
    expected = {repr(before): follow(begun.fork()), repr(after): follow(done)}
    assert len(tracer.ends) >= {"ask": 100, "undo": 3, "reset": 5, "fork": 10}[action]
    for at in tracer.ends:
        chat = begun.fork()
        model.model.encoder.clear()
        interrupted = Tracer(at)
        with contextlib.suppress(KeyboardInterrupt), interrupted:
            ACTIONS[action](chat, image)
        assert len(interrupted.places) == at, "not every run of the action passes the same places"
        left = chat.messages
        assert left in (before, after), interrupted.places[-1]
        assert follow(chat) == expected[repr(left)], interrupted.places[-1]


INTERRUPTED = """
import random, signal, sys
from owl2 import Owl2

rng, owl = random.Random(1), Owl2.load(sys.argv[1], threads=1)
expected = owl.chat().ask("Why?", max_new_tokens=3).ids
signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupted = 0
for _ in range(150):
    chat = owl.chat()
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.012))
    try:
        while True:
            chat.ask("What is this?", max_new_tokens=8)
            chat.reset()
    except KeyboardInterrupt:
        interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    chat.reset()
    assert chat.ask("Why?", max_new_tokens=3).ids == expected
print(interrupted)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
def test_interrupts_at_any_time_neither_hang_nor_become_other_errors(bundle_a1: Path) -> None:
    """They come within the code of libraries, too."""
    command = [sys.executable, "-c", INTERRUPTED, str(bundle_a1)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (told.returncode, told.stdout) == (0, "150\n"), told.stderr


@pytest.mark.slow
def test_a_stopped_answer_writes_nothing_into_the_next(model: Owl2, golden: Path) -> None:
    """Cancel from another thread, ask at once: 200 times at different moments."""
    images = sorted((golden / "images").glob("*.png"))[:3]
    rng = np.random.default_rng(0)
    cold = [model.chat().ask("What?", images=image, max_new_tokens=6).ids for image in images]
    chat = model.chat()
    for turn in range(200):
        stream = chat.stream("Describe this at length, please.", images=images[turn % 3], max_new_tokens=40)
        reading = threading.Thread(target=list, args=(stream,))
        reading.start()
        time.sleep(rng.random() * 0.02)
        stream.cancel()
        chat.reset()
        other = int(rng.integers(3))
        assert chat.ask("What?", images=images[other], max_new_tokens=6).ids == cold[other]
        reading.join()
        chat.reset()


def test_a_replaced_stream_cannot_be_read_on(model: Owl2, golden: Path) -> None:
    image = sorted((golden / "images").glob("*.png"))[0]
    cold = model.chat().ask("Why?", images=image, max_new_tokens=8).ids
    chat = model.chat()
    old = chat.stream("What?", max_new_tokens=20)
    next(old)
    new, ids = chat.stream("Why?", images=image, max_new_tokens=8), []
    for chunk in new:
        with pytest.raises(Owl2Error, match="its chat went on without it"):
            next(old)
        ids.append(chunk.token_id)
    assert tuple(ids) == cold
