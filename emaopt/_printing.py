"""What the command line prints: tables and sentences, from what the library returns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from emaopt._weights import WeightSummary, weight_summary


def summaries(profiles: Mapping[str, Any], steps: int) -> Table:
    """A row for each profile."""
    table = _table(
        f"averages after {steps:,} steps",
        ["", "mean age", "half-life", "effective iterates", "weight of θ_0"],
    )
    for name, weights in profiles.items():
        table.add_row(escape(name), *_cells(weight_summary(weights)))
    return table


def weights_table(weights: Mapping[str, float], profile: str, said: str) -> Table:
    """The checkpoints and what they weigh."""
    table = _table(f"{profile}, of {said}", ["checkpoint", "weight"])
    for path, weight in weights.items():
        table.add_row(escape(path), f"{weight:.4f}")
    return table


def synthesis(made: Any) -> Iterator[Any]:
    """What was combined, and how good it is."""
    table = _table(
        f"snapshots, for an average at step {made.step:,}",
        ["checkpoint", "average", "step", "coefficient"],
    )
    rows = zip(made.snapshots, made.solution.coefficients, strict=True)
    for (path, name, step), coefficient in rows:
        table.add_row(escape(path), escape(name), f"{step:,}", f"{coefficient:+.4f}")
    yield table
    yield (
        f"Error of the profile: {made.solution.residual:.2%} (relative, L2). Noise gain: "
        f"{made.solution.noise_gain:.2f} times the rounding errors of the snapshots."
    )


def description(found: Any) -> Iterator[Any]:
    """A checkpoint: its arrays, then its averages and what is served."""
    table = _table(escape(found.path), ["array", "dtype", "shape", "size"])
    for leaf in found.leaves:
        shape = " × ".join(map(str, leaf.shape)) or "scalar"
        name = escape(leaf.name) or "(the root)"
        table.add_row(name, leaf.dtype, shape, _size(leaf.nbytes))
    yield table
    total = _size(sum(leaf.nbytes for leaf in found.leaves))
    yield (
        f"{len(found.leaves)} arrays, {total}; on disk {_size(found.nbytes_on_disk)}. "
        f"Parameters: {escape(found.parameters) or 'the whole checkpoint'}. There stand: "
        f"{escape(found.served)}."
    )
    if found.averages:
        columns = ["average", "updates", "stands"]
        columns += ["mean age", "half-life", "effective iterates", "weight of θ_0"]
        averages = _table("averages", columns)
        for one in found.averages:
            where = "under the names" if one.served else "in its slot"
            cells = _cells(one.summary) if one.summary else ["", "", "", ""]
            averages.add_row(escape(one.name), f"{one.num_updates:,}", where, *cells)
        yield averages
        if not all(one.summary for one in found.averages):
            yield (
                "Of an average whose name does not say its decay, `emaopt profile DECAY "
                "--steps UPDATES` tells what it is made of."
            )
    if found.record:
        yield _combination(found.record)


def _combination(record: Mapping[str, Any]) -> Table:
    kind = record.get("profile") or record.get("target") or "by coefficients"
    said = f"a combination ({kind}) of {record['weights']}"
    table = _table(escape(said), ["of", "coefficient"])
    rows = zip(record["checkpoints"], record["coefficients"], strict=True)
    for path, coefficient in rows:
        table.add_row(escape(path), f"{coefficient:+.4f}")
    return table


def _cells(summary: WeightSummary) -> list[str]:
    return [
        f"{summary.mean_age:,.1f} steps",
        f"{summary.half_life:,.1f} steps",
        f"{summary.effective_iterates:,.1f}",
        f"{summary.initial_weight:.2%}",
    ]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:,.{unit != 'B':d}f} {unit}"
        nbytes /= 1024
    raise AssertionError(nbytes)
