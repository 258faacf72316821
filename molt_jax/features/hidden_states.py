"""Hidden states of both towers for one batch; a missing modality never reaches its tower."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from molt_jax.data.modalities import COLUMN, MODALITIES


@flax.struct.dataclass
class HiddenStates:
  """Hidden states of each tower, those that a method reads.

  Attributes:
    image_lbid: [L, B, I, D_i], or None where the image tower was not run. Examples without an image
      hold the states of a blank one.
    text_lbtd: [L, B, T, D_t], or None where the text tower was not run. Padded positions hold
      finite numbers without meaning.
    text_mask_bt: bool[B, T], True at valid tokens; all False in examples without text.
    token_position_gn: int32[G, N], where the valid tokens are (`packing.Packing`), for a head to
      leave out padding; None: not known.
  """

  image_lbid: jax.Array | None
  text_lbtd: jax.Array | None
  text_mask_bt: jax.Array
  token_position_gn: jax.Array | None = None

  def of(self, modality: str) -> jax.Array | None:
    """Returns the states of one tower."""
    return self.image_lbid if modality == 'image' else self.text_lbtd


def text_mask(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns bool[B, T], the valid tokens of the texts that are there."""
  return batch['token_mask'] & batch['present'][:, COLUMN['text'], None]


def clean_inputs(batch: Mapping[str, jax.Array], modality: str) -> tuple[jax.Array, ...]:
  """Returns what a tower's `embed` and `run` read, without the content of a missing modality,
  whatever is in its place: (images,), or (tokens, mask). Several images of an example follow each
  other: [B n, H, W, 3].
  """
  if modality == 'image' and 'image_mask' in batch:
    mask_bn = _image_mask(batch)
    image_bnhwc = jnp.where(mask_bn[..., None, None, None], batch['image'], 0)
    return (image_bnhwc.reshape(-1, *image_bnhwc.shape[2:]),)
  if modality == 'image':
    has_image_b = batch['present'][:, COLUMN['image']]
    return (jnp.where(has_image_b[:, None, None, None], batch['image'], 0),)
  mask_bt = text_mask(batch)
  return jnp.where(mask_bt, batch['tokens'], 0), mask_bt


def _image_mask(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns bool[B, n], the images of the examples that have theirs."""
  return batch['image_mask'] & batch['present'][:, COLUMN['image'], None]


def _mean_over_images(states_lbid: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns [L, B, I, D], the mean over the images of each example, of [L, B n, I, D]."""
  if 'image_mask' not in batch:
    return states_lbid
  mask_bn = _image_mask(batch)
  layers, _, tokens, width = states_lbid.shape
  states_lbnid = states_lbid.reshape(layers, *mask_bn.shape, tokens, width).astype(jnp.float32)
  total_lbid = jnp.sum(jnp.where(mask_bn[None, :, :, None, None], states_lbnid, 0), axis=2)
  count_b = jnp.maximum(jnp.sum(mask_bn, axis=1), 1).astype(jnp.float32)
  return (total_lbid / count_b[None, :, None, None]).astype(states_lbid.dtype)


def extract(
  towers: Mapping[str, nn.Module | None],
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  states: Mapping[str, tuple[int, ...]],
) -> HiddenStates:
  """Runs frozen towers on a batch; no gradient goes in.

  Args:
    towers: modality -> module; a tower whose parameters are None may be None.
    frozen: modality -> parameters, or None: the tower is not run.
    batch: image float32[B, H, W, 3], tokens int32[B, T], token_mask bool[B, T], present bool[B, 2];
      with token_position int32[G, N] the text tower computes real tokens alone. With image_mask
      bool[B, n], image is float32[B, n, H, W, 3], and the states are the mean over an example's
      images.
    states: modality -> the hidden states that are read; none: the tower is not run.

  Returns:
    `HiddenStates`. Whatever the batch holds for a missing modality, numbers that are not finite
    included, changes no bit of them.
  """
  found = {}
  for modality in MODALITIES:
    found[modality] = None
    if frozen.get(modality) is not None and states.get(modality):
      inputs = clean_inputs(batch, modality)
      if modality == 'text':
        inputs = (*inputs, batch.get('token_position'))
      params = {'params': frozen[modality]}
      found[modality] = towers[modality].apply(params, *inputs, states=states[modality])
      if modality == 'image':
        found[modality] = _mean_over_images(found[modality], batch)
  mask_bt = text_mask(batch)
  position_gn = batch.get('token_position')
  return jax.lax.stop_gradient(HiddenStates(found['image'], found['text'], mask_bt, position_gn))


def from_store(batch: Mapping[str, jax.Array]) -> HiddenStates | None:
  """Returns the hidden states that a batch brings from a feature store; None: it brings none."""
  stored = {m: batch[f'{m}_states'] for m in MODALITIES if f'{m}_states' in batch}
  if not stored:
    return None
  first = {modality: jnp.moveaxis(x_blnd, 1, 0) for modality, x_blnd in stored.items()}
  position_gn = batch.get('token_position')
  return HiddenStates(first.get('image'), first.get('text'), text_mask(batch), position_gn)
