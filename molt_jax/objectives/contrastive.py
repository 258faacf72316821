"""Contrastive losses on pairs of image and text embeddings, and the table of all objectives for a
pair of towers.

InfoNCE over the global batch (van den Oord et al. 2018; CLIP: Radford et al. 2021): the positive of
row j is row j, all rows are candidates. The symmetric loss of CLIP is `{'v2t': 0.5, 't2v': 0.5}`,
that of Jiang et al. (CVPR 2023) `{'v2t': 0.25, 't2v': 0.25, 'v2v': 0.25, 't2t': 0.25}`; the
regularisers of the latter are in `latent_structure.py`.
"""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp

from molt_jax.objectives import latent_structure
from molt_jax.objectives.pairwise import dots, over_columns, present_rows, weighted_mean

# The logarithm of weight 0: finite, so that a block without any present row has a gradient, and
# that is 0.
LOG_OF_NOTHING = -1e30


@flax.struct.dataclass
class PairEmbeddings:
  """What two towers make of a batch of pairs.

  Arrays [B, C], each row of length one (L2), or None where not computed.

  Augmented: of another view of the same input. None for a tower whose input is not augmented.
  Independent: z^i of deep feature separation, from a projection layer of its own beside the
  embedding's, normalised too. Error: of decoding the image from the tower's patch tokens, [B].
  weight_b: [B], how often a row counts; rows of weight 0 (padding) drop out as if never there.
  None: every row once.
  """

  image_bc: jax.Array
  text_bc: jax.Array
  image_augmented_bc: jax.Array | None = None
  text_augmented_bc: jax.Array | None = None
  image_independent_bc: jax.Array | None = None
  text_independent_bc: jax.Array | None = None
  image_independent_augmented_bc: jax.Array | None = None
  text_independent_augmented_bc: jax.Array | None = None
  image_error_b: jax.Array | None = None
  weight_b: jax.Array | None = None


def info_nce(anchor_bc, positive_bc, scale, *, weight_b=None):
  """Cross-entropy of finding each anchor's positive among all positives, one direction.

      L = -1/N sum_j log( exp(s <a_j, p_j>) / sum_k exp(s <a_j, p_k>) )

  Args:
    anchor_bc, positive_bc: [B, C]; normalised rows make <a, p> the cosine.
    scale: scalar s, the inverse temperature 1/tau.
    weight_b: [B], how often row b counts, as anchor and as candidate; a row of weight 0 is not
      read, whatever it holds. N is their sum.

  Returns:
    Scalar, float32; 0 when no row is present. In a sharded run the batch is the global one, and a
    device holds [B / devices, 1024] logits at a time.
  """
  weight_b, anchor_bc, positive_bc = present_rows(weight_b, anchor_bc, positive_bc)
  scaled_bc = scale * anchor_bc

  def step(log_sum_b, block):
    positive_nc, weight_n = block
    log_weight_n = jnp.where(
      weight_n > 0, jnp.log(jnp.where(weight_n > 0, weight_n, 1.0)), LOG_OF_NOTHING
    )
    return jnp.logaddexp(
      log_sum_b, jax.nn.logsumexp(dots(scaled_bc, positive_nc) + log_weight_n[None, :], axis=1)
    )

  log_sum_b = over_columns(step, jnp.full(len(anchor_bc), LOG_OF_NOTHING), (positive_bc, weight_b))
  return weighted_mean(log_sum_b - jnp.sum(scaled_bc * positive_bc, axis=1), weight_b)


def _each_modality(loss, *kinds):
  """Sum of `loss` over the modalities whose embeddings of these kinds are all there."""

  def total(e, scale, key):
    rows = [
      [getattr(e, f'{modality}{kind}_bc') for kind in kinds] for modality in ('image', 'text')
    ]
    return sum(
      loss(*arrays, scale=scale, weight_b=e.weight_b)
      for arrays in rows
      if all(array_bc is not None for array_bc in arrays)
    )

  return total


def _mean(value_b, weight_b):
  """The mean over present rows."""
  weight_b, value_b1 = present_rows(weight_b, value_b[:, None])
  return weighted_mean(value_b1[:, 0], weight_b)


def _or(augmented_bc, original_bc):
  """A tower whose input is not augmented sees the same input twice."""
  return original_bc if augmented_bc is None else augmented_bc


# Name -> function(embeddings, scale, key) -> scalar. `key` draws the Brownian bridge's times.
OBJECTIVES: dict[str, Callable] = {
  'v2t': lambda e, scale, key: info_nce(e.image_bc, e.text_bc, scale, weight_b=e.weight_b),
  't2v': lambda e, scale, key: info_nce(e.text_bc, e.image_bc, scale, weight_b=e.weight_b),
  'v2v': lambda e, scale, key: info_nce(
    e.image_bc, e.image_augmented_bc, scale, weight_b=e.weight_b
  ),
  't2t': lambda e, scale, key: info_nce(e.text_bc, e.text_augmented_bc, scale, weight_b=e.weight_b),
  'orthogonality': _each_modality(
    lambda z, own, scale, weight_b: latent_structure.orthogonality(z, own, weight_b=weight_b),
    '',
    '_independent',
  ),
  'contrastive_separation': _each_modality(info_nce, '_independent', '_independent_augmented'),
  'uniformity': _each_modality(
    lambda own, scale, weight_b: latent_structure.uniformity(own, weight_b=weight_b), '_independent'
  ),
  'brownian_bridge': lambda e, scale, key: latent_structure.brownian_bridge(
    e.image_bc,
    e.text_bc,
    e.image_augmented_bc,
    jax.random.uniform(key, e.image_bc.shape[:1]),
    weight_b=e.weight_b,
  ),
  'geometric_original': lambda e, scale, key: latent_structure.geometric_original(
    e.image_bc, e.text_bc, weight_b=e.weight_b
  ),
  'geometric_augmented': lambda e, scale, key: latent_structure.geometric_augmented(
    e.image_bc,
    e.text_bc,
    _or(e.image_augmented_bc, e.image_bc),
    _or(e.text_augmented_bc, e.text_bc),
    weight_b=e.weight_b,
  ),
  'reconstruction': lambda e, scale, key: _mean(e.image_error_b, e.weight_b),
}

# Name -> fields of PairEmbeddings of which at least one must be there.
NEEDS: dict[str, tuple[str, ...]] = {
  'v2t': ('image_bc',),
  't2v': ('image_bc',),
  'v2v': ('image_augmented_bc',),
  't2t': ('text_augmented_bc',),
  'orthogonality': ('image_independent_bc', 'text_independent_bc'),
  'contrastive_separation': ('image_independent_augmented_bc', 'text_independent_augmented_bc'),
  'uniformity': ('image_independent_bc', 'text_independent_bc'),
  'brownian_bridge': ('image_augmented_bc',),
  'geometric_original': ('image_bc',),
  'geometric_augmented': ('image_augmented_bc', 'text_augmented_bc'),
  'reconstruction': ('image_error_b',),
}


def pair_loss(
  embeddings: PairEmbeddings, weights: Mapping[str, float], scale, key
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The weighted sum of the objectives whose weight is not 0.

  Args:
    embeddings: of the global batch.
    weights: name in `OBJECTIVES` -> weight; Python numbers.
    scale: scalar, the inverse temperature.
    key: a PRNG key; equal keys give equal losses.

  Returns:
    (loss, parts): a float32 scalar, and each objective's value before its weight.

  Raises:
    ValueError: an unknown name, or an objective whose embeddings (`NEEDS`) are not there.
  """
  unknown = sorted(set(weights) - set(OBJECTIVES))
  if unknown:
    raise ValueError(
      f'pair_loss: no objective {", ".join(unknown)}; known: {", ".join(OBJECTIVES)}'
    )
  chosen = [name for name in OBJECTIVES if weights.get(name)]
  for name in chosen:
    if all(getattr(embeddings, field) is None for field in NEEDS[name]):
      raise ValueError(f'pair_loss: {name} needs {" or ".join(NEEDS[name])}, got None')
  parts = {name: OBJECTIVES[name](embeddings, scale, key) for name in chosen}
  return sum((weights[name] * value for name, value in parts.items()), jnp.zeros(())), parts
