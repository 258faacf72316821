"""Kernels between pooled examples and landmarks, on the host: which tokens of a modality are
compared, and on which scale.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.methods.parts.kernel_ridge import KERNELS, MEAN

_LEAST_STD = 1e-3


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples in a random order.

  Attributes:
    pooled: modality -> group -> [B, L, N, D].
    present_bm: bool[B, 2].
    target_bk: float32[B, K] of zeros and ones.
  """

  pooled: Mapping[str, Mapping[str, np.ndarray]]
  present_bm: np.ndarray
  target_bk: np.ndarray

  def take(self, rows: np.ndarray) -> 'Examples':
    """Returns some of the examples."""
    pooled = {m: {g: x[rows] for g, x in groups.items()} for m, groups in self.pooled.items()}
    return Examples(pooled, self.present_bm[rows], self.target_bk[rows])

  def having(self, pattern_m: np.ndarray) -> np.ndarray:
    """Returns the rows of the examples that have the modalities of a pattern."""
    return np.flatnonzero(self.present_bm[:, pattern_m].all(axis=1))


class Groups(NamedTuple):
  """How a modality's kernel is made of groups.

  Attributes:
    mean_weight, cells_weight: of the two groups.
    state: whose cells are compared.
    lowest: the lowest hidden state whose means are compared, of those that the head reads.
    only_mean: the first and the last token are not compared beside the mean.
  """

  mean_weight: float
  cells_weight: float
  state: int = 0
  lowest: int = 0
  only_mean: bool = False


class ModalityKernels:
  """Kernels of one modality's examples (training, then held) with the landmarks."""

  def __init__(self, modality: str, training: Examples, held: Examples, count: int, kernel: str):
    self._kernel = KERNELS[kernel]
    own = training.having(np.array(MODALITIES) == modality)
    self.choice, self.chosen = Groups(1.0, 0.0), None
    self._spaces, self._inputs = {}, {}
    for group, x_blnd in training.pooled[modality].items():
      self._spaces[group] = space(x_blnd[own] if len(own) else x_blnd)
      self._inputs[group] = (x_blnd, held.pooled[modality][group])
    self._count = count
    self._num_states = training.pooled[modality]['cells'].shape[1]
    # One token without a place: both groups would be the same.
    self._has_cells = training.pooled[modality]['cells'].shape[2] > 1

  @property
  def means(self) -> list[Groups]:
    """The groups of means that may be compared: of all hidden states or of the upper half, with or
    without other tokens beside the mean.
    """
    lowest = sorted({0, self._num_states // 2})
    choices = itertools.product(lowest, (False, True))
    return [Groups(1.0, 0.0, lowest=state, only_mean=alone) for state, alone in choices]

  @property
  def cells(self) -> list[Groups]:
    """The groups of cells that may be compared; none where there is one cell, since both groups
    would be the same.
    """
    return [Groups(0.0, 1.0, state) for state in range(self._num_states if self._has_cells else 0)]

  def kernels(self, choice: Groups, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernels of training and held examples with `count` landmarks, float32[B, M]."""
    weights = {'mean': choice.mean_weight, 'cells': choice.cells_weight}
    found = [(w, self._kernels(group, choice, count)) for group, w in weights.items() if w]
    return tuple(sum(w * pair[k] for w, pair in found) for k in range(2))

  def _kernels(self, group: str, choice: Groups, count: int) -> tuple[np.ndarray, np.ndarray]:
    flat = []
    for x_blnd in self._inputs[group]:
      z_blnd = self._standardised(group, choice, x_blnd)
      flat.append(z_blnd.reshape(len(z_blnd), -1))
    landmarks_mc = flat[0][:count]
    return tuple(self._kernel(x_bc, landmarks_mc) for x_bc in flat)

  def _standardised(self, group: str, choice: Groups, x_blnd: np.ndarray) -> np.ndarray:
    mean_lnd, scale_lnd, rows = self._space_of(group, choice)
    return (x_blnd[:, rows].astype(np.float32) - mean_lnd) * scale_lnd

  def _space_of(self, group: str, choice: Groups) -> tuple[np.ndarray, np.ndarray, slice]:
    """Mean and scale of the hidden states of a group, and which they are. What is not compared has
    the scale zero, and the rest weighs as much more.
    """
    mean_lnd, scale_lnd = self._spaces[group]
    if group == 'cells':
      rows = slice(choice.state, choice.state + 1)
      return mean_lnd[rows], scale_lnd[rows], rows
    compared_lnd = np.zeros_like(scale_lnd)
    compared_lnd[choice.lowest :, [MEAN] if choice.only_mean else slice(None)] = 1
    scale_lnd = scale_lnd * compared_lnd / np.sqrt(compared_lnd.mean())
    return mean_lnd, scale_lnd.astype(np.float32), slice(None)

  def variables(self, landmarks: int) -> dict[str, np.ndarray]:
    """Returns the modality's variables, as `kernel_ridge.empty` makes them."""
    choice = self.choice
    weights = np.array([choice.mean_weight, choice.cells_weight], np.float32)
    found = {'state': np.int32(choice.state), 'group_weight': weights}
    for group, (x_blnd, _) in self._inputs.items():
      z_mlnd = self._standardised(group, choice, x_blnd[: self._count])
      padding = np.zeros((landmarks - len(z_mlnd), *z_mlnd.shape[1:]), np.float32)
      mean_lnd, scale_lnd, _ = self._space_of(group, choice)
      found |= {
        f'{group}_mean_lnd': mean_lnd,
        f'{group}_scale_lnd': scale_lnd,
        f'{group}_landmarks_mlnd': np.concatenate([z_mlnd, padding]).astype(np.float16),
      }
    return found


def space(x_blnd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and inverse standard deviation over the first axis of training examples, float32."""
  mean_lnd = x_blnd.mean(axis=0, dtype=np.float64)
  square_lnd = np.zeros_like(mean_lnd)
  for rows in np.array_split(x_blnd, max(len(x_blnd) // 256, 1)):
    square_lnd += np.square(rows - mean_lnd).sum(axis=0)
  deviation_lnd = np.sqrt(square_lnd / max(len(x_blnd), 1))
  scale_lnd = 1 / (deviation_lnd + _LEAST_STD + 1e-3 * np.abs(mean_lnd))
  return mean_lnd.astype(np.float32), scale_lnd.astype(np.float32)


def mixture(image, text, share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (1 - share) of the image's kernels + share of the text's, with `count` landmarks."""
  pairs = zip(image, text, strict=True)
  return tuple((1 - share) * a[:, :count] + share * b[:, :count] for a, b in pairs)
