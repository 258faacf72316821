"""Weight-only quantisation of a frozen tower: int8 or int4 matrices and their scales, computed
while loading (qwix).

The matrices of the layers are quantised; embeddings, norms and biases, a few percent of a tower,
stay as they are. Activations are never quantised: a layer's matrices are scaled back when the layer
runs (`dequantize`), one layer at a time, and XLA fuses that with the product where it can.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from molt_jax.errors import UserError


class Scheme(NamedTuple):
  """How numbers are coded.

  Attributes:
    group: most inputs that share a scale, for each output; None: all of them.
    calibration: qwix's 'absmax' (symmetric) or 'minmax' (with a zero point).
    scale_dtype: of the scales; also of what comes out of `dequantize`.
  """

  group: int | None
  calibration: str
  scale_dtype: str


# int8 as the weights of Dettmers et al. 2022, "LLM.int8()". 16 levels need small groups and a zero
# point; a bfloat16 scale errs by 1/30 of a level.
SCHEMES = {
  'int8': Scheme(group=None, calibration='absmax', scale_dtype='float32'),
  'int4': Scheme(group=32, calibration='minmax', scale_dtype='bfloat16'),
}


@dataclasses.dataclass(frozen=True)
class How:
  """How one layer's matrix is quantised.

  Attributes:
    method: a key of SCHEMES, which is the type of the codes as well.
    num_inputs: leading axes that the product sums over; the others are outputs.
  """

  method: str
  num_inputs: int

  def quantize(self, w: jax.Array):
    """Returns a matrix as a `qwix.QArray`: codes in its shape, scales, zero points."""
    scheme = SCHEMES[self.method]
    return _qwix(self.method).quantize(
      w.astype(jnp.float32),
      jnp.dtype(self.method),
      channelwise_axes=range(self.num_inputs, w.ndim),
      tiled_axes=self._tiles(w.shape),
      calibration_method=scheme.calibration,
      scale_dtype=scheme.scale_dtype,
    )

  def abstract(self, boxed: nn.meta.AxisMetadata):
    """Returns the boxed shapes of a stack of matrices, [layers, ...], once quantised; codes and
    scales split over devices as the matrix does.
    """
    num_layers, *shape = boxed.value.shape
    one = jax.eval_shape(self.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(
      lambda x: boxed.replace_boxed(jax.ShapeDtypeStruct((num_layers, *x.shape), x.dtype)), one
    )

  def _tiles(self, shape: tuple[int, ...]) -> dict[int, int]:
    """Axis -> neighbours along it that share a scale."""
    group = SCHEMES[self.method].group
    *outer, inner = range(self.num_inputs)
    if group is None:
      return {axis: shape[axis] for axis in (*outer, inner)}
    return {**dict.fromkeys(outer, 1), inner: math.gcd(shape[inner], group)}


def plan(boxed: Any, method: str) -> dict[str, How]:
  """Returns path -> how, for every parameter that `method` quantises: the kernels of the layers.

  A kernel reads the residual stream (logical axis 'embed' first, the one input) or writes it
  ('embed' last, the one output).

  Args:
    boxed: abstract parameters of a tower, with logical axes.
    method: 'none', 'int8' or 'int4'.
  """
  if method == 'none':
    return {}
  flat = traverse_util.flatten_dict(boxed, sep='/')
  kernels = {
    path: box.names[1:]
    for path, box in flat.items()
    if path.startswith('layers/') and path.endswith('/kernel')
  }
  return {
    path: How(method, 1 if names[0] == 'embed' else len(names) - 1)
    for path, names in kernels.items()
  }


def abstract_params(boxed: Any, method: str) -> Any:
  """Shapes, types and (boxed) logical axes of a tower's parameters once quantised; `boxed` are
  those before.
  """
  hows = plan(boxed, method)
  flat = traverse_util.flatten_dict(boxed, sep='/')
  return traverse_util.unflatten_dict(
    {path: hows[path].abstract(box) if path in hows else box for path, box in flat.items()}, sep='/'
  )


def is_quantized(leaf: Any) -> bool:
  """Whether a parameter is a `qwix.QArray`; asked in this way, towers that are not quantised do
  without qwix.
  """
  return hasattr(leaf, 'qvalue')


def dequantize(params: Any) -> Any:
  """Returns parameters with arrays of numbers in the place of quantised ones."""
  return jax.tree.map(
    lambda leaf: _qwix('a quantised tower').dequantize(leaf) if is_quantized(leaf) else leaf,
    params,
    is_leaf=is_quantized,
  )


def _qwix(wanted: str):
  try:
    import qwix  # Takes a second, and who quantises nothing need not have it.
  except ImportError as error:
    raise UserError(
      f'config.backbones.quantization: {wanted} needs the package qwix; pip install qwix, or '
      'give '
      'none'
    ) from error
  return qwix
