"""Weight, mean and scatter of a stream, merged by the pairwise update of Chan, Golub and LeVeque
(1979): exact for any division of the stream, and without the cancellation of sums of squares.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TINY = float(jnp.finfo(jnp.float32).tiny)


class Moments(NamedTuple):
  """The moments of some weighted samples.

  Attributes:
    weight: scalar, the sum of their weights.
    mean: an array, or a tree of arrays for several views.
    scatter: sums of products of distances from the mean, whichever of them are wanted: an array or
      a tree.
  """

  weight: jax.Array
  mean: Any
  scatter: Any


def merge(a: Moments, b: Moments, products: Callable[[jax.Array, Any], Any]) -> Moments:
  """Returns the moments of the samples of both together.

  Args:
    a, b: weights may be 0; then the mean is not read.
    products: (weight, difference of the means) -> the weighted products of the difference that
      `scatter` is made of.
  """
  total = a.weight + b.weight
  share = b.weight / jnp.maximum(total, TINY)
  step = jax.tree.map(lambda x, y: y - x, a.mean, b.mean)
  between = products(a.weight * share, step)
  return Moments(
    total,
    jax.tree.map(lambda mean, step: mean + share * step, a.mean, step),
    jax.tree.map(lambda *parts: parts[0] + parts[1] + parts[2], a.scatter, b.scatter, between),
  )
