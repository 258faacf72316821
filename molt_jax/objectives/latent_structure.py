"""Regularisers that give the common space of two towers a structure (Jiang et al., CVPR 2023, arXiv
2303.05952).

Perfect alignment of two modalities costs at least the gap |I(X_T;Y) - I(X_V;Y)| of what they tell
about a label (their theorem 3.1). These keep the space aligned without collapsing it: deep feature
separation (`orthogonality`, `uniformity`, and `info_nce` on the independent features), the Brownian
bridge, geometric consistency. v, t: image and text embeddings; a: of another view; i: independent
features; all of length one.

N is the sum of `weight_b` [B], how often a row counts (None: once); a row of weight 0 is not read,
whatever it holds. Sums over pairs grow with N, as in the paper. All compute in float32, return a
scalar, and mean the global batch in a sharded run.
"""

import jax.numpy as jnp

from molt_jax.objectives.pairwise import dots, over_columns, present_rows, weighted_mean


def orthogonality(z_bc, independent_bc, *, weight_b=None):
  """1/N sum_j <z_j, z^i_j>^2: what the independent feature holds is not in the embedding."""
  weight_b, z_bc, independent_bc = present_rows(weight_b, z_bc, independent_bc)
  return weighted_mean(jnp.sum(z_bc * independent_bc, axis=1) ** 2, weight_b)


def uniformity(independent_bc, *, sharpness=2.0, weight_b=None):
  """1/N sum_j sum_k exp(-t ||z^i_j - z^i_k||^2), j = k included, t = `sharpness`.

  Independent features differ between examples.
  """
  weight_b, z_bc = present_rows(weight_b, independent_bc)
  square_b = jnp.sum(z_bc**2, axis=1)

  def step(total_b, block):
    z_nc, square_n, weight_n = block
    distance_bn = square_b[:, None] + square_n[None, :] - 2 * dots(z_bc, z_nc)
    closeness_bn = jnp.exp(-sharpness * jnp.maximum(distance_bn, 0.0))  # Rounding can make it less.
    return total_b + jnp.sum(weight_n[None, :] * closeness_bn, axis=1)

  return weighted_mean(
    over_columns(step, jnp.zeros(len(z_bc)), (z_bc, square_b, weight_b)), weight_b
  )


def brownian_bridge(image_bc, text_bc, augmented_bc, time_b, *, weight_b=None):
  """1/N sum_j ||v^a_j - mu_j||^2, mu = (t v + (1 - t) text) / ||t v + (1 - t) text||.

  The augmented image lies on the way to its text.

  Args:
    time_b: [B] in [0, 1]; the paper leaves its choice open. `pair_loss` draws it uniformly for each
      row.
  """
  weight_b, image_bc, text_bc, augmented_bc = present_rows(
    weight_b, image_bc, text_bc, augmented_bc
  )
  mean_bc = time_b[:, None] * image_bc + (1 - time_b[:, None]) * text_bc
  # Opposite embeddings have no mean at t = 1/2; there and in absent rows it is 0, with a finite
  # gradient.
  length_b = jnp.sqrt(jnp.maximum(jnp.sum(mean_bc**2, axis=1), 1e-12))
  return weighted_mean(jnp.sum((augmented_bc - mean_bc / length_b[:, None]) ** 2, axis=1), weight_b)


def geometric_original(image_bc, text_bc, *, weight_b=None):
  """1/N sum_jk (<v_j, t_k> - <v_k, t_j>)^2 + (<v_j, v_k> - <t_j, t_k>)^2.

  Two pairs are as far apart whichever modalities are compared.
  """
  weight_b, image_bc, text_bc = present_rows(weight_b, image_bc, text_bc)
  one_bc = _concatenate(image_bc, -text_bc)
  crossed_bc = _concatenate(text_bc, image_bc)
  same_bc = _concatenate(image_bc, text_bc)
  return _mean_square(one_bc, crossed_bc, weight_b) + _mean_square(one_bc, same_bc, weight_b)


def geometric_augmented(image_bc, text_bc, image_augmented_bc, text_augmented_bc, *, weight_b=None):
  """Augmenting keeps the geometry of each modality, and each pair's similarity:

  1/N sum_jk (<v_j, v_k> - <v^a_j, v^a_k>)^2 + (<t_j, t_k> - <t^a_j, t^a_k>)^2  +  1/N sum_j (<v_j,
  t_j> - <v^a_j, t^a_j>)^2
  """
  weight_b, *views = present_rows(
    weight_b, image_bc, text_bc, image_augmented_bc, text_augmented_bc
  )
  image_bc, text_bc, image_augmented_bc, text_augmented_bc = views
  kept_b = jnp.sum(image_bc * text_bc, axis=1) - jnp.sum(
    image_augmented_bc * text_augmented_bc, axis=1
  )
  within = [
    _mean_square(_concatenate(z_bc, -augmented_bc), _concatenate(z_bc, augmented_bc), weight_b)
    for z_bc, augmented_bc in ((image_bc, image_augmented_bc), (text_bc, text_augmented_bc))
  ]
  return sum(within) + weighted_mean(kept_b**2, weight_b)


def _concatenate(a_bc, b_bc):
  """Concatenated vectors turn a difference of two inner products into one."""
  return jnp.concatenate([a_bc, b_bc], axis=1)


def _mean_square(rows_bc, columns_bc, weight_b):
  """1/N sum_jk <row_j, column_k>^2."""

  def step(total_b, block):
    columns_nc, weight_n = block
    return total_b + jnp.sum(weight_n[None, :] * dots(rows_bc, columns_nc) ** 2, axis=1)

  return weighted_mean(
    over_columns(step, jnp.zeros(len(rows_bc)), (columns_bc, weight_b)), weight_b
  )
