"""A stack of equal layers, run from layer a to layer b without copying weights.

Every parameter of one layer is stored once for all layers, on a leading 'layers' axis.
`jax.lax.scan` runs over layer *indices*, and the body reads its slice of the (loop-invariant)
stack. Scanning over the stack itself, as `nn.scan` does, would copy the slice a..b before the loop.
Compile time does not depend on depth.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.errors import UserError
from molt_jax.towers import quantize


def check_taps(num_taps: int, num_layers: int, tower: str) -> None:
  """Raises UserError unless a tower of `num_layers` layers has that many hidden states, which are
  one more.
  """
  if not 1 <= num_taps <= num_layers + 1:
    raise UserError(

        f'{num_taps} tapped layers of a {tower} with {num_layers} layers: choose from 1 to '
        f'{num_layers + 1} (molt.num_layers)'

    )


def layer_params(module: nn.Module, layer: nn.Module, num_layers: int, *example):
  """Returns the stacked parameters of `num_layers` copies of `layer`, creating them as `module`'s
  parameter 'layers' on initialisation.

  Args:
    module: the bound module that owns the stack.
    layer: an unbound module (parent=None) of one layer.
    num_layers: depth of the stack.
    *example: arguments that `layer` can be initialised with.
  """

  def init(key):
    params = jax.vmap(lambda k: layer.init(k, *example)['params'])(
      jax.random.split(key, num_layers)
    )
    return nn.meta.add_axis(params, 0, {nn.PARTITION_NAME: 'layers'})

  if module.is_initializing() and not module.has_variable('params', 'layers'):
    module.param('layers', init)
  return nn.unbox(module.get_variable('params', 'layers'))


def run_layers(
  layer: nn.Module, params, h_btd: jax.Array, *args, start: int, stop: int, num_taps: int = 0
):
  """Runs layers start..stop-1 of a stack on hidden states.

  Args:
    layer: an unbound module of one layer, called as layer(h_btd, *args).
    params: stacked parameters, as `layer_params` returns them.
    h_btd: hidden states that enter layer `start`.
    *args: what every layer reads besides the hidden states.
    start, stop: range of layers; start == stop leaves h_btd as it is.
    num_taps: how many of the hidden states to return as well, at most stop - start + 1.

  Returns:
    (hidden states that leave layer stop - 1, taps_lbtd: the last `num_taps` of the stop - start + 1
    hidden states h_btd, first output, ..., last).
  """

  def body(carry, i):
    h_btd, taps_lbtd = carry
    one = quantize.dequantize(
      jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), params)
    )
    h_btd = layer.apply({'params': one}, h_btd, *args)
    if num_taps:
      # States that are not among the last ones land in slot 0 too, where the first wanted one
      # overwrites them.
      slot = jnp.maximum(i - (stop - num_taps), 0)
      taps_lbtd = jax.lax.dynamic_update_index_in_dim(taps_lbtd, h_btd, slot, 0)
    return (h_btd, taps_lbtd), None

  # Differentiation (rival methods train what they insert between frozen layers) must not keep each
  # layer's slice of the weights, scaled back or not, as a residual: that would be a second copy of
  # the model. Products are kept; slices are read again and what is cheap is computed again.
  body = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
  taps_lbtd = jnp.broadcast_to(h_btd, (num_taps, *h_btd.shape))
  return jax.lax.scan(body, (h_btd, taps_lbtd), jnp.arange(start, stop))[0]
