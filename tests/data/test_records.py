"""Texts as people have them: under another key, in another column, in directories of `datasets`."""

from __future__ import annotations

import json

import pytest

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from trainer.data.fields import Fields
from trainer.data.text import Shard, open_inputs

TEXTS = ["one text", "two\ntexts", "", "пять"]
OBJECTS = [{"id": number, "content": text} for number, text in enumerate(TEXTS)]
NAMED = Fields("content", "body")


def read(*paths, fields=NAMED):
    return list(open_inputs(paths, "strict", fields).read_documents())


def write_lines(path, objects):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    return path


def test_the_key_of_a_text_is_named(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", OBJECTS)
    (folder / "b.json").write_text(json.dumps(OBJECTS))
    write_lines(folder / "c.txt", OBJECTS)
    (folder / "settings.json").write_text('{"text": "not one of them"}')
    assert read(folder) == TEXTS * 3
    assert [path.name for _, path in open_inputs([folder]).files] == [
        "a.jsonl",
        "c.txt",
        "settings.json",
    ]
    with pytest.raises(
        GrowkitError,
        match=r"line 1 must.*under \"text\", and has 'id', 'content'; "
        "name the key of its text with --text-key",
    ):
        read(folder / "a.jsonl", fields=Fields())
    with pytest.raises(GrowkitError, match='without a text under "text"; name the key.*--text-k'):
        read(folder / "c.txt", fields=Fields())
    with pytest.raises(UsageError, match="--text-key names where.*empty"):
        Fields("")


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


def make_table(arrow, column="body", kind="string"):
    return arrow.table({"id": list(range(4)), column: arrow.array(TEXTS[:3] + [None], kind)})


READ = [*TEXTS[:3], ""]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_the_column_of_a_table_is_named(tmp_path, arrow, kind):
    from pyarrow import ipc, parquet

    table = make_table(arrow, kind=kind)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table, 2)
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, 2)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read(tmp_path / name) == READ
        said = rf'{name} must have a column "text" of strings; it has id \(int64\), body.*--column'
        with pytest.raises(GrowkitError, match=said):
            read(tmp_path / name, fields=Fields())
    whole = (tmp_path / "stream.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GrowkitError, match="cut.arrow is not a whole Arrow file of text"):
        read(tmp_path / "cut.arrow")


def save_split(arrow, folder, texts):
    """A directory as datasets.Dataset.save_to_disk writes it, with a cache that it left there."""
    from pyarrow import ipc

    folder.mkdir(parents=True)
    files = [f"data-{number:05d}-of-{len(texts):05d}.arrow" for number in range(len(texts))]
    for name, text in zip([*files, "cache-1f.arrow"], [*texts, "stale"], strict=True):
        table = arrow.table({"text": [text]})
        with ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in files], "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"text": "no document"}')
    return folder


def test_a_directory_of_datasets_is_read_and_its_caches_are_not(tmp_path, arrow):
    saved = save_split(arrow, tmp_path / "saved" / "train", ["one", "two", "three"])
    inputs = open_inputs([saved])
    assert list(inputs.read_documents()) == ["one", "two", "three"]
    said = inputs.listing.describe(inputs.files)
    assert "reading 3 files (3 .arrow); passed over: 3 caches and descriptions" in said
    blocks = [block for number in (1, 2) for block in inputs.read_blocks(Shard(number, 2))]
    assert sorted(text for block in blocks for text in block.texts) == ["one", "three", "two"]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read(tmp_path / "saved", fields=Fields()) == ["one", "two", "three"]
    save_split(arrow, tmp_path / "saved" / "test", ["four"])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match="the splits train, test of a data set; .*saved/train"):
        open_inputs([tmp_path / "saved"])
    assert read(tmp_path / "saved" / "test", fields=Fields()) == ["four"]


@pytest.mark.slow
def test_what_datasets_saves_is_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"body": TEXTS, "id": list(range(4))})
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(UsageError, match="the splits train, test"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "test") == TEXTS
    # What is computed from a data set on disk is cached beside it.
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"body": row["body"].upper()})
    assert list((tmp_path / "one").glob("cache-*.arrow")) and read(tmp_path / "one") == TEXTS


def test_the_command_takes_both_names_and_the_manifest_has_them(tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", OBJECTS)
    out = tmp_path / "out"
    command = ["tokenize", str(file), "--train-bpe", "300", "--out", str(out), "--processes", "1"]
    assert run([*command, "--text-key", "content"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["text_key"] == "content" and "column" not in manifest
    assert manifest["documents"] == 3 and manifest["empty_documents"] == 1
    assert run([*command, "--force"]) != 0
    assert "name the key of its text with --text-key" in capsys.readouterr().err
