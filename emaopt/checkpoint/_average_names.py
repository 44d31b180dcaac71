"""Names as TensorFlow gives them to averages."""

from typing import Any

import numpy as np

from emaopt._checks import check_arrays, check_callable, check_text
from emaopt._masks import is_function
from emaopt._names import named_leaves
from emaopt.checkpoint import _files


def average_names(
    params: Any,
    name: str = "ExponentialMovingAverage",
    *,
    mask: Any = None,
    scope: str = "",
) -> dict[str, str]:
    """Maps names as TensorFlow gives averages to the parameters' own.

    What `tf.train.ExponentialMovingAverage.variables_to_restore` returns: use it to
    rename what a converted TensorFlow checkpoint holds. Unlike that, it makes up no
    average for what has none.

    Args:
      params: The parameters.
      name: The average's name in TensorFlow.
      mask: Which parameters have an average: a tree of booleans like `params` or a
        function that makes one, such as `emaopt.by_name`. None: all.
      scope: The variable scope in which TensorFlow made the averages.

    Returns:
      {"<scope>/path/of/parameter/<name>": "path/of/parameter"}, keys joined with "/";
      what has no average has its own name twice.

    Raises:
      ValueError: If `mask` is not like `params`.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(average_names({"dense": {"kernel": 0.0}}))
      {'dense/kernel/ExponentialMovingAverage': 'dense/kernel'}
    """
    check_arrays("average_names", "params", params)
    check_text("average_names", "name", name)
    check_text("average_names", "scope", scope)
    if callable(mask) and is_function(mask, params):
        check_callable("average_names", "mask", mask, 1)
    flags = mask(params) if is_function(mask, params) else mask
    averaged = dict.fromkeys(_files.names_of(params), True)
    if flags is not None:
        averaged = _files.names_of(flags)
    booleans = all(isinstance(flag, (bool, np.bool_)) for flag in averaged.values())
    if averaged.keys() != _files.names_of(params).keys() or not booleans:
        raise ValueError("average_names: mask must be a tree of booleans like params.")
    prefix = f"{scope}/" if scope else ""
    flags = [averaged[names] for names in _files.names_of(params)]
    named = ["/".join(names) for names, _ in named_leaves(params)]
    pairs = zip(named, flags, strict=True)
    return {f"{prefix}{n}/{name}" if has_one else n: n for n, has_one in pairs}
