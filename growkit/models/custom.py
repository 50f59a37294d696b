"""A model of one's own: a table and the size of each axis, without a config.json.

For parameters of one's own in memory, whose names no file format knows. Growth has rules for these
axes by name: layer, embed, mlp, head (or kv and group) and head_dim. Every other axis of a table
may have any name; it keeps its size.

>>> model = describe_model(
...     '''
...     layers.{layer}.up.kernel     /embed mlp  normal  matrix
...     layers.{/layer}.down.kernel  /mlp embed  normal  matrix
...     ''',
...     {"layer": 2, "embed": 8, "mlp": 32},
... )
>>> model.parameters
1024
"""

from __future__ import annotations

from collections.abc import Mapping

from growkit.errors import GrowkitError, did_you_mean, require_type
from growkit.models.architecture import Architecture
from growkit.models.family import NORMS, Family, bare_condition
from growkit.models.fields import Frozen
from growkit.models.notation import Row, parse_table
from growkit.models.scalars import POWER

HEAD_DIM_STAYS = (
    "a table does not say which of its dimensions rotary positions rotate; grow the heads instead"
)


def describe_model(
    table: str,
    sizes: Mapping[str, int],
    norm: str = "layer",
    *,
    norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
    scalars: Mapping[str, str] | None = None,
    **options: bool,
) -> Architecture:
    """The model of a table, see `growkit.models.notation`, at the given size of each of its axes.

    norm: 'layer' for norms that subtract the mean, 'rms' for those that do not; padding asks.
    norm_eps: what norms add to the variance (Flax adds 1e-6); padding changes it, and
    `plan.grown.norm_eps` says to what. initializer_range: the standard deviation of new weights,
    the unit of noise. scalars: row -> 'sqrt(axis)', 'axis' or 1 over one of them, a factor that the
    model itself multiplies the parameter by. options: the truth of each condition that a row of the
    table has.

    Raises ValueError for a line that is not a row, GrowkitError for sizes that are not those of the
    axes and for options that no row depends on.
    """
    require_type("table", table, str, "one line for each parameter")
    require_type("sizes", sizes, Mapping, "from axes to sizes")
    require_type("norm", norm, str, "'layer' or 'rms'")
    require_type("scalars", scalars or {}, Mapping, "from rows to factors, as 'sqrt(embed)'")
    if norm not in NORMS:
        raise GrowkitError(f"norm is 'layer' or 'rms', got {norm!r}{did_you_mean(norm, NORMS)}")
    rows = parse_table(table)
    _check_sizes(rows, sizes)
    _check_scalars(rows, scalars or {}, sizes)
    _check_options(rows, options)
    family = _describe_family(table, sizes, norm, scalars or {}, _explain_unpadded(rows, norm))
    # rope is empty and not missing: whoever asks for rotary positions finds that there are none.
    values = {"norm_eps": norm_eps, "initializer_range": initializer_range, "rope": {}, **options}
    # A condition that no option answers is refused here, and not at the first growth.
    family.select_rows(values)
    return Architecture(family, Frozen(sizes), Frozen(values))


def _describe_family(
    table: str, sizes: Mapping[str, int], norm: str, scalars: Mapping[str, str], unpadded: str
) -> Family:
    """The family of one described model: no config.json states its sizes."""
    return Family(
        kind="described",
        class_name="",
        title="described",
        text=table,
        fields={axis: axis for axis in sizes},
        defaults={},
        options={},
        norm=norm,
        heads="kv" if "kv" in sizes else "head",
        rotary=None,
        frozen={"head_dim": HEAD_DIM_STAYS} if "head_dim" in sizes else {},
        scalars=dict(scalars),
        # transformers' rule that heads divide embed is not a rule of a model of one's own.
        whole_heads=False,
        unpadded=unpadded,
    )


def _check_sizes(rows: tuple[Row, ...], sizes: Mapping[str, int]) -> None:
    """Raise GrowkitError unless `sizes` states each axis of the rows, and no other, as a count."""
    if not rows:
        raise GrowkitError("the table has no rows; write one line for each parameter")
    for row in rows:
        if row.kind:
            raise GrowkitError(
                f"{row.name} is only in layers of the kind {row.kind!r}, and a description does "
                f"not say which they are; such models grow from files"
            )
    axes = {axis.name for row in rows for axis in row.stacked}
    axes = axes.union(*(row.axes for row in rows))
    for axis in sorted(axes - sizes.keys()):
        row = next(row for row in rows if axis in row.axes or axis in row.name)
        raise GrowkitError(f"sizes lacks the axis {axis!r}, which the row {row.name} has")
    for axis in sizes.keys() - axes:
        near = did_you_mean(axis, axes)
        raise GrowkitError(f"sizes states the axis {axis!r}, which no row of the table has{near}")
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise GrowkitError(f"the size of {axis} is a whole number of at least 1, got {size!r}")


def _check_scalars(
    rows: tuple[Row, ...], scalars: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    """Raise GrowkitError for a factor of an unknown row, or that is not a root of a size."""
    names = {row.name for row in rows}
    for name, text in scalars.items():
        if name not in names:
            near = did_you_mean(name, names)
            raise GrowkitError(f"scalars names {name!r}, which is not a row of the table{near}")
        found = POWER.fullmatch(text)
        if found is None or (found[2] or found[3]) not in sizes:
            raise GrowkitError(
                f"a scalar is axis, sqrt(axis), 1/axis or 1/sqrt(axis) of an axis of the table, "
                f"got {text!r}"
            )


def _check_options(rows: tuple[Row, ...], options: Mapping[str, bool]) -> None:
    """Raise GrowkitError for an option that no row of the table depends on."""
    conditions = {condition for row in rows for condition in row.conditions}
    known = {name for condition in conditions for name in (condition, bare_condition(condition))}
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise GrowkitError(f"no row of the table depends on the option {name!r}{near}")


def _explain_unpadded(rows: tuple[Row, ...], norm: str) -> str:
    """Why embed cannot be padded; empty where it can.

    Padding under LayerNorm fills the stream with its own mean, which is not zero: a norm must
    stand before every reader. That layers begin with one the table says by their rows; what reads
    the stream after them needs a norm outside the layers.
    """
    if norm != "layer":
        return ""
    if any(row.role == "norm" and "embed" in row.axes and not row.stacked for row in rows):
        return ""
    return (
        "under LayerNorm new entries hold the mean of the old ones, and no norm over embed outside "
        "the layers hides them from what reads the last layer's output"
    )
