"""GGUF files of LLaMA-family models: metadata, Hugging Face names and orientation, dequantised tensors.

The header is read here, in one pass over the bytes: `gguf.GGUFReader` builds an array object for every string of the vocabulary, which takes seconds.
Types, block sizes and dequantisation are those of the `gguf` package.
"""

import mmap
import os
import re
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from molt_jax.backbones.llama import LlamaConfig, rope_frequencies
from molt_jax.config import UserError

SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}  # GGUF value type -> struct code
STRING, ARRAY = 8, 9
IMPLEMENTED = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q6_K')

# GGUF tensor -> Hugging Face tensor; {} is the layer.
NAMES = {
    'token_embd': 'embed_tokens', 'output_norm': 'norm', 'output': 'lm_head', 'blk.{}.attn_norm': 'layers.{}.input_layernorm',
    'blk.{}.attn_q': 'layers.{}.self_attn.q_proj', 'blk.{}.attn_k': 'layers.{}.self_attn.k_proj', 'blk.{}.attn_v': 'layers.{}.self_attn.v_proj',
    'blk.{}.attn_output': 'layers.{}.self_attn.o_proj', 'blk.{}.ffn_norm': 'layers.{}.post_attention_layernorm',
    'blk.{}.ffn_gate': 'layers.{}.mlp.gate_proj', 'blk.{}.ffn_up': 'layers.{}.mlp.up_proj', 'blk.{}.ffn_down': 'layers.{}.mlp.down_proj',
}
# Metadata key (after 'llama.') -> config.json key.
KEYS = {
    'embedding_length': 'hidden_size', 'feed_forward_length': 'intermediate_size', 'block_count': 'num_hidden_layers',
    'attention.head_count': 'num_attention_heads', 'attention.head_count_kv': 'num_key_value_heads', 'attention.key_length': 'head_dim',
    'context_length': 'max_position_embeddings', 'attention.layer_norm_rms_epsilon': 'rms_norm_eps', 'rope.freq_base': 'rope_theta',
}
# LLaMA 3.1 to 3.3 as published; the file holds only the resulting divisors of the frequencies (rope_freqs).
LLAMA3_ROPE = {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}


class Reader:
  """An open GGUF file.

  Attributes:
    metadata: key -> value.
    tensors: GGUF name -> (type, shape in row-major order, byte offset).

  Raises:
    UserError: not a GGUF file of version 2 or 3, cut short, or tensors of types that are not implemented.
  """

  def __init__(self, path: str | os.PathLike):
    with open(path, 'rb') as f:
      if f.read(4) != b'GGUF':
        raise UserError(f'{path} is not a GGUF file')
      self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    self._at = 4
    try:
      version, num_tensors, num_keys = self._unpack('IQQ')
      if version not in (2, 3):
        raise UserError(f'{path} is GGUF version {version}; implemented: 2 and 3, little-endian')
      self.metadata = {self._string(): self._value(*self._unpack('I')) for _ in range(num_keys)}
      infos = [(self._string(), self._unpack(f'{self._unpack("I")[0]}Q'), *self._unpack('IQ')) for _ in range(num_tensors)]
    except struct.error as e:
      raise UserError(f'{path} ends within its header: download it again') from e
    alignment = self.metadata.get('general.alignment', 32)
    start = -(-self._at // alignment) * alignment
    unknown = sorted({_type_name(kind) for _, _, kind, _ in infos} - set(IMPLEMENTED))
    if unknown:
      raise UserError(f'{path} holds tensors of type {", ".join(unknown)}; implemented: {", ".join(IMPLEMENTED)}')
    self.tensors = {name: (gguf.GGMLQuantizationType(kind), dims[::-1], start + offset) for name, dims, kind, offset in infos}
    end = max((offset + _num_bytes(kind, shape) for kind, shape, offset in self.tensors.values()), default=0)
    if end > len(self._data):
      raise UserError(f'{path} is cut short: {len(self._data)} bytes of {end}; download it again')

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor as float32."""
    kind, shape, offset = self.tensors[name]
    raw = np.frombuffer(self._data, np.uint8, _num_bytes(kind, shape), offset)
    view = {'F32': np.float32, 'F16': np.float16}.get(kind.name, np.uint8)
    rows = raw.view(view).reshape(*shape[:-1], -1)
    return gguf.quants.dequantize(rows, kind).astype(np.float32, copy=False).reshape(shape)

  def _unpack(self, code: str) -> tuple:
    values = struct.unpack_from('<' + code, self._data, self._at)
    self._at += struct.calcsize('<' + code)
    return values

  def _string(self) -> str:
    size, = self._unpack('Q')
    if self._at + size > len(self._data):
      raise struct.error
    self._at += size
    return self._data[self._at - size:self._at].decode('utf-8', errors='replace')

  def _value(self, kind: int) -> Any:
    if kind == STRING:
      return self._string()
    if kind != ARRAY:
      return self._unpack(SCALARS[kind])[0]
    kind, size = self._unpack('IQ')
    return list(self._unpack(f'{size}{SCALARS[kind]}')) if kind in SCALARS else [self._value(kind) for _ in range(size)]


def _type_name(kind: int) -> str:
  known = {t.value: t.name for t in gguf.GGMLQuantizationType}
  return known.get(kind, f'number {kind}')


def _num_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
  block, size = gguf.GGML_QUANT_SIZES[kind]
  return int(np.prod(shape)) // block * size


def hf_config(reader: Reader) -> dict[str, Any]:
  """Returns the Hugging Face config.json dict that the file's metadata amounts to.

  Raises:
    UserError: another architecture, or something in it that is not implemented.
  """
  m: Mapping[str, Any] = reader.metadata
  if (name := m.get('general.architecture')) != 'llama':
    raise UserError(f'the GGUF file has general.architecture = {name!r}; implemented: llama')
  config = {'model_type': 'llama', 'vocab_size': reader.tensors['token_embd.weight'][1][0] if 'token_embd.weight' in reader.tensors else None}
  config |= {ours: m[f'llama.{key}'] for key, ours in KEYS.items() if f'llama.{key}' in m}
  config |= {flag: name in reader.tensors for flag, name in (('attention_bias', 'blk.0.attn_q.bias'), ('mlp_bias', 'blk.0.ffn_up.bias'))}
  head_dim = LlamaConfig.from_hf(config).head_dim
  for key, legal in (('rope.dimension_count', head_dim), ('attention.value_length', head_dim), ('expert_count', 0), ('attention.causal', True)):
    if m.get(f'llama.{key}', legal) != legal:
      raise UserError(f'the GGUF file has llama.{key} = {m[f"llama.{key}"]}; implemented: {legal}')
  kind = m.get('llama.rope.scaling.type', 'none')
  if kind not in ('none', 'linear'):
    raise UserError(f'the GGUF file has llama.rope.scaling.type = {kind!r}; implemented: none, linear, and the rope_freqs of LLaMA 3')
  factor = m.get('llama.rope.scaling.factor', m.get('llama.rope.scale_linear', 1.0))
  if factor not in (0.0, 1.0):
    config['rope_scaling'] = {'rope_type': 'linear', 'factor': factor}
  if 'rope_freqs.weight' in reader.tensors:
    config['rope_scaling'] = _llama3_rope(config, reader.read('rope_freqs.weight'))
  return config


def _llama3_rope(config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
  """Recovers the 'llama3' scaling from its divisors, or refuses what it does not reproduce."""
  plain = LlamaConfig.from_hf({**config, 'rope_scaling': None})
  scaling = {**LLAMA3_ROPE, 'factor': float(divisors.max())}
  expected = rope_frequencies(plain) / rope_frequencies(LlamaConfig.from_hf({**config, 'rope_scaling': scaling}))
  if 'rope_scaling' in config or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
    raise UserError('the GGUF file has rope_freqs.weight other than those of LLaMA 3.1 to 3.3: this RoPE scaling is not implemented')
  return scaling


def hf_name(name: str) -> str:
  """Hugging Face name of a GGUF tensor; a name that the table lacks stays as it is (and is reported as unmapped)."""
  layer = re.match(r'blk\.(\d+)\.', name)
  stem, _, end = (name.replace(layer[0], 'blk.{}.', 1) if layer else name).rpartition('.')
  return f'{NAMES[stem]}.{end}'.format(*(layer.groups() if layer else ())) if stem in NAMES else name


def unpermute(name: str, w: np.ndarray, config: LlamaConfig) -> np.ndarray:
  """Undoes the reordering of query and key rows: GGUF pairs neighbours (x_2j, x_2j+1), Hugging Face halves (x_j, x_j+H/2)."""
  heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads}.get(name.split('.')[-2])
  if heads is None:
    return w
  return w.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
