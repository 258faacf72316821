"""Taps of both frozen towers for one batch; an absent modality never reaches its tower."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from molt_jax.towers.clip import ClipVision
from molt_jax.towers.llama import Llama


@flax.struct.dataclass
class Taps:
  """Hidden states of the last layers of each tower, gradient stopped.

  Attributes:
    image_lbid: [num_taps, B, I, D_i], or None where the image tower was not run. Rows without an
      image hold the states of a blank one.
    text_lbtd: [num_taps, B, T, D_t], or None where the text tower was not run. Padded positions
      hold finite numbers without meaning.
    text_mask_bt: bool[B, T], True at valid tokens; all False in rows without text.
    token_position_gn: int32[G, N], where the valid tokens are (`packing.Packing`), for a head to
      leave out padding; None: not known.
  """

  image_lbid: jax.Array | None
  text_lbtd: jax.Array | None
  text_mask_bt: jax.Array
  token_position_gn: jax.Array | None = None


def extract(
  image_tower: ClipVision | None,
  text_tower: Llama | None,
  frozen: Mapping[str, Any],
  batch: Mapping[str, jax.Array],
  *,
  num_taps: int,
) -> Taps:
  """Runs the towers on a batch.

  Args:
    image_tower, text_tower: modules; a tower whose parameters are None may be None.
    frozen: {'image': parameters or None, 'text': parameters or None}; a tower without parameters is
      not run.
    batch: image float32[B, H, W, 3], tokens int32[B, T], token_mask bool[B, T], present bool[B, 2]
      (column 0 image, 1 text); with token_position int32[G, N] the text tower computes real tokens
      alone.
    num_taps: L_s, how many of the last hidden states.

  Returns:
    Taps. Whatever the batch holds for an absent modality, numbers that are not finite included,
    changes no bit of them.
  """
  has_image_b, has_text_b = batch['present'][:, 0], batch['present'][:, 1]
  text_mask_bt = batch['token_mask'] & has_text_b[:, None]
  image_lbid = text_lbtd = None
  if frozen['image'] is not None:
    image_bhwc = jnp.where(has_image_b[:, None, None, None], batch['image'], 0)
    image_lbid = image_tower.apply({'params': frozen['image']}, image_bhwc, num_taps=num_taps)
  if frozen['text'] is not None:
    tokens_bt = jnp.where(text_mask_bt, batch['tokens'], 0)
    text_lbtd = text_tower.apply(
      {'params': frozen['text']},
      tokens_bt,
      text_mask_bt,
      batch.get('token_position'),
      num_taps=num_taps,
    )
  return jax.lax.stop_gradient(
    Taps(image_lbid, text_lbtd, text_mask_bt, batch.get('token_position'))
  )
