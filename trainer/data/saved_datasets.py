"""Directories that Hugging Face's `datasets` saved by save_to_disk.

A data set is a directory of Arrow files, with a state.json that lists them. Other Arrow files in it
are caches of what was computed from the data set. Several splits (train, test) lie in directories
of their names, with a dataset_dict.json above them.
"""

from __future__ import annotations

from etils import epath

from growkit.checkpoint.files import read_json
from growkit.errors import GrowkitError, UsageError
from growkit.textfiles import ARROW, get_ending

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"
NOT_OF_DATASET = "caches and descriptions of data sets"


class SavedDatasets:
    """What the files of one input are that lie in directories of data sets."""

    def __init__(self) -> None:
        # directory: the names of its data files, or None where no data set was saved.
        self._listed: dict[epath.Path, frozenset[str] | None] = {}

    def passes_over(self, file: epath.Path) -> bool:
        """Whether a file describes a data set, or is an Arrow file that is not of it.

        Raises UsageError for a directory of several splits.
        """
        if file.name == SPLITS:
            _check_splits(file)
            return True
        if file.name not in (STATE, INFO) and get_ending(file.name) != ARROW:
            return False
        folder = file.parent
        if folder not in self._listed:
            self._listed[folder] = _read_names(folder / STATE)
        names = self._listed[folder]
        return names is not None and file.name not in names


def _read_names(state: epath.Path) -> frozenset[str] | None:
    """The data files that a state.json lists; None for one of something else."""
    if not state.exists():
        return None
    try:
        listed = read_json(state)["_data_files"]
        return frozenset(str(each["filename"]) for each in listed)
    except (GrowkitError, KeyError, TypeError):
        return None


def _check_splits(file: epath.Path) -> None:
    """Refuse a directory of several splits, which are not meant to be read as one."""
    try:
        splits = [str(split) for split in read_json(file)["splits"]]
    except (GrowkitError, KeyError, TypeError):
        return
    if len(splits) > 1:
        raise UsageError(
            f"{file.parent} holds the splits {', '.join(splits)} of a data set; name those to "
            f"read, as {file.parent / splits[0]}"
        )
