"""Plots of averages; the only module that imports Matplotlib.

Each function draws into an Axes and returns it. `new_axes` makes one without pyplot, so
that no window opens and no backend is chosen.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from emaopt._checks import (
    check_mapping,
    check_number,
    check_real,
    check_text,
    check_vector,
)
from emaopt._names import Unknown
from emaopt._output import writing
from emaopt._paths import check_writable
from emaopt._types import Path, Vector

__all__ = [
    "AVERAGED",
    "RAW",
    "curves",
    "new_axes",
    "save",
    "weight_curves",
    "weight_profiles",
    "width_sweep",
]

RAW = "#d1603d"
AVERAGED = "#1f5fa8"
_LARGEST = 1000.0  # inches
_FARTHEST = 1e300  # the largest number that an axis takes
_COLORS = (AVERAGED, RAW, "#4f8a3c", "#8b5fa8", "#b08a1e", "#5b6670")
_STYLES = ("-", "--", "-.", ":")

Losses: TypeAlias = Vector | Sequence[Vector]


def new_axes(width: float = 8.0, height: float = 4.2) -> Axes:
    """Makes an empty Axes in a figure of its own, `axes.figure`.

    Args:
      width, height: The size of the figure in inches.

    Raises:
      ValueError, TypeError: If a size is not a number in (0, 1000].
    """
    check_number("new_axes", "width", width, 0, _LARGEST, above=True)
    check_number("new_axes", "height", height, 0, _LARGEST, above=True)
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def save(axes: Axes, path: Path, *, dpi: int = 200) -> None:
    """Writes the figure of the axes to a file, which appears whole or not at all.

    Args:
      axes: As these functions return them.
      path: The file to write or replace; its ending says the format, else PNG.
      dpi: Dots per inch, from 10 to 10,000.

    Raises:
      ValueError, TypeError: If an argument is of another kind, or Matplotlib writes no
        pictures with the ending of `path`.
    """
    _check_axes("save", axes)
    check_writable("save", "path", path)
    check_number("save", "dpi", dpi, 10, 10_000)
    figure: Any = axes.figure
    kind = pathlib.Path(path).suffix[1:].lower() or "png"
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise Unknown(
            f"save: path must end in one of {', '.join(sorted(known))}, got {path!r}.",
            "path",
        )
    if os.path.isdir(os.path.abspath(path)):
        raise IsADirectoryError(f"save: {path} is a directory; give the file to make.")
    # Matplotlib gets an open file, without the name whose ending tells the format.
    with writing(path) as file:
        figure.savefig(file, dpi=dpi, format=kind)


def weight_profiles(axes: Axes, profiles: Mapping[str, Vector]) -> Axes:
    """Draws the weights of the iterates of a run in averages.

    Args:
      axes: Where to draw.
      profiles: {label: float [T+1]}, as `emaopt.decay_weights` returns them. θ_0 is left
        out: it has weight only in averages that start from it.

    Returns:
      The axes.

    Raises:
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> weights = emaopt.decay_weights(0.99, 1000)
      >>> print(weight_profiles(new_axes(), {"β = 0.99": weights}).get_xlabel())
      training step
    """
    _check_axes("weight_profiles", axes)
    check_mapping("weight_profiles", "profiles", profiles)
    curves = {}
    for label, given in profiles.items():
        check_text("weight_profiles", "each label of profiles", label)
        weights = check_vector("weight_profiles", "profiles", given)
        curves[label] = np.arange(weights.size), weights
    return weight_curves(axes, curves)


def weight_curves(axes: Axes, profiles: Mapping[str, tuple[Vector, Vector]]) -> Axes:
    """Draws `weight_profiles` from the weights of some steps, as for a long run.

    Args:
      axes: Where to draw.
      profiles: {label: (steps [n], float [n] their weights)}. Step 0 is left out.

    Returns:
      The axes.

    Raises:
      ValueError, TypeError: If an argument is of another kind, or there are not as many
        weights as steps.

    Example:
      >>> print(weight_curves(new_axes(), {"x": ([0, 1, 9], [0, 0.1, 0.9])}).get_ylabel())
      weight in the average
    """
    _check_axes("weight_curves", axes)
    check_mapping("weight_curves", "profiles", profiles)
    for i, (label, curve) in enumerate(profiles.items()):
        check_text("weight_curves", "each label of profiles", label)
        if not isinstance(curve, (tuple, list)) or len(curve) != 2:
            raise TypeError(
                f"weight_curves: each label of profiles has a pair (steps, weights), got "
                f"{curve!r}."
            )
        steps, weights = (check_vector("weight_curves", "profiles", x) for x in curve)
        if steps.size != weights.size:
            raise ValueError(
                f"weight_curves: profiles[{label!r}] has {steps.size} steps and "
                f"{weights.size} weights."
            )
        drawn = steps[steps > 0], weights[steps > 0]
        color = _COLORS[i % len(_COLORS)]
        # Where two curves coincide, both are seen.
        style = _STYLES[i % len(_STYLES)]
        axes.plot(*drawn, color=color, ls=style, label=label, lw=1.8)
        if drawn[0].size and drawn[0][-1] >= 10**7:
            axes.locator_params(axis="x", nbins=4)  # the numbers would touch
    axes.set_ylabel("weight in the average")
    axes.set_ylim(bottom=0)
    return _finished(axes)


def width_sweep(
    axes: Axes,
    sigma_rel: Sequence[float],
    losses: Sequence[float],
    *,
    recorded: Mapping[float, float] | None = None,
    raw: float | None = None,
) -> Axes:
    """Draws the held-out loss of one run against the width of the average.

    Args:
      axes: Where to draw.
      sigma_rel: Widths of synthesized power averages, [n].
      losses: The loss of each, [n].
      recorded: {width: loss} of averages that were recorded in training, drawn as
        circles.
      raw: The loss of the raw parameters at the end of the run, drawn as a line.

    Returns:
      The axes.

    Raises:
      TypeError: If an argument is of another kind.

    Example:
      >>> axes = width_sweep(new_axes(), [0.05, 0.1, 0.2], [0.3, 0.2, 0.4], raw=0.5)
      >>> print(axes.get_ylabel())
      held-out loss
    """
    _check_axes("width_sweep", axes)
    widths = check_vector("width_sweep", "sigma_rel", sigma_rel)
    heights = check_real("width_sweep", "losses", losses, "[n]", (1,), finite=False)
    if len(widths) != len(heights):
        raise ValueError(
            f"width_sweep: {len(heights)} losses for {len(widths)} of sigma_rel."
        )
    check_mapping("width_sweep", "recorded", recorded, optional=True)
    if recorded:
        for pair in recorded.items():
            check_vector("width_sweep", "recorded", pair)
    if raw is not None:
        check_number("width_sweep", "raw", raw, -_FARTHEST, _FARTHEST)
    label = "synthesized after training"
    axes.plot(widths, heights, color=AVERAGED, label=label, lw=1.8, marker=".")
    if recorded:
        axes.plot(*zip(*recorded.items(), strict=True), "o", color=RAW, mfc="none", ms=9,
                  mew=1.8, label="really recorded")  # fmt: skip
    if raw is not None:
        axes.axhline(raw, color=RAW, lw=1.2, ls="--", label="raw parameters")
    axes.set_xlabel("σ_rel: width of the average, as a fraction of the run")
    axes.set_ylabel("held-out loss")
    return _styled(axes)


def curves(axes: Axes, steps: Vector, raw: Losses, averaged: Losses) -> Axes:
    """Draws the held-out losses of raw parameters and of their average over a run.

    Args:
      axes: Where to draw.
      steps: The training steps at which the losses were measured, [n].
      raw: Losses of the raw parameters, [runs, n] or [n]. Several runs are drawn as their
        mean, with a band from the smallest to the largest loss.
      averaged: Losses of the average, in the same form.

    Returns:
      The axes, with a logarithmic scale of losses.

    Raises:
      TypeError: If an argument is of another kind.

    Example:
      >>> axes = curves(new_axes(), [1, 2], [0.3, 0.2], [[0.3, 0.1], [0.2, 0.1]])
      >>> print(axes.get_yscale())
      log
    """
    _check_axes("curves", axes)
    steps = check_vector("curves", "steps", steps)
    what = "losses [n] or [runs, n]"
    raw = check_real("curves", "raw", raw, what, (1, 2), finite=False)
    averaged = check_real("curves", "averaged", averaged, what, (1, 2), finite=False)
    for argument, losses in (("raw", raw), ("averaged", averaged)):
        if losses.shape[-1] != len(steps):
            raise ValueError(
                f"curves: {argument} must be [n] or [runs, n] for {len(steps)} steps, "
                f"got shape {losses.shape}."
            )
    series = [("raw parameters", raw, RAW), ("their average", averaged, AVERAGED)]
    for label, losses, color in series:
        losses = np.atleast_2d(losses)
        axes.plot(steps, losses.mean(axis=0), color=color, label=label, lw=1.8)
        if len(losses) > 1:
            low, high = losses.min(axis=0), losses.max(axis=0)
            axes.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
    # Set in this order: a logarithmic scale brings locators and formatters of its own.
    axes.set_ylabel("held-out loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, steps[-1])
    return _finished(axes)


def _check_axes(function: str, axes: object) -> None:
    """Raises unless `axes` is an Axes."""
    if not isinstance(axes, Axes):
        raise TypeError(
            f"{function}: axes must be an Axes of Matplotlib's, as new_axes() makes, got "
            f"{axes!r}."
        )


def _finished(axes: Axes) -> Axes:
    """The axes, with training steps on the horizontal one."""
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return _styled(axes)


def _styled(axes: Axes) -> Axes:
    """The axes in the style of all pictures, with a legend."""
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes
