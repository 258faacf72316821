"""Kernel ridge regression on pooled hidden states, solved in closed form for each missing pattern.

Few examples are learned better by ridge regression with a radial kernel than by gradient descent,
so a head's answer is multiplied with those of such regressions on the same hidden states. A kernel
compares an example with landmarks (training examples),

  k_j(x, z) = exp(-GAMMA d_j(x, z)),   d_j = the mean of (x_c - z_c)^2 over the channels of group j,

with channels standardised by training statistics. Each modality has two groups (`GROUPS`): first
token, mean (and, of a text, last token) of all hidden states; and, of an image, all cells of one
hidden state, which keep place. Its kernel is a convex mixture of theirs; that of a complete example
is a convex mixture of both modalities'. Scores are k(x, Z) alpha + b, where alpha solves ridge
regression of one-hot labels, less their mean, in the space that the landmarks span (Williams and
Seeger 2001). Where all training examples are landmarks, that is exact kernel ridge regression. b is
that mean, or makes the probabilities of an example that is like no other the shares of the classes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.features.hidden_states import HiddenStates

GAMMA = 0.3  # Standardised channels of unrelated examples have a mean squared distance of about 2.
GROUPS = ('mean', 'cells')
MEAN = 1  # Where the mean is among the tokens of the first group.
# More tokens than these are no cells: their mean alone is compared.
MAX_CELLS = 40
BLOCK = 64  # Landmarks that are compared at once on a CPU.
_HIGHEST = jax.lax.Precision.HIGHEST


def empty(
  shapes: Mapping[str, tuple[int, int, int] | None], *, landmarks: int, num_classes: int
) -> dict[str, Any]:
  """Returns the variables of a regression that answers nothing yet.

  Args:
    shapes: modality -> (L hidden states, N tokens that keep a place, D channels), None for one that
      is not used.
    landmarks: M.
    num_classes: K.
  """
  patterns = len(PATTERNS)
  found = {
    'dual_vmk': jnp.zeros((patterns, landmarks, num_classes)),
    'offset_vk': jnp.zeros((patterns, num_classes)),
    'share_vm': jnp.zeros((patterns, len(MODALITIES))),
    'temperature_v': jnp.zeros((patterns,)),
    'weight_vv': jnp.zeros((patterns, patterns)),
    'head_weight_v': jnp.ones((patterns,)),
  }
  for modality, shape in shapes.items():
    if shape is None:
      continue
    layers, tokens, width = shape
    own = 3 if modality == 'text' else 2
    sizes = {'mean': (layers, own, width), 'cells': (1, num_cells(tokens), width)}
    found[modality] = {
      'state': jnp.zeros((), jnp.int32),
      'group_weight': jnp.zeros((len(GROUPS),)),
      **{f'{group}_mean_lnd': jnp.zeros(size) for group, size in sizes.items()},
      **{f'{group}_scale_lnd': jnp.zeros(size) for group, size in sizes.items()},
      **{
        f'{group}_landmarks_mlnd': jnp.zeros((landmarks, *size), jnp.float16)
        for group, size in sizes.items()
      },
    }
  return found


def num_cells(tokens: int) -> int:
  """Returns how many tokens of an example keep their place, 1 where they are too many."""
  return tokens if tokens <= MAX_CELLS else 1


def pool(states_lbnd: jax.Array, mask_bn: jax.Array, *, has_cells: bool) -> dict[str, jax.Array]:
  """Returns what the groups compare of a modality's hidden states.

  Args:
    states_lbnd: [L, B, N, D]; whatever lies where mask_bn is False is not read.
    mask_bn: bool[B, N]; of a text, the first tokens are valid.
    has_cells: tokens have places (of an image) that examples share.

  Returns:
    {'mean': float32[B, L, 2 or 3, D], 'cells': float32[B, L, C, D]}; zero where no token is valid.
    'mean' is of an image its first token and the mean of the others, of a text its first token, the
    mean of all and its last token.
  """
  x_lbnd = jnp.where(mask_bn[None, :, :, None], states_lbnd, 0).astype(jnp.float32)
  x_blnd = jnp.moveaxis(x_lbnd, 1, 0)
  first_bl1d = x_blnd[:, :, :1]
  if has_cells:
    mean_bl1d = jnp.mean(x_blnd[:, :, 1:] if x_blnd.shape[2] > 1 else x_blnd, 2, keepdims=True)
    cells = x_blnd if num_cells(x_blnd.shape[2]) > 1 else mean_bl1d
    return {'mean': jnp.concatenate([first_bl1d, mean_bl1d], axis=2), 'cells': cells}
  count_b = jnp.maximum(jnp.sum(mask_bn, axis=1, dtype=jnp.int32), 1)
  mean_bl1d = jnp.sum(x_blnd, axis=2, keepdims=True) / count_b[:, None, None, None]
  last_bl1d = jnp.take_along_axis(x_blnd, (count_b - 1)[:, None, None, None], axis=2)
  return {'mean': jnp.concatenate([first_bl1d, mean_bl1d, last_bl1d], 2), 'cells': mean_bl1d}


def kernel(
  variables: Mapping[str, Any], pooled: Mapping[str, jax.Array], kind: str = 'rbf'
) -> jax.Array:
  """Returns the kernel of a modality's examples with the landmarks, float32[B, M].

  Args:
    variables: of the modality, as in `empty`.
    pooled: as `pool` returned it.
    kind: a key of KERNELS.
  """
  state = variables['state']
  chosen = {
    'mean': pooled['mean'],
    'cells': jax.lax.dynamic_slice_in_dim(pooled['cells'], state, 1, axis=1),
  }
  total = 0.0
  for g, group in enumerate(GROUPS):
    weight = variables['group_weight'][g]
    # A group that was not chosen is not computed.
    own = {group: chosen[group]}
    total += weight * jax.lax.cond(
      weight > 0,
      functools.partial(_group_kernel, variables, group, kind),
      functools.partial(_zeros, variables),
      own,
    )
  return total


def _group_kernel(variables, group, kind, pooled) -> jax.Array:
  mean_lnd, scale_lnd = variables[f'{group}_mean_lnd'], variables[f'{group}_scale_lnd']
  x_blnd = (pooled[group] - mean_lnd[None]) * scale_lnd[None]
  x_bc, z_mc = (x.reshape(len(x), -1) for x in (x_blnd, variables[f'{group}_landmarks_mlnd']))
  whole = functools.partial(_with_landmarks, kind)
  return jax.lax.platform_dependent(x_bc, z_mc, cpu=_by_blocks(whole), default=whole)


def _with_landmarks(kind: str, x_bc: jax.Array, z_mc: jax.Array) -> jax.Array:
  return KERNELS[kind](x_bc, z_mc.astype(jnp.float32))


def _by_blocks(whole: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The same, some landmarks after others: all of them in float32 leave a processor's caches, which
  takes 1.5 to 3 times as long.
  """

  def kernel_bm(x_bc, z_mc):
    size = min(BLOCK, len(z_mc))
    count = len(z_mc) // size
    blocks_nbm = jax.lax.map(
      lambda n: whole(x_bc, jax.lax.dynamic_slice_in_dim(z_mc, n * size, size)),
      jnp.arange(count),
    )
    blocks_bm = jnp.moveaxis(blocks_nbm, 0, 1).reshape(len(x_bc), count * size)
    return jnp.concatenate([blocks_bm, whole(x_bc, z_mc[count * size :])], axis=1)

  return kernel_bm


def _zeros(variables, pooled) -> jax.Array:
  """A kernel, float32[B, M], of nothing."""
  examples = len(next(iter(pooled.values())))
  return jnp.zeros((examples, len(variables['mean_landmarks_mlnd'])))


def mean_squared_distance(x_bc: Any, z_mc: Any) -> Any:
  """Returns float32[B, M], the mean over channels of squared differences."""
  xp = np if isinstance(x_bc, np.ndarray) else jnp
  squares_bm = xp.square(x_bc).sum(1)[:, None] + xp.square(z_mc).sum(1)[None]
  return xp.maximum(squares_bm - 2 * _products(x_bc, z_mc), 0) / x_bc.shape[1]


def _products(x_bc: Any, z_mc: Any) -> Any:
  if isinstance(x_bc, np.ndarray):
    return np.matmul(x_bc, z_mc.T)
  # XLA multiplies a matrix by one column in a third of the time of one row by a matrix.
  return jnp.matmul(z_mc, x_bc.T, precision=_HIGHEST).T


def rbf(x_bc: Any, z_mc: Any) -> Any:
  """The radial kernel, float32[B, M]; of JAX's arrays or NumPy's."""
  xp = np if isinstance(x_bc, np.ndarray) else jnp
  return xp.exp(-GAMMA * mean_squared_distance(x_bc, z_mc))


def linear(x_bc: Any, z_mc: Any) -> Any:
  """Products per channel, and of a constant: 1 + x'z / C, float32[B, M]."""
  return 1 + _products(x_bc, z_mc) / x_bc.shape[1]


KERNELS = {'rbf': rbf, 'linear': linear}


def answers(
  variables: Mapping[str, Any], states: HiddenStates, present_bm: jax.Array, kind: str = 'rbf'
) -> tuple[jax.Array, jax.Array]:
  """Returns the answers of the regressions to examples with some of their modalities.

  Args:
    variables: as in `empty`, fitted.
    states: hidden states that the head reads.
    present_bm: bool[B, 2], the modalities that may be read; no bit of another enters.
    kind: of the kernels, a key of KERNELS.

  Returns:
    (float32[B, V, K]: of the regressions of complete examples, of images and of texts; bool[B, V],
    those whose modalities the example has).
  """
  kernels = {}
  for column, modality in enumerate(MODALITIES):
    if modality in variables and states.of(modality) is not None:
      own_b = present_bm[:, column]
      pooled = pool_modality(states, present_bm, modality)
      # Missing from every example, its kernel is not computed.
      kernel_bm = jax.lax.cond(
        own_b.any(),
        functools.partial(kernel, variables[modality], kind=kind),
        functools.partial(_zeros, variables[modality]),
        pooled,
      )
      kernels[column] = jnp.where(own_b[:, None], kernel_bm, 0.0)
  found = []
  for v in range(len(PATTERNS)):
    shares = variables['share_vm'][v]
    total_bm = sum(shares[column] * kernel_bm for column, kernel_bm in kernels.items())
    answer_bk = jnp.matmul(total_bm, variables['dual_vmk'][v], precision=_HIGHEST)
    found.append(answer_bk + variables['offset_vk'][v][None])
  able_bv = jnp.stack([present_bm[:, pattern].all(axis=1) for pattern in PATTERNS], axis=1)
  return jnp.stack(found, axis=1), able_bv


def pool_modality(
  states: HiddenStates, present_bm: jax.Array, modality: str
) -> dict[str, jax.Array]:
  """`pool` of one modality's states, where it is present."""
  own_lbnd, column = states.of(modality), MODALITIES.index(modality)
  mask_bn = jnp.broadcast_to(present_bm[:, column, None], own_lbnd.shape[1:3])
  if modality == 'text':
    mask_bn &= states.text_mask_bt
  return pool(own_lbnd, mask_bn, has_cells=modality == 'image')


def combine(
  variables: Mapping[str, Any],
  logits_bk: jax.Array,
  answer_bvk: jax.Array,
  able_bv: jax.Array,
  *,
  multi_label: bool,
) -> jax.Array:
  """Multiplies a head's answer with those of the regressions that an example has the modalities
  for, as `answers` returned them. Where nothing was fitted the head's logits stay as they are.
  """
  # Of the three patterns an example has its own, the first whose modalities are all there.
  pattern_b = jnp.argmax(able_bv, axis=1)
  fitted_v = variables['temperature_v'] > 0
  weight_bv = jnp.where(able_bv & fitted_v[None], variables['weight_vv'][pattern_b], 0.0)
  log_bvk = experts(answer_bvk, variables['temperature_v'], multi_label=multi_label)
  head_bk = logits_bk if multi_label else jax.nn.log_softmax(logits_bk)
  head_weight_b1 = variables['head_weight_v'][pattern_b][:, None]
  mixed_bk = head_weight_b1 * head_bk + jnp.einsum('bv,bvk->bk', weight_bv, log_bvk)
  answered_b1 = jnp.any(weight_bv > 0, axis=1)[:, None]
  return jnp.where(answered_b1, mixed_bk, logits_bk)


def experts(answer_bvk: Any, temperature_v: Any, *, multi_label: bool) -> Any:
  """Returns log-probabilities of answers; for several labels their logits."""
  temperature_1v1 = temperature_v[None, :, None]
  if multi_label:
    return temperature_1v1 * (answer_bvk - 0.5)
  return jax.nn.log_softmax(temperature_1v1 * answer_bvk)
