"""Weights of a vision transformer in an ONNX file, by Hugging Face's names of DINOv2.

An exporter keeps the names of most tensors. Matrices, which it transposes, and positions, which it
cuts in two, lose theirs: they are found by the graph. The file is read by protobuf's wire format
(https://protobuf.dev/programming-guides/encoding, numbers of fields as in onnx.proto): names,
graph and tensors, and nothing is executed. No number is believed before it is compared with the
size of what holds it.
"""

import math
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
MOST_ITEMS = 1 << 16  # Nodes and tensors of a graph.
MOST_DIMENSIONS = 8
# Message -> number of a field -> its name and wire types; a name that begins with _ is not read,
# since it changes no weight. Other fields (functions, quantisation, sparse or external tensors ...)
# are refused.
FIELDS = {
  'ModelProto': {
    1: ('_ir_version', VARINT),
    2: ('_producer_name', BYTES),
    3: ('_producer_version', BYTES),
    4: ('_domain', BYTES),
    5: ('_model_version', VARINT),
    6: ('_doc_string', BYTES),
    7: ('graph', BYTES),
    8: ('_opset_import', BYTES),
    14: ('_metadata_props', BYTES),
  },
  'GraphProto': {
    1: ('node', BYTES),
    2: ('_name', BYTES),
    5: ('initializer', BYTES),
    10: ('_doc_string', BYTES),
    11: ('_input', BYTES),
    12: ('_output', BYTES),
    13: ('_value_info', BYTES),
    16: ('_metadata_props', BYTES),
  },
  'NodeProto': {
    1: ('input', BYTES),
    2: ('output', BYTES),
    3: ('_name', BYTES),
    4: ('op_type', BYTES),
    5: ('_attribute', BYTES),
    6: ('_doc_string', BYTES),
    7: ('_domain', BYTES),
    9: ('_metadata_props', BYTES),
  },
  'TensorProto': {
    1: ('dims', VARINT),
    2: ('data_type', VARINT),
    8: ('name', BYTES),
    9: ('raw_data', BYTES),
    12: ('_doc_string', BYTES),
    16: ('_metadata_props', BYTES),
  },
}
# TensorProto.DataType -> type as safetensors names it, and of NumPy.
TYPES = {1: ('F32', np.float32), 10: ('F16', np.float16), 16: ('BF16', ml_dtypes.bfloat16)}
# Operations that change where positions lie, and none of them.
RESHAPING = ('Reshape', 'Transpose', 'Cast', 'Resize')
POSITIONS = 'embeddings.position_embeddings'


class Tensor(NamedTuple):
  """An initialiser: its type (as safetensors names it), shape and bytes."""

  dtype: str
  shape: tuple[int, ...]
  raw: memoryview

  def read(self) -> np.ndarray:
    """Returns it; the bytes stay where they are."""
    kinds = dict(TYPES.values())
    return np.frombuffer(self.raw, kinds[self.dtype]).reshape(self.shape)


class Node(NamedTuple):
  """One operation, by the names of what it reads and makes."""

  op: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]


class Weight(NamedTuple):
  """A tensor as Hugging Face has it: pieces along the second axis, or a matrix to be transposed."""

  pieces: tuple[Tensor, ...]
  turned: bool = False

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.pieces[0].shape
    if self.turned:
      return first[::-1]
    if len(self.pieces) == 1:
      return first
    return first[0], sum(piece.shape[1] for piece in self.pieces), *first[2:]

  def read(self) -> np.ndarray:
    """Reads it."""
    arrays = [piece.read() for piece in self.pieces]
    if self.turned:
      return arrays[0].T
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


class Graph:
  """Initialisers and operations of an ONNX file.

  Attributes:
    path: the file.
    tensors: name -> initialiser.
    nodes: in the file's order.

  Raises:
    UserError: it is no ONNX file, is damaged or cut short, or has something that is not read.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    files.check_file(path)
    with open(path, 'rb') as file:
      data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    graphs = [value for name, value in self._fields(data, 'ModelProto') if name == 'graph']
    if len(graphs) != 1:
      raise self._damaged(f'it holds {len(graphs)} graphs')
    self.tensors: dict[str, Tensor] = {}
    self.nodes: list[Node] = []
    for name, value in self._fields(graphs[0], 'GraphProto'):
      if name == 'node':
        self.nodes.append(self._node(value))
      elif name == 'initializer':
        self._add_tensor(value)
      if len(self.nodes) + len(self.tensors) > MOST_ITEMS:
        raise self._damaged(f'it has more than {MOST_ITEMS} nodes and tensors')
    made = [output for node in self.nodes for output in node.outputs if output]
    if len(set(made) | self.tensors.keys()) < len(made) + len(self.tensors):
      raise self._damaged('two nodes make one value')

  def _damaged(self, what: str) -> UserError:
    return UserError(
      f'{files.printable(self.path)} is damaged, or no ONNX file that can be read: {what}'
    )

  def _fields(self, data: memoryview, message: str) -> Iterator[tuple[str, Any]]:
    """Yields the name and value of each field that is read: an int, or bytes where they lie."""
    known, at = FIELDS[message], 0
    while at < len(data):
      tag, at = self._varint(data, at)
      number, wire = tag >> 3, tag & 7
      if number not in known:
        raise self._damaged(f'{message} has the field {number}, which is not implemented')
      name, expected = known[number]
      if wire == VARINT:
        value, at = self._varint(data, at)
      else:
        length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(wire)
        if wire == BYTES:
          length, at = self._varint(data, at)
        if length is None or length > len(data) - at:
          raise self._damaged(f'{message}.{name.strip("_")} ends after the message')
        value = data[at : at + length]
        at += length
      if wire != expected:
        raise self._damaged(f'{message}.{name.strip("_")} has the wire type {wire}')
      if not name.startswith('_'):
        yield name, value

  def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
    """Reads a whole number of at most 64 bits; returns it, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
      if at >= len(data):
        raise self._damaged('it ends within a number')
      byte = data[at]
      at += 1
      value |= (byte & 0x7F) << shift
      if byte < 0x80:
        return value, at
    raise self._damaged('it has a number of more than 64 bits')

  def _text(self, raw: memoryview) -> str:
    try:
      return str(raw, 'utf-8')
    except UnicodeDecodeError as error:
      raise self._damaged('a name is not UTF-8') from error

  def _node(self, data: memoryview) -> Node:
    found = {'input': [], 'output': [], 'op_type': []}
    for name, value in self._fields(data, 'NodeProto'):
      found[name].append(self._text(value))
    return Node(''.join(found['op_type']), tuple(found['input']), tuple(found['output']))

  def _add_tensor(self, data: memoryview) -> None:
    found = {'dims': [], 'data_type': [], 'name': [], 'raw_data': []}
    for field, value in self._fields(data, 'TensorProto'):
      found[field].append(value)
    shape = tuple(found.pop('dims'))
    if any(len(values) != 1 for values in found.values()) or len(shape) > MOST_DIMENSIONS:
      raise self._damaged('a tensor lacks its name, type or raw data, or has one of them twice')
    name, (kind,), (raw,) = self._text(found['name'][0]), found['data_type'], found['raw_data']
    if kind not in TYPES:
      raise self._damaged(
        f'{files.shown(name)} has the data type {kind}; implemented: '
        f'{", ".join(f"{number} ({dtype})" for number, (dtype, _) in TYPES.items())}'
      )
    dtype, numpy_type = TYPES[kind]
    if len(raw) != math.prod(shape) * np.dtype(numpy_type).itemsize:
      raise self._damaged(
        f'{files.shown(name)} of shape {files.shown(shape)} has {len(raw)} bytes of type {dtype}'
      )
    if name in self.tensors:
      raise self._damaged(f'it holds the tensor {files.shown(name)} twice')
    self.tensors[name] = Tensor(dtype, shape, raw)


def dinov2(graph: Graph, prefix: str) -> dict[str, Weight]:
  """Returns the weights of a DINOv2 tower by Hugging Face's names.

  Args:
    graph: what an exporter of PyTorch made of a model that holds the tower.
    prefix: of the tower's tensors in it, e.g. 'backbone.'; others are left out.

  Raises:
    UserError: the matrix of a bias, or the positions, cannot be told by the graph.
  """
  named = {n.removeprefix(prefix): t for n, t in graph.tensors.items() if n.startswith(prefix)}
  weights = {name: Weight((tensor,)) for name, tensor in named.items()}
  matrices = _matrices(graph)
  for name in named:
    stem = name.removesuffix('.bias')
    if stem != name and f'{stem}.weight' not in named:
      found = matrices.get(prefix + name, [])
      if len(found) != 1 or len(found[0].shape) != 2:
        raise UserError(_not_told(graph, f'the matrix to {prefix}{name}', len(found)))
      weights[f'{stem}.weight'] = Weight((found[0],), turned=True)
  found = list(_positions(graph))
  if len(found) != 1:
    raise UserError(_not_told(graph, 'the positions', len(found)))
  return weights | {POSITIONS: Weight(found[0])}


def _not_told(graph: Graph, what: str, count: int) -> str:
  return (
    f'{files.printable(graph.path)}: {what} cannot be told by the graph, which has {count} tensors '
    'in its place; expected is one'
  )


def _matrices(graph: Graph) -> dict[str, list[Tensor]]:
  """Returns bias -> matrices W of all x @ W that it is added to."""
  products = {}
  for node in graph.nodes:
    if node.op == 'MatMul' and len(node.inputs) == 2 and node.inputs[1] in graph.tensors:
      for output in node.outputs:
        products[output] = graph.tensors[node.inputs[1]]
  found: dict[str, list[Tensor]] = {}
  for node in graph.nodes:
    if node.op == 'Add' and len(node.inputs) == 2:
      for bias, product in (node.inputs, node.inputs[::-1]):
        if bias in graph.tensors and product in products:
          found.setdefault(bias, []).append(products[product])
  return found


def _positions(graph: Graph) -> Iterator[tuple[Tensor, Tensor]]:
  """Yields (position of the class token [1, 1, D], of the patches [1, N, D]): what is put together
  after the second has been interpolated.
  """
  makers = {output: node for node in graph.nodes for output in node.outputs}
  for node in graph.nodes:
    if node.op != 'Concat' or len(node.inputs) != 2 or node.inputs[0] not in graph.tensors:
      continue
    first, second = graph.tensors[node.inputs[0]], _origin(graph, makers, node.inputs[1])
    if second and len(second.shape) == 3 and first.shape == (1, 1, second.shape[2]):
      yield first, second


def _origin(graph: Graph, makers: Mapping[str, Node], name: str) -> Tensor | None:
  """The initialiser that a value is a rearrangement of, or None."""
  for _ in range(len(graph.nodes) + 1):  # A damaged graph may go round in circles.
    if name in graph.tensors:
      return graph.tensors[name]
    node = makers.get(name)
    if node is None or node.op not in RESHAPING or not node.inputs:
      return None
    name = node.inputs[0]
  return None
