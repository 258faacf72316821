"""GGUF files of decoders: metadata, Hugging Face names and shapes, dequantised tensors.

The header is read here, in one pass over the bytes: `gguf.GGUFReader` builds an array object for
every string of the vocabulary, which takes seconds. Types, block sizes and dequantisation are those
of the `gguf` package. No number in a header is believed before it is compared with the file's size.
"""

import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.towers import keys
from molt_jax.towers.decoder.config import DecoderConfig

# GGUF value type -> struct code
SCALARS = {
  0: 'B',
  1: 'b',
  2: 'H',
  3: 'h',
  4: 'I',
  5: 'i',
  6: 'f',
  7: '?',
  10: 'Q',
  11: 'q',
  12: 'd',
}
STRING, ARRAY = 8, 9
IMPLEMENTED = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q6_K')
MOST_DIMENSIONS = 4
MOST_NESTED = 4  # Arrays of arrays.
# Bytes that the shortest entry takes: key "", type, one byte; name "", one dimension, type, offset.
LEAST_KEY, LEAST_TENSOR = 13, 32
SPLIT_NAME = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf', re.S)

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
  rest: Callable[[Mapping[str, Any], 'Reader'], dict[str, Any]] = lambda m, reader: {}


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


class Tensor(NamedTuple):
  """Where a tensor is: its type, its shape in row-major order, and its bytes."""

  type: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  offset: int
  file: '_File'

  def part(self, first: int, rows: int) -> 'Tensor':
    """Some rows of it, as a tensor."""
    before = _num_bytes(self.type, (first, *self.shape[1:]))
    return self._replace(shape=(rows, *self.shape[1:]), offset=self.offset + before)

  def read(self) -> np.ndarray:
    """Returns it as float32."""
    raw = np.frombuffer(self.file.data, np.uint8, _num_bytes(self.type, self.shape), self.offset)
    view = {'F32': np.float32, 'F16': np.float16}.get(self.type.name, np.uint8)
    rows = raw.view(view).reshape(*self.shape[:-1], -1)
    found = gguf.quants.dequantize(rows, self.type)
    return found.astype(np.float32, copy=False).reshape(self.shape)


class Reader:
  """An open GGUF file, or all files of a model that llama.cpp has split.

  Attributes:
    paths: the files.
    metadata: key -> value; arrays of numbers are NumPy arrays. Of several files, the first one's.
    tensors: GGUF name -> `Tensor`.

  Raises:
    UserError: not a GGUF file of version 2 or 3, damaged, cut short, with metadata that are not in
      `keys.GGUF`, with tensors of types that are not implemented, or parts of it are missing.
  """

  def __init__(self, path: str | os.PathLike):
    path = pathlib.Path(path)
    first = _File(path)
    parts = [first, *(_File(part) for part in _other_parts(path, first.metadata))]
    self.paths, self.metadata = [part.path for part in parts], first.metadata
    self.tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
      if part.metadata.get('split.no', 0) != number:
        raise UserError(
          f'{part.path} has split.no = {part.metadata.get("split.no")}, expected {number}: it is '
          'a part of another model'
        )
      if twice := self.tensors.keys() & part.tensors.keys():
        raise UserError(f'{part.path} holds {files.shown(min(twice))}, as does a part before it')
      self.tensors |= part.tensors
    total = first.metadata.get('split.tensors.count', len(self.tensors))
    if len(parts) > 1 and total != len(self.tensors):
      raise UserError(
        f'{path} promises {total} tensors (split.tensors.count), its {len(parts)} parts hold '
        f'{len(self.tensors)}: they do not belong together'
      )

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor as float32."""
    return self.tensors[name].read()


def _other_parts(path: pathlib.Path, metadata: Mapping[str, Any]) -> list[pathlib.Path]:
  """The second and further files of a model that is split; they are found by their names."""
  count = metadata.get('split.count', 0)
  if count <= 1:
    return []
  name = SPLIT_NAME.fullmatch(path.name)
  if not name or int(name[3]) != count:
    raise UserError(
      f'{path} is one of {count} parts of a model; parts are found by names such as '
      f'MODEL-00001-of-{count:05d}.gguf: give it its name back'
    )
  parts = [path.with_name(f'{name[1]}-{i + 1:05d}-of-{name[3]}.gguf') for i in range(count)]
  if metadata.get('split.no') != 0 or path != parts[0]:
    raise UserError(f'{path} is not the first of {count} parts of a model: give {parts[0].name}')
  if missing := [part.name for part in parts if not part.exists()]:
    raise UserError(f'{path} is one of {count} parts; {files.listed(missing)} is not beside it')
  return parts[1:]


class _File:
  """One GGUF file: its header, and its bytes in memory's address space."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._size = files.check_file(path)
    with open(path, 'rb') as f:
      if f.read(4) != b'GGUF':
        raise UserError(f'{path} is not a GGUF file')
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    self._at = 4
    try:
      num_tensors, num_keys = self._counts()
      self.metadata = self._metadata(num_keys)
      infos = self._infos(num_tensors)
    except struct.error as e:
      raise UserError(f'{path} is damaged, or ends within its header: download it again') from e
    keys.check(self.metadata, keys.gguf(self.metadata.get('general.architecture')), str(path))
    self.tensors = self._place(infos)

  def _counts(self) -> tuple[int, int]:
    version, num_tensors, num_keys = self._unpack('IQQ')
    if version not in (2, 3):
      swapped = version in (2 << 24, 3 << 24)
      raise UserError(
        f'{self.path} is GGUF {"big-endian" if swapped else f"version {version}"}; '
        'implemented: versions 2 and 3, little-endian'
      )
    room = self._size - self._at
    if num_tensors > room // LEAST_TENSOR or num_keys > room // LEAST_KEY:
      raise UserError(
        f'{self.path} is damaged, or ends within its header: it promises {num_tensors} tensors '
        f'and {num_keys} keys in {self._size} bytes; download it again'
      )
    return num_tensors, num_keys

  def _metadata(self, count: int) -> dict[str, Any]:
    found = {}
    for _ in range(count):
      key = self._string('a key')
      if key in found:
        raise UserError(f'{self.path} has the key {files.shown(key)} twice: it is damaged')
      found[key] = self._value(self._unpack('I')[0], key)
    return found

  def _infos(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """Returns name -> (type, shape in GGUF's order, offset)."""
    found = {}
    for _ in range(count):
      name = self._string('the name of a tensor')
      (num_dimensions,) = self._unpack('I')
      if name in found or not 1 <= num_dimensions <= MOST_DIMENSIONS:
        raise UserError(
          f'{self.path} has the tensor {files.shown(name)} twice, or with {num_dimensions} '
          f'dimensions; legal: 1 to {MOST_DIMENSIONS}'
        )
      shape = self._unpack(f'{num_dimensions}Q')
      found[name] = (*self._unpack('I'), shape, *self._unpack('Q'))
    return found

  def _place(self, infos: Mapping[str, tuple[int, tuple[int, ...], int]]) -> dict[str, Tensor]:
    """Finds the bytes of each tensor: one after the other, in the order of the header."""
    if unknown := {_type_name(kind) for kind, _, _ in infos.values()} - set(IMPLEMENTED):
      raise UserError(
        f'{self.path} holds tensors of type {", ".join(sorted(unknown))}; '
        f'implemented: {", ".join(IMPLEMENTED)}'
      )
    alignment = self.metadata.get('general.alignment', 32)
    start = end = _padded(self._at, alignment)
    found = {}
    for name, (number, shape, offset) in infos.items():
      kind = gguf.GGMLQuantizationType(number)
      if 0 in shape or shape[0] % gguf.GGML_QUANT_SIZES[kind][0] or start + offset != end:
        raise UserError(
          f'{self.path} is damaged: {files.shown(name)} of shape {shape[::-1]} and type '
          f'{kind.name} is said to be at byte {offset}, where it cannot be'
        )
      found[name] = Tensor(kind, shape[::-1], end, self)
      last = end + _num_bytes(kind, shape)
      end = _padded(last, alignment)
      if last > self._size:
        raise UserError(
          f'{self.path} is cut short: {self._size} bytes of {last}; download it again'
        )
    if self._size > end:
      raise UserError(
        f'{self.path} is damaged: {self._size - end} bytes follow the last tensor, which nothing '
        'in its header explains'
      )
    return found

  def _unpack(self, code: str) -> tuple:
    values = struct.unpack_from('<' + code, self.data, self._at)
    self._at += struct.calcsize('<' + code)
    return values

  def _string(self, what: str) -> str:
    (size,) = self._unpack('Q')
    if self._at + size > self._size:
      raise struct.error
    self._at += size
    try:
      return self.data[self._at - size : self._at].decode('utf-8')
    except UnicodeDecodeError as error:
      raise UserError(f'{self.path} is damaged: {what} is not UTF-8') from error

  def _value(self, kind: int, key: str, depth: int = 0) -> Any:
    if kind == STRING:
      return self._string(files.shown(key))
    if kind in SCALARS:
      return self._unpack(SCALARS[kind])[0]
    if kind != ARRAY or depth >= MOST_NESTED:
      raise UserError(
        f'{self.path} is damaged: {files.shown(key)} has a value of type {kind}, '
        f'{depth} arrays deep'
      )
    kind, size = self._unpack('IQ')
    least = struct.calcsize('<' + SCALARS[kind]) if kind in SCALARS else 8
    if size > (self._size - self._at) // least:
      raise struct.error
    if kind not in SCALARS:
      return [self._value(kind, key, depth + 1) for _ in range(size)]
    self._at += size * least
    return np.frombuffer(self.data, '<' + SCALARS[kind], size, self._at - size * least)


def _type_name(kind: int) -> str:
  known = {t.value: t.name for t in gguf.GGMLQuantizationType}
  return known.get(kind, f'number {kind}')


def _padded(size: int, alignment: int) -> int:
  return -(-size // alignment) * alignment


def _num_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
  block, size = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // block * size


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
