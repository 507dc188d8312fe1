"""The cache knows what it holds; merging names every position by what decides it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from owl2 import ContextOverflowError, Owl2Error
from owl2.runtime.backends.ort.engine import OrtBuffers, OrtEngine
from owl2.runtime.bundle import Bundle
from owl2.runtime.config import IMAGE_TOKEN_ID
from owl2.runtime.engine import own
from owl2.runtime.families.mplug_owl2.positions import digests_of, embed, merge
from owl2.runtime.kv_cache import GROWTH, Key, KvCache
from owl2.runtime.token_table import ArrayTable


@pytest.fixture(scope="module")
def engine(bundle_a1: Path) -> OrtEngine:
    return OrtEngine(Bundle.open(bundle_a1))


keys = st.lists(st.one_of(st.integers(0, 3), st.tuples(st.sampled_from("ab"), st.integers(0, 2))), max_size=8)


@given(held=keys, wanted=keys)
def test_shared_prefix_is_the_longest_common_one(engine: OrtEngine, held: list[Key], wanted: list[Key]) -> None:
    cache = KvCache(engine, 100)
    cache.claim().commit(held)
    count = cache.shared_prefix(wanted)
    assert held[:count] == wanted[:count]
    assert count == min(len(held), len(wanted)) or held[count] != wanted[count]


def test_buffers_grow_in_steps_and_keep_their_content(engine: OrtEngine) -> None:
    cache = KvCache(engine, 2 * GROWTH + 10)
    claim = cache.claim()
    first = own(claim.reserve(5), OrtBuffers)
    for array in first.arrays:
        array[:, :, :5] = np.arange(5)[:, None]
    claim.commit(range(5))
    assert claim.reserve(GROWTH - 5) is first
    second = own(claim.reserve(GROWTH), OrtBuffers)
    assert second.capacity == 2 * GROWTH
    assert all((array[:, :, :5] == np.arange(5)[:, None]).all() for array in second.arrays)
    claim.commit(range(GROWTH))
    assert claim.reserve(GROWTH).capacity == 2 * GROWTH + 10
    assert cache.nbytes == sum(array.nbytes for array in own(claim.reserve(1), OrtBuffers).arrays)


def test_reserving_changes_nothing_and_truncating_forgets(engine: OrtEngine) -> None:
    cache = KvCache(engine, 50)
    claim = cache.claim()
    claim.commit([1, 2, 3])
    claim.reserve(10)
    assert (cache.length, cache.shared_prefix([1, 2, 3, 4])) == (3, 3)
    claim.truncate(1)
    assert (cache.length, cache.shared_prefix([1, 2, 3])) == (1, 1)
    cache.clear()
    assert (cache.length, cache.nbytes) == (0, 0)


def test_more_than_the_context_is_refused_with_the_numbers(engine: OrtEngine) -> None:
    cache = KvCache(engine, 8)
    claim = cache.claim()
    claim.commit([1, 2, 3])
    with pytest.raises(ContextOverflowError, match="holds 8 positions: 3 are in use and 6 more are needed") as caught:
        claim.reserve(6)
    assert (caught.value.used, caught.value.requested, caught.value.context) == (3, 6, 8)
    assert cache.length == 3


def test_only_the_newest_claim_may_write(engine: OrtEngine) -> None:
    cache = KvCache(engine, 50)
    old = cache.claim()
    old.commit([1, 2])
    new = cache.claim()
    for write in (lambda: old.commit([3]), lambda: old.truncate(0), lambda: old.reserve(1)):
        with pytest.raises(Owl2Error, match="its chat went on without it"):
            write()
    assert cache.shared_prefix([1, 2, 3]) == 2
    new.commit([4])
    assert cache.shared_prefix([1, 2, 4]) == 3


def test_placeholders_become_rows_of_their_images_in_order() -> None:
    merged = merge([1, IMAGE_TOKEN_ID, 5, IMAGE_TOKEN_ID], ["b", "a"], 2)
    assert merged == [1, ("b", 0), ("b", 1), 5, ("a", 0), ("a", 1)]
    assert digests_of([*merged, ("b", 0)]) == ["b", "a"]


def test_embedding_takes_rows_from_the_table_and_from_images() -> None:
    table = ArrayTable(np.arange(12, dtype=np.float16).reshape(6, 2))
    rows = {"a": np.full((2, 2), -1, np.float32), "b": np.full((2, 2), -2, np.float32)}
    embeds, modality = embed([5, ("b", 1), ("a", 0), 0], table, rows)
    assert embeds.dtype == np.float32
    np.testing.assert_array_equal(embeds, [[10, 11], [-2, -2], [-1, -1], [0, 1]])
    assert modality.tolist() == [0, 1, 1, 0]
