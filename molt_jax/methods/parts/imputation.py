"""Translation of an absent modality: in each layer, the pooled vector it would have had, predicted
from that of the present one.

The map is ridge regression in closed form. With S the moments of n complete pairs of x (the present
modality, encoded as when it is alone) and y (the other one, encoded beside it),

  y^ = mean_y + (x - mean_x) (S_xx + r I)^(-1) S_xy,    r = ridge * tr(S_xx) / d

With the whitened cross-covariance (S_xx + r I)^(-1/2) S_xy (S_yy + r' I)^(-1/2) = U diag(rho) V'
this is V diag(rho) U' between whitened spaces, whatever r': along each canonical direction the
prediction is shrunk by its canonical correlation, that of L_CCA's ridge.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from molt_jax.data.modalities import MODALITIES
from molt_jax.objectives import moments
from molt_jax.objectives.pairwise import in_range

_EPS = float(np.finfo(np.float32).eps)
_LARGEST = 1e12  # Of a view: so that sums of squares over any number of pairs stay in float32.


def _products(weight: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
  """The products of x with x and with y, [L, C, C]."""
  x_lc, y_lc = step
  return tuple(weight * x_lc[:, :, None] * other_lc[:, None, :] for other_lc in (x_lc, y_lc))


@struct.dataclass
class Moments:
  """Sums over weighted pairs (x, y) in L layers, from which the map follows; float32.

  Numbers of a view beyond 1e12 count as 1e12.

  Attributes:
    weight: scalar, n.
    mean_x_lc, mean_y_lc: [L, C].
    scatter_xx_lcc, scatter_xy_lcc: [L, C, C], sums of products of distances from the means.
  """

  weight: jax.Array
  mean_x_lc: jax.Array
  mean_y_lc: jax.Array
  scatter_xx_lcc: jax.Array
  scatter_xy_lcc: jax.Array

  @classmethod
  def empty(cls, num_layers: int, width: int) -> 'Moments':
    """The moments of no pair."""
    mean_lc, scatter_lcc = (
      np.zeros((num_layers, width), np.float32),
      np.zeros((num_layers, width, width), np.float32),
    )
    return cls(np.zeros((), np.float32), mean_lc, mean_lc, scatter_lcc, scatter_lcc)

  def update(self, x_lbc: jax.Array, y_lbc: jax.Array, weight_b: jax.Array) -> 'Moments':
    """Adds a batch [L, B, C] (`objectives.moments`); examples of weight 0 are not read."""
    new = jnp.sum(weight_b)
    share_b = weight_b / jnp.maximum(new, 1e-6)
    live = (weight_b > 0)[None, :, None]

    def centred(view_lbc):
      view_lbc = in_range(jnp.where(live, view_lbc, 0), _LARGEST)
      mean_lc = jnp.einsum('b,lbc->lc', share_b, view_lbc, precision='highest')
      return mean_lc, jnp.where(live, view_lbc - mean_lc[:, None, :], 0)

    (mean_x_lc, x_lbc), (mean_y_lc, y_lbc) = centred(x_lbc), centred(y_lbc)
    scatter = tuple(
      jnp.einsum('b,lbc,lbe->lce', weight_b, x_lbc, other_lbc, precision='highest')
      for other_lbc in (x_lbc, y_lbc)
    )
    seen = moments.Moments(
      self.weight,
      (self.mean_x_lc, self.mean_y_lc),
      (self.scatter_xx_lcc, self.scatter_xy_lcc),
    )
    batch = moments.Moments(new, (mean_x_lc, mean_y_lc), scatter)
    merged = moments.merge(seen, batch, _products)
    return Moments(merged.weight, *merged.mean, *merged.scatter)

  def solve(self, *, ridge: float) -> dict[str, np.ndarray]:
    """Returns {'kernel_lcc', 'bias_lc'}, float32, of y^ = x kernel + bias; computed in float64 on
    the host, one layer after the other.

    A ridge below the rounding of S_xx, which is summed in float32, 4 eps ||S_xx||_F, is raised to
    that.
    """
    kernels, biases = [], []
    for mean_x_c, mean_y_c, xx_cc, xy_cc in zip(
      *(
        np.asarray(m, np.float64)
        for m in (self.mean_x_lc, self.mean_y_lc, self.scatter_xx_lcc, self.scatter_xy_lcc)
      ),
      strict=True,
    ):
      shrinkage = max(ridge * np.trace(xx_cc) / len(xx_cc), 4 * _EPS * np.linalg.norm(xx_cc))
      if shrinkage > 0:
        kernels.append(np.linalg.solve(xx_cc + shrinkage * np.eye(len(xx_cc)), xy_cc))
      else:
        kernels.append(np.zeros_like(xy_cc))  # Of a constant view nothing can be learned.
      biases.append(mean_y_c - mean_x_c @ kernels[-1])
    return {
      'kernel_lcc': np.stack(kernels).astype(np.float32),
      'bias_lc': np.stack(biases).astype(np.float32),
    }


class CrossModalImputation(nn.Module):
  """Fills in what is absent by the fitted map; before it is fitted, nothing.

  The collection `statistics` holds, for each direction 'to_image' and 'to_text', kernel_lcc [L, C,
  C] and bias_lc [L, C] of `Moments.solve`, and `pairs` [], how many they were fitted on. They are
  constants of the training step: `molt_jax.training.imputation_fit` fits them at each validation.

  Attributes:
    num_layers: L.
    width: C.
  """

  num_layers: int
  width: int

  @nn.compact
  def __call__(
    self, image_lbc: jax.Array, text_lbc: jax.Array, available_bm: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32[L, B, C] of each modality and bool[B, 2], where it is available -> the same with the
    gaps of examples that have one of them filled.
    """
    fitted = self.variable('statistics', 'pairs', jnp.zeros, (), jnp.float32).value > 0
    fill_b = fitted & (available_bm[:, 0] != available_bm[:, 1])
    own = {'image': image_lbc, 'text': text_lbc}
    filled = []
    for column, modality in enumerate(MODALITIES):
      other = MODALITIES[1 - column]
      predicted_lbc = self._map(f'to_{modality}', own[other])
      filled.append(
        jnp.where((fill_b & ~available_bm[:, column])[None, :, None], predicted_lbc, own[modality])
      )
    return *filled, available_bm | fill_b[:, None]

  def _map(self, name: str, x_lbc: jax.Array) -> jax.Array:
    affine = self.variable(
      'statistics',
      name,
      lambda: {
        'kernel_lcc': jnp.zeros((self.num_layers, self.width, self.width)),
        'bias_lc': jnp.zeros((self.num_layers, self.width)),
      },
    ).value
    return (
      jnp.einsum('lbc,lce->lbe', x_lbc, affine['kernel_lcc'], precision='highest')
      + affine['bias_lc'][:, None, :]
    )
