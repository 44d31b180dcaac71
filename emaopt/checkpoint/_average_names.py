"""Names as TensorFlow gives them to averages."""

import numpy as np

from emaopt._checks import check_callable, check_text
from emaopt._masks import is_function
from emaopt._names import named_leaves
from emaopt._tree_checks import check_arrays
from emaopt._types import Mask, PyTree
from emaopt.checkpoint import _files


def average_names(
    params: PyTree,
    name: str = "ExponentialMovingAverage",
    *,
    mask: Mask = None,
    scope: str = "",
) -> dict[str, str]:
    """Maps TensorFlow's names of averages to the names of the parameters.

    The result is that of `tf.train.ExponentialMovingAverage.variables_to_restore`: use it
    to rename the variables in a converted TensorFlow checkpoint. Unlike TensorFlow's, it
    makes up no average for a parameter without one.

    Args:
      params: The parameters.
      name: The average's name in TensorFlow.
      mask: Which parameters have an average: a tree of booleans like `params` or a
        function that makes one, such as `emaopt.by_name`. None: all.
      scope: The variable scope in which TensorFlow made the averages.

    Returns:
      {"<scope>/path/of/parameter/<name>": "path/of/parameter"}, keys joined with "/";
      a parameter without an average has its own name twice.

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
    # A callable model with a flag at each leaf is a tree, and no function.
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
