"""Hashes of a checkpoint: the same however an array is read, and another for every change."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from growkit.checkpoint.hashes import (
    ALGORITHMS,
    HASHES,
    Hashed,
    begin_hash,
    find_changed,
    hash_array,
    hash_meta,
    make_hashes,
    read_hashes,
    view_bytes,
)
from growkit.errors import GrowkitError

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_an_array_in_pieces_has_the_hash_of_the_whole():
    found = begin_hash()
    for layer in ARRAY:
        found.update(view_bytes(layer))
    assert found.hexdigest() == hash_array(ARRAY)


def test_the_order_in_memory_does_not_matter():
    assert hash_array(np.asfortranarray(ARRAY)) == hash_array(ARRAY)


@pytest.mark.parametrize(
    "other",
    [
        ARRAY.astype(np.float64),
        np.where(ARRAY == 5, 6, ARRAY),
        np.zeros_like(ARRAY),
    ],
    ids=["dtype", "value", "zeros"],
)
def test_another_array_has_another_hash(other):
    assert hash_array(other) != hash_array(ARRAY)


def test_scalars_empty_arrays_and_bfloat16_have_hashes():
    arrays = [np.asarray(3, np.int32), np.empty((0, 4)), ARRAY.astype(ml_dtypes.bfloat16)]
    assert len({hash_array(array) for array in arrays}) == 3


def test_what_changed_is_named():
    meta = {"config": {"b": 1, "a": 1e-7}, "record": {"loss": float("nan"), "sizes": (1, 2)}}
    files = {"tokenizer.json": b"{}"}
    arrays = {"params.x": hash_array(ARRAY)}
    meta[HASHES] = make_hashes(arrays, files, meta)
    read = json.loads(json.dumps(meta))
    assert read_hashes(read, "x") == read[HASHES] and read_hashes({}, "x") is None
    assert hash_meta(read) == hash_meta(meta)
    assert find_changed(read[HASHES], arrays, files, read) is None
    changed = {"params.x": hash_array(ARRAY + 1)}
    assert find_changed(read[HASHES], changed, files, read) == "the array 'params.x'"
    assert find_changed(read[HASHES], arrays, {"tokenizer.json": b"[]"}) == (
        "the file 'tokenizer.json'"
    )
    read["record"]["loss"] = 3.0
    assert find_changed(read[HASHES], arrays, files, read) == "the meta"


def test_hashes_of_another_algorithm_are_no_hashes_that_agree():
    meta = {HASHES: {"algorithm": "blake9", "arrays": {}}}
    with pytest.raises(GrowkitError, match="are of 'blake9', and this version .* --no-verify"):
        read_hashes(meta, "x")
    with pytest.raises(GrowkitError, match="blake9"):
        Hashed("blake9", {"a": "0"}, lambda name: iter(())).find_changed()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_known_algorithm_is_compared(algorithm):
    meta = {"record": {"step": 3}}
    hashes = {
        "algorithm": algorithm,
        "arrays": {"params.x": hash_array(ARRAY, algorithm)},
        "meta": hash_meta(meta, algorithm),
    }
    same = {"params.x": hash_array(ARRAY, algorithm)}
    assert find_changed(hashes, same, meta=meta) is None
    other = {"params.x": hash_array(ARRAY + 1, algorithm)}
    assert find_changed(hashes, other, meta=meta) == "the array 'params.x'"
