"""Power averages: exponents, widths, inner products, and the error of a synthesis."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.typing import ArrayLike

from emaopt._checks import check_number, check_real
from emaopt._least_squares import nearest

Numbers: TypeAlias = ArrayLike | Sequence[float]


def gamma_of_sigma_rel(function: str, sigma_rel: Any) -> float:
    """Solves σ_rel² = (γ+1)/((γ+2)²(γ+3)) for the root γ > 0, the one in common use.

    The right-hand side rises from 0 at γ = -1 to a maximum near γ = -0.38 and falls
    from there, so a σ_rel below 1/√12 (γ = 0, the uniform average) has one root > 0.
    """
    check_number(function, "sigma_rel", sigma_rel, 0, above=True)
    if sigma_rel >= 12**-0.5:
        raise ValueError(
            f"{function}: sigma_rel must be below 1/sqrt(12) = 0.2887, the uniform "
            f"average, got {sigma_rel!r}."
        )
    # Multiplied out: γ³ + 7γ² + (16 - σ⁻²)γ + 12 - σ⁻² = 0.
    inverse = float(sigma_rel) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(np.max(roots.real))


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Returns the exponent γ of the power profile of relative width σ_rel.

    The root γ > 0 of σ_rel² = (γ+1) / ((γ+2)² (γ+3)).

    Args:
      sigma_rel: In (0, 0.2886...).

    Raises:
      ValueError: If `sigma_rel` is out of its range.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(f"{sigma_rel_to_gamma(0.1):.3f}")
      6.937
    """
    return gamma_of_sigma_rel("sigma_rel_to_gamma", sigma_rel)


def gamma_to_sigma_rel(gamma: float) -> float:
    """Returns the relative width σ_rel of the power profile t^γ.

    The standard deviation of the positions of the weights, as a fraction of the run:
    σ_rel² = (γ+1) / ((γ+2)² (γ+3)).

    Args:
      gamma: γ, greater than -1.

    Raises:
      ValueError: If `gamma` is out of its range.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(f"{gamma_to_sigma_rel(0):.4f}")
      0.2887
    """
    check_number("gamma_to_sigma_rel", "gamma", gamma, -1, above=True)
    return float(np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2))


def power_inner_product(
    gamma_a: Numbers, end_a: Numbers, gamma_b: Numbers, end_b: Numbers
) -> np.ndarray:
    """Returns ∫ p_a(τ) p_b(τ) dτ of the power profiles p(τ) = (γ+1) τ^γ / t^(γ+1).

    Each profile reaches from 0 to its end t. With t_a <= t_b the integral is

        (γ_a+1)(γ_b+1) / ((γ_a+γ_b+1) t_b) · (t_a/t_b)^γ_b,

    which needs γ_a + γ_b > -1. Only a ratio is raised to a power, so nothing overflows.

    Args:
      gamma_a: γ_a, any shape that broadcasts with the others.
      end_a: t_a, greater than 0, in any unit of time.
      gamma_b: γ_b.
      end_b: t_b.

    Returns:
      float64, in one over the unit of time.

    Raises:
      ValueError, TypeError: If an argument is out of its range, or not of finite numbers.

    Example:
      >>> print(power_inner_product(0, 1, 0, 2))
      0.5

    References:
      Karras et al., 2024, appendix C.2, https://arxiv.org/abs/2312.02696
    """
    name = "power_inner_product"
    given = {"gamma_a": gamma_a, "end_a": end_a, "gamma_b": gamma_b, "end_b": end_b}
    gamma_a, end_a, gamma_b, end_b = (
        check_real(name, argument, value, "numbers") for argument, value in given.items()
    )
    try:
        np.broadcast_shapes(gamma_a.shape, end_a.shape, gamma_b.shape, end_b.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from None
    if np.any(end_a <= 0) or np.any(end_b <= 0):
        raise ValueError(f"{name}: end_a and end_b must be greater than 0.")
    if np.any(gamma_a <= -1) or np.any(gamma_b <= -1) or np.any(gamma_a + gamma_b <= -1):
        raise ValueError(
            f"{name}: gamma_a, gamma_b and their sum must be greater than -1."
        )
    # The exponent is that of the profile that ends later, element by element.
    late = np.maximum(end_a, end_b)
    of_late = np.where(end_a <= end_b, gamma_b, gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * late)
    return scale * (np.minimum(end_a, end_b) / late) ** of_late


def power_residual(gammas: Sequence[float], count: int, target: float) -> float:
    """The residual of a power average made from evenly spaced snapshots.

    Args:
      gammas: γ of the recorded averages.
      count: How many snapshots there are of each, at times 1/count ... 1.
      target: γ of the average to make, at time 1.
    """
    ends = np.arange(1, count + 1) / count
    gamma = np.append(np.repeat(gammas, count), target)
    end = np.append(np.tile(ends, len(gammas)), 1.0)
    gram = power_inner_product(gamma[:, None], end[:, None], gamma, end)
    # Least squares depends on the profiles only by their inner products, so any vectors
    # with these products will do: the square root of the Gram matrix. Its rounding can
    # make small eigenvalues negative.
    values, vectors = np.linalg.eigh(gram)
    columns = (vectors * np.sqrt(np.maximum(values, 0))).T  # [n+1 coordinates, n+1]
    pairs = [(columns[:, :-1].T, columns[:, -1])]
    return nearest("snapshots_needed", pairs, len(gamma) - 1, rcond=None)[1]
