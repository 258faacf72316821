"""Where patches are: position embeddings resampled for another grid, and rotary angles."""

import dataclasses

import numpy as np

from molt_jax.towers.tensors import Transform
from molt_jax.towers.vision.config import VisionConfig

# Of the cubic kernels of PyTorch's `interpolate`, without and with antialias (Keys 1981).
CUBIC, CUBIC_ANTIALIAS = -0.75, -0.5


def transform(stored: Transform, config: VisionConfig) -> Transform:
  """How stored position embeddings become those of the grid that a tower reads.

  Args:
    stored: how they become ours where the grids are one.
    config: has both grids.
  """
  if config.position_grid == config.grid:
    return stored
  prefix = int(config.class_token)
  rows = prefix + config.position_grid**2

  def resampled(w):
    flat_pd = np.asarray(w, np.float64).reshape(rows, -1)
    first_kd, grid_pd = flat_pd[:prefix], flat_pd[prefix:]
    new_pd = resample(grid_pd, config.position_grid, config.grid, antialias=config.antialias)
    both_pd = np.concatenate([first_kd, new_pd]).astype(np.float32)
    return both_pd.reshape(*w.shape[:-2], *both_pd.shape)

  return dataclasses.replace(
    stored, source_shape=lambda ours: stored.source_shape((rows, ours[1])), host=resampled
  )


def resample(grid_pd: np.ndarray, old: int, new: int, *, antialias: bool) -> np.ndarray:
  """Resamples values on a square grid bicubically, as `torch.nn.functional.interpolate` does with
  align_corners=False.

  Args:
    grid_pd: [old * old, D], row by row.
    old, new: side of the grid.
    antialias: whether a kernel covers all that a cell of a coarser grid covers.

  Returns:
    [new * new, D]
  """
  weight_no = cubic_weights(old, new, antialias=antialias)
  grid_rcd = grid_pd.reshape(old, old, -1)
  rows_ncd = np.einsum('nr,rcd->ncd', weight_no, grid_rcd)
  return np.einsum('mc,ncd->nmd', weight_no, rows_ncd).reshape(new * new, -1)


def cubic_weights(old: int, new: int, *, antialias: bool) -> np.ndarray:
  """Weight of each of `old` cells of an axis in each of `new` ones, float64[new, old].

  Without antialias, cells beyond the border are those at the border; with it they have no weight
  and the others are normalised.
  """
  center_n = (np.arange(new) + 0.5) * old / new - 0.5
  if not antialias:
    first_n = np.floor(center_n).astype(int) - 1
    taps_nt = first_n[:, None] + np.arange(4)
    tap_weight_nt = _cubic(taps_nt - center_n[:, None], CUBIC)
    weight_no = np.zeros((new, old))
    np.add.at(weight_no, (np.arange(new)[:, None], taps_nt.clip(0, old - 1)), tap_weight_nt)
    return weight_no
  wide = max(old / new, 1.0)
  offset_no = np.arange(old) - center_n[:, None]
  weight_no = _cubic(offset_no / wide, CUBIC_ANTIALIAS)
  return weight_no / weight_no.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """The cubic convolution kernel, zero from 2 on."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def rotary(config: VisionConfig) -> tuple[np.ndarray, np.ndarray] | None:
  """(cos, sin) of the angles of each patch, float32[P, H / 2] each, H the width of a head; None:
  the tower has position embeddings.

  The first half of the angles are of the row of a patch, the others of its column, both between -1
  and 1 from border to border (DINOv3: Siméoni et al. 2025).
  """
  if not config.rope_theta:
    return None
  head_dim = config.hidden_size // config.num_heads
  frequency_f = config.rope_theta ** -np.arange(0, 1, 4 / head_dim)
  place_g = 2 * (np.arange(config.grid) + 0.5) / config.grid - 1
  row_p, column_p = (x.ravel() for x in np.meshgrid(place_g, place_g, indexing='ij'))
  angle_p2f = 2 * np.pi * np.stack([row_p, column_p], axis=1)[:, :, None] * frequency_f
  angle_ph = angle_p2f.reshape(len(row_p), -1)
  return np.cos(angle_ph).astype(np.float32), np.sin(angle_ph).astype(np.float32)
