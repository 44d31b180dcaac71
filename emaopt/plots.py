"""Pictures of averages. The only import of Matplotlib.

Each function draws into an Axes and returns it; `new_axes` makes one without pyplot, so
that no window opens and no backend is chosen.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from emaopt._writing import writing

RAW, AVERAGED = "#d1603d", "#1f5fa8"
_COLORS = (AVERAGED, RAW, "#4f8a3c", "#8b5fa8", "#b08a1e", "#5b6670")


def new_axes(width: float = 8.0, height: float = 4.2) -> Axes:
    """Makes an empty Axes in a figure of its own, `axes.figure`; inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def save(axes: Axes, path: str | os.PathLike, *, dpi: int = 200) -> None:
    """Writes the figure of the axes; the file is there whole or not at all."""
    figure: Any = axes.figure
    with writing(path) as file:
        figure.savefig(file, dpi=dpi, format=pathlib.Path(path).suffix[1:] or "png")


def weight_profiles(axes: Axes, profiles: Mapping[str, Any]) -> Axes:
    """Draws how much the iterates of a run weigh in averages.

    Args:
      axes: Where to draw.
      profiles: {label: float [T+1]}, as `emaopt.decay_weights` returns them. θ_0 is left
        out: it weighs something only in averages that start from it.

    Returns:
      The axes.

    Example:
      >>> import emaopt
      >>> weights = emaopt.decay_weights(0.99, 1000)
      >>> print(weight_profiles(new_axes(), {"β = 0.99": weights}).get_xlabel())
      training step
    """
    curves = {label: np.asarray(weights) for label, weights in profiles.items()}
    return weight_curves(axes, {k: (np.arange(w.size), w) for k, w in curves.items()})


def weight_curves(axes: Axes, profiles: Mapping[str, tuple[Any, Any]]) -> Axes:
    """Is `weight_profiles` of some of the steps: {label: (steps [n], weights [n])}.

    Example:
      >>> print(weight_curves(new_axes(), {"x": ([0, 1, 9], [0, 0.1, 0.9])}).get_ylabel())
      weight in the average
    """
    for i, (label, (steps, weights)) in enumerate(profiles.items()):
        later = np.asarray(steps) > 0
        drawn = np.asarray(steps)[later], np.asarray(weights)[later]
        color = _COLORS[i % len(_COLORS)]
        axes.plot(*drawn, color=color, label=label, lw=1.8)
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
    """Draws the held-out loss of one run over the width of the average.

    Args:
      axes: Where to draw.
      sigma_rel: Widths of synthesized power averages, [n].
      losses: The loss of each, [n].
      recorded: {width: loss} of averages that were really recorded, as circles.
      raw: The loss of the raw parameters at the end of the run, as a line.

    Returns:
      The axes.

    Example:
      >>> axes = width_sweep(new_axes(), [0.05, 0.1, 0.2], [0.3, 0.2, 0.4], raw=0.5)
      >>> print(axes.get_ylabel())
      held-out loss
    """
    label = "synthesized after training"
    axes.plot(sigma_rel, losses, color=AVERAGED, label=label, lw=1.8, marker=".")
    if recorded:
        axes.plot(*zip(*recorded.items(), strict=True), "o", color=RAW, mfc="none", ms=9,
                  mew=1.8, label="really recorded")  # fmt: skip
    if raw is not None:
        axes.axhline(raw, color=RAW, lw=1.2, ls="--", label="raw parameters")
    axes.set_xlabel("σ_rel: width of the average, as a fraction of the run")
    axes.set_ylabel("held-out loss")
    return _styled(axes)


def curves(axes: Axes, steps: Any, raw: Any, averaged: Any) -> Axes:
    """Draws the held-out losses of raw parameters and of their average over a run.

    Args:
      axes: Where to draw.
      steps: The training steps at which they were measured, [n].
      raw: Losses [runs, n] or [n]; of several runs the mean, and the range as a band.
      averaged: Losses of the average, alike.

    Returns:
      The axes, with a logarithmic scale of losses.

    Example:
      >>> axes = curves(new_axes(), [1, 2], [0.3, 0.2], [[0.3, 0.1], [0.2, 0.1]])
      >>> print(axes.get_yscale())
      log
    """
    series = [("raw parameters", raw, RAW), ("their average", averaged, AVERAGED)]
    for label, losses, color in series:
        losses = np.atleast_2d(losses)
        axes.plot(steps, losses.mean(axis=0), color=color, label=label, lw=1.8)
        if len(losses) > 1:
            low, high = losses.min(axis=0), losses.max(axis=0)
            axes.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
    axes.set_ylabel("held-out loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, steps[-1])
    return _finished(axes)


def _finished(axes: Axes) -> Axes:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return _styled(axes)


def _styled(axes: Axes) -> Axes:
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes
