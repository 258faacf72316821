"""CLIP's vision transformer: class token and patches in each hidden state."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import stack
from molt_jax.towers.clip.config import ClipVisionConfig
from molt_jax.towers.clip.layers import ClipLayer, layer_norm, patches


class ClipVision(nn.Module):
  """CLIP vision transformer.

  Attributes:
    config: the architecture.
    dtype: of computation; norms and softmax are float32.
    attention: implementation of `jax.nn.dot_product_attention`, 'xla' or 'cudnn' (GPU, bfloat16).
    param_dtype: of weights; None: `dtype`.
    heads: what it has above the last hidden state: 'pool', the final norm that `pool` reads, and
      'projection', the matrix into CLIP's common space that `project` reads.
  """

  config: ClipVisionConfig
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
    param('class_embedding', width, ('embed',), (c.hidden_size,))
    shape = (c.num_tokens, c.hidden_size)
    param('position_embedding', width, ('position', 'embed'), shape)
    self.pre_norm = layer_norm(c, self.dtype, param_dtype, None)
    self.layer = ClipLayer(c, self.dtype, self.attention, param_dtype, parent=None)
    example = jnp.zeros((1, 1, c.hidden_size), self.dtype)
    self.layers = stack.layer_params(self, self.layer, c.num_layers, example)
    if 'pool' in self.heads:
      self.post_norm = layer_norm(c, self.dtype, param_dtype, None)
    if 'projection' in self.heads:
      param('projection', width, ('embed', 'common'), (c.hidden_size, c.projection_size))

  def __call__(self, image_bhwc, *, states: Sequence[int]):
    """Returns hidden states, numbered as Hugging Face's `output_hidden_states` numbers them.

    Args:
      image_bhwc: float[B, image_size, image_size, 3], normalised.
      states: which, from 0 to num_layers, or from -num_layers - 1 to -1. Layers above the last of
        them do not run.

    Returns:
      dtype[len(states), B, I, D], ascending; I = 1 + number of patches, class token first.

    Raises:
      UserError: a state that is not there, or images of another size.
    """
    states = stack.resolve_states(states, self.config.num_layers, 'CLIP tower')
    hidden_bid = self.embed(image_bhwc)
    last_bid, found_sbid = self.run(hidden_bid, start=0, stop=states[-1], states=states)
    if 'pool' in self.heads and self.is_initializing():
      self.post_norm(last_bid)
    return found_sbid

  def embed(self, image_bhwc):
    """Class token and patch embeddings with positions, after the first norm, dtype[B, I, D]: the
    first hidden state.
    """
    c = self.config
    if image_bhwc.shape[1:] != (c.image_size, c.image_size, 3):
      size = (c.image_size, c.image_size, 3)
      raise UserError(f'images of shape {image_bhwc.shape[1:]} for a CLIP tower that reads {size}')
    x_bid = patches(image_bhwc.astype(self.dtype), c.patch_size) @ self._cast(self.patch_kernel)
    first_b1d = jnp.broadcast_to(
      self._cast(self.class_embedding), (x_bid.shape[0], 1, c.hidden_size)
    )
    position_1id = self._cast(self.position_embedding)[None]
    return self.pre_norm(jnp.concatenate([first_b1d, x_bid], axis=1) + position_1id)

  def run(self, hidden_bid, mask_bi=None, *, start, stop, states=(), keys_bt=None, **hook):
    """Runs layers start..stop-1 on hidden states dtype[B, I, D]; I may differ from call to call;
    weights are read in place.

    Args:
      hidden_bid: what enters layer `start`.
      mask_bi: not read: every token of an image is valid.
      start, stop, states: see `stack.run_layers`.
      keys_bt: bool[B, I], the tokens that may be read; None: all.
      **hook: its `before` and `inserts`.

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
    """The class token of the last hidden states after the final norm, dtype[B, D]: Hugging Face's
    `pooler_output`. Only with the head 'pool'.
    """
    return self.post_norm(hidden_bid[:, 0])

  def norm_tokens(self, hidden_bkd):
    """Any tokens of the last hidden states after the final norm. Only with the head 'pool'."""
    return self.post_norm(hidden_bkd)

  def project(self, pooled_bd):
    """What `pool` returned in CLIP's common space, dtype[B, projection_size]: Hugging Face's
    `image_embeds`. Only with the head 'projection'.
    """
    return pooled_bd @ self._cast(self.projection)

  def _cast(self, x):
    return x.astype(self.dtype)
