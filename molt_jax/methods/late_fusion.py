"""Late fusion: the baseline without MoLT."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods import head as heads
from molt_jax.methods.parts.interface import Output, pool
from molt_jax.methods.parts.prototypes import Margins


class LateFusionHead(nn.Module):
  """The means of the tokens of E_i and E_t side by side, [B, D_i + D_t], and a classifier.

  An absent modality leaves zeros with the strategies `robust` and `zero`, and a learned vector with
  `null`.

  Attributes:
    inputs: hidden states -> (image, text) sequences, an `InputPair` of one layer.
    classifier: a module of `fusion.CLASSIFIERS`.
    margins: what training does to the logits of prototypes; None for another classifier.
  """

  inputs: nn.Module
  classifier: nn.Module
  margins: Margins | None = None

  @nn.compact
  def __call__(
    self,
    states: HiddenStates,
    present_bm: jax.Array,
    *,
    train: bool,
    content_bm: jax.Array | None = None,
    weight_b: jax.Array | None = None,
    label: jax.Array | None = None,
  ) -> Output:
    """See `head.make_head`."""
    sequences = self.inputs(
      states, present_bm, train=train, content_bm=content_bm, weight_b=weight_b
    )
    features_bd = jnp.concatenate([_pooled(sequence) for sequence in sequences], axis=-1)
    logits_bk = self.classifier(features_bd, train=train)
    if label is None:
      return Output(logits_bk)
    complete_b = sequences[0].present_b & sequences[1].present_b
    return Output(logits_bk, branches_bk={heads.MARGIN: self.margins(logits_bk, label, complete_b)})


def _pooled(sequence):
  absent = (
    0.0
    if sequence.placeholder_l11d is None
    else sequence.placeholder_l11d[-1, 0].astype(jnp.float32)
  )
  return jnp.where(sequence.present_b[:, None], pool(sequence.tokens, sequence.mask_bt)[-1], absent)


def make_head(config, *, num_layers, num_classes, image_width, text_width) -> LateFusionHead:
  """See `head.make_head`; of several hidden states the last is read."""
  del num_layers
  return LateFusionHead(
    inputs=heads.inputs(config, 1, image_width, text_width),
    classifier=heads.classifier(config, num_classes, 'embed'),
    margins=heads.own_margins(config),
  )


def build(config, towers, *, num_classes, class_names=()) -> heads.HeadMethod:
  """See `base.make_method`."""
  del class_names
  states = {modality: (tower.config.num_layers,) for modality, tower in towers.items()}
  sizes = {f'{modality}_width': width for modality, width in base.widths(towers).items()}
  head = make_head(config, num_layers=1, num_classes=num_classes, **sizes)
  return heads.build(config, towers, states, head, num_classes)
