"""From hidden states to token sequences: their normalisation, and what stands in for an absent
modality.

Whatever sits in the states of an absent example, or under text padding, is selected away before any
arithmetic: NaN there changes no bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import MODALITIES
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.parts.interface import Tokens, TokenSequence
from molt_jax.objectives import moments
from molt_jax.objectives.pairwise import in_range
from molt_jax.towers.packing import Packing

# HiddenStates beyond, and normalised ones, count as this much: products of a few stay in float32.
LARGEST = 1e9
# A channel whose standard deviation is below this share of its mean is constant: float32 sums
# resolve no less.
_CONSTANT = 1e-5


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How the gap that an absent modality leaves is filled.

  Attributes:
    placeholder: a token takes the place of the absent sequence and counts as available; otherwise
      the present modality works alone.
    learned: the token is a parameter, one per layer; otherwise it is zero.
    imputes: the absent h_l of eq. 5 is predicted from the present one
      (`imputation.CrossModalImputation`); its tokens stay absent.
  """

  placeholder: bool
  learned: bool
  imputes: bool = False


STRATEGIES = {
  'robust': Strategy(placeholder=False, learned=False),
  'translate': Strategy(placeholder=False, learned=False, imputes=True),
  'null': Strategy(placeholder=True, learned=True),
  'zero': Strategy(placeholder=True, learned=False),
}


class Identity(nn.Module):
  """HiddenStates as they are (the paper)."""

  @nn.compact
  def __call__(self, x_lbtd: jax.Array, counted_bt: jax.Array, *, train: bool) -> jax.Array:
    return x_lbtd


class RMSNormalize(nn.Module):
  """Each token divided by its root mean square; no parameters."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_lbtd: jax.Array, counted_bt: jax.Array, *, train: bool) -> jax.Array:
    x_lbtd = x_lbtd.astype(jnp.float32)
    return x_lbtd * jax.lax.rsqrt(
      jnp.mean(jnp.square(x_lbtd), axis=-1, keepdims=True) + self.epsilon
    )


class Standardize(nn.Module):
  """Each channel of each layer minus its mean, over its standard deviation, both streamed over
  the valid tokens of the training states.

  The collection `statistics` holds count [], mean [L, D] and m2 [L, D] (sum of squared distances
  from the mean), merged with those of each training batch (`objectives.moments`). Training and
  evaluation use the same statistics (in training those that include the batch). Everything is a
  sum over examples, so sharding the batch changes nothing. Before the first update, and in constant
  channels, the standard deviation is taken as one.
  """

  @nn.compact
  def __call__(self, x_lbtd: jax.Array, counted_bt: jax.Array, *, train: bool) -> jax.Array:
    x_lbtd = x_lbtd.astype(jnp.float32)
    shape_ld = (x_lbtd.shape[0], x_lbtd.shape[-1])
    count = self.variable('statistics', 'count', jnp.zeros, (), jnp.float32)
    mean_ld = self.variable('statistics', 'mean', jnp.zeros, shape_ld, jnp.float32)
    m2_ld = self.variable('statistics', 'm2', jnp.zeros, shape_ld, jnp.float32)
    if train and self.is_mutable_collection('statistics') and not self.is_initializing():
      seen = moments.Moments(count.value, mean_ld.value, m2_ld.value)
      batch = _moments(jax.lax.stop_gradient(x_lbtd), counted_bt)
      merged = moments.merge(seen, batch, lambda weight, step_ld: jnp.square(step_ld) * weight)
      count.value, mean_ld.value, m2_ld.value = merged
    mean_l11d = mean_ld.value[:, None, None, :]
    variance_l11d = m2_ld.value[:, None, None, :] / jnp.maximum(count.value, 1.0)
    varies_l11d = variance_l11d > jnp.square(_CONSTANT * mean_l11d)
    return (x_lbtd - mean_l11d) * jax.lax.rsqrt(jnp.where(varies_l11d, variance_l11d, 1.0))


def _moments(x_lbtd: jax.Array, counted_bt: jax.Array) -> moments.Moments:
  """Count, mean and m2 of the tokens of a batch."""
  counted = counted_bt[None, :, :, None]
  count = jnp.sum(counted_bt, dtype=jnp.float32)
  mean_ld = jnp.sum(x_lbtd, axis=(1, 2), where=counted) / jnp.maximum(count, 1.0)
  square_lbtd = jnp.square(x_lbtd - mean_ld[:, None, None, :])
  return moments.Moments(count, mean_ld, jnp.sum(square_lbtd, axis=(1, 2), where=counted))


INPUT_NORMS = {'none': Identity, 'rms': RMSNormalize, 'standardize': Standardize}


class Inputs(nn.Module):
  """Normalises the hidden states of one modality and fills the gap where it is absent.

  Attributes:
    num_layers: L, hidden states that are read.
    width: D, the tower's width. The parameters follow from these fields alone, never from which
      modality is present.
    norm: a key of INPUT_NORMS.
    strategy: a key of STRATEGIES. A placeholder lives in the space of the normalised states.
    dtype: type of the tokens that come out.
  """

  num_layers: int
  width: int
  norm: str
  strategy: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    states_lbtd: jax.Array | None,
    mask_bt: jax.Array,
    present_b: jax.Array,
    counted_b: jax.Array,
    *,
    train: bool,
    content_b: jax.Array | None = None,
    position_gn: jax.Array | None = None,
  ) -> TokenSequence:
    """Returns the TokenSequence of states_lbtd [L, B, T, D] (None: absent in every example, and
    mask_bt is bool[B, 1] of False).

    Args:
      states_lbtd: the modality's hidden states.
      mask_bt: bool[B, T], its tokens.
      present_b: bool[B].
      counted_b: bool[B], examples that enter the statistics if they may be read.
      train: whether the statistics are updated.
      content_b: bool[B], examples whose states may be read, those of `present_b` among them;
        default: these alone.
      position_gn: where the valid tokens are (`packing.Packing`), to leave out the others.
    """
    content_b = present_b if content_b is None else content_b
    if states_lbtd is None:
      states_lbtd, position_gn = (
        jnp.zeros((self.num_layers, present_b.shape[0], 1, self.width), self.dtype),
        None,
      )
    packing = None if position_gn is None else Packing.of(position_gn, mask_bt.shape)
    placed = packing.pack if packing else lambda x_bt: x_bt
    valid_bt = mask_bt & content_b[:, None]
    valid, counted_bt = placed(valid_bt)[None, :, :, None], placed(valid_bt & counted_b[:, None])
    norm = INPUT_NORMS[self.norm](name='norm')
    x_lbtd = norm(_read(jax.vmap(placed)(states_lbtd), valid), counted_bt, train=train)
    tokens = Tokens(_read(x_lbtd, valid).astype(self.dtype), packing)
    return TokenSequence(tokens, valid_bt, present_b, self._placeholder())

  def _placeholder(self):
    strategy = STRATEGIES[self.strategy]
    if not strategy.placeholder:
      return None
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('layers', 'embed'))
    shape_ld = (self.num_layers, self.width)
    token_ld = (
      self.param('null', init, shape_ld, jnp.float32) if strategy.learned else jnp.zeros(shape_ld)
    )
    return token_ld[:, None, None, :].astype(self.dtype)


def _read(x_lbtd, valid):
  """What is valid, in range; zeros elsewhere."""
  largest = min(LARGEST, float(jnp.finfo(x_lbtd.dtype).max))
  return in_range(jnp.where(valid, x_lbtd, 0), largest)


class InputPair(nn.Module):
  """Both modalities' hidden states -> (image, text), the two TokenSequences a head works on.

  A text without a single valid token counts as absent. Attributes as in `Inputs`.
  """

  num_layers: int
  image_width: int
  text_width: int
  norm: str
  strategy: str
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
  ) -> tuple[TokenSequence, TokenSequence]:
    """Arguments as `heads.make_head` describes them."""
    present_bm = present_bm.astype(bool)
    content_bm = present_bm if content_bm is None else content_bm.astype(bool)
    counted_b = jnp.ones_like(present_bm[:, 0]) if weight_b is None else weight_b > 0
    masks = (
      jnp.ones((present_bm.shape[0], _length(states.image_lbid)), bool),
      jnp.zeros((present_bm.shape[0], 1), bool)
      if states.text_lbtd is None
      else states.text_mask_bt.astype(bool),
    )
    columns = zip(
      MODALITIES,
      (self.image_width, self.text_width),
      (states.image_lbid, states.text_lbtd),
      masks,
      (None, states.token_position_gn),
      content_bm.T,
      present_bm.T,
      strict=True,
    )
    return tuple(
      Inputs(self.num_layers, width, self.norm, self.strategy, self.dtype, name=name)(
        None if own_lbtd is None else own_lbtd[-self.num_layers :],
        mask_bt,
        present_b & content_b & jnp.any(mask_bt, axis=-1) & (own_lbtd is not None),
        counted_b,
        train=train,
        content_b=content_b,
        position_gn=position_gn,
      )
      for name, width, own_lbtd, mask_bt, position_gn, content_b, present_b in columns
    )


def _length(states_lbtd):
  return 1 if states_lbtd is None else states_lbtd.shape[2]
