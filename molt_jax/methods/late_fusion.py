"""Heads without MoLT."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.methods.parts.interface import HeadOutput, Taps, pool


class LateFusionHead(nn.Module):
  """The means of the tokens of E_i and E_t side by side, [B, D_i + D_t], and a classifier.

  An absent modality leaves zeros with the strategies `robust` and `zero`, and a learned vector with
  `null`.

  Attributes:
    inputs: taps -> (image, text) sequences, an `InputPair` of one layer.
    classifier: a module of `fusion.CLASSIFIERS`.
  """

  inputs: nn.Module
  classifier: nn.Module

  @nn.compact
  def __call__(
    self,
    taps: Taps,
    present_bm: jax.Array,
    *,
    train: bool,
    content_bm: jax.Array | None = None,
    row_weight_b: jax.Array | None = None,
  ) -> HeadOutput:
    """See `heads.make_head`."""
    sequences = self.inputs(
      taps, present_bm, train=train, content_bm=content_bm, row_weight_b=row_weight_b
    )
    features_bd = jnp.concatenate([_pooled(sequence) for sequence in sequences], axis=-1)
    return HeadOutput(self.classifier(features_bd, train=train))


def _pooled(sequence):
  absent = (
    0.0 if sequence.stand_in_l11d is None else sequence.stand_in_l11d[-1, 0].astype(jnp.float32)
  )
  return jnp.where(sequence.present_b[:, None], pool(sequence.tokens, sequence.mask_bt)[-1], absent)
