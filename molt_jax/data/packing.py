"""Where the real tokens of a batch of texts are, so that text tower and head can leave out padding;
sizes come from short lists, for few programs.
"""

from collections.abc import Sequence

import numpy as np

SHORTEST = 16  # Tokens of the shortest batch.


def padded_length(length: int, max_tokens: int) -> int:
  """Returns the length that a batch is padded to whose longest text has `length` tokens.

  The least of SHORTEST, its doubles and `max_tokens`.
  """
  padded = SHORTEST
  while padded < length:
    padded *= 2
  return min(padded, max_tokens)


def packed_size(tokens: int) -> int:
  """Returns the positions that so many real tokens get.

  The least of 16, 20, 24, 28, 32, 40, ..., four sizes to the double.
  """
  step = max(SHORTEST // 4, 1 << max(0, int(tokens - 1).bit_length() - 3))
  return max(SHORTEST, -(-int(tokens) // step) * step)


def usual_size(lengths: Sequence[int], rows: int) -> int:
  """Returns a `packed_size` that nearly every group of so many rows keeps to.

  Mean + 3 standard deviations of the sum, for rows drawn from texts of these lengths.
  """
  mean, std = (float(f(lengths)) if len(lengths) else 0.0 for f in (np.mean, np.std))
  return packed_size(round(rows * mean + 3 * rows**0.5 * std))


def groups(rows: int, pack: tuple[int, int]) -> np.ndarray:
  """Returns [G, rows / G], the rows of a batch that are packed together.

  Those that one of `shards` devices takes in one of `parts` microbatches.

  pack: (shards, parts). A shard is an unbroken run of rows; part m of it has its rows m, m + parts,
  ..., so group s * parts + m goes where they go.
  """
  shards, parts = pack
  return np.arange(rows).reshape(shards, -1, parts).swapaxes(1, 2).reshape(shards * parts, -1)


def token_positions(
  mask_bt: np.ndarray, groups_gr: np.ndarray, size: int | None = None
) -> dict[str, np.ndarray]:
  """Returns {'token_position': int32[G, size]}, where a mask's real tokens are.

  Among the R x T positions of each group; R T in positions left over.

  `size` is the `packed_size` of the fullest group if None. Returns {} where packing would not make
  the batch smaller.
  """
  mask_gm = mask_bt[groups_gr].reshape(len(groups_gr), -1)
  size = packed_size(mask_gm.sum(axis=1).max()) if size is None else size
  if size >= mask_gm.shape[1]:
    return {}
  position_gn = np.full((len(mask_gm), size), mask_gm.shape[1], np.int32)
  for position_n, mask_m in zip(position_gn, mask_gm, strict=True):
    found = np.flatnonzero(mask_m)
    position_n[: len(found)] = found
  return {'token_position': position_gn}
