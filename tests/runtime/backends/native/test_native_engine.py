"""The native core on the sample bundle."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_NATIVE

from owl2.runtime.backends.choose import resolve_options
from owl2.runtime.backends.native import support
from owl2.runtime.backends.native.support import reason_against
from owl2.runtime.bundle import read_manifest
from owl2.runtime.engine import EngineOptions
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.load import Loaded, open_bundle
from owl2.runtime.spec import KvType

pytestmark = NEEDS_NATIVE
ROWS = 40


def opened(bundle: Path, kv_cache: KvType = "fp32", threads: int = 2, backend: str = "native") -> Loaded:
    return open_bundle(bundle, EngineOptions(threads=threads, kv_cache=kv_cache, backend=backend))[1]  # type: ignore[arg-type]


@pytest.fixture(params=["fp32", "fp16", "int8"])
def model(request: pytest.FixtureRequest, sample_bundle: Path) -> Iterator[Loaded]:
    loaded = opened(sample_bundle, request.param)
    yield loaded
    loaded.close()


def inputs(model: Loaded, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = model.table.rows([int(token) for token in random.integers(3, model.config.decoder.vocab_size, ROWS)])
    modality = np.zeros(ROWS, np.int64)
    modality[5:20] = 1
    return rows, modality


def logits(model: Loaded, steps: list[int], seed: int = 0) -> np.ndarray:
    """Logits [ROWS, V] of the inputs in steps that end at these rows."""
    rows, modality = inputs(model, seed)
    buffers, parts, start = model.engine.allocate(256, None), [], 0
    for end in steps:
        wanted = np.arange(end - start)
        parts.append(model.engine.prefill(rows[start:end], modality[start:end], start, buffers, wanted))
        start = end
    return np.concatenate(parts)


def test_a_row_does_not_depend_on_the_step_it_is_in(model: Loaded) -> None:
    whole = logits(model, [ROWS])
    for steps in (list(range(1, ROWS + 1)), [3, 4, 21, ROWS]):
        np.testing.assert_array_equal(logits(model, steps), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_nor_on_the_number_of_threads(sample_bundle: Path, threads: int) -> None:
    one, two = opened(sample_bundle, "int8", threads), opened(sample_bundle, "int8")
    np.testing.assert_array_equal(logits(one, [ROWS]), logits(two, [ROWS]))
    one.close()
    two.close()


def test_it_computes_what_onnxruntime_does(sample_bundle: Path) -> None:
    ours, theirs = opened(sample_bundle), opened(sample_bundle, backend="onnxruntime")
    differences, sizes = [], []
    for seed in range(6):
        expected = logits(theirs, [ROWS], seed)
        differences.append(np.sqrt(((logits(ours, [ROWS], seed) - expected) ** 2).mean(1)))
        sizes.append(np.sqrt((expected**2).mean()))
    # Sums in another order differ by 1e-6, until one falls on the other side of the middle between two int8 codes; the
    # rows from there on differ by the error of int8 activations. Where that happens depends on the processor.
    assert (np.stack(differences) < 1e-4).mean() > 0.1
    assert (np.stack(differences).mean(1) < 0.03 * np.array(sizes)).all()
    ours.close()
    theirs.close()


def test_a_processor_without_fast_kernels_is_left_to_onnxruntime(
    sample_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(sample_bundle)
    monkeypatch.setenv("OWL2_CPU", "scalar")
    assert reason_against(manifest) is None  # asked for
    monkeypatch.setattr(support, "native_kernels", lambda: "scalar")
    monkeypatch.delenv("OWL2_CPU")
    assert reason_against(manifest) == "the native core has no fast kernels for this processor"
    assert resolve_options(manifest, EngineOptions()).backend == "onnxruntime"
    assert resolve_options(manifest, EngineOptions(backend="native")).backend == "native"


def test_an_instruction_set_that_is_not_there(sample_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL2_CPU", "abacus")
    with pytest.raises(BackendUnavailableError, match=r"OWL2_CPU is abacus, and this processor has .*scalar; set"):
        open_bundle(sample_bundle, EngineOptions())


def kernels() -> list[str]:
    from owl2.runtime import _native

    return _native.available_kernels()


def test_every_instruction_set_gives_the_same_logits(sample_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for name in kernels():
        monkeypatch.setenv("OWL2_CPU", name)
        model = opened(sample_bundle, "fp16")
        made[name] = logits(model, [ROWS]).tobytes()
    assert len(set(made.values())) == 1, made.keys()


@pytest.mark.parametrize("kv_cache", ["fp32", "fp16", "int8"])
def test_a_sequence_among_others_is_as_alone(sample_bundle: Path, kv_cache: KvType) -> None:
    """Sequences of different lengths and pasts, in any order, in one step."""
    from owl2.runtime.backends.native.engine import NativeEngine
    from owl2.runtime.engine import SequenceRows

    model = opened(sample_bundle, kv_cache)
    engine = model.engine
    assert isinstance(engine, NativeEngine)
    random = np.random.default_rng(0)
    width = model.config.decoder.hidden_size
    lengths = [(1, 0), (7, 0), (1, 20), (3, 63), (40, 5), (1, 300)]
    pasts = [random.standard_normal((past, width)).astype(np.float32) for _, past in lengths]
    news = [random.standard_normal((count, width)).astype(np.float32) for count, _ in lengths]
    modalities = [random.integers(0, 2, count) for count, _ in lengths]

    def filled(number: int) -> SequenceRows:
        past, new = pasts[number], news[number]
        buffers = engine.allocate(len(past) + len(new), None)
        if len(past):
            engine.prefill(past, np.zeros(len(past), np.int64), 0, buffers, np.array([0]))
        return SequenceRows(new, modalities[number], len(past), buffers)

    alone = [engine.step([filled(i)], np.arange(count)) for i, (count, _) in enumerate(lengths)]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 4, 2], [2, 0], [4, 4]):
        together = engine.step([filled(i) for i in order], np.arange(sum(len(news[i]) for i in order)))
        np.testing.assert_array_equal(together, np.concatenate([alone[i] for i in order]))


def test_the_vision_side_is_opened_with_the_first_image(sample_bundle: Path) -> None:
    code = """
import sys
from owl2 import Owl2
owl = Owl2.load(sys.argv[1], backend="native", warm=sys.argv[2] == "warm")
print("onnxruntime" in sys.modules)
owl.generate("Hello", max_new_tokens=1)
print("onnxruntime" in sys.modules)
"""
    for how, expected in (("cold", "False\nFalse\n"), ("warm", "True\nTrue\n")):
        command = [sys.executable, "-c", code, str(sample_bundle), how]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


def test_two_processes_share_the_weights(sample_bundle: Path) -> None:
    """What a second process adds is its own memory: the pages of the file are those of the first."""
    code = """
import re, sys
from owl2 import Owl2
owl = Owl2.load(sys.argv[1], backend="native")
owl.generate("Hello", max_new_tokens=1)
print(flush=True)
sys.stdin.readline()
text = open("/proc/self/smaps").read()
part = next(part for part in re.split(r"(?m)^(?=[0-9a-f]+-)", text) if "decoder.onnx.data" in part)
print(*(re.search(rf"{name}: +(\\d+) kB", part)[1] for name in ("Rss", "Private_Clean", "Private_Dirty")))
"""
    command = [sys.executable, "-c", code, str(sample_bundle)]
    with contextlib.ExitStack() as running:
        both = [
            running.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        for one in both:
            assert one.stdout is not None
            one.stdout.readline()
        for one in both:
            resident, clean, dirty = map(int, one.communicate("go\n")[0].split())
            assert resident > 1000
            assert dirty == 0
            # The other may have ended when the second looks. Around a page that is read, the kernel maps those that it
            # can lock at that moment: a few pages that nobody reads may so be mapped by one process alone.
            if one is both[0]:
                assert clean < resident / 50
