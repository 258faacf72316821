"""From the joint representation to logits: fusion with the towers' last states (eq. 6 and 7) and
the classifier.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.methods.parts.attention import LayerAffine, attend, dense
from molt_jax.methods.parts.interface import Tokens, TokenSequence, available_mean
from molt_jax.methods.parts.prototypes import Prototypes


class Fusion(nn.Module):
  """H_r asks the tokens of E_i and of E_t, eq. 6; returns the mean answer over the available
  modalities (the classifier's input in eq. 7).

  E is the last hidden state as the head sees it, so normalised with that layer's own statistics and
  with its placeholder where absent.

  Attributes:
    width: C.
    num_heads: attention heads; with one the scale is 1 / sqrt(C).
    dtype: type of the matrix products.
  """

  width: int
  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, joint_bc: jax.Array, image: TokenSequence, text: TokenSequence) -> jax.Array:
    """joint_bc: float32[B, C] -> float32[B, C]."""
    query = self._map('query', ('common', 'heads'), joint_bc.shape[-1])
    answers = [
      self._answer(modality, joint_bc, query, sequence)
      for modality, sequence in zip(MODALITIES, (image, text), strict=True)
    ]
    return available_mean(answers, jnp.stack([image.available_b, text.available_b], axis=-1))

  def _answer(self, modality, joint_bc, query, sequence):
    last = sequence.tokens.map(lambda x_lbtd: x_lbtd[-1:])
    key, value = (
      self._map(f'{modality}_{role}', ('embed', 'heads'), last.x_lbtd.shape[-1])
      for role in ('key', 'value')
    )
    queries = Tokens(joint_bc[None, :, None, :])
    answer_1b1c = attend(
      queries, last, sequence.mask_bt, query=query, key=key, value=value, num_heads=self.num_heads
    ).x_lbtd
    if sequence.placeholder_l11d is not None:  # One key, so the softmax is one.
      answer_1b1c = jnp.where(
        sequence.present_b[None, :, None, None], answer_1b1c, value(sequence.placeholder_l11d[-1:])
      )
    return answer_1b1c[0, :, 0, :].astype(jnp.float32)

  def _map(self, name, axes, width):
    return LayerAffine(
      1, self.width, axes, self.dtype, use_bias=not name.endswith('key'), name=name
    )(width)


class BilinearPooling(nn.Module):
  """Factorised bilinear pooling of both modalities (MFB: Yu et al. 2017), as MoLT has it in its
  second version: z_c = sum_j (u_cj' h_i + a_cj) (v_cj' h_t + b_cj) in each layer.

  It says what holds of both together, as the answer to a question about a picture does. The factor
  of a modality that is missing is one, which leaves an affine map of the present one.

  Attributes:
    width: C.
    factors: number of j.
    dtype: type of the matrix products.
  """

  width: int
  factors: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_lbc: jax.Array, text_lbc: jax.Array, available_bm: jax.Array):
    """float32[L, B, C] each, bool[B, 2] -> float32[L, B, C]; zero where nothing is available."""
    product_lbcj = 1.0
    for column, (modality, x_lbc) in enumerate(zip(MODALITIES, (image_lbc, text_lbc), strict=True)):
      width = self.width * self.factors
      layers, rows, size = x_lbc.shape
      maps = LayerAffine(layers, width, ('common', 'heads'), self.dtype, name=modality)(size)
      x_lbc = jnp.where(available_bm[None, :, column, None], x_lbc, 0.0)
      factor_lbcj = maps(x_lbc[:, :, None]).astype(jnp.float32)
      factor_lbcj = factor_lbcj.reshape(layers, rows, self.width, self.factors)
      product_lbcj *= jnp.where(available_bm[None, :, column, None, None], factor_lbcj, 1.0)
    pooled_lbc = jnp.sum(product_lbcj, axis=3)
    return jnp.where(available_bm.any(axis=1)[None, :, None], pooled_lbc, 0.0)


class Linear(nn.Module):
  """Dropout and one affine map, [B, C] -> float32[B, K]."""

  num_classes: int
  hidden: int
  dropout: float
  axis: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_bc: jax.Array, *, train: bool) -> jax.Array:
    x_bc = nn.Dropout(self.dropout, deterministic=not train)(x_bc)
    return dense(self.num_classes, (self.axis, 'classes'), self.dtype, name='logits')(x_bc).astype(
      jnp.float32
    )


class MLP(nn.Module):
  """LayerNorm, one hidden layer with (exact) GELU, dropout, affine map, [B, C] -> float32[B, K]."""

  num_classes: int
  hidden: int
  dropout: float
  axis: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_bc: jax.Array, *, train: bool) -> jax.Array:
    ones, zeros = (
      nn.with_logical_partitioning(init, (self.axis,))
      for init in (nn.initializers.ones, nn.initializers.zeros)
    )
    x_bc = nn.LayerNorm(
      epsilon=1e-5, use_fast_variance=False, scale_init=ones, bias_init=zeros, name='norm'
    )(x_bc)
    x_bf = jax.nn.gelu(
      dense(self.hidden, (self.axis, 'mlp'), self.dtype, name='hidden')(x_bc), approximate=False
    )
    x_bf = nn.Dropout(self.dropout, deterministic=not train)(x_bf)
    return dense(self.num_classes, ('mlp', 'classes'), self.dtype, name='logits')(x_bf).astype(
      jnp.float32
    )


CLASSIFIERS = {'linear': Linear, 'mlp': MLP, 'prototypes': Prototypes}
