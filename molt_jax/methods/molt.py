"""MoLT: modality latent translation (eq. 1-5), fusion (eq. 6-7) and classifier over hidden states
of two frozen towers.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.errors import UserError
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base
from molt_jax.methods import head as heads
from molt_jax.methods.parts.attention import LayerAffine, PooledLayerNorm, attend
from molt_jax.methods.parts.fusion import BilinearPooling, Fusion
from molt_jax.methods.parts.imputation import CrossModalImputation
from molt_jax.methods.parts.inputs import STRATEGIES
from molt_jax.methods.parts.interface import Output, Tokens, TokenSequence, available_mean
from molt_jax.methods.parts.prototypes import Margins, contrast_of


class Translation(nn.Module):
  """Eq. 1-3 and pooling: two token sequences -> one vector per sample, layer and modality, (h_i,
  h_t), float32[L, B, C] each.

  Attributes:
    width: C.
    num_heads: attention heads; with one the scale is 1 / sqrt(C).
    cross_attention: eq. 2; without it H is zero and H' = Norm(I').
    dtype: type of the matrix products.
  """

  width: int
  num_heads: int
  cross_attention: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image: TokenSequence, text: TokenSequence) -> tuple[jax.Array, jax.Array]:
    """A modality with nothing to read gives zero, and adds nothing to the other.

    Each example is encoded in every way that a pattern may ask for, whatever is present; patterns
    differ in which of the results they take.
    """
    sequences = dict(zip(MODALITIES, (image, text), strict=True))
    maps = {m: self._maps(m, *s.tokens.x_lbtd.shape[::3]) for m, s in sequences.items()}
    norms = {m: PooledLayerNorm(name=f'{m}_norm') for m in MODALITIES}
    tokens = {m: s.tokens.map(maps[m]['project']) for m, s in sequences.items()}
    placeholders = {
      m: None if s.placeholder_l11d is None else Tokens(maps[m]['project'](s.placeholder_l11d))
      for m, s in sequences.items()
    }
    pooled = []
    for own, other in (('image', 'text'), ('text', 'image')):
      ask = functools.partial(
        self._ask, maps[own].get('query'), maps[other].get('key'), maps[other].get('value')
      )
      own_mask_bt, other_mask_bt = sequences[own].mask_bt, sequences[other].mask_bt
      together_lbc = norms[own](ask(tokens[own], tokens[other], other_mask_bt), own_mask_bt)
      alone_lbc = norms[own](ask(tokens[own], placeholders[other], None), own_mask_bt)
      absent_lbc = jnp.zeros_like(alone_lbc)
      if placeholders[own] is not None:
        absent_lbc = norms[own](
          ask(placeholders[own], tokens[other], other_mask_bt), jnp.ones_like(own_mask_bt[:, :1])
        )
      present_lbc = jnp.where(sequences[other].present_b[None, :, None], together_lbc, alone_lbc)
      pooled.append(jnp.where(sequences[own].present_b[None, :, None], present_lbc, absent_lbc))
    return tuple(pooled)

  def _maps(self, modality, num_layers, width):
    """The maps of eq. 1 and, with cross-attention, of eq. 2."""
    axes = {'project': (width, ('embed', 'common'))}
    axes |= {
      role: (self.width, ('common', 'heads'))
      for role in ('query', 'key', 'value')
      if self.cross_attention
    }
    return {
      role: LayerAffine(
        num_layers, self.width, names, self.dtype, use_bias=role != 'key', name=f'{modality}_{role}'
      )(width)
      for role, (width, names) in axes.items()
    }

  def _ask(self, query, key, value, own, other, other_mask_bs):
    """Eq. 2 and the sum of eq. 3, float32 Tokens; other_mask_bs None: `other` is one token for all
    rows, or nothing.
    """
    residual = own.map(lambda x: x.astype(jnp.float32))
    if not self.cross_attention or other is None:
      return residual
    if other_mask_bs is None:  # The softmax over one key is one.
      return residual.map(lambda x: x + value(other.x_lbtd).astype(jnp.float32))
    answer = attend(
      own, other, other_mask_bs, query=query, key=key, value=value, num_heads=self.num_heads
    )
    return residual.map(lambda x: x + answer.x_lbtd.astype(jnp.float32))


class MoLTHead(nn.Module):
  """The whole of MoLT's trainable part.

  Attributes:
    inputs: hidden states -> (image, text) sequences, an `InputPair`.
    classifier: a module of `fusion.CLASSIFIERS`.
    alone: {'image': .., 'text': ..}, classifiers of the examples that have that modality
      alone; None: the same one reads all examples.
    translator: predicts the absent h_l in eq. 5, an `imputation.CrossModalImputation`; None: H_l is
      of the available ones.
    width: C (d_c).
    num_layers: L (L_s).
    num_heads: attention heads in the common space.
    cross_attention, layer_weights, fusion_attention: the switches of the paper's Table 2.
    fusion_residual: the classifier reads the fused vector + H_r.
    bilinear: factors of the bilinear pooling that is added to H_l; 0: the mean of eq. 5 alone.
    margins: what training does to the logits of prototypes; None for another classifier.
    dtype: type of the matrix products; norms, softmax, means and logits are float32.
  """

  inputs: nn.Module
  classifier: nn.Module
  alone: Mapping[str, nn.Module] | None
  translator: nn.Module | None  # Its name is that of its statistics in checkpoints.
  width: int
  num_layers: int
  num_heads: int
  cross_attention: bool
  layer_weights: bool
  fusion_attention: bool
  fusion_residual: bool
  bilinear: int
  margins: Margins | None
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
    image, text = self.inputs(
      states, present_bm, train=train, content_bm=content_bm, weight_b=weight_b
    )
    available_bm = jnp.stack([image.available_b, text.available_b], axis=-1)
    pooled = Translation(
      self.width, self.num_heads, self.cross_attention, self.dtype, name='translation'
    )(image, text)
    imputed = pooled
    if self.translator:
      *imputed, available_bm = self.translator(*pooled, available_bm)
    layers_lbc = available_mean(imputed, available_bm)
    if self.bilinear:
      pool = BilinearPooling(self.width, self.bilinear, self.dtype, name='bilinear')
      layers_lbc += pool(*imputed, available_bm)
    if self.layer_weights:
      init = nn.with_logical_partitioning(nn.initializers.ones, ('layers',))
      layers_lbc *= self.param('layer_weights', init, (self.num_layers,), jnp.float32)[
        :, None, None
      ]
    joint_bc = jnp.mean(layers_lbc, axis=0)
    features_bc = joint_bc
    if self.fusion_attention:
      features_bc = Fusion(self.width, self.num_heads, self.dtype, name='fusion')(
        joint_bc, image, text
      )
      features_bc += joint_bc if self.fusion_residual else 0.0
    logits_bk = self._logits(features_bc, image.present_b, text.present_b, train=train)
    out = Output(logits_bk, *pooled)
    if label is None:
      return out
    harder_bk = self.margins(logits_bk, label, image.present_b & text.present_b)
    modules = [self.classifier, *(self.alone or {}).values()]
    supcon = contrast_of(modules, len(label))
    return out.replace(branches_bk={heads.MARGIN: harder_bk}, losses_b=supcon)

  def _logits(self, features_bc, image_b, text_b, *, train):
    logits_bk = self.classifier(features_bc, train=train)
    for modality, alone_b in (
      (('image', image_b & ~text_b), ('text', text_b & ~image_b)) if self.alone else ()
    ):
      logits_bk = jnp.where(
        alone_b[:, None], self.alone[modality](features_bc, train=train), logits_bk
      )
    return logits_bk


def make_head(config, *, num_layers, num_classes, image_width, text_width) -> MoLTHead:
  """See `head.make_head`."""
  c = config.molt
  imputes = STRATEGIES[config.missing.strategy].imputes
  return MoLTHead(
    inputs=heads.inputs(config, num_layers, image_width, text_width),
    classifier=heads.classifier(config, num_classes, 'common'),
    alone=heads.unimodal_classifiers(config, num_classes, 'common'),
    translator=CrossModalImputation(num_layers, c.width) if imputes else None,
    width=c.width,
    num_layers=num_layers,
    num_heads=c.num_heads,
    cross_attention=c.cross_attention,
    layer_weights=c.layer_weights,
    fusion_attention=config.fusion.attention,
    fusion_residual=config.fusion.residual,
    bilinear=config.molt.bilinear,
    margins=heads.own_margins(config),
    dtype=jnp.dtype(config.compute_dtype),
  )


def build(config, towers, *, num_classes, class_names=()) -> heads.HeadMethod:
  """See `base.make_method`.

  Raises:
    UserError: `molt.layers` names a hidden state that a tower does not have, or not as many of
      each tower.
  """
  del class_names
  states = heads.named_states(config, towers)
  counts = {modality: len(found) for modality, found in states.items()}
  if len(set(counts.values())) > 1:
    raise UserError(
      f'config.molt.layers: {config.molt.layers!r} names {counts["image"]} hidden states of the '
      f'image tower and {counts["text"]} of the text tower; name as many of each'
    )
  sizes = {f'{modality}_width': width for modality, width in base.widths(towers).items()}
  num_layers = max(counts.values())
  head = make_head(config, num_layers=num_layers, num_classes=num_classes, **sizes)
  return heads.build(config, towers, states, head, num_classes, config.molt.cells)
