"""Batches of hidden states that are stored: nothing else of an example is read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from molt_jax.data import missing
from molt_jax.data.examples import Preprocess, label_array
from molt_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class CachedStates:
  """Where the hidden states of one modality of a split are.

  Attributes:
    keys: of each example, of several images several; none where it is not wanted or cannot be
      used.
    read: key -> [L, real tokens, D].
    tokens: key -> real tokens, without reading them.
    shape: (L, most tokens, D).
    dtype: of what `read` returns.
  """

  keys: Sequence[tuple[str, ...]]
  read: Callable[[str], np.ndarray]
  tokens: Callable[[str], int]
  shape: tuple[int, int, int]
  dtype: np.dtype

  def mean(self, index: int) -> np.ndarray:
    """Returns the hidden states of an example, [L, real tokens, D], the mean over its images."""
    first, *others = self.keys[index]
    x_lnd = self.read(first)
    if not others:
      return x_lnd
    total_lnd = x_lnd.astype(np.float32)
    for key in others:
      total_lnd += self.read(key).astype(np.float32)
    return (total_lnd / (1 + len(others))).astype(self.dtype)


def take(
  source: Source, stored: Mapping[str, CachedStates] | None, rows: Sequence[int]
) -> tuple[Source, dict[str, CachedStates] | None]:
  """Returns these examples of a source, and of its hidden states where they are stored."""
  part = missing.Part(source, tuple(rows))
  if not stored:
    return part, stored
  kept = {}
  for modality, states in stored.items():
    kept[modality] = dataclasses.replace(states, keys=[states.keys[row] for row in rows])
  return part, kept


def stack_examples(
  index_b: np.ndarray,
  preprocess: Preprocess,
  *,
  source: Source,
  present_nm: np.ndarray,
  stored: Mapping[str, CachedStates],
) -> dict[str, np.ndarray]:
  """As `examples.stack_examples`, with hidden states for content."""
  batch = {}
  length_bm = np.zeros((len(index_b), 2), int)
  for column, (modality, most) in enumerate((('image', None), ('text', preprocess.max_tokens))):
    if modality in stored:
      batch[f'{modality}_states'], length_bm[:, column] = _read_states(
        stored[modality], index_b, present_nm[:, column], most
      )
  empty = () if preprocess.multi_label else 0
  labels = [source.labels[index] if index >= 0 else empty for index in index_b]
  return batch | {
    'token_mask': np.arange(preprocess.max_tokens)[None, :] < length_bm[:, 1:],
    'present': length_bm > 0,
    'label': np.stack([label_array(preprocess, label) for label in labels]),
    'weight': (length_bm > 0).any(axis=1).astype(np.float32),
    'index': np.asarray(index_b, np.int32),
  }


def _read_states(
  stored: CachedStates, index_b: np.ndarray, present_n: np.ndarray, most: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (hidden states [B, L, `most` tokens, D], zeros where absent; real tokens int[B])."""
  layers, all_tokens, width = stored.shape
  states_blnd = np.zeros((len(index_b), layers, most or all_tokens, width), stored.dtype)
  length_b = np.zeros(len(index_b), int)
  # Each is read into its place, so that a batch is in memory once.
  for row, index in enumerate(index_b):
    if index >= 0 and present_n[index] and stored.keys[index]:
      x_lnd = stored.mean(index)
      length_b[row] = x_lnd.shape[1]
      states_blnd[row, :, : length_b[row]] = x_lnd
  return states_blnd, length_b


def text_length(index: int, *, present_nm: np.ndarray, stored: Mapping[str, CachedStates]) -> int:
  """Returns the tokens of an example's text; 0 where it is absent."""
  if index < 0 or not present_nm[index, 1] or 'text' not in stored:
    return 0
  keys = stored['text'].keys[index]
  return stored['text'].tokens(keys[0]) if keys else 0
