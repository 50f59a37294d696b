"""The sweep: a tiny model of a type, saved by transformers, grown by the command line in every way
that its table offers, loaded by transformers, compared with the source in float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from growkit.checkpoint.location import open_source
from growkit.cli import run as run_command
from growkit.derive import proof
from growkit.derive.derive import load_logits
from growkit.derive.network import State, build, file_state, load, make_config, run, set_plain, wide
from growkit.derive.sizes import LAYERS, shapes_of
from growkit.derive.stream import TOKENS
from growkit.derive.tiny import tiny_fields
from growkit.derive.variant import config_json, fill
from growkit.errors import GrowkitError
from growkit.growth.axes import replicate
from growkit.models import find_family
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.given import find_given

# Axes that no growth in width is for.
KEPT = ("layer", "vocab", "position", "expert")
# Where modules keep the number of their layer.
NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "seed")

NEAREST = re.compile(r"the nearest that works is --map ([0-9,-]+)")


def read_list(text: str) -> list[int]:
    """'0-2,1' as layers."""
    found: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@dataclass
class Case:
    """One growth of a type: the command, what it is compared with, and what came of it.

    index: the source layer of each new layer; the source itself where it is None. gap: of the
    largest logit. refused: the sentence, where the command refuses. kinds: what differs of the
    layers' kinds.
    """

    name: str
    words: list[str]
    index: list[int] | None = None
    gap: float = float("inf")
    refused: str = ""
    kinds: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not self.refused and not self.kinds and self.gap < proof.BOUND


@dataclass
class Sweep:
    """A type's tiny model in a directory, and growths of it."""

    kind: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    logits: torch.Tensor = field(init=False)
    cases: list[Case] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.family = find_given(self.kind) or find_family(self.kind)
        if not (self.folder / "source").is_dir():
            fields = tiny_fields(self.kind) | dict(self.options)
            save_tiny(self.kind, fields, self.folder / "source")
        self.config = json.loads((self.folder / "source/config.json").read_text())
        self.layers = self.family.fields_of(self.config).size(self.family.fields["layer"])
        self.logits = load_logits(self.folder / "source")
        self.model = open_source(str(self.folder / "source")).model

    def try_growth(self, case: Case) -> Case:
        """Run a command and compare what it wrote."""
        self.cases.append(case)
        out = self.folder / case.name.replace(" ", "_")
        source = self.folder / "source"
        case.refused = call([*case.words, str(source), str(out), "--no-sync", "--no-verify"])
        if case.index is not None and (near := NEAREST.search(case.refused)):
            # A map under which layers would change their kind: the one that is named works.
            case.words, case.index = ["depth", "--map", near[1]], read_list(near[1])
            case.refused = call([*case.words, str(source), str(out), "--no-sync", "--no-verify"])
        if case.refused:
            return case
        expected = self.logits if case.index is None else self.reorder(case.index)
        case.gap = proof.gap(load_logits(out), expected)
        # A factor that follows the number of layers is no kind.
        if case.index is not None and not any("layer" in f for f in self.family.scalars.values()):
            case.kinds = compare_kinds(source, out, self.prefix, case)
        return case

    def reorder(self, index: Sequence[int]) -> torch.Tensor:
        """Logits of transformers' own list of layers in another order, each with its kind."""
        network = load_network(self.folder / "source")
        holder, last = find_layers(network, self.prefix)
        moved = proof.reorder_layers(network, holder, last, index, self.family.numbers)
        return run(moved, TOKENS)

    @property
    def prefix(self) -> str:
        """What comes before a layer's number in the names of the table."""
        row = next(row for row in self.family.rows if "{layer}" in row.name)
        return row.name.partition(".{layer}")[0]


def make_tiny(kind: str, fields: Mapping[str, Any]) -> tuple[Any, State]:
    """A tiny random model in float64: its configuration, and its parameters as files hold them."""
    config = make_config(kind, fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return config, fill(file_state(build(config)))


def save_tiny(kind: str, fields: Mapping[str, Any], path: Path) -> None:
    """A tiny random model as transformers saves it."""
    config, state = make_tiny(kind, fields)
    with wide():
        load(config, state).save_pretrained(path)


def call(words: list[str]) -> str:
    """Run the command line in this process: empty, or the sentence of its refusal."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        code = run_command(words)
    lines = said.getvalue().strip().splitlines()
    return "" if code == 0 else f"{code}: {lines[-1] if lines else ''}"


def load_network(path: Path) -> Any:
    """A directory's model, as transformers loads it, in float64."""
    config = set_plain(transformers.AutoConfig.from_pretrained(path))
    with wide():
        network = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float64
        )
    return network.eval()


def find_layers(network: Any, prefix: str) -> tuple[Any, str]:
    """The module that holds the list of layers, and the list's name."""
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and (name == prefix or name.endswith(f".{prefix}") or prefix.endswith(f".{name}"))
    ]
    holder, _, last = found[0].rpartition(".")
    return network.get_submodule(holder), last


def compare_kinds(source: Path, out: Path, prefix: str, case: Case) -> list[str]:
    """Where a new layer is of another kind than the one that it copies: class or attributes."""
    index = case.index or []
    old, new = (
        [describe_kind(layer) for layer in getattr(*find_layers(load_network(path), prefix))]
        for path in (source, out)
    )
    if len(new) != len(index):
        return [f"{len(new)} layers for {len(index)}"]
    return [
        f"layer {place} of {layer}: {difference}"
        for place, layer in enumerate(index)
        for difference in list_differences(old[layer], new[place], case.words[0] != "depth")
    ]


def describe_kind(layer: Any) -> dict[str, Any]:
    """What a layer is beside its parameters: classes of its modules and their plain attributes."""
    kind: dict[str, Any] = {}
    for name, module in layer.named_modules():
        kind[name] = type(module).__name__
        for attribute, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if plain and attribute not in (*NUMBERS, *LAYERS) and not attribute.startswith("_"):
                kind[f"{name}.{attribute}"] = value
    return kind


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any], wide: bool) -> list[str]:
    """What two layers differ in. wide: whether sizes differ too, which are no kinds."""
    return [
        f"{name} is {new.get(name)!r} and was {old.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and not (
            wide and type(old.get(name)) in (int, float) and type(new.get(name)) in (int, float)
        )
    ]


def list_depths(sweep: Sweep) -> list[Case]:
    """Growths in depth: replicated, stacked, a list, and layers that add nothing."""
    count = sweep.layers
    pair = f"{count}:{count + 2}"
    copies = replicate(count, count + 2).index.tolist()
    stacked = [*range(count), *range(count)]
    stack = ["depth", "--map", f"{count}:{2 * count}", "--method", "stack"]
    listed = sorted([*range(count), count - 1])
    words = ",".join(map(str, listed))
    return [
        Case("replicate", ["depth", "--map", pair], copies),
        Case("stack", stack, stacked),
        Case("list", ["depth", "--map", words], listed),
        Case("identity", ["depth", "--map", pair, "--method", "identity"]),
    ]


def list_widths(sweep: Sweep) -> list[Case]:
    """Growths in width: each axis alone, all together with unequal multiplicities, padded, and
    together with layers.
    """
    model, family = sweep.model, sweep.family
    fixed = {*KEPT, *family.frozen}
    if family.coupled and model.heads in fixed:
        fixed.add("embed")
    free = [axis for axis in family.fields if axis not in fixed]
    sizes = {axis: enlarge(model, axis) for axis in free}
    found = [Case(axis, ["width", *write_size(model, axis, size)]) for axis, size in sizes.items()]
    found += [
        Case(f"frozen {axis}", ["width", *write_size(model, axis, 2 * model.sizes[axis])])
        for axis in fixed
        if axis in family.fields and axis not in KEPT
    ]
    sizes.pop("head_dim", None)
    if sizes:
        found += list_together(sweep, sizes)
    return [*found, *list_paddings(sweep)]


def list_together(sweep: Sweep, sizes: dict[str, int]) -> list[Case]:
    """All axes at once, and these sizes with one layer more."""
    model, family = sweep.model, sweep.family
    together = dict(sizes)
    if "embed" in together and not family.coupled:
        # Three of each, so that an odd number of heads divides it.
        together["embed"] = 3 * model.embed
        if model.heads in together:
            size = model.sizes[model.heads]
            even = model.heads in model.table.uniform_axes or size == 1
            together[model.heads] = 2 * size if even else size * 3 // 2
    if family.coupled and model.heads in together:
        # It follows: heads x head_dim.
        together.pop("embed", None)
    words = [word for axis, size in together.items() for word in write_size(model, axis, size)]
    if model.heads in together and "group" in together:
        # --heads counts query heads: all of them.
        heads = together[model.heads] * together["group"]
        words[words.index("--heads") + 1] = str(heads)
    found = [Case("together", ["width", *words])]
    uneven = [axis for axis in together if axis != "embed" and axis not in model.table.uniform_axes]
    if uneven and not model.table.uniform_axes & (together.keys() - {"embed"}):
        found.append(Case("uneven shares", ["width", *words, "--spread", "0.3"]))
    if "layer" not in family.frozen:
        found.append(list_combined(sweep, words))
    return found


def list_combined(sweep: Sweep, words: list[str]) -> Case:
    """Growth to the sizes of another model: all of these and one layer more."""
    target = sweep.folder / "target.json"
    wide = sweep.folder / "wide"
    call(["width", *words, str(sweep.folder / "source"), str(wide), "--no-sync"])
    config = sweep.config
    if wide.is_dir():
        config = json.loads((wide / "config.json").read_text())
    count = sweep.layers + 1
    index = replicate(sweep.layers, count).index.tolist()
    longer = {
        name: [config[name][layer] for layer in index]
        for name in sweep.family.by_layer
        if isinstance(config.get(name), list) and len(config[name]) == sweep.layers
    }
    target.write_text(json.dumps(config | longer | {sweep.family.fields["layer"]: count}))
    return Case("combined", ["grow", "--like", str(target)], index)


def list_paddings(sweep: Sweep) -> list[Case]:
    """embed to one and a half its size."""
    model, family = sweep.model, sweep.family
    if "embed" not in family.fields:
        return []
    return [Case("padding", ["width", "--embed", str(model.embed * 3 // 2)])]


def enlarge(model: Architecture, axis: str) -> int:
    """A size for an axis: half of its units more, so that copies are unequal, where that can be
    exact.
    """
    size = model.sizes[axis]
    whole = model.family.whole_heads and axis in (model.heads, "group")
    if axis == "embed" or axis in model.table.uniform_axes or whole or size == 1:
        return 2 * size
    return size + max(1, size // 2)


def write_size(model: Architecture, axis: str, size: int) -> list[str]:
    """The option of a size."""
    if axis == model.heads:
        return ["--heads", str(size * model.sizes.get("group", 1))]
    if axis in ("embed", "mlp", "head_dim"):
        return [f"--{axis.replace('_', '-')}", str(size)]
    return ["--axis", f"{axis}={size}"]


def expects_refusal(sweep: Sweep, case: Case) -> bool:
    """Whether a table says that a growth is refused."""
    family, model = sweep.family, sweep.model
    if case.name == "padding":
        fixed = {"embed", model.heads} if family.coupled else {"embed"}
        return bool(family.unpadded or fixed & family.frozen.keys())
    if case.name == "identity":
        return bool(family.no_identity) or "layer" in family.frozen
    if case.name in ("replicate", "stack", "list", "combined"):
        return "layer" in family.frozen
    return case.name.startswith("frozen ")


def sweep_type(kind: str, folder: Path, options: Mapping[str, Any] = {}) -> Sweep:  # noqa: B006
    """All growths of a type."""
    sweep = Sweep(kind, folder, options)
    for case in [*list_depths(sweep), *list_widths(sweep)]:
        sweep.try_growth(case)
    return sweep


def list_misfits(kind: str) -> list[str]:
    """What a table says wrongly of models of other sizes: each field of a size doubled alone."""
    family = find_family(kind)
    fields = tiny_fields(kind)
    stated = make_config(kind, fields).to_dict()
    found = []
    for axis, path in family.fields.items():
        names = path.split(" / ")
        if axis == family.heads and "group" in family.fields:
            names += family.fields["group"].split(" / ")
        if family.coupled and axis in (family.heads, "group"):
            names.append(family.fields["embed"])
        doubled = {name: 2 * stated[name] for name in names if isinstance(stated.get(name), int)}
        if axis != "layer" and doubled:
            found += check_sizes(family, fields | doubled, axis)
    return found


def check_sizes(family: Family, fields: Mapping[str, Any], what: str) -> list[str]:
    """Why a table does not cover a model of these fields; empty where it does, or there is none."""
    shapes = shapes_of(family.kind, fields)
    if shapes is None:
        return []
    model = family.read(config_json(make_config(family.kind, fields))).measure(shapes)
    tied = family.head_name if model.tied else ""
    held = {name: shape for name, shape in shapes.items() if name != tied}
    try:
        model.table.check_covered(held, model.sizes, model.fields)
    except GrowkitError as problem:
        return [f"{what}: {problem}"]
    return []
