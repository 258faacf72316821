"""Nuclear norm and polar factor of a matrix, and the square roots that products alone can make."""

import jax.numpy as jnp
from jax import lax

from molt_jax.objectives.cca.linalg import EPS, either, svd

# ||A'A - I||_F below which the iteration without an SVD has converged in float32.
_NEARLY_ORTHOGONAL = 0.1
# Singular values of A that rounding has taken above 1 by less keep their sign in the iteration.
_MARGIN = 1.1


def _polar(a_kj, rounding):
  """(nuclear norm, polar factor, whether to believe them); directions without correlation get none.

  Not if there are correlations above float32's own rounding that are no larger than `rounding`, the
  larger one of `Factor.rounding`: they may be of directions that a view does not have.

  The A of a batch smaller than the width is all but orthogonal, beside rows and columns of zeros.
  Then a few products are faster than an SVD.
  """
  square_jj = a_kj.T @ a_kj
  off_jj = square_jj - jnp.diag(jnp.where(jnp.diag(square_jj) > 0, 1.0, 0.0))
  is_nearly_orthogonal = jnp.sum(off_jj * off_jj) < _NEARLY_ORTHOGONAL**2
  return either(is_nearly_orthogonal, _polar_of_nearly_orthogonal, _polar_by_svd, a_kj, rounding)


def _polar_by_svd(a_kj, rounding):
  p_ks, s_s, q_sj = svd(a_kj)
  is_there_s = s_s > 8 * EPS
  is_sound = ~jnp.any(is_there_s & (s_s <= rounding))
  return jnp.sum(s_s), (p_ks * is_there_s[None, :]) @ q_sj, is_sound


def _polar_of_nearly_orthogonal(a_kj, rounding):
  """By x -> (3 x - x^3) / 2, which takes 1 - e to 1 - 1.5 e^2 or so.

  From 0.1 off to float32's rounding in three steps.
  """
  del rounding
  w_kj = a_kj
  for _ in range(3):
    w_kj = 1.5 * w_kj - 0.5 * w_kj @ (w_kj.T @ w_kj)
  return jnp.sum(w_kj * a_kj), w_kj, jnp.bool_(True)


def _polar_by_products(a_kj, rounding):
  """The same by matrix products. Singular values below 1e-4 are not fully turned to 1."""
  del rounding
  w_kj = newton_schulz_polar(a_kj / _MARGIN, smallest=1e-4)
  corr = jnp.sum(w_kj * a_kj)
  return corr, w_kj, jnp.isfinite(corr)


def newton_schulz_polar(a_kj, smallest):
  """Polar factor of a matrix with singular values in [smallest, 1]."""

  def step(w_ks, coefficient):
    linear, cubic = coefficient
    return linear * w_ks + cubic * (w_ks @ (w_ks.T @ w_ks)), None

  is_wide = a_kj.shape[0] < a_kj.shape[1]
  w_ks, _ = lax.scan(step, a_kj.T if is_wide else a_kj, _newton_schulz_coefficients(smallest))
  return w_ks.T if is_wide else w_ks


def newton_schulz_root(r_nn, span_nn):
  """R^(1/2) and R^(-1/2) on the span of R, eigenvalues in [0, 1], by the coupled iteration.

  Roots below 1e-2 are not fully resolved.
  """

  def step(carry, coefficient):
    y_nn, z_nn = carry
    linear, cubic = coefficient
    t_nn = linear * span_nn + cubic * (z_nn @ y_nn)
    return (y_nn @ t_nn, t_nn @ z_nn), None

  return lax.scan(step, (r_nn, span_nn), _newton_schulz_coefficients(1e-2))[0]


def _newton_schulz_coefficients(smallest):
  """(linear, cubic) per step.

  The cubic that brings [smallest, 1] closest to 1, then the same for its image, until it is 1 in
  float32.

  x -> (3 s x - (s x)^3) / 2 with s^2 = 3 / (1 + l + l^2) maps both ends of [l, 1] to the same value
  (Chen and Chow 2014).
  """
  steps, low = [], smallest
  while 1 - low > EPS / 4:
    scale = (3 / (1 + low + low * low)) ** 0.5
    steps.append((1.5 * scale, -0.5 * scale**3))
    low = min(1.0, 1.5 * scale * low - 0.5 * (scale * low) ** 3)
  return jnp.asarray(steps, jnp.float32)


POLAR = {'eigh': _polar, 'newton_schulz': _polar_by_products, 'svd': _polar_by_svd}
