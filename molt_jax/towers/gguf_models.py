"""What a GGUF file of a decoder amounts to in Hugging Face's terms: config.json, names of tensors,
order of their rows.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.gguf import Reader

# GGUF tensor -> Hugging Face tensor; {} is the layer.
_NAMES = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  'output': 'lm_head',
  'blk.{}.attn_norm': 'layers.{}.input_layernorm',
  'blk.{}.attn_q': 'layers.{}.self_attn.q_proj',
  'blk.{}.attn_k': 'layers.{}.self_attn.k_proj',
  'blk.{}.attn_v': 'layers.{}.self_attn.v_proj',
  'blk.{}.attn_output': 'layers.{}.self_attn.o_proj',
  'blk.{}.ffn_norm': 'layers.{}.post_attention_layernorm',
  'blk.{}.ffn_gate': 'layers.{}.mlp.gate_proj',
  'blk.{}.ffn_up': 'layers.{}.mlp.up_proj',
  'blk.{}.ffn_down': 'layers.{}.mlp.down_proj',
}
_QK_NORM = {
  'blk.{}.attn_q_norm': 'layers.{}.self_attn.q_norm',
  'blk.{}.attn_k_norm': 'layers.{}.self_attn.k_norm',
}
_GEMMA_NORMS = {
  'blk.{}.post_attention_norm': 'layers.{}.post_attention_layernorm',
  'blk.{}.ffn_norm': 'layers.{}.pre_feedforward_layernorm',
  'blk.{}.post_ffw_norm': 'layers.{}.post_feedforward_layernorm',
}
_FUSED = {
  'blk.{}.attn_qkv': 'layers.{}.self_attn.qkv_proj',
  'blk.{}.ffn_up': 'layers.{}.mlp.gate_up_proj',
}
# Metadata key (after the architecture) -> config.json key.
_KEYS = {
  'embedding_length': 'hidden_size',
  'feed_forward_length': 'intermediate_size',
  'block_count': 'num_hidden_layers',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'context_length': 'max_position_embeddings',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'rope.freq_base': 'rope_theta',
}


class _Architecture(NamedTuple):
  """How files of a `general.architecture` differ from those of LLaMA.

  Attributes:
    family: `model_type` of its config.json.
    names: GGUF tensor -> Hugging Face tensor.
    more: metadata key -> config.json key, beside those of all.
    neighbours: whether the rows of queries and keys are reordered: GGUF rotates neighbours.
    flags: config.json key of biases -> the tensor whose bias says so.
    rest: (metadata without the architecture's name, reader) -> what else config.json has.
  """

  family: str
  names: Mapping[str, str]
  more: Mapping[str, str] = {}
  neighbours: bool = False
  flags: Mapping[str, str] = {}
  rest: Callable[[Mapping[str, Any], Reader], dict[str, Any]] = lambda m, reader: {}


def _gemma_scale(m: Mapping[str, Any], layers_27b: int) -> dict[str, Any]:
  """The scale of attention, which files do not have; that of the largest model is another one."""
  if m['block_count'] == layers_27b:
    return {'query_pre_attn_scalar': m['embedding_length'] // m['attention.head_count']}
  return {'query_pre_attn_scalar': m['attention.key_length']}


def _gemma2(m, reader):
  return _gemma_scale(m, layers_27b=46)


def _gemma3(m, reader):
  found = _gemma_scale(m, layers_27b=62)
  if not m.get('attention.sliding_window'):
    found |= {'sliding_window': None, 'layer_types': ['full_attention'] * m['block_count']}
  return found


def _phi3(m, reader):
  width = m['attention.key_length']
  rotated = m.get('rope.dimension_count', width)
  found = {'sliding_window': m.get('attention.sliding_window') or None}
  # A quarter more than whole, so that no rounding takes one of the channels away.
  found['partial_rotary_factor'] = min((rotated + 0.25) / width, 1.0)
  if (original := m.get('rope.scaling.original_context_length')) is not None:
    found['original_max_position_embeddings'] = original
  tensors = {kind: f'rope_factors_{kind}.weight' for kind in ('short', 'long')}
  if any(name in reader.tensors for name in tensors.values()):
    factors = {
      f'{kind}_factor': reader.read(name).tolist()
      for kind, name in tensors.items()
      if name in reader.tensors
    }
    amplitude = {'attention_factor': m.get('rope.scaling.attn_factor', 1.0)}
    found['rope_scaling'] = {'rope_type': 'longrope', **factors, **amplitude}
  return found


_BIASES = {'attention_bias': 'attn_q', 'mlp_bias': 'ffn_up'}
_WINDOW = {'attention.sliding_window': 'sliding_window'}
ARCHITECTURES = {
  'llama': _Architecture('llama', _NAMES, neighbours=True, flags=_BIASES),
  'qwen2': _Architecture('qwen2', _NAMES),
  'qwen3': _Architecture('qwen3', _NAMES | _QK_NORM, flags={'attention_bias': 'attn_q'}),
  'smollm3': _Architecture('smollm3', _NAMES, neighbours=True, flags=_BIASES),
  'gemma2': _Architecture(
    'gemma2',
    _NAMES | _GEMMA_NORMS,
    {**_WINDOW, 'attn_logit_softcapping': 'attn_logit_softcapping'},
    rest=_gemma2,
  ),
  'gemma3': _Architecture(
    'gemma3_text',
    _NAMES | _QK_NORM | _GEMMA_NORMS,
    {
      **_WINDOW,
      'attention.sliding_window_pattern': 'sliding_window_pattern',
      'rope.freq_base_swa': 'rope_local_base_freq',
    },
    rest=_gemma3,
  ),
  'phi3': _Architecture('phi3', _NAMES | _FUSED, rest=_phi3),
}
# Tensors that are read as a part of config.json.
ROPE_TENSORS = ('rope_freqs.weight', 'rope_factors_short.weight', 'rope_factors_long.weight')
# LLaMA 3.1 to 3.3 as published; the file holds only the resulting divisors of the frequencies
# (rope_freqs).
LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def hf_config(reader: Reader) -> dict[str, Any]:
  """Returns the Hugging Face config.json dict that the file's metadata amounts to.

  Raises:
    UserError: another architecture, or something in it that is not implemented.
  """
  where = str(reader.paths[0])
  name = reader.metadata.get('general.architecture')
  if name not in ARCHITECTURES:
    raise UserError(
      f'{where} has general.architecture = {name!r}; implemented: {", ".join(ARCHITECTURES)}'
    )
  if 'token_embd.weight' not in reader.tensors:
    raise UserError(
      f'{where} holds no token_embd.weight: it is no language model, or a part of one'
    )
  architecture, m = ARCHITECTURES[name], _of_model(reader, name, where)
  rows = reader.tensors['token_embd.weight'].shape[0]
  config = {'model_type': architecture.family, 'vocab_size': rows, 'rope_theta': 10000.0}
  found = {**_KEYS, **architecture.more}
  config |= {ours: m[key] for key, ours in found.items() if key in m}
  for flag, tensor in architecture.flags.items():
    config[flag] = f'blk.0.{tensor}.bias' in reader.tensors
  config |= architecture.rest(m, reader)
  config |= _rope_scaling(m, where)
  read = DecoderConfig.from_hf(config, where)
  rotated = 2 * len(read.ropes[0].frequencies)
  for key, legal in (
    ('rope.dimension_count', rotated),
    ('attention.value_length', read.head_dim),
    ('vocab_size', rows),
  ):
    if m.get(key, legal) != legal:
      raise UserError(f'{where} has {name}.{key} = {m[key]}; implemented: {legal}')
  if name == 'llama' and 'rope_freqs.weight' in reader.tensors:
    config['rope_scaling'] = _llama3_rope(config, reader.read('rope_freqs.weight'), where)
  return config


def _of_model(reader: Reader, name: str, where: str) -> dict[str, Any]:
  """The metadata of the architecture, without its name; what is implied is filled in."""
  prefix = f'{name}.'
  m = {k.removeprefix(prefix): v for k, v in reader.metadata.items() if k.startswith(prefix)}
  sizes = ('embedding_length', 'feed_forward_length', 'block_count', 'attention.head_count')
  if missing := [f'{name}.{key}' for key in sizes if key not in m]:
    raise UserError(f'{where} lacks {files.listed(missing)}: it is damaged')
  heads = m['attention.head_count']
  if 'attention.key_length' not in m and m['embedding_length'] % heads == 0:
    m['attention.key_length'] = m['embedding_length'] // heads
  return {'attention.head_count_kv': heads, **m}


def _rope_scaling(m: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The scaling of all frequencies, as a part of config.json."""
  factor = m.get('rope.scaling.factor', m.get('rope.scale_linear', 1.0))
  kind = m.get('rope.scaling.type', 'linear')
  if factor in (0.0, 1.0):
    return {}
  if kind == 'none':
    raise UserError(f'{where} scales RoPE by {factor}, but has rope.scaling.type = none')
  scaling = {'rope_type': kind, 'factor': factor}
  if kind == 'yarn' and 'rope.scaling.original_context_length' in m:
    original = m['rope.scaling.original_context_length']
    scaling['original_max_position_embeddings'] = original
  return {'rope_scaling': scaling}


def _llama3_rope(config: Mapping[str, Any], divisors: np.ndarray, where: str) -> dict[str, Any]:
  """Recovers the 'llama3' scaling from its divisors, or refuses what it does not reproduce."""
  plain = DecoderConfig.from_hf({**config, 'rope_scaling': None}, where)
  factor = float(divisors.max())
  fits = 'rope_scaling' not in config and math.isfinite(factor) and factor > 0
  if fits:
    scaling = {**LLAMA3_ROPE, 'factor': factor}
    scaled = DecoderConfig.from_hf({**config, 'rope_scaling': scaling}, where)
    expected = np.divide(plain.ropes[0].frequencies, scaled.ropes[0].frequencies)
    fits = divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4)
  if not fits:
    raise UserError(
      f'{where} has rope_freqs.weight other than those of LLaMA 3.1 to 3.3: this RoPE scaling is '
      'not implemented'
    )
  return scaling


def hf_name(name: str, architecture: str) -> str:
  """Hugging Face name of a GGUF tensor; a name that the table of the architecture lacks stays as it
  is (and is reported as unmapped).
  """
  names = ARCHITECTURES[architecture].names
  layer = re.match(r'blk\.(\d+)\.', name)
  stem, _, end = (name.replace(layer[0], 'blk.{}.', 1) if layer else name).rpartition('.')
  return (
    f'{names[stem]}.{end}'.format(*(layer.groups() if layer else ())) if stem in names else name
  )


def restore(name: str, w: np.ndarray, config: DecoderConfig, architecture: str) -> np.ndarray:
  """Undoes what converters do to tensors: the reordering of query and key rows (GGUF pairs
  neighbours (x_2j, x_2j+1), Hugging Face halves (x_j, x_j+H/2)), and the 1 that is added to norms.
  """
  if config.norm_offset and name.endswith('norm.weight'):
    return w - np.float32(config.norm_offset)
  heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads}.get(name.split('.')[-2])
  if heads is None or not ARCHITECTURES[architecture].neighbours:
    return w
  return w.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
