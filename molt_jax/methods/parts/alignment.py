"""Aligning images and texts before they are fused (Li et al., NeurIPS 2021, "Align before Fuse"):
contrast with a queue and soft targets, and hard negatives of a batch.

Examples with the same image or the same text are no negatives of each other, whatever their ids:
what is compared is their pooled frozen states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from molt_jax.methods.parts.interface import unit

_SAME = 0.999  # Cosine from which on two pooled states count as those of one input.
_NOTHING = -1e30  # The logarithm of no weight, with a finite gradient.


class Pair(NamedTuple):
  """Something of images and of texts, row by row: pooled states, or embeddings of length one."""

  image: jax.Array
  text: jax.Array


def same_input(rows: Pair, columns: Pair) -> jax.Array:
  """Returns bool[B, N], which pairs share their image or their text."""

  def same(x_bd, y_nd):
    return jnp.matmul(unit(x_bd), unit(y_nd).T, precision='highest') >= _SAME

  return same(rows.image, columns.image) | same(rows.text, columns.text)


def contrast(
  online: Pair,
  keys: Pair,
  queue: Pair,
  negative_bn: jax.Array,
  *,
  temperature: jax.Array,
  alpha: float,
) -> jax.Array:
  """The cross-entropy of finding each image's text, and each text's image, among its own and those
  of a queue; float32[B].

  Targets are (1 - alpha) for its own, and alpha times what the momentum model finds likely.

  Args:
    online: embeddings [B, C] that are trained.
    keys: of the same examples by the momentum model.
    queue: [N, C], of others by the momentum model.
    negative_bn: bool[B, N], which of the queue are negatives of an example.
    temperature: scalar.
    alpha: weight of the soft targets.
  """
  directions = ((online.image, keys.image, 1), (online.text, keys.text, 0))
  losses = []
  for anchor_bc, soft_bc, other in directions:
    logits_bn = _logits(anchor_bc, keys[other], queue[other], negative_bn, temperature)
    soft_bn = _logits(soft_bc, keys[other], queue[other], negative_bn, temperature)
    soft_bn = jax.lax.stop_gradient(jax.nn.softmax(soft_bn, axis=1))
    log_bn = jax.nn.log_softmax(logits_bn, axis=1)
    likely_b = jnp.sum(jnp.where(soft_bn > 0, soft_bn * log_bn, 0.0), axis=1)
    losses.append(-((1 - alpha) * log_bn[:, 0] + alpha * likely_b))
  return (losses[0] + losses[1]) / 2


def _logits(anchor_bc, own_bc, queue_nc, negative_bn, temperature) -> jax.Array:
  """[B, 1 + N]; the first is its own."""
  own_b1 = jnp.sum(anchor_bc * own_bc, axis=1, keepdims=True)
  others_bn = jnp.matmul(anchor_bc, queue_nc.T, precision='highest')
  scaled_bn = jnp.concatenate([own_b1, others_bn], axis=1) / temperature
  own_mask = jnp.ones_like(negative_bn[:, :1])
  return jnp.where(jnp.concatenate([own_mask, negative_bn], axis=1), scaled_bn, _NOTHING)


def hard_negatives(
  online: Pair, negative_bb: jax.Array, temperature: jax.Array, key: jax.Array
) -> tuple[Pair, jax.Array]:
  """Draws a negative of each example, the likelier the more similar.

  A row without a negative, as in a batch of one or of equal captions, has none: the draw is by
  Gumbel noise on logarithms, and no weight is ever zero by zero.

  Args:
    online: embeddings [B, C].
    negative_bb: bool[B, B], which examples are negatives of an example.
    temperature: scalar.
    key: of the draw.

  Returns:
    (image int[B], text int[B]: for each example's text another example's image, and for its image
    another's text; bool[B], whether there are any).
  """
  keys = jax.random.split(key)

  def draw(rows_bc, columns_bc, key):
    score_bb = jnp.matmul(rows_bc, columns_bc.T, precision='highest') / temperature
    score_bb = jnp.where(negative_bb, score_bb, _NOTHING)
    return jnp.argmax(score_bb + jax.random.gumbel(key, score_bb.shape), axis=1)

  image_bc, text_bc = jax.lax.stop_gradient(tuple(online))
  chosen = Pair(draw(text_bc, image_bc, keys[0]), draw(image_bc, text_bc, keys[1]))
  return chosen, jnp.any(negative_bb, axis=1)
