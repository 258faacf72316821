"""Decoupled prototypes (DPL) on hidden states of two frozen towers: for each modality, and for each
missing pattern that it occurs in, one prototype of each class. See `parts.prototypes` and
`docs/methods/prototypes.md`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods import head as heads
from molt_jax.methods.parts.attention import dense
from molt_jax.methods.parts.interface import Output, available_mean, pool
from molt_jax.methods.parts.prototypes import Margins, contrast_of

COMPLETE, ALONE = 'complete', 'alone'  # Of a modality, the patterns that it occurs in.


class PrototypeHead(nn.Module):
  """The mean of each modality's tokens, mapped to a common width, is compared with the prototypes
  of its pattern. Logits are the mean over the modalities that are there.

  Attributes:
    inputs: hidden states -> (image, text) sequences, an `InputPair` of one layer.
    classifiers: modality -> pattern -> `parts.prototypes.Prototypes`; without ALONE, those of
      complete examples read all.
    margins: what training does to the logits.
    width: C.
    dtype: type of the maps' products.
  """

  inputs: nn.Module
  classifiers: Mapping[str, Mapping[str, nn.Module]]
  margins: Margins
  width: int
  dtype: jnp.dtype

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
    there_bm = jnp.stack([sequence.present_b for sequence in sequences], axis=-1)
    complete_b = jnp.all(there_bm, axis=-1)
    logits = []
    for modality, sequence in zip(MODALITIES, sequences, strict=True):
      pooled_bd = pool(sequence.tokens, sequence.mask_bt)[-1]
      axes = ('embed', 'common')
      x_bc = dense(self.width, axes, self.dtype, use_bias=False, name=modality)(pooled_bd)
      own = self.classifiers[modality]
      logits_bk = own[COMPLETE](x_bc, train=train)
      if ALONE in own:
        alone_bk = own[ALONE](x_bc, train=train)
        logits_bk = jnp.where(complete_b[:, None], logits_bk, alone_bk)
      logits.append(logits_bk)
    out = Output(available_mean(logits, there_bm))
    if label is None:
      return out
    harder = [self.margins(logits_bk, label, complete_b) for logits_bk in logits]
    modules = [module for own in self.classifiers.values() for module in own.values()]
    return out.replace(
      branches_bk={heads.MARGIN: available_mean(harder, there_bm)},
      losses_b=contrast_of(modules, len(present_bm)),
    )


def make_head(config, *, num_layers, num_classes, image_width, text_width) -> PrototypeHead:
  """See `head.make_head`; of several hidden states the last is read."""
  del num_layers
  missing = config.missing
  # Prototypes of examples that training never shows would have learned nothing.
  shown = missing.views or missing.train_dropout > 0 or missing.train_rate > 0
  patterns = (COMPLETE, ALONE) if config.classifier.per_pattern and shown else (COMPLETE,)
  classifiers = {
    modality: {
      pattern: heads.classifier(config, num_classes, 'common', kind='prototypes')
      for pattern in patterns
    }
    for modality in MODALITIES
  }
  return PrototypeHead(
    inputs=heads.inputs(config, 1, image_width, text_width, strategy='robust'),
    classifiers=classifiers,
    margins=heads.margins(config),
    width=config.prototypes.width,
    dtype=jnp.dtype(config.compute_dtype),
  )


def build(config, towers, *, num_classes, class_names=()) -> heads.HeadMethod:
  """See `base.make_method`."""
  del class_names
  states = {modality: (tower.config.num_layers,) for modality, tower in towers.items()}
  sizes = {f'{modality}_width': width for modality, width in base.widths(towers).items()}
  head = make_head(config, num_layers=1, num_classes=num_classes, **sizes)
  return heads.build(config, towers, states, head, num_classes)
