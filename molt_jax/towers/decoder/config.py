"""What the config.json of a decoder says; in what the families differ, says `families`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.decoder import config_keys
from molt_jax.towers.decoder.families import FAMILIES, Family
from molt_jax.towers.decoder.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Architecture of a decoder; where a field has a default, it is LLaMA's.

  Attributes:
    family: `model_type` of its config.json.
    max_positions: most tokens of a text.
    ropes: the rotations that its layers have.
    layer_ropes: of each layer, which of `ropes`; None: its tokens are not rotated. All layers where
      it is empty: the first.
    windows: of each layer, how many tokens a token reads, itself included; None: all before it.
      Empty: all layers do.
    norm: 'rms' or 'layer'.
    norm_offset: added to the weights of norms: Gemma's are stored less 1.
    norm_weights: whether norms have weights.
    norm_first: whether what attention and MLP read is normalised; else what they are added to.
    post_norms: whether what they return is normalised as well, before it is added.
    final_norm: whether the last state is.
    qk_norm: whether queries and keys are, head by head.
    gated: whether the MLP is activation(gate) * up; else activation(up).
    attention_scale: of the products of queries and keys; None: 1 / sqrt(head_dim).
    logit_cap: they are kept within it by cap * tanh(x / cap); None: they are not.
    causal: whether a token reads only those before it.
    embedding_scale: factor of token embeddings.
    embedding_size: their width; where it is not hidden_size, a matrix follows.
    position_offset: rows of learned position embeddings before that of the first token; None: there
      are none.
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  embedding_size: int
  ropes: tuple[Rope, ...] = dataclasses.field(default=(), repr=False)
  layer_ropes: tuple[int | None, ...] = dataclasses.field(default=(), repr=False)
  windows: tuple[int | None, ...] = dataclasses.field(default=(), repr=False)
  norm: str = 'rms'
  norm_offset: float = 0.0
  norm_weights: bool = True
  norm_first: bool = True
  post_norms: bool = False
  final_norm: bool = True
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  gated: bool = True
  attention_scale: float | None = None
  logit_cap: float | None = None
  causal: bool = True
  embedding_scale: float = 1.0
  position_offset: int | None = None

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = 'the config of the decoder'
  ) -> 'DecoderConfig':
    """Reads the dict of a Hugging Face config.json of any family in `FAMILIES`.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: another family, a size is missing, a key is unknown, or a value is not implemented.
    """
    config, where = _text_part(config, where)
    name = config.get('model_type') or 'llama'
    if not isinstance(name, str) or name not in FAMILIES:
      raise UserError(
        f'{where} has model_type = {name!r}, which is no decoder that is implemented; '
        f'implemented: {", ".join(FAMILIES)}'
      )
    c = _checked(config, FAMILIES[name], where)
    heads, kv_heads, head_dim = _heads(c, where)
    usual = {
      'family': name,
      'vocab_size': c['vocab_size'],
      'hidden_size': c['hidden_size'],
      'intermediate_size': c['intermediate_size'],
      'num_layers': c['num_hidden_layers'],
      'num_heads': heads,
      'num_kv_heads': kv_heads,
      'head_dim': head_dim,
      'max_positions': c['max_position_embeddings'],
      'norm_eps': c['rms_norm_eps'],
      'embedding_size': c['hidden_size'],
    }
    return cls(**{**usual, **FAMILIES[name].fields(c, head_dim, where)})


def _text_part(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
  """The text model's part of a model of images and texts, where it is one."""
  if config.get('model_type') != 'gemma3':
    return config, where
  keys.check(config, config_keys.GEMMA3, where)
  return {'model_type': 'gemma3_text', **(config.get('text_config') or {})}, f'{where}: text_config'


def _checked(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
  """Compares a config.json with its family's closed list; fills in what Hugging Face would."""
  missing = [k for k in family.required if config.get(k) is None]
  given = {k: v for k, v in config.items() if k not in missing}
  keys.check(given, family.table, where)
  if missing:
    raise UserError(
      f'{where} lacks {", ".join(missing)}; is this the config.json of a decoder of this family?'
    )
  meant = {k: v for k, v in given.items() if v is not None or k in _NULL_IS_A_VALUE}
  return {**family.defaults, **meant}


def _heads(c: Mapping[str, Any], where: str) -> tuple[int, int, int]:
  """Returns (heads, heads of keys and values, width of a head)."""
  heads = c['num_attention_heads']
  kv_heads = c.get('num_key_value_heads') or heads
  head_dim = c.get('head_dim')
  if heads % kv_heads or c['hidden_size'] % heads and head_dim is None:
    raise UserError(
      f'{where} has num_attention_heads = {heads}, which must be a multiple of '
      f'num_key_value_heads = {kv_heads} and, without head_dim, divide hidden_size = '
      f'{c["hidden_size"]}'
    )
  head_dim = head_dim or c['hidden_size'] // heads
  if c['rope_theta'] and head_dim % 2 or head_dim > keys.MOST_HEAD_DIM:
    raise UserError(
      f'{where} has heads of width {head_dim} (head_dim, or hidden_size / '
      f'num_attention_heads); rotary positions need an even number up to {keys.MOST_HEAD_DIM}'
    )
  return heads, kv_heads, head_dim


# ---- In what each family differs from LLaMA ------------------------------------------------------


_NULL_IS_A_VALUE = ('sliding_window', 'attn_logit_softcapping', 'num_key_value_heads', 'head_dim')
