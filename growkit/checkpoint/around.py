"""Models around a text decoder: pictures or sound in, text out. The decoder grows, and everything
else is carried along as it is.

Such a config.json holds the decoder's own under `text_config`; the names of the decoder's tensors
have further words, which differ by the version of transformers that wrote them. Both are put back
when a grown decoder is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from growkit.checkpoint.tensor import Recipe, Tensor, copy_tensor
from growkit.errors import GrowkitError, UsageError
from growkit.models import find_family
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.given import find_given
from growkit.models.unknown import describe_unknown

# The field of a larger model's config.json that holds its text decoder's, and one that both have.
TEXT = "text_config"
TIE = "tie_word_embeddings"
# (how names of the table begin, how those of files do instead), the likeliest first.
PLACES = (
    ("model.", "model.language_model."),
    ("model.", "model.text_model."),
    ("", "language_model."),
    ("model.", "language_model."),
    ("", ""),
)
STAYS = "what feeds the decoder from outside of it is carried along, and has the old width"


@dataclass(frozen=True)
class Around:
    """What lies around a text decoder.

    config: the whole config.json. family: of the decoder. places: row -> how its names begin in the
    table and in files. others: every other tensor, by its name in files. made: recipes of those of
    them that are not copied.
    """

    config: Mapping[str, Any]
    family: Family
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    made: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """What a user should know of such a model."""
        return (
            f"the text decoder of a larger model: growth carries the {len(self.others)} tensors "
            "around it along as they are; training, import and export take the decoder alone"
        )

    def write_config(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config.json around a decoder's."""
        if TEXT not in self.config:
            return {**self.config, **text, "model_type": self.config["model_type"]}
        inner = dict(text)
        if TIE not in self.config[TEXT]:
            inner.pop(TIE, None)
        outer = {**self.config, TEXT: inner}
        return outer | ({TIE: text[TIE]} if TIE in self.config and TIE in text else {})

    def write_recipes(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """The decoder's tensors under their names in files, and all others, copied or made."""
        named = {self.name_in_files(name): recipe for name, recipe in recipes.items()}
        copied = {name: copy_tensor(tensor) for name, tensor in self.others.items()}
        return named | copied | dict(self.made)

    def name_in_files(self, name: str) -> str:
        """What files call a parameter of the table."""
        row = next(row for row in self.family.rows if row.match(name) is not None)
        ours, theirs = self.places[row.name]
        return theirs + name.removeprefix(ours)


def find_text(config: Mapping[str, Any], lineage: Sequence[Any] = ()) -> dict[str, Any] | None:
    """The configuration of the decoder within a larger model; None for a plain decoder.

    lineage: the model's entries, one of which may state the table. Raises GrowkitError for a
    decoder of a type that has no table.
    """
    kind = str(config.get("model_type"))
    if has_table(kind, lineage):
        return None
    text = config.get(TEXT)
    if not isinstance(text, dict):
        # transformers 4 wrote the decoder's fields beside the others.
        flat = f"{kind}_text"
        return dict(config, model_type=flat) if has_table(flat, lineage) else None
    inner = str(text.get("model_type"))
    if not has_table(inner, lineage):
        raise GrowkitError(
            f"the text decoder of a {kind!r} model is {inner!r} ({TEXT}), of which growkit has no "
            f"table{describe_unknown(inner, ())}"
        )
    # The whole model's word counts: transformers ties its head or does not.
    tie = {TIE: config[TIE]} if TIE in config else {}
    return {**text, **tie}


def has_table(kind: str, lineage: Sequence[Any]) -> bool:
    """Whether there is a table of a type: given, in a lineage, or growkit's own."""
    try:
        given = find_given(kind, lineage)
    except UsageError:
        # One was given of another type, as that of a decoder is for the model around it.
        return False
    return given is not None or find_family(kind) is not None


def split_tensors(
    tensors: Mapping[str, Tensor], model: Architecture, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Around]:
    """A decoder's tensors by the names of its table, and what lies around it.

    Raises GrowkitError where two tensors have one name in the table.
    """
    ours: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    places: dict[str, tuple[str, str]] = {}
    for name, tensor in tensors.items():
        found = _find_place(name, model.family)
        if found is None:
            others[name] = tensor
            continue
        known, row, place = found
        if known in ours or places.setdefault(row, place) != place:
            raise GrowkitError(f"two tensors are the decoder's {known!r}, one of them {name!r}")
        ours[known] = tensor
    return ours, Around(config, model.family, places, others)


def _find_place(name: str, family: Family) -> tuple[str, str, tuple[str, str]] | None:
    """(name in the table, row, place) of a tensor's name in files; None for what is around."""
    for ours, theirs in PLACES:
        if not name.startswith(theirs):
            continue
        known = ours + name.removeprefix(theirs)
        for row in family.rows:
            if row.match(known) is not None:
                return known, row.name, (ours, theirs)
    return None


def keep_width(model: Architecture, around: Around) -> Architecture:
    """The decoder with embed frozen, where something around it feeds it."""
    if not around.others:
        return model
    frozen = {**model.family.frozen, "embed": STAYS}
    if model.coupled:
        frozen[model.heads] = STAYS
    return replace(model, family=replace(model.family, frozen=frozen))
