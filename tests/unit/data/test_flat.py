"""Many short things in two arrays, against the lists they stand for."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3_ray.data.flat import FlatArrays, FlatStrings

# Names of files: any text, and the lone surrogates by which Python carries bytes that are no UTF-8.
names = st.text(st.one_of(st.characters(codec="utf-8"), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)))


@given(st.lists(names))
def test_strings_are_those_of_the_list(strings: list[str]) -> None:
    flat: FlatStrings = pickle.loads(pickle.dumps(FlatStrings(strings)))
    assert list(flat) == [flat[number] for number in range(len(flat))] == strings
    assert flat[1:] == strings[1:] and flat[::-2] == strings[::-2]
    assert [flat[-1 - number] for number in range(len(flat))] == strings[::-1]
    with pytest.raises(IndexError):
        flat[len(strings)]


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=5)))
def test_arrays_are_those_of_the_list(lists: list[list[int]]) -> None:
    flat: FlatArrays = pickle.loads(pickle.dumps(FlatArrays.of([np.array(part, dtype=np.int64) for part in lists])))
    assert len(flat) == len(lists) and [array.tolist() for array in flat] == lists
    assert [flat[number].tolist() for number in range(len(flat))] == lists


def test_what_is_pickled_has_its_bytes_beside_it_and_no_object_a_string() -> None:
    """Buffers that lie beside a pickle are what Ray maps and does not copy."""
    buffers: list[pickle.PickleBuffer] = []
    strings = [f"folder/data_{number}.pt" for number in range(10_000)]
    content = pickle.dumps(FlatStrings(strings), protocol=5, buffer_callback=buffers.append)
    assert len(content) < 1000
    assert sum(buffer.raw().nbytes for buffer in buffers) == sum(map(len, strings)) + 8 * len(strings)
