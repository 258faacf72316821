"""Ridge probes: linear or radial ridge regression of one-hot labels on pooled hidden states, in
closed form for each missing pattern. Nothing is trained; what is open is chosen on validation. See
`parts.kernel_ridge` and `docs/methods/probe.md`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import head as heads
from molt_jax.methods.parts.interface import Output


class NoHead(nn.Module):
  """Knows nothing: every class has the logit zero.

  Attributes:
    num_classes: K.
  """

  num_classes: int

  @nn.compact
  def __call__(
    self,
    states: HiddenStates,
    present_bm: jax.Array,
    *,
    train: bool,
    content_bm: jax.Array | None = None,
    weight_b: jax.Array | None = None,
  ) -> Output:
    """See `head.make_head`."""
    del states, train, content_bm, weight_b
    return Output(jnp.zeros((len(present_bm), self.num_classes)))


def make_head(config, *, num_layers, num_classes, image_width, text_width) -> NoHead:
  """See `head.make_head`."""
  del config, num_layers, image_width, text_width
  return NoHead(num_classes)


def build(config, towers, *, num_classes, class_names=()) -> heads.HeadMethod:
  """See `base.make_method`.

  Raises:
    UserError: `probe.layers` names a hidden state that a tower does not have.
  """
  del class_names
  states = heads.named_states(config, towers)
  cells = config.probe.cells
  whole = heads.build(config, towers, states, NoHead(num_classes), num_classes, cells)
  own = {'landmarks': config.probe.landmarks, 'kernel': config.probe.kernel}
  return dataclasses.replace(whole, is_trained=False, **own)
