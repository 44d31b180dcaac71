"""What users who look for a mistake have JAX refuse."""

import jax

CAREFUL = {
    "leaks": jax.checking_leaks,
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}
