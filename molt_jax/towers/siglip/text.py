"""SigLIP's text transformer: Zhai et al. 2023."""

from typing import ClassVar

from molt_jax.errors import UserError
from molt_jax.towers import stack
from molt_jax.towers.clip.text import ClipText
from molt_jax.towers.encoder import dense
from molt_jax.towers.siglip.text_config import SiglipTextConfig


class SiglipText(ClipText):
  """SigLIP text transformer: that of CLIP, but every token reads all others, those that fill a text
  up to the length of the pretraining too. Filling is the tokenizer's, so that it counts as tokens.

  Attributes:
    config: the architecture.
    dtype, attention, param_dtype: see `ClipText`.
    heads: 'projection': it has the linear layer into the common space that `project` reads.
  """

  config: SiglipTextConfig
  is_causal: ClassVar[bool] = False
  title: ClassVar[str] = 'SigLIP text tower'

  def __call__(self, tokens_bt, mask_bt, position_gn=None, *, states):
    """See `ClipText`; the mask and the places of valid tokens are not read: no token is padding."""
    del position_gn
    return super().__call__(tokens_bt, mask_bt, states=states)

  def check_length(self, tokens: int) -> None:
    """Raises UserError for texts of another length than that of the pretraining."""
    if tokens != self.config.max_positions and not self.is_initializing():
      raise UserError(
        f'{tokens} tokens for a SigLIP text tower, which reads exactly '
        f'{self.config.max_positions}, padding among them: give '
        f'text.max_tokens={self.config.max_positions}, or 0'
      )

  def pool(self, hidden_btd, tokens_bt=None, mask_bt=None):
    """The last token, of the text or of its padding, after the final norm, dtype[B, D]."""
    del tokens_bt, mask_bt
    return self.final_norm(hidden_btd[:, -1])

  def project(self, pooled_bd):
    """What `pool` returned in the common space, dtype[B, projection_size]: Hugging Face's
    `pooler_output`. Only with the head 'projection'.
    """
    return self.projection(pooled_bd)

  def _make_projection(self, param_dtype):
    return dense(None, self.config.projection_size, ('embed', 'common'), self.dtype, param_dtype)

  def _run(self, hidden_btd, mask_bt, *, packing=None, keys_bt=None, **how):
    del mask_bt, packing
    depth = self.config.num_layers
    return stack.run_layers(
      self.layer, self.layers, hidden_btd, None, keys_bt, num_layers=depth, **how
    )
