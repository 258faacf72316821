"""A vision transformer: class token, registers and patches in each hidden state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import stack
from molt_jax.towers.encoder import EncoderLayer, dense, layer_norm
from molt_jax.towers.functions import ACTIVATIONS
from molt_jax.towers.vision import positions
from molt_jax.towers.vision.config import VisionConfig


def patches(image_bhwc: jax.Array, size: int) -> jax.Array:
  """Cuts images into flattened patches [B, patches, size * size * channels]; an incomplete last row
  or column is dropped.
  """
  b, h, w, c = image_bhwc.shape
  rows, columns = h // size, w // size
  x = image_bhwc[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
  return x.swapaxes(2, 3).reshape(b, rows * columns, size * size * c)


class VisionTransformer(nn.Module):
  """A vision transformer of any family; `config` says what it has.

  Attributes:
    config: the architecture.
    dtype: of computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: what it has above the last hidden state: 'pool', the final norm and, where there is one,
      the query that `pool` reads with, and 'projection', the matrix into CLIP's common space that
      `project` reads.
  """

  config: VisionConfig
  dtype: Any
  attention: str
  param_dtype: Any = None
  heads: tuple[str, ...] = ()

  def setup(self):
    c = self.config
    param_dtype = self.param_dtype or self.dtype
    width = nn.initializers.normal(c.hidden_size**-0.5)

    def param(name, init, axes, shape):
      if stack.has_param(self, name):
        setattr(
          self, name, self.param(name, nn.with_logical_partitioning(init, axes), shape, param_dtype)
        )

    kernel_shape = (3 * c.patch_size**2, c.hidden_size)
    param('patch_kernel', nn.initializers.lecun_normal(), ('patch', 'embed'), kernel_shape)
    if c.patch_bias:
      param('patch_bias', nn.initializers.zeros, ('embed',), (c.hidden_size,))
    if c.class_token:
      param('class_embedding', width, ('embed',), (c.hidden_size,))
    if c.num_registers:
      param('registers', width, ('position', 'embed'), (c.num_registers, c.hidden_size))
    if not c.rope_theta:
      shape = (int(c.class_token) + c.grid**2, c.hidden_size)
      param('position_embedding', width, ('position', 'embed'), shape)
    if c.pre_norm:
      self.pre_norm = layer_norm(c, self.dtype, param_dtype, None)
    how = {'no_bias': c.no_bias, 'gated': c.gated, 'layer_scale': c.layer_scale}
    self.layer = EncoderLayer(c, self.dtype, self.attention, param_dtype, parent=None, **how)
    example = jnp.zeros((1, 1, c.hidden_size), self.dtype)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, example)
    if 'pool' in self.heads:
      self.post_norm = layer_norm(c, self.dtype, param_dtype, None)
      if c.pooled == 'attention':
        self.attention_pool = AttentionPool(c, self.dtype, self.attention, param_dtype)
    if 'projection' in self.heads:
      param('projection', width, ('embed', 'common'), (c.hidden_size, c.projection_size))

  def __call__(self, image_bhwc, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them (the
    last one before the final norm).

    Args:
      image_bhwc: float[B, image_size, image_size, 3], normalised.
      states: which, from 0 to num_layers, or from -num_layers - 1 to -1. Layers above the last of
        them do not run.

    Returns:
      dtype[len(states), B, I, D], ascending; I = config.num_tokens: class token, registers,
      patches row by row.

    Raises:
      UserError: a state that is not there, or images of another size.
    """
    states = stack.resolve_states(states, self.config.num_layers, 'image tower')
    hidden_bid = self.embed(image_bhwc)
    last_bid, found_sbid = self.run(hidden_bid, start=0, stop=states[-1], states=states)
    if 'pool' in self.heads and self.is_initializing():
      self.pool(last_bid)
    return found_sbid

  def embed(self, image_bhwc):
    """Class token, registers and patch embeddings with positions, after the first norm where there
    is one, dtype[B, I, D]: the first hidden state.
    """
    c = self.config
    if image_bhwc.shape[1:] != (c.image_size, c.image_size, 3):
      size = (c.image_size, c.image_size, 3)
      raise UserError(
        f'images of shape {image_bhwc.shape[1:]} for an image tower that reads {size}'
      )
    x_bid = patches(image_bhwc.astype(self.dtype), c.patch_size) @ self._cast(self.patch_kernel)
    if c.patch_bias:
      x_bid += self._cast(self.patch_bias)[None, None]
    if c.class_token:
      x_bid = jnp.concatenate([self._spread(self.class_embedding[None], x_bid), x_bid], axis=1)
    if not c.rope_theta:
      x_bid += self._cast(self.position_embedding)[None]
    if c.num_registers:
      registers_bkd = self._spread(self.registers, x_bid)
      x_bid = jnp.concatenate([x_bid[:, :1], registers_bkd, x_bid[:, 1:]], axis=1)
    return self.norm_inputs(x_bid)

  def norm_inputs(self, hidden_bkd):
    """Any tokens as `embed` returns them: after the first norm, where there is one."""
    return self.pre_norm(hidden_bkd) if self.config.pre_norm else hidden_bkd

  def run(self, hidden_bid, mask_bi=None, *, start, stop, states=(), keys_bt=None, **hook):
    """Runs layers start..stop-1 on hidden states dtype[B, I, D]; weights are read in place.

    Args:
      hidden_bid: what enters layer `start`. I may differ from call to call; with rotary positions
        the last tokens are the patches, all of them.
      mask_bi: not read: every token of an image is valid.
      start, stop, states: see `stack.run_layers`.
      keys_bt: bool[B, I], the tokens that may be read, or bool[B, I, I], by each of them;
        None: all.
      **hook: its `before`, `inserts` and `additions`.

    Returns:
      (hidden states dtype[B, I, D], states dtype[len(states), B, I, D]).
    """
    del mask_bi
    return stack.run_layers(
      self.layer,
      self.layers,
      hidden_bid,
      None,
      keys_bt,
      positions.rotary(self.config),
      num_layers=self.config.num_layers,
      start=start,
      stop=stop,
      states=states,
      **hook,
    )

  def finish(self, hidden_bid):
    """What makes the last hidden state of what leaves the last layer: nothing."""
    return hidden_bid

  def pool(self, hidden_bid, *unused):
    """One vector an image, dtype[B, D], of the last hidden states: after the final norm, the class
    token or what the learned query reads (Hugging Face's `pooler_output` of CLIP, DINOv2, DINOv3
    and SigLIP). Without the head 'pool' it is the class token, or the mean over patches where
    there is none, without that norm.
    """
    if 'pool' not in self.heads:
      return hidden_bid[:, 0] if self.config.class_token else jnp.mean(hidden_bid, axis=1)
    if self.config.pooled == 'attention':
      return self.attention_pool(self.post_norm(hidden_bid))
    return self.post_norm(hidden_bid[:, 0])

  def norm_tokens(self, hidden_bkd):
    """Any tokens of the last hidden states after the final norm; without the head 'pool' as they
    are.
    """
    return self.post_norm(hidden_bkd) if 'pool' in self.heads else hidden_bkd

  def project(self, pooled_bd):
    """What `pool` returned in CLIP's common space, dtype[B, projection_size]: Hugging Face's
    `image_embeds`. Only with the head 'projection'.
    """
    return pooled_bd @ self._cast(self.projection)

  def _cast(self, x):
    return x.astype(self.dtype)

  def _spread(self, x_kd, like_bid):
    """Gives every image the same tokens."""
    return jnp.broadcast_to(self._cast(x_kd)[None], (like_bid.shape[0], *x_kd.shape))


class AttentionPool(nn.Module):
  """SigLIP's pooling: one learned query reads all tokens, then x + MLP(norm(x))."""

  config: VisionConfig
  dtype: Any
  attention: str
  param_dtype: Any

  @nn.compact
  def __call__(self, tokens_bid):
    """Returns dtype[B, D]."""
    c, kinds = self.config, (self.dtype, self.param_dtype)
    init = nn.with_logical_partitioning(nn.initializers.normal(c.hidden_size**-0.5), ('embed',))
    query_d = self.param('query', init, (c.hidden_size,), self.param_dtype).astype(self.dtype)
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    axes = ('embed', 'heads', 'head_dim')
    query_b1d = jnp.broadcast_to(query_d[None, None], (tokens_bid.shape[0], 1, c.hidden_size))
    read_b1nh = jax.nn.dot_product_attention(
      dense('q_proj', heads, axes, *kinds)(query_b1d),
      dense('k_proj', heads, axes, *kinds)(tokens_bid),
      dense('v_proj', heads, axes, *kinds)(tokens_bid),
      implementation=self.attention,
    )
    out_axes = ('heads', 'head_dim', 'embed')
    x_b1d = dense('o_proj', c.hidden_size, out_axes, *kinds, axis=(-2, -1))(read_b1nh)
    y_b1d = layer_norm(c, *kinds, 'norm')(x_b1d)
    y_b1f = dense('up_proj', c.intermediate_size, ('embed', 'mlp'), *kinds)(y_b1d)
    y_b1f = ACTIVATIONS[c.hidden_act](y_b1f)
    return (x_b1d + dense('down_proj', c.hidden_size, ('mlp', 'embed'), *kinds)(y_b1f))[:, 0]
