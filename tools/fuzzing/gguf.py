"""GGUF files with damaged headers, opened as text towers.

A trial takes a tiny LLaMA, changes bytes of its header or puts the header together anew with
hostile keys, values, types, counts, shapes and offsets, cuts it, or splits it into parts and
damages those. What came out is 'refused' in one line, 'identical' to the undamaged file, or
'changed', which only values that are used may bring about.
"""

import dataclasses
import functools
import hashlib
import pathlib
import struct
from typing import Any

import jax
import numpy as np
import tokenizers

from molt_jax.errors import UserError
from molt_jax.towers import loading

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
CODES = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
WIDTH, FF, VOCAB, LAYERS = 32, 32, 64, 2
TEXTS = ['!" #', '!"!"$<|end|>', '\ud800 \0', '!" ' * 3000]
NUMBERS = [0, 1, 2, 3, 7, 31, 63, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
LARGE = [0, 1, 31, 32, 33, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
STRANGE = [
  'llama.attention.logit_softcap',
  'llama.new',
  'tokenizer.ggml.lowercase',
  'vendor.key',
  '',
]
# Other values that are legal, each of which makes another tower or other ids.
LEGAL = [
  ('llama.rope.freq_base', F32, 777.0),
  ('llama.attention.layer_norm_rms_epsilon', F32, 0.25),
  ('llama.context_length', U32, 64),
  ('tokenizer.ggml.add_bos_token', BOOL, True),
  ('tokenizer.ggml.eos_token_id', U32, 5),
]
NEUTRAL = [
  'general.name',
  'general.author.0',
  'quantize.imatrix.file',
  'tokenizer.ggml.fim_pre_token_id',
]


@functools.cache
def parts() -> tuple[list[list[Any]], list[list[Any]], bytes]:
  """Returns metadata [key, type, value], tensors [name, shape as in GGUF, type, offset], data."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet[: VOCAB - 2], alphabet[0] + alphabet[1], '<|end|>']
  metadata = [
    ['general.architecture', STRING, 'llama'],
    ['general.name', STRING, 'tiny'],
    ['llama.block_count', U32, LAYERS],
    ['llama.context_length', U32, 128],
    ['llama.embedding_length', U32, WIDTH],
    ['llama.feed_forward_length', U32, FF],
    ['llama.attention.head_count', U32, 2],
    ['llama.attention.head_count_kv', U32, 1],
    ['llama.attention.layer_norm_rms_epsilon', F32, 1e-5],
    ['llama.rope.freq_base', F32, 5000.0],
    ['llama.rope.dimension_count', U32, WIDTH // 2],
    ['general.file_type', U32, 0],
    ['tokenizer.ggml.model', STRING, 'gpt2'],
    ['tokenizer.ggml.pre', STRING, 'smollm'],
    ['tokenizer.ggml.tokens', ARRAY, (STRING, tokens)],
    ['tokenizer.ggml.token_type', ARRAY, (I32, [1] * (VOCAB - 1) + [3])],
    ['tokenizer.ggml.merges', ARRAY, (STRING, [f'{alphabet[0]} {alphabet[1]}'])],
    ['tokenizer.ggml.eos_token_id', U32, VOCAB - 1],
    ['tokenizer.ggml.add_bos_token', BOOL, False],
    ['general.quantization_version', U32, 2],
  ]
  half = WIDTH // 2
  shapes = {
    'attn_q': (WIDTH, WIDTH),
    'attn_k': (WIDTH, half),
    'attn_v': (WIDTH, half),
    'attn_output': (WIDTH, WIDTH),
    'ffn_gate': (WIDTH, FF),
    'ffn_up': (WIDTH, FF),
    'ffn_down': (FF, WIDTH),
    'attn_norm': (WIDTH,),
    'ffn_norm': (WIDTH,),
  }
  named = {'token_embd.weight': (WIDTH, VOCAB), 'output_norm.weight': (WIDTH,)}
  for layer in range(LAYERS):
    named |= {f'blk.{layer}.{name}.weight': shape for name, shape in shapes.items()}
  rng = np.random.default_rng(0)
  tensors, data = [], b''
  for name, shape in named.items():
    tensors.append([name, shape, 0, len(data)])
    data += rng.normal(size=int(np.prod(shape))).astype(np.float32).tobytes()
  return metadata, tensors, data


def _string(text: str | bytes) -> bytes:
  raw = text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass')
  return struct.pack('<Q', len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
  if kind == STRING:
    return _string(value)
  if kind != ARRAY:
    return struct.pack('<' + CODES[kind], value)
  inner, items = value
  return struct.pack('<IQ', inner, len(items)) + b''.join(_value(inner, item) for item in items)


def header(metadata, tensors, *, version: int = 3, num_tensors=None, num_keys=None) -> bytes:
  """Writes a header, padded to 32 bytes."""
  num_tensors = len(tensors) if num_tensors is None else num_tensors
  num_keys = len(metadata) if num_keys is None else num_keys
  out = [b'GGUF', struct.pack('<IQQ', version, num_tensors, num_keys)]
  for key, kind, value in metadata:
    raw = value if isinstance(value, bytes) and kind != STRING else _value(kind, value)
    out += [_string(key), struct.pack('<I', kind), raw]
  for name, shape, kind, offset in tensors:
    out += [_string(name), struct.pack(f'<I{len(shape)}Q', len(shape), *shape)]
    out += [struct.pack('<IQ', kind, offset)]
  raw = b''.join(out)
  return raw + b'\0' * (-len(raw) % 32)


def open_tower(path: pathlib.Path) -> tuple[str, ...]:
  """Opens a tower and uses it; returns hashes of its configuration, weights and ids."""
  described = loading.describe_tower(str(path), modality='text')
  tower = loading.load_tower(str(path), modality='text', dtype='float32', attention='xla')
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tower.params):
    array = np.asarray(leaf)
    if not np.isfinite(array).all():
      raise AssertionError('weights that are not finite were loaded')
    digest.update(array.tobytes())
  ids = [described.tokenizer.encode(text, 12) for text in TEXTS]
  if max(map(max, ids)) >= described.config.vocab_size:
    raise AssertionError('an id without an embedding came out')
  architecture = repr(dataclasses.asdict(described.config))  # Its own repr leaves out tables.
  return architecture, digest.hexdigest(), repr((ids, described.tokenizer.pad_id))


@functools.cache
def undamaged(folder: pathlib.Path) -> tuple[str, ...]:
  """What the whole file gives."""
  metadata, tensors, data = parts()
  path = folder / 'whole.gguf'
  path.write_bytes(header(metadata, tensors) + data)
  return open_tower(path)


_WHOLE: list[tuple[str, ...]] = []


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Damages a file and opens it."""
  if not _WHOLE:
    _WHOLE.append(undamaged(folder))
  path = folder / 'tower.gguf'
  kind, must_change = rng.random(), False
  if kind < 0.3:
    may_change, must_refuse = _bytes(rng, path)
  elif kind < 0.4:
    path, may_change, must_refuse = _split(rng, folder)
  elif kind < 0.5:
    must_change, may_change, must_refuse = True, True, False
    _legal(rng, path)
  else:
    may_change, must_refuse = _structure(rng, path)
  try:
    found = open_tower(path)
  except UserError as error:
    message = str(error)
    if '\n' in message or not message or len(message) > 20_000:
      raise AssertionError(f'not one line of text: {message[:300]!r}') from error
    return {'refused': 1}
  if must_refuse:
    raise AssertionError('what must not open opened')
  if found == _WHOLE[0]:
    if must_change:
      raise AssertionError('a value that is used was read past')
    return {'identical': 1}
  if not may_change:
    raise AssertionError(f'{found} instead of {_WHOLE[0]}')
  return {'changed': 1}


def _bytes(rng: np.random.Generator, path: pathlib.Path) -> tuple[bool, bool]:
  metadata, tensors, data = parts()
  head = header(metadata, tensors)
  content = bytearray(head + data)
  if rng.random() < 0.2:
    path.write_bytes(content[: int(rng.integers(len(content)))])
    return False, True
  for _ in range(int(rng.integers(1, 4))):
    at, how = int(rng.integers(len(head))), rng.random()
    if how < 0.6:
      content[at] ^= 1 << int(rng.integers(8))
    elif how < 0.8:
      content[at : at + 8] = struct.pack('<Q', LARGE[int(rng.integers(len(LARGE)))])
    else:
      del content[at : at + int(rng.integers(1, 40))]
  path.write_bytes(content)
  return True, False


def _legal(rng: np.random.Generator, path: pathlib.Path) -> None:
  """Gives a key that is used another value."""
  metadata, tensors, data = parts()
  name, kind, value = LEGAL[int(rng.integers(len(LEGAL)))]
  metadata = [[k, kind, value] if k == name else [k, t, v] for k, t, v in metadata]
  if name == 'tokenizer.ggml.add_bos_token':
    metadata.append(['tokenizer.ggml.bos_token_id', U32, 3])
  path.write_bytes(header(metadata, tensors) + data)


def _structure(rng: np.random.Generator, path: pathlib.Path) -> tuple[bool, bool]:
  """Puts a header together anew, with one thing in it that is wrong."""
  metadata, tensors, data = parts()
  metadata, tensors = [list(m) for m in metadata], [list(t) for t in tensors]
  how = int(rng.integers(16))
  more, may_change, must_refuse = {}, False, True
  key = metadata[int(rng.integers(len(metadata)))]
  tensor = tensors[int(rng.integers(len(tensors)))]
  if how == 0:
    more['num_tensors'] = LARGE[int(rng.integers(2, len(LARGE)))]
  elif how == 1:
    more['num_keys'] = LARGE[int(rng.integers(2, len(LARGE)))]
  elif how == 2:
    more['version'] = int(rng.choice([0, 1, 4, 2 << 24, 3 << 24]))
  elif how == 3:
    metadata.append([str(rng.choice(STRANGE)), U32, 1])
  elif how == 4:
    metadata.append(list(key))
  elif how == 5:
    key[0], may_change, must_refuse = str(rng.choice(STRANGE)), True, True
  elif how == 6:
    key[1:] = [int(rng.choice([13, 14, 255, 2**31])), b'\0' * 8]
  elif how == 7:
    depth = int(rng.choice([1, 2, 5, 1000]))  # Of arrays around an empty one.
    raw = struct.pack('<IQ', ARRAY, 1) * depth + struct.pack('<IQ', U32, 0)
    metadata.append(['general.nested', ARRAY, raw])
    must_refuse = depth > 3
  elif how == 8:
    size = LARGE[int(rng.integers(4, len(LARGE)))]
    key[1:] = [ARRAY, struct.pack('<IQ', int(rng.choice([0, 4, 8, 10])), size) + b'\0' * 64]
  elif how == 9:
    shape = tuple(LARGE[int(i)] for i in rng.integers(len(LARGE), size=int(rng.integers(0, 6))))
    must_refuse = shape != tensor[1]
    tensor[1] = shape
  elif how == 10:
    tensor[3] = LARGE[int(rng.integers(2, len(LARGE)))] ^ tensor[3] or 64
    must_refuse = tensor[3] != parts()[1][[t[0] for t in tensors].index(tensor[0])][3]
  elif how == 11:
    tensor[2] = int(rng.choice([1, 2, 3, 8, 12, 30, 4, 5, 31, 99, 2**31]))
  elif how == 12:
    tensors.append([tensor[0], *tensor[1:]])
  elif how == 13:
    metadata.append([str(rng.choice(NEUTRAL)) + 'x' * (rng.random() < 0.5), STRING, 'something'])
    twice = [m[0] for m in metadata].count(metadata[-1][0]) > 1
    must_refuse = twice
    may_change = False
  elif how == 14:
    kind = int(rng.choice([U32, I32, F32, BOOL, STRING, U64]))
    value = {
      STRING: 'x',
      BOOL: True,
      F32: float(rng.choice([np.nan, np.inf, -1, 0, 1e30])),
      I32: -1,
      U32: int(rng.choice(NUMBERS)),
      U64: int(rng.choice(NUMBERS)),
    }[kind]
    key[1:] = [kind, value]
    may_change, must_refuse = True, False
  else:
    key[0], key[1:] = 'general.description', [STRING, b'\xff\xfe']
  path.write_bytes(header(metadata, tensors, **more) + data)
  return may_change, must_refuse


def _split(rng: np.random.Generator, folder: pathlib.Path) -> tuple[pathlib.Path, bool, bool]:
  """Splits the model into two files, and perhaps damages one of them."""
  metadata, tensors, data = parts()
  at = int(rng.integers(1, len(tensors)))
  bound = tensors[at][3]
  halves = (
    (tensors[:at], data[:bound]),
    ([[*t[:3], t[3] - bound] for t in tensors[at:]], data[bound:]),
  )
  paths = [folder / f'm-0000{i + 1}-of-00002.gguf' for i in range(2)]
  how = int(rng.integers(8))
  for i, (path, (part, raw)) in enumerate(zip(paths, halves, strict=True)):
    number = int(rng.integers(2, 9)) if how == 1 and i else i
    count = 3 if how == 2 and not i else 2
    total = len(tensors) + (how == 3)
    keys = [['split.no', 2, number], ['split.count', 2, count], ['split.tensors.count', I32, total]]
    part = part + [halves[0][0][0]] if how == 4 and i else part
    path.write_bytes(header([*metadata, *keys] if not i else keys, part) + raw)
  if how == 5:
    paths[1].unlink()
  if how == 6:
    paths[1].write_bytes(paths[1].read_bytes()[:-8])
  return paths[1 if how == 7 else 0], False, how > 0
