"""Token files: ours read by Megatron, Megatron's read by us, and every kind of breakage refused."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growkit.errors import GrowkitError, UsageError
from trainer.data.checked import verify
from trainer.data.tokens import TokenFile, TokenWriter, select_token_dtype

DOCUMENTS = [[1, 2, 3, 0], [4, 0], [], [5, 6, 7, 8, 9, 0]]


def write(directory, documents=DOCUMENTS, vocab_size=10, manifest=True):
    directory.mkdir()
    with TokenWriter(directory, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64))
    if manifest:
        content = {**writer.summary(), "vocab_size": vocab_size, "end_of_text": 0}
        (directory / "manifest.json").write_text(json.dumps(content))
    return directory


def refused(path, kind, *fragments):
    """Opening the path raises exactly this kind of refusal, naming these things."""
    with pytest.raises(GrowkitError) as caught:
        TokenFile.open(path)
    assert caught.type is kind
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_written_directory_reads_back(tmp_path):
    file = TokenFile.open(write(tmp_path / "data"))
    assert file.tokens.tolist() == sum(DOCUMENTS, [])
    assert file.documents.tolist() == [0, 4, 6, 6, 12]
    assert (len(file), file.dtype, file.manifest["documents"]) == (12, np.uint16, 4)
    assert isinstance(file.tokens, np.memmap)
    verify(file)


SOME_DOCUMENTS = st.lists(st.lists(st.integers(0, 69_999), max_size=9), min_size=1, max_size=9)


@given(SOME_DOCUMENTS, st.sampled_from([0, 70_000]))
@settings(deadline=None, max_examples=40)
def test_any_documents_read_back(tmp_path_factory, documents, vocab_size):
    documents = [[*document, 0] for document in documents]
    vocab_size = vocab_size or max(map(max, documents)) + 1
    directory = write(tmp_path_factory.mktemp("any") / "data", documents, vocab_size)
    file = TokenFile.open(directory)
    bounds = file.documents
    assert [
        file.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)
    ] == documents


@pytest.mark.parametrize("name", ["data", "data/tokens", "data/tokens.bin", "data/tokens.idx"])
def test_every_name_of_the_pair_opens_it(tmp_path, name):
    write(tmp_path / "data")
    file = TokenFile.open(tmp_path / name)
    assert len(file) == 12
    assert file.manifest is not None


def test_a_prefix_with_dots_opens(tmp_path):
    write(tmp_path / "data", manifest=False)
    (tmp_path / "data/tokens.bin").rename(tmp_path / "pile_v1.2_document.bin")
    (tmp_path / "data/tokens.idx").rename(tmp_path / "pile_v1.2_document.idx")
    assert TokenFile.open(tmp_path / "pile_v1.2_document").manifest is None


def test_the_dtype_is_megatrons():
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for vocab_size in (10, 65_499, 65_500, 65_536, 200_000):
        assert select_token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [10, 70_000])
def test_megatron_reads_ours(tmp_path, vocab_size):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "data", vocab_size=vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "data/tokens"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def build_theirs(tmp_path, dtype, documents):
    """A pair by Megatron's own builder; a document is a list of sequences."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    return tmp_path / "theirs"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path, dtype):
    prefix = build_theirs(tmp_path, dtype, [[[1, 2], [3]], [[4, 5, 6]]])
    file = TokenFile.open(prefix)
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert file.documents.tolist() == [0, 3, 6]
    assert (file.dtype, file.manifest) == (dtype, None)


def test_ours_and_megatrons_are_the_same_bytes(tmp_path):
    prefix = build_theirs(tmp_path, np.uint16, [[document] for document in DOCUMENTS])
    write(tmp_path / "data")
    for end in (".bin", ".idx"):
        assert (tmp_path / f"data/tokens{end}").read_bytes() == prefix.with_suffix(end).read_bytes()


def test_sequences_that_were_never_ended_are_documents(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for sequence in ([1, 2], [3]):
        builder.add_item(torch.tensor(sequence))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert TokenFile.open(tmp_path / "theirs").documents.tolist() == [0, 2, 3]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, same = TokenFile.open(write(tmp_path / "one")), TokenFile.open(write(tmp_path / "same"))
    other = TokenFile.open(write(tmp_path / "other", [[1, 2, 3, 1], *DOCUMENTS[1:]]))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    content = (tmp_path / "one/tokens.bin").read_bytes()
    assert one.fingerprint == hashlib.sha256(content).hexdigest()[:16]


def test_without_a_manifest_the_fingerprint_is_of_the_index(tmp_path):
    one = TokenFile.open(write(tmp_path / "one", manifest=False))
    same = TokenFile.open(write(tmp_path / "same", manifest=False))
    other = TokenFile.open(write(tmp_path / "other", DOCUMENTS[::-1], manifest=False))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_verify_finds_a_changed_token(tmp_path):
    directory = write(tmp_path / "data")
    content = bytearray((directory / "tokens.bin").read_bytes())
    content[0] ^= 1
    (directory / "tokens.bin").write_bytes(content)
    file = TokenFile.open(directory)  # opening looks at sizes only
    with pytest.raises(GrowkitError, match="has changed"):
        verify(file)


def test_verify_needs_a_manifest(tmp_path):
    file = TokenFile.open(write(tmp_path / "data", manifest=False))
    with pytest.raises(UsageError, match=r"manifest\.json"):
        verify(file)


def test_missing_data_is_a_usage_error(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nothing", UsageError, "nothing.bin", "nothing.idx")
    refused(tmp_path / "empty", UsageError, "directory without tokens.bin")
    refused("gs://bucket/data", UsageError, "local disk")


@pytest.mark.parametrize("end", ["bin", "idx"])
def test_half_a_pair_is_broken(tmp_path, end):
    (write(tmp_path / "data") / f"tokens.{end}").unlink()
    refused(tmp_path / "data", GrowkitError, f"tokens.{end} is missing")


def patched(offset, code, value):
    def patch(content):
        changed = bytearray(content)
        struct.pack_into(code, changed, offset, value)
        return bytes(changed)

    return patch


INDEX_BREAKAGES = {
    "magic": (patched(0, "<B", 0), "not a Megatron index"),
    "version": (patched(9, "<Q", 2), "version 2"),
    "float": (patched(17, "<B", 7), "floats"),
    "dtype": (patched(17, "<B", 99), "dtype code 99"),
    "another dtype": (patched(17, "<B", 4), "does not begin where"),
    "sequence count": (patched(18, "<Q", 5), "cut short"),
    "absurd count": (patched(18, "<Q", 2**63), "cut short"),
    "document count": (patched(26, "<Q", 4), "too long"),
    "no sequences": (
        lambda content: struct.pack("<9sQBQQq", content[:9], 1, 8, 0, 1, 0),
        "no sequences",
    ),
    "header cut": (lambda content: content[:20], "cut short"),
    "empty": (lambda content: b"", "cut short"),
    "tail cut": (lambda content: content[:-1], "cut short"),
    "tail added": (lambda content: content + b"\0", "too long"),
    "length": (patched(34, "<i", 5), "sequence 1 does not begin"),
    "negative length": (patched(34, "<i", -1), "sequence 0"),
    "last length": (patched(34 + 12, "<i", 7), "tokens.bin is cut short"),
    "pointer": (patched(34 + 16 + 8, "<q", 2), "sequence 1 does not begin"),
    "first boundary": (patched(34 + 48, "<q", 1), "must begin with 0"),
    "falling boundary": (patched(34 + 48 + 16, "<q", 4), "must rise"),
    "last boundary": (patched(34 + 48 + 32, "<q", 3), "must rise"),
}


@pytest.mark.parametrize("breakage", INDEX_BREAKAGES)
def test_a_corrupted_index_is_caught(tmp_path, breakage):
    change, fragment = INDEX_BREAKAGES[breakage]
    path = write(tmp_path / "data", manifest=False) / "tokens.idx"
    path.write_bytes(change(path.read_bytes()))
    refused(tmp_path / "data", GrowkitError, fragment)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda b: b[:-2], "cut short"),
        (lambda b: b[:-1], "cut short"),
        (lambda b: b + b"\0\0", "too long"),
    ],
)
def test_a_bin_of_another_size_is_caught(tmp_path, change, fragment):
    path = write(tmp_path / "data") / "tokens.bin"
    path.write_bytes(change(path.read_bytes()))
    refused(tmp_path / "data", GrowkitError, "tokens.bin", fragment)


def test_no_tokens_at_all_is_caught(tmp_path):
    refused(write(tmp_path / "none", []), GrowkitError, "no sequences")
    refused(write(tmp_path / "void", [[], []]), GrowkitError, "no tokens")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "lacks 'bin_sha256'"),
        ('{"tokens": 13}', "tokens = 13"),
        ('{"documents": 1}', "documents = 1"),
        ('{"dtype": "int32"}', "'uint16'"),
    ],
)
def test_a_manifest_of_other_data_is_caught(tmp_path, content, fragment):
    path = write(tmp_path / "data") / "manifest.json"
    if ":" in content:
        content = json.dumps(json.loads(path.read_text()) | json.loads(content))
    path.write_text(content)
    refused(tmp_path / "data", GrowkitError, "manifest.json", fragment)


@pytest.mark.parametrize("bad", [-1, 10])
def test_an_id_outside_the_vocabulary_is_not_written(tmp_path, bad):
    with pytest.raises(UsageError, match="0..9"), TokenWriter(tmp_path, 10) as writer:
        writer.add(np.array([1, bad]))
    assert not (tmp_path / "tokens.idx").exists()
