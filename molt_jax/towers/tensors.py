"""How a Hugging Face tensor becomes one of our parameters, and back."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a Hugging Face tensor becomes ours and back.

  Attributes:
    source_shape: shape of ours -> the shape that theirs must have.
    reorder: theirs -> ours (a reshape to the shape of ours follows).
    restore: (ours, shape of theirs) -> theirs.
    host: theirs -> theirs, on the host before `reorder`; None: nothing.
  """

  source_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
  reorder: Callable[[jax.Array], jax.Array]
  restore: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  host: Callable[[np.ndarray], np.ndarray] | None = None


def _turned(w: np.ndarray, theirs: tuple[int, ...]) -> np.ndarray:
  return w.reshape(theirs[::-1]).T


def _unpatched(w: np.ndarray, theirs: tuple[int, ...]) -> np.ndarray:
  out, channels, height, width = theirs
  return w.reshape(height, width, channels, out).transpose(3, 2, 0, 1)


AS_IS = Transform(lambda ours: ours, lambda w: w, np.reshape)
ROWS = Transform(lambda ours: (1, *ours), lambda w: w, np.reshape)  # Of a batch of one.
TOKEN = Transform(lambda ours: (1, 1, *ours), lambda w: w, np.reshape)
FLAT = Transform(lambda ours: (math.prod(ours),), lambda w: w, np.reshape)
DENSE = Transform(
  lambda ours: (math.prod(ours[1:]), ours[0]), lambda w: w.T, _turned
)  # [out, in] -> [in, out...]
DENSE_OUT = Transform(
  lambda ours: (ours[-1], math.prod(ours[:-1])), lambda w: w.T, _turned
)  # [out, in] -> [in..., out]
PATCHES = Transform(
  lambda ours: (ours[1], 3, math.isqrt(ours[0] // 3), math.isqrt(ours[0] // 3)),
  lambda w: w.transpose(2, 3, 1, 0),
  _unpatched,
)

# (theirs, ours[, transform]) of a norm and of a linear layer; biases that a configuration does not
# have are not looked for.
NORM = (('weight', 'scale'), ('bias', 'bias'))
LINEAR = (('weight', 'kernel', DENSE), ('bias', 'bias', FLAT))


def norm(theirs: str, ours: str) -> dict[str, tuple[str, Transform]]:
  """Rows of a family's table for a norm with scale and bias."""
  return {f'{theirs}.{a}': (f'{ours}/{b}', AS_IS) for a, b in NORM}


def linear(theirs: str, ours: str) -> dict[str, tuple[str, Transform]]:
  """Rows of a family's table for a linear layer."""
  return {f'{theirs}.{a}': (f'{ours}/{b}', how) for a, b, how in LINEAR}


def linear_out(theirs: str, ours: str) -> dict[str, tuple[str, Transform]]:
  """As `linear`, for a layer whose input is heads x head width."""
  return {
    f'{theirs}.weight': (f'{ours}/kernel', DENSE_OUT),
    f'{theirs}.bias': (f'{ours}/bias', FLAT),
  }
