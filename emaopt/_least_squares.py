"""The combination of snapshots that is nearest to a profile, by QR in blocks."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def nearest(
    function: str,
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    count: int,
    rcond: float | None,
) -> tuple[np.ndarray, float]:
    """The c that minimizes ‖cᵀS - p‖₂ with Σc = 1, and its residual over ‖p‖₂.

    Args:
      function: The name of the function that was called, for errors.
      pairs: Blocks of the columns of S and of p, [n, b] and [b].
      count: n.
      rcond: As for `posthoc.solve`.
    """
    # The triangle has the least-squares problem of all blocks so far, in n + 1 rows. S is
    # never whole in memory, and SᵀS is never formed.
    triangle: Any = np.zeros((0, count + 1))
    for block, target in pairs:
        rows = np.column_stack([block.T, target])
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"{function}: the weights must be finite.")
        triangle = np.linalg.qr(np.concatenate([triangle, rows]), mode="r")
    matrix, target = triangle[:, :count], triangle[:, count]
    # c = 1/n + (any combination of the columns of sum_zero), which keeps Σc = 1.
    ones = np.ones((count, 1))
    sum_zero = np.linalg.qr(ones, mode="complete")[0][:, 1:]  # [n, n-1], orthonormal
    coefficients = ones[:, 0] / count
    if count > 1:
        # np.linalg.lstsq drops singular values that are small beside the largest one.
        # Here ‖S‖ is the measure: the differences of equal snapshots are all rounding,
        # the largest one as well.
        left, sizes, right = np.linalg.svd(matrix @ sum_zero, full_matrices=False)
        if rcond is None:
            rcond = count * np.finfo(np.float64).eps
        used = sizes > rcond * np.linalg.norm(matrix)
        along = left.T[used] @ (target - matrix @ coefficients) / sizes[used]
        coefficients += sum_zero @ (along @ right[used])
    residual = np.linalg.norm(matrix @ coefficients - target) / np.linalg.norm(target)
    return coefficients, float(residual)
