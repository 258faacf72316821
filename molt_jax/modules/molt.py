"""MoLT: modality latent translation (eq. 1-5), fusion (eq. 6-7) and classifier over the taps of two frozen towers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.modules.attention import LayerDense, LayerNorm, attend
from molt_jax.modules.fusion import Fusion
from molt_jax.modules.interface import MODALITIES, HeadOutput, Taps, TokenSequence, pool, usable_mean


class Projection(nn.Module):
  """Eq. 1 for one modality and, when asked, the Q, K and V of eq. 2, for all layers at once."""

  width: int
  attention: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens_lbtd: jax.Array) -> tuple[jax.Array, ...]:
    """[L, B, T, D] -> (projected,) or (projected, query, key, value), each [L, B, T, C]."""
    projected_lbtc = LayerDense(self.width, ('embed', 'common'), self.dtype, name='project')(tokens_lbtd)
    roles = ('query', 'key', 'value') if self.attention else ()
    return projected_lbtc, *(LayerDense(self.width, ('common', 'heads'), self.dtype, name=role)(projected_lbtc) for role in roles)


class Translation(nn.Module):
  """Eq. 1-3 and pooling: two token sequences -> one vector per sample, layer and modality, (h_i, h_t), float32[L, B, C] each.

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
    """A modality with nothing to read gives zero, to the other modality's attention too."""
    sequences = dict(zip(MODALITIES, (image, text), strict=True))
    maps = {m: Projection(self.width, self.cross_attention, self.dtype, name=m)(s.tokens_lbtd) for m, s in sequences.items()}
    pooled = []
    for own, other in (('image', 'text'), ('text', 'image')):
      residual_lbtc = maps[own][0].astype(jnp.float32)
      if self.cross_attention:
        query_lbtc, (key_lbsc, value_lbsc) = maps[own][1], maps[other][2:]
        answer_lbtc = attend(query_lbtc, key_lbsc, value_lbsc, sequences[other].mask_bt[None], num_heads=self.num_heads)
        residual_lbtc += jnp.where(sequences[other].usable_b[None, :, None, None], answer_lbtc.astype(jnp.float32), 0.0)
      pooled.append(pool(LayerNorm(name=f'{own}_norm')(residual_lbtc), sequences[own].mask_bt))
    return tuple(pooled)


class MoLTHead(nn.Module):
  """The whole of MoLT's trainable part.

  Attributes:
    inputs: taps -> (image, text) sequences, an `InputPair`.
    classifier: a module of `fusion.CLASSIFIERS`.
    width: C (d_c).
    num_layers: L (L_s).
    num_heads: attention heads in the common space.
    cross_attention, layer_weights, fusion_attention: the switches of the paper's Table 2.
    fusion_residual: the classifier reads the fused vector + H_r.
    dtype: type of the matrix products; norms, softmax, means and logits are float32.
  """

  inputs: nn.Module
  classifier: nn.Module
  width: int
  num_layers: int
  num_heads: int
  cross_attention: bool
  layer_weights: bool
  fusion_attention: bool
  fusion_residual: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, taps: Taps, present_bm: jax.Array, *, train: bool, content_bm: jax.Array | None = None, row_weight_b: jax.Array | None = None
  ) -> HeadOutput:
    """See `heads.make_head`."""
    image, text = self.inputs(taps, present_bm, train=train, content_bm=content_bm, row_weight_b=row_weight_b)
    usable_bm = jnp.stack([image.usable_b, text.usable_b], axis=-1)
    pooled = Translation(self.width, self.num_heads, self.cross_attention, self.dtype, name='translation')(image, text)
    layers_lbc = usable_mean(*pooled, usable_bm)
    if self.layer_weights:
      init = nn.with_logical_partitioning(nn.initializers.ones, ('layers',))
      layers_lbc *= self.param('layer_weights', init, (self.num_layers,), jnp.float32)[:, None, None]
    joint_bc = jnp.mean(layers_lbc, axis=0)
    features_bc = joint_bc
    if self.fusion_attention:
      features_bc = Fusion(self.width, self.num_heads, self.dtype, name='fusion')(joint_bc, image, text)
      features_bc += joint_bc if self.fusion_residual else 0.0
    return HeadOutput(self.classifier(features_bc, train=train), *pooled)
