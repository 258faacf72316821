"""Two towers with projection heads into one space (CLIP: Radford et al. 2021)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.methods.parts.interface import unit
from molt_jax.towers.vision import patches


def project(tower: nn.Module, pooled_bd: jax.Array) -> jax.Array:
  """What a tower pooled, by the tower's own projection where it has one, in float32."""
  if 'projection' in tower.heads:
    pooled_bd = tower.project(pooled_bd.astype(tower.dtype))
  return pooled_bd.astype(jnp.float32)


class Projection(nn.Module):
  """Linear, GELU, LayerNorm, then length one; the last two in float32.

  Attributes:
    width: C, of the common space.
    dtype: of the linear layer's computation.
  """

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x_bd):
    """Returns float32[B, C], rows of length one."""
    x_bc = nn.Dense(
      self.width,
      dtype=self.dtype,
      name='linear',
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', 'common')),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('common',)),
    )(x_bd)
    x_bc = nn.LayerNorm(
      dtype=jnp.float32,
      name='norm',
      scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('common',)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('common',)),
    )(nn.gelu(x_bc).astype(jnp.float32))
    return unit(x_bc)


class Towers(nn.Module):
  """An image tower and a text tower, and what is read of them; parameters: {image,text}_tower.

  Attributes:
    image_tower: with its final norm.
    text_tower: with its `pool`.
  """

  image_tower: nn.Module
  text_tower: nn.Module

  def pool_text(self, tokens_bt, mask_bt):
    """One vector a text, float32[B, D_t]: what the text head reads (before it is standardised,
    where it is).
    """
    last_btd = self.text_tower(tokens_bt, mask_bt, states=(-1,))[0]
    return self.text_tower.pool(last_btd, tokens_bt, mask_bt).astype(jnp.float32)

  def image_features(self, image_bhwc, num_layers: int):
    """Class token (where there is one) and mean patch token of each of the image tower's last
    layers, side by side, float32[B, num_layers * 2 * D_i].
    """
    first = self.image_tower.config.num_prefix_tokens
    found_lbid = self.image_tower(image_bhwc, states=range(-num_layers, 0)).astype(jnp.float32)
    parts = [found_lbid[:, :, 0]] if first else []
    both_lbd = jnp.concatenate([*parts, jnp.mean(found_lbid[:, :, first:], axis=2)], axis=-1)
    return jnp.moveaxis(both_lbd, 0, 1).reshape(both_lbd.shape[1], -1)

  def image_tokens(self, image_bhwc):
    """Every token of the image tower's last layer, laid flat, float32[B, I * D_i]: what
    `image_features` averages over places.
    """
    last_bid = self.image_tower(image_bhwc, states=(-1,))[0].astype(jnp.float32)
    return last_bid.reshape(len(image_bhwc), -1)


class DualEncoder(Towers):
  """An image tower and a text tower, each with a projection head; parameters: {image,text}_tower,
  {image,text}_head. With `own_projections` there are no such heads: as in CLIP, each tower has a
  matrix into the common space among its parameters.

  With `independent`, each tower has one more head, {image,text}_independent, for deep feature
  separation; with `reconstruct`, the image tower has a linear decoder of pixels, image_decoder.

  Attributes:
    image_tower: a vision transformer with its final norm.
    text_tower: a LLaMA (its mean-pooled last hidden states are projected) or a CLIP text tower (its
      pooled token).
    width: C, of the common space.
    dtype: of computation in the heads.
    own_projections: whether the towers' own projections are the heads.
    independent: whether to project into independent features too.
    reconstruct: whether to decode each image from its patch tokens too.
    kept: share of the patches of an image that `pool_image` keeps when it is given a key, in (0,
      1].
  """

  width: int
  dtype: Any
  own_projections: bool
  independent: bool
  reconstruct: bool
  kept: float

  def setup(self):
    if not self.own_projections:
      self.image_head = Projection(self.width, self.dtype)
      self.text_head = Projection(self.width, self.dtype)
    if self.independent:
      self.image_independent, self.text_independent = (
        Projection(self.width, self.dtype),
        Projection(self.width, self.dtype),
      )
    if self.reconstruct:
      self.image_decoder = nn.Dense(
        3 * self.image_tower.config.patch_size**2,
        dtype=self.dtype,
        kernel_init=nn.with_logical_partitioning(
          nn.initializers.lecun_normal(), ('embed', 'patch')
        ),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('patch',)),
      )

  def __call__(self, image_bhwc, tokens_bt, mask_bt):
    """Makes every parameter; used for initialisation alone."""
    return self.project_image(self.pool_image(image_bhwc)[0]), self.project_text(
      self.pool_text(tokens_bt, mask_bt)
    )

  def pool_image(self, image_bhwc, key=None):
    """Returns (one vector an image, [B, D_i], that the image head reads; the error of decoding the
    image, float32[B], or None).

    The error: mean square over pixels and channels (normalised, so about 1 for a decoder that knows
    their mean alone) between the image and what one linear map makes of each of its patch tokens in
    the last layer. With a key, patches are left out of each image at random, the same number of
    each, before the first layer, and are not decoded (FLIP: Li et al., CVPR 2023).
    """
    hidden_bid, patches_bpx = (
      self.image_tower.embed(image_bhwc),
      patches(image_bhwc, self.image_tower.config.patch_size),
    )
    if key is not None and self.kept < 1:
      hidden_bid, patches_bpx = self._thin_out(hidden_bid, patches_bpx, key)
    stop = self.image_tower.config.num_layers
    hidden_bid, _ = self.image_tower.run(hidden_bid, start=0, stop=stop)
    error_b = None
    if self.reconstruct:
      first = self.image_tower.config.num_prefix_tokens
      error_b = self._decoding_error(hidden_bid[:, first:], patches_bpx)
    return self.image_tower.pool(hidden_bid), error_b

  def _thin_out(self, hidden_bid, patches_bpx, key):
    """Keeps the tokens that are no patches and a random choice of patches, in their order."""
    b, p = patches_bpx.shape[:2]
    first = self.image_tower.config.num_prefix_tokens
    order_bp = jnp.argsort(jax.random.uniform(key, (b, p)), axis=1)
    chosen_bk1 = jnp.sort(order_bp[:, : max(1, round(self.kept * p))], axis=1)[:, :, None]
    tokens_bkd = jnp.take_along_axis(hidden_bid[:, first:], chosen_bk1, axis=1)
    return jnp.concatenate([hidden_bid[:, :first], tokens_bkd], axis=1), jnp.take_along_axis(
      patches_bpx, chosen_bk1, axis=1
    )

  def _decoding_error(self, tokens_bpd, patches_bpx):
    return jnp.mean(
      jnp.square(self.image_decoder(tokens_bpd).astype(jnp.float32) - patches_bpx), axis=(1, 2)
    )

  def project_image(self, pooled_bd):
    """Returns (embeddings, independent features or None), each float32[B, C] with rows of length
    one.
    """
    independent_bc = self.image_independent(pooled_bd) if self.independent else None
    if self.own_projections:
      return unit(project(self.image_tower, pooled_bd)), independent_bc
    return self.image_head(pooled_bd), independent_bc

  def project_text(self, pooled_bd):
    """As `project_image`, of pooled texts."""
    independent_bc = self.text_independent(pooled_bd) if self.independent else None
    if self.own_projections:
      return unit(project(self.text_tower, pooled_bd)), independent_bc
    return self.text_head(pooled_bd), independent_bc
