"""The tables and sentences that the command line prints of the library's results."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape as without_markup
from rich.table import Table

from emaopt._types import Json
from emaopt._weights import WeightSummary
from emaopt.cli._terminal import in_letters, shown

if TYPE_CHECKING:
    from emaopt.checkpoint import Description, Sweep

_SUMMARY = ["mean age\n(steps)", "half-life\n(steps)", "effective\niterates"]
_SUMMARY += ["weight\nof θ_0"]


def escape(name: object) -> str:
    """A name of the user's, with markup and control characters escaped."""
    return without_markup(shown(name))


def document(value: Any) -> Any:
    """A result in the types of JSON, in which NamedTuples become objects."""
    # A NamedTuple is a tuple as well, so it is asked for first.
    if hasattr(value, "_asdict"):
        return document(value._asdict())
    if isinstance(value, Mapping):
        return {name: document(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [document(one) for one in value]
    if isinstance(value, float) and math.isnan(value):
        return None  # JSON has no NaN
    return value


def summaries(found: Mapping[str, WeightSummary], steps: int) -> Table:
    """A table with a row for each profile."""
    table = _table(
        f"averages after {steps:,} steps",
        ["", *_SUMMARY],
    )
    for name, summary in found.items():
        table.add_row(escape(name), *_cells(summary))
    return table


def named(found: Mapping[str, WeightSummary]) -> list[Json]:
    """The summaries for JSON, in the form of the averages of a checkpoint."""
    return [{"name": name, "summary": document(one)} for name, one in found.items()]


def combination(record: Json) -> Iterator[RenderableType]:
    """What was combined, and the error of a synthesis."""
    kind = record.get("profile") or record.get("target") or "by coefficients"
    at = f" at step {record['step']:,}" if "step" in record else ""
    clock = record.get("clock", "steps")
    kind += f" by {clock}" if clock != "steps" else ""
    title = f"a combination ({kind}{at}) of {record['weights']}"
    columns: dict[str, Iterable[str]] = {"checkpoint": map(escape, record["checkpoints"])}
    if "averages" in record:
        columns["average"] = map(escape, record["averages"])
    columns["coefficient"] = (f"{c:+.4f}" for c in record["coefficients"])
    table = _table(escape(title), list(columns))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    yield table
    if "residual" in record:
        yield (
            f"Error of the profile: {record['residual']:.2%} (relative, L2). Noise gain: "
            f"{record['noise_gain']:.2f} times the rounding errors of the snapshots."
        )


def description(found: "Description") -> Iterator[RenderableType]:
    """A checkpoint: its arrays, what it serves, and its averages."""
    table = _table(escape(found.path), ["array", "dtype", "shape", "size"])
    for leaf in found.leaves:
        shape = in_letters(" × ").join(map(str, leaf.shape)) or "scalar"
        name = escape(leaf.name) or "(the root)"
        table.add_row(name, leaf.dtype, shape, _size(leaf.nbytes))
    yield table
    total = _size(sum(leaf.nbytes for leaf in found.leaves))
    yield (
        f"{len(found.leaves)} arrays, {total}; on disk {_size(found.nbytes_on_disk)}. "
        f"Parameters: {escape(found.parameters) or 'the whole checkpoint'}. There stand: "
        f"{escape(found.served)}."
    )
    if found.beside:
        yield (
            f"With them go {escape(', '.join(found.beside))}; training resumes from the "
            "values that it had."
        )
    if found.averages:
        clocked = any(one.clock for one in found.averages)
        columns = [c.replace("\n(steps)", "") for c in _SUMMARY] if clocked else _SUMMARY
        averages = _table("averages", ["average", "updates", *columns])
        for one in found.averages:
            unit = f" {escape(one.clock or 'steps')}" if clocked else ""
            cells = _cells(one.summary, unit) if one.summary else [""] * len(_SUMMARY)
            updates = "?" if one.num_updates is None else f"{one.num_updates:,}"
            if one.elapsed is not None:
                time = f"{one.elapsed:,.{0 if one.elapsed.is_integer() else 3}f}"
                updates += f" ({time} {escape(str(one.clock))})"
            averages.add_row(escape(one.name), updates, *cells)
        yield averages
        if not all(one.summary for one in found.averages):
            yield (
                "Of an average whose name does not say its decay, `emaopt profile DECAY "
                "--steps UPDATES` tells what it is made of."
            )
    if found.record:
        yield from combination(found.record)


def swept(
    found: "Sweep", command: str, run: str
) -> tuple[Json, Iterator[RenderableType]]:
    """The candidates of a sweep, as JSON and as a table, and which of them was chosen."""
    differences = found.losses - found.losses[0]
    errors = differences.std(1, ddof=1) / math.sqrt(differences.shape[1])
    rows = [
        {
            "name": name,
            "loss": float(losses.mean()),
            "difference": float(difference.mean()),
            "standard_error": float(error),
            "residual": residual,
        }
        for name, losses, difference, error, residual in zip(
            found.candidates,
            found.losses,
            differences,
            errors,
            found.residuals,
            strict=True,
        )
    ]
    selection = document(found.selection)
    made = {"candidates": rows, "chosen": found.chosen, "selection": selection}
    return {**made, "step": found.step}, _swept(found, rows, command, run)


def _swept(
    found: "Sweep", rows: list[Json], command: str, run: str
) -> Iterator[RenderableType]:
    count = found.losses.shape[1]
    title = f"{escape(run)}: losses of {count:,} examples, step {found.step:,}"
    table = _table(title, ["weights", "loss", "to the first", "error of\nthe profile"])
    for row in rows:
        gain = f"{row['difference']:+.5f} ± {row['standard_error']:.5f}"
        residual = row["residual"]
        table.add_row(
            escape(row["name"]),
            f"{row['loss']:.5f}",
            "" if row is rows[0] else gain,
            "" if residual is None else f"{residual:.2%}",
        )
    yield table
    one = found.selection
    best = escape(found.candidates[one.best])
    judged = (
        f"by {one.difference:+.5f} ± {one.standard_error:.5f} on the "
        f"{one.num_judged:,} examples that judge (p = {one.p_value:.2g})"
    )
    if found.chosen is not None:
        yield f"{best} is better than {escape(found.candidates[0])} {judged}."
        yield f"{escape(command)} --target {best} --out DIR makes it."
    elif one.best == 0:
        yield f"None: {best} is the best in the examples that choose."
    else:
        yield (
            f"None: {best} is the best in the examples that choose, but differs {judged}."
            f" A gain of {one.detectable:.5f} would be found four times out of five."
        )


def metrics(
    run: str, found: Mapping[int, Mapping[str, float]]
) -> Iterator[RenderableType]:
    """The metrics of a run: steps down, views and their metrics across."""
    names = sorted({name for one in found.values() for name in one})
    table = _table(escape(run), ["step", *map(escape, names)])
    for step, one in found.items():
        cells = (f"{one[name]:.6g}" if name in one else "" for name in names)
        table.add_row(f"{step:,}", *cells)
    yield table
    if not names:
        yield (
            "Its steps have no metrics: CheckpointManager keeps them only if its options "
            "have a best_fn."
        )
    yield f"emaopt inspect {escape(run)}/{max(found)} shows what a step holds."


def _cells(summary: WeightSummary, unit: str = "") -> list[str]:
    """The columns of `_SUMMARY`; the unit of ages, if it is not steps."""
    return [
        f"{summary.mean_age:,.1f}{unit}",
        f"{summary.half_life:,.1f}{unit}",
        "" if math.isnan(number := summary.effective_iterates) else f"{number:,.1f}",
        f"{summary.initial_weight:.2%}",
    ]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        # Names are folded at the end of the line, numbers never.
        justify = "right" if i else "left"
        table.add_column(
            in_letters(column), justify=justify, overflow="fold", no_wrap=i > 0
        )
    return table


def _size(nbytes: float) -> str:
    """A number of bytes in a unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:,.{unit != 'B':d}f} {unit}"
        nbytes /= 1024
    raise AssertionError(nbytes)
