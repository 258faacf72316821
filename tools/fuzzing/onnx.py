"""ONNX files with damaged bytes and structure, read as DINOv2 towers.

A trial writes a tiny tower as PyTorch's exporter writes it, changes bytes of it or puts it together
anew with one thing wrong, and reads it. What came out is 'refused' in one line, 'identical' to the
whole file, or 'changed', which only other bytes may bring about.
"""

import pathlib
import struct
from collections.abc import Iterable, Mapping

import numpy as np

from molt_jax.errors import UserError
from molt_jax.towers import onnx

VARINT, BYTES = 0, 2
FLOAT = 1
WIDTH, LAYERS, MLP, PATCH, SIDE = 4, 2, 8, 2, 3
PREFIX = 'backbone.'
LARGE = [0, 1, 2, 7, 127, 128, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]


# ---- A writer ------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
  """A whole number, seven bits a byte."""
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*out, value])


def number(field: int, value: int) -> bytes:
  """A field that holds a whole number."""
  return varint(field << 3 | VARINT) + varint(value)


def content(field: int, value: bytes | str) -> bytes:
  """A field that holds bytes."""
  raw = value.encode() if isinstance(value, str) else value
  return varint(field << 3 | BYTES) + varint(len(raw)) + raw


def tensor(name: str, value: np.ndarray, kind: int = FLOAT, raw: bytes | None = None) -> bytes:
  """A TensorProto."""
  dims = [number(1, size) for size in value.shape]
  data = value.tobytes() if raw is None else raw
  return b''.join([*dims, number(2, kind), content(8, name), content(9, data)])


def node(op: str, inputs: Iterable[str], output: str) -> bytes:
  """A NodeProto with one output, and an attribute."""
  reads = [content(1, name) for name in inputs]
  attribute = content(1, 'axis') + number(3, 1) + number(20, 2)
  return b''.join([*reads, content(2, output), content(4, op), content(5, attribute)])


def model(tensors: Iterable[bytes], nodes: Iterable[bytes], more: bytes = b'') -> bytes:
  """A ModelProto; `more` is put behind its graph's fields."""
  graph = [content(1, one) for one in nodes] + [content(2, 'main_graph')]
  graph += [content(5, one) for one in tensors]
  head = number(1, 7) + content(2, 'pytorch') + content(8, content(1, '') + number(2, 14))
  return head + content(7, b''.join(graph) + more)


# ---- A tower -------------------------------------------------------------------------------------


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Random weights of a tiny DINOv2, by Hugging Face's names."""
  shapes = {
    'embeddings.cls_token': (1, 1, WIDTH),
    'embeddings.position_embeddings': (1, SIDE**2 + 1, WIDTH),
    'embeddings.patch_embeddings.projection.weight': (WIDTH, 3, PATCH, PATCH),
    'embeddings.patch_embeddings.projection.bias': (WIDTH,),
    'layernorm.weight': (WIDTH,),
    'layernorm.bias': (WIDTH,),
  }
  matrices = {
    'attention.attention.query': (WIDTH, WIDTH),
    'attention.attention.key': (WIDTH, WIDTH),
    'attention.attention.value': (WIDTH, WIDTH),
    'attention.output.dense': (WIDTH, WIDTH),
    'mlp.fc1': (MLP, WIDTH),
    'mlp.fc2': (WIDTH, MLP),
  }
  for i in range(LAYERS):
    for name in ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias'):
      shapes[f'encoder.layer.{i}.{name}'] = (WIDTH,)
    for name in ('layer_scale1.lambda1', 'layer_scale2.lambda1'):
      shapes[f'encoder.layer.{i}.{name}'] = (WIDTH,)
    for name, shape in matrices.items():
      shapes[f'encoder.layer.{i}.{name}.weight'] = shape
      shapes[f'encoder.layer.{i}.{name}.bias'] = shape[:1]
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def parts(values: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[list]]:
  """Returns initialisers and nodes [operation, inputs, output] as PyTorch writes a tower:
  matrices transposed and without names, positions cut in two; and something beside the tower.
  """
  initialisers = {'decoder.weight': np.ones((2, 2), np.float32)}
  nodes = [['Relu', ['x'], 'ignored']]
  for name, value in values.items():
    stem = name.removesuffix('.weight')
    if name == 'embeddings.position_embeddings':
      initialisers |= {'onnx::Concat_1': value[:, :1], 'onnx::Reshape_2': value[:, 1:]}
    elif name != stem and value.ndim == 2:
      made = f'onnx::MatMul_{len(nodes)}'
      initialisers[made] = np.ascontiguousarray(value.T)
      nodes.append(['MatMul', ['x', made], f'{stem}/MatMul'])
      nodes.append(['Add', [f'{PREFIX}{stem}.bias', f'{stem}/MatMul'], f'{stem}/Add'])
    else:
      initialisers[PREFIX + name] = value
  nodes += [
    ['Reshape', ['onnx::Reshape_2', 'shape'], 'as_square'],
    ['Transpose', ['as_square'], 'channels_first'],
    ['Resize', ['channels_first', '', '', 'sizes'], 'resized'],
    ['Reshape', ['resized', 'shape'], 'patches'],
    ['Concat', ['onnx::Concat_1', 'patches'], 'positions'],
    ['Concat', ['class_token', 'embedded'], 'tokens'],
    ['Add', ['tokens', 'positions'], 'y'],
  ]
  return initialisers, nodes


def write(
  initialisers: Mapping[str, np.ndarray], nodes: Iterable[list], more: bytes = b''
) -> bytes:
  """Puts a file together."""
  tensors = [tensor(name, value) for name, value in initialisers.items()]
  return model(tensors, [node(*row) for row in nodes], more)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a tower."""
  found = onnx.dinov2(onnx.Graph(path), PREFIX)
  return {name: weight.read() for name, weight in found.items()}


# ---- Trials --------------------------------------------------------------------------------------


def _same(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> bool:
  return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Damages a file and reads it."""
  values = weights(rng)
  path = folder / 'tower.onnx'
  kind = rng.random()
  if kind < 0.6:
    must_refuse = _bytes(rng, path, write(*parts(values)))
  else:
    must_refuse = _structure(rng, path, values)
  try:
    found = read(path)
  except UserError as error:
    if '\n' in str(error) or not str(error) or len(str(error)) > 2000:
      raise AssertionError(f'not one line of text: {str(error)[:300]!r}') from error
    return {'refused': 1}
  if must_refuse:
    raise AssertionError('what must not open opened')
  return {'identical' if _same(found, values) else 'changed': 1}


def _bytes(rng: np.random.Generator, path: pathlib.Path, whole: bytes) -> bool:
  """Changes bytes; returns whether the file must be refused."""
  raw = bytearray(whole)
  if rng.random() < 0.2:
    path.write_bytes(raw[: int(rng.integers(len(raw)))])
    return True
  for _ in range(int(rng.integers(1, 4))):
    at = int(rng.integers(len(raw)))
    how = rng.random()
    if how < 0.6:
      raw[at] ^= 1 << int(rng.integers(8))
    elif how < 0.8:
      raw[at : at + 8] = struct.pack('<Q', LARGE[int(rng.integers(len(LARGE)))])
    else:
      del raw[at : at + int(rng.integers(1, 40))]
  path.write_bytes(raw)
  return False


def _structure(
  rng: np.random.Generator, path: pathlib.Path, values: Mapping[str, np.ndarray]
) -> bool:
  """Puts a file together with one thing wrong; returns whether it must be refused."""
  initialisers, nodes = parts(values)
  names = list(initialisers)
  name, how = names[int(rng.integers(len(names)))], int(rng.integers(6))
  more, must_refuse = b'', True
  row = nodes[int(rng.integers(len(nodes)))]
  if how == 0:
    more = content(5, tensor(name, initialisers[name]))
  elif how == 1:
    more = number(int(rng.choice([3, 4, 6, 14, 15, 99])), 1)
  elif how == 2:
    size = LARGE[int(rng.integers(len(LARGE)))]
    more = content(5, number(1, size) + number(2, FLOAT) + content(8, 'x') + content(9, b'1234'))
    must_refuse = size != 1
  elif how == 3:
    more = content(1, node(*row))
  elif how == 4:
    more = varint(LARGE[int(rng.integers(8))] << 3 | int(rng.choice([3, 4, 6, 7])))
  else:
    initialisers[name] = initialisers[name][None]
    must_refuse = name.startswith('onnx::')
  path.write_bytes(write(initialisers, nodes, more))
  return must_refuse
