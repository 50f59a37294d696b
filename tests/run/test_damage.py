"""A checkpoint that is not what was saved is never trained on in silence: it is named, and kept.

A power cut leaves a checkpoint whole: its files are on the disk before it has its name.
"""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from orbax.checkpoint.path import atomicity
from runs import assert_as_if_uninterrupted, new_run, values

from growkit.checkpoint.hashes import HASHES, hash_array
from growkit.checkpoint.location import open_source
from growkit.errors import GrowkitError
from trainer.run.begin import begin, prepare
from trainer.run.damage import Trust, find_damage, find_last_whole
from trainer.run.loop import Run

pytestmark = pytest.mark.usefixtures("compiled_once")
ARRAY = "state/mu.embed_in.weight/0.0"
LAST = 12
# Orbax writes these in the moment in which it renames.
MARKERS = {"commit_success.txt", "_CHECKPOINT_METADATA"}


@pytest.fixture
def out(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def checkpoint(out, step=LAST):
    return out / "checkpoints" / str(step)


def flip_bit(file, at=100):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def read_meta(out, step=LAST):
    return json.loads((checkpoint(out, step) / "meta" / "metadata").read_text())


def refuse(data, out, **how):
    with pytest.raises(GrowkitError) as caught:
        begin(prepare(values(data), out, trust=Trust(**how)))
    said = str(caught.value)
    assert "\n" not in said
    return said


def resume(data, out, **how):
    return Run(begin(prepare(values(data), out, trust=Trust(**how))))


def test_every_array_and_file_has_the_hash_of_what_was_trained(out):
    hashes = read_meta(out)[HASHES]
    states = list((checkpoint(out) / "state").glob("*/.zarray"))
    assert set(hashes["arrays"]) == {path.parent.name for path in states}
    raw = np.fromfile(checkpoint(out) / ARRAY, np.float32)
    assert hashes["arrays"]["mu.embed_in.weight"] == hash_array(raw)
    assert "history.csv" in hashes["files"]
    assert find_damage(checkpoint(out)) is None


@pytest.mark.parametrize("damage", ["one bit", "zeros"])
def test_an_array_with_other_bytes_is_named(damage, data, out):
    if damage == "one bit":
        flip_bit(checkpoint(out) / ARRAY)
    else:
        for file in (checkpoint(out) / "state").glob("*/[0.]*[0-9]"):
            if not file.name.startswith("."):
                file.write_bytes(bytes(file.stat().st_size))
    said = refuse(data, out)
    assert str(checkpoint(out)) in said and "the array '" in said
    assert f"whole is {out}@8, and --from-last-whole" in said
    if damage == "one bit":
        assert "'mu.embed_in.weight'" in said
        resume(data, out, verify=False).close()


def change_small_file(out, name):
    files = {
        "files": "files/metadata",
        "meta": "meta/metadata",
        "metrics": "metrics/metrics",
    }
    path = checkpoint(out) / files[name]
    path.write_bytes(path.read_bytes()[:-3])
    return str(path)


@pytest.mark.parametrize("name", ["files", "meta", "metrics"])
def test_a_small_file_cut_short_is_named(name, data, out):
    path = change_small_file(out, name)
    assert refuse(data, out).startswith(f"{path} is damaged: it is not JSON; the last checkpoint")


def test_a_pointer_of_git_lfs_is_named(data, out):
    path = checkpoint(out) / "meta" / "metadata"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    assert refuse(data, out).startswith(f"{path} is a Git LFS pointer")


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml"])
def test_a_pointer_in_the_place_of_a_runs_own_file_is_named(name, data, out):
    (out / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    assert refuse(data, out) == (
        f"{out / name} is a Git LFS pointer, not the file; `git lfs pull` fetches that"
    )


@pytest.mark.parametrize("content", ["[5]", "null", '{"validation_loss": "x"}', '"a"'])
def test_a_small_file_of_another_form_is_named(content, data, out):
    for item in ("files/metadata", "meta/metadata", "metrics/metrics"):
        path = checkpoint(out) / item
        before = path.read_bytes()
        path.write_text(content)
        assert refuse(data, out).startswith(f"{path} is damaged")
        path.write_bytes(before)


def test_an_empty_directory_and_a_missing_marker_are_named(data, out):
    (checkpoint(out, 40)).mkdir()
    assert refuse(data, out).startswith(f"{checkpoint(out, 40)} is not a whole checkpoint")
    (checkpoint(out, 40)).rmdir()
    (checkpoint(out) / "_CHECKPOINT_METADATA").unlink()
    assert "it has no _CHECKPOINT_METADATA" in refuse(data, out)


def test_a_changed_number_in_the_meta_or_a_file_is_seen(data, out):
    meta = read_meta(out)
    meta["record"]["validation_loss"] += 1
    (checkpoint(out) / "meta" / "metadata").write_text(json.dumps(meta))
    assert refuse(data, out).startswith("the meta of ")


@pytest.mark.parametrize("key", ["hashes", "mu.embed_in.weight", "history.csv"])
def test_a_record_of_hashes_that_lost_a_name_is_seen(key, data, out):
    path = checkpoint(out) / "meta" / "metadata"
    content = path.read_text()
    assert content.count(f'"{key}"') == 1
    path.write_text(content.replace(f'"{key}"', f'"{key[:-1]}~"'))
    said = refuse(data, out)
    if key == "hashes":
        assert said.startswith(f"{path} is damaged: it is not what a run writes there")
    else:
        assert said.startswith("the hash of the ") and repr(key) in said


def test_the_run_goes_on_from_the_last_whole_checkpoint_when_told(data, out, whole):
    flip_bit(checkpoint(out) / ARRAY)
    run = resume(data, out, from_last_whole=True)
    assert run.step == 8
    assert any("damaged/12" in note for note in run.notes)
    run.go()
    assert_as_if_uninterrupted(out, whole)
    assert (out / "damaged" / "12" / ARRAY).exists()


def test_several_damaged_checkpoints_are_passed_over(data, out):
    change_small_file(out, "files")
    flip_bit(checkpoint(out, 8) / ARRAY)
    assert find_last_whole(out, ()) == 4
    assert f"{out}@4" in refuse(data, out)
    run = resume(data, out, from_last_whole=True)
    assert run.step == 4
    run.close()


def test_nothing_whole_is_no_new_run(data, out):
    for step in (4, 8, 12):
        flip_bit(checkpoint(out, step) / ARRAY)
    assert "no other checkpoint" in refuse(data, out, from_last_whole=True)
    assert checkpoint(out, 12).exists()


@pytest.mark.parametrize(
    "array,value,said",
    [
        (ARRAY, np.nan, "3 first moments are NaN"),
        ("state/params.embed_in.weight/0.0", np.inf, "3 weights are NaN or infinite"),
        ("state/nu.embed_in.weight/0.0", -1e-20, "3 second moments are negative"),
        ("state/nu.embed_in.weight/0.0", np.inf, "3 second moments are NaN or infinite"),
    ],
)
def test_no_training_begins_with_numbers_that_no_model_should_hold(array, value, said, data, out):
    file = checkpoint(out) / array
    numbers = np.fromfile(file, np.float32)
    numbers[:3] = value
    numbers.tofile(file)
    refused = refuse(data, out, verify=False)
    assert f"{checkpoint(out)} cannot be trained on: {said}" in refused
    assert f"{out}@8" in refused
    start = str(checkpoint(out))
    config = values(data)
    del config["model"]
    with pytest.raises(GrowkitError, match="another hash than the one on record"):
        begin(prepare(config, out.parent / "new", start))
    with pytest.raises(GrowkitError, match=f"cannot be trained on: {said}"):
        begin(prepare(config, out.parent / "new", start, trust=Trust(verify=False)))


@pytest.mark.parametrize(
    "item,said", [("meta", "the bytes of the meta"), ("files", "the bytes of the file '")]
)
def test_meta_and_files_are_compared_by_other_commands_too(item, said, out):
    open_source(str(checkpoint(out))).require_whole()
    path = checkpoint(out) / item / "metadata"
    old, new = {"meta": ('"record"', '"recorb"'), "files": ('"text": "', '"text": "x')}[item]
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(GrowkitError, match=f"is damaged: {said}.*--no-verify"):
        open_source(str(checkpoint(out))).require_whole()


@pytest.mark.parametrize("record", [{"tokens": "x"}, {"stream": {"number": 1}}, {"count": -1}])
def test_a_position_that_is_none_is_named(record, data, out):
    meta = read_meta(out)
    meta["record"] |= record
    path = checkpoint(out) / "meta" / "metadata"
    path.write_text(json.dumps(meta))
    assert f"{path} is damaged" in refuse(data, out, verify=False)


def test_hashes_that_cannot_be_computed_are_said(data, out):
    meta = read_meta(out)
    meta[HASHES]["algorithm"] = "blake9"
    (checkpoint(out) / "meta" / "metadata").write_text(json.dumps(meta))
    assert "'blake9'" in refuse(data, out)
    resume(data, out, verify=False).close()


def test_a_checkpoint_without_hashes_is_resumed(data, out):
    meta = read_meta(out)
    del meta[HASHES]
    (checkpoint(out) / "meta" / "metadata").write_text(json.dumps(meta))
    new_run(data, out).close()


def watch(data, out, **how):
    """Train; returns what was brought to the disk, by inode, and the names given, in order."""
    seen = []
    fsync, finalize = os.fsync, atomicity.AtomicRenameTemporaryPath.finalize

    def noted_fsync(file):
        seen.append(os.fstat(file).st_ino)
        fsync(file)

    async def noted_finalize(self, *given, **options):
        await finalize(self, *given, **options)
        seen.append(self.get_final().name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", noted_finalize)
        Run(begin(prepare(values(data), out, trust=Trust(**how)))).go()
    return seen


def test_files_then_the_name_are_brought_to_the_disk(data, tmp_path):
    seen = watch(data, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / str(LAST)
    at = seen.index(str(LAST))
    inodes = {path: path.stat().st_ino for path in last.rglob("*")}
    markers = {path for path in inodes if path.parent == last and path.name in MARKERS}
    assert len(inodes) > 20 and markers
    assert {inodes[path] for path in inodes.keys() - markers} <= set(seen[:at])
    after = set(seen[at:])
    assert {inodes[path] for path in markers} <= after
    assert {last.stat().st_ino, last.parent.stat().st_ino} <= after
    assert (tmp_path / "run" / "metrics.csv").stat().st_ino in seen


def test_without_it_nothing_of_a_checkpoint_is_waited_for(data, tmp_path):
    seen = watch(data, tmp_path / "run", sync=False)
    last = tmp_path / "run" / "checkpoints" / str(LAST)
    assert not {path.stat().st_ino for path in last.rglob("*")} & set(seen)
