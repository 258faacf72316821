"""ONNX files: weights by name and by graph, damages, what is not read."""

import pathlib
import sys

import numpy as np
import pytest

from molt_jax.errors import UserError
from molt_jax.towers import onnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))
from fuzzing import onnx as made

sys.path.remove(str(pathlib.Path(__file__).parents[2] / 'tools'))


@pytest.fixture(scope='module')
def values():
  return made.weights(np.random.default_rng(0))


def test_weights_have_hugging_faces_names_and_orientation(tmp_path, values):
  (tmp_path / 'tower.onnx').write_bytes(made.write(*made.parts(values)))
  found = made.read(tmp_path / 'tower.onnx')
  assert found.keys() == values.keys()
  for name, value in values.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  weights = onnx.dinov2(onnx.Graph(tmp_path / 'tower.onnx'), made.PREFIX)
  assert {n: w.shape for n, w in weights.items()} == {n: v.shape for n, v in values.items()}


@pytest.mark.parametrize('kind, numpy_type', [(10, np.float16), (16, onnx.TYPES[16][1])])
def test_half_precision_is_read(tmp_path, kind, numpy_type):
  value = np.array([1.5, -2.0], numpy_type)
  (tmp_path / 'tower.onnx').write_bytes(made.model([made.tensor('x', value, kind)], []))
  tensor = onnx.Graph(tmp_path / 'tower.onnx').tensors['x']
  np.testing.assert_array_equal(tensor.read(), value)


def test_fields_that_change_no_weight_are_passed_over(tmp_path, values):
  neutral = made.content(10, 'words') + made.content(13, b'\xff\xff') + made.content(11, b'')
  (tmp_path / 'tower.onnx').write_bytes(made.write(*made.parts(values), neutral))
  assert made.read(tmp_path / 'tower.onnx').keys() == values.keys()


FLOATS = np.ones((2, 3), np.float32)
WHOLE = made.tensor('x', FLOATS)


def graph(*tensors, more=b''):
  return made.model(tensors, [], more)


# Name -> (bytes, what is said).
DAMAGES = {
  'words': (b'hello', 'has the field 13'),
  'a GGUF file': (b'GGUF' + b'\0' * 99, 'ModelProto'),
  'no graph': (made.number(1, 7), 'holds 0 graphs'),
  'two graphs': (graph() + graph(), 'holds 2 graphs'),
  'a field of no message': (made.content(25, b'') + graph(), 'ModelProto has the field 25'),
  'the field 0': (b'\0\0' + graph(), 'ModelProto has the field 0'),
  'a number without end': (b'\xff' * 20, 'more than 64 bits'),
  'cut in a number': (b'\x08\xff', 'ends within a number'),
  'cut in a length': (b'\x3a', 'ends within a number'),
  'cut in a graph': (graph(WHOLE)[:-5], 'graph ends after the message'),
  'an endless length': (b'\x3a' + made.varint(2**63), 'graph ends after the message'),
  'a length of 70 bits': (b'\x3a' + b'\xff' * 10 + b'\1', 'more than 64 bits'),
  'groups': (b'\x3b' + b'\x3c', 'graph ends after the message'),
  'a graph that is a number': (made.number(7, 5), 'graph has the wire type 0'),
  'eight bytes for a graph': (b'\x39' + b'\0' * 8, 'graph has the wire type 1'),
  'four bytes of three': (b'\x0d\0\0\0', '_?ir_version ends after the message'),
  'sparse tensors': (graph(more=made.content(15, b'')), 'GraphProto has the field 15'),
  'a tensor twice': (graph(WHOLE, WHOLE), "the tensor 'x' twice"),
  'no data': (graph(made.content(8, 'x') + made.number(2, 1)), 'lacks its name, type or raw data'),
  'data twice': (graph(WHOLE + made.content(9, b'')), 'one of them twice'),
  'data outside': (graph(WHOLE + made.content(13, b'')), 'TensorProto has the field 13'),
  'data as numbers': (graph(WHOLE + made.content(4, b'')), 'TensorProto has the field 4'),
  'data elsewhere': (graph(WHOLE + made.number(14, 1)), 'TensorProto has the field 14'),
  'whole numbers': (graph(made.tensor('x', FLOATS, 7)), 'data type 7; implemented: 1 .F32'),
  'too little data': (
    graph(made.tensor('x', FLOATS, raw=b'1234')),
    '2, 3. has 4 bytes of type F32',
  ),
  'too much data': (graph(made.tensor('x', FLOATS, raw=b'1' * 28)), 'has 28 bytes of type F32'),
  'another type': (graph(made.tensor('x', FLOATS, 10)), 'has 24 bytes of type F16'),
  'endless sides': (
    graph(made.number(1, 2**62) + made.number(1, 2**62) + WHOLE),
    'has 24 bytes of type F32',
  ),
  'many dimensions': (graph(made.number(1, 1) * 9 + WHOLE), 'lacks its name'),
  'a name that is no UTF-8': (
    graph(made.number(2, 1) + made.content(8, b'\xff') + made.content(9, b'')),
    'a name is not UTF-8',
  ),
  'empty': (b'', 'is empty'),
  'a Git LFS pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damages_are_one_line(tmp_path, name):
  raw, says = DAMAGES[name]
  (tmp_path / 'tower.onnx').write_bytes(raw)
  with pytest.raises(UserError, match=says) as error:
    onnx.Graph(tmp_path / 'tower.onnx')
  assert '\n' not in str(error.value) and 'tower.onnx' in str(error.value)


def test_a_graph_without_end_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(onnx, 'MOST_ITEMS', 9)
  (tmp_path / 'tower.onnx').write_bytes(made.model([], [made.node('Relu', 'x', 'y')] * 10))
  with pytest.raises(UserError, match='more than 9 nodes and tensors'):
    onnx.Graph(tmp_path / 'tower.onnx')


def drop(op):
  def change(initialisers, nodes):
    nodes[:] = [row for row in nodes if row[0] != op]

  return change


def rename(old, new):
  def change(initialisers, nodes):
    for row in nodes:
      row[1] = [new if name == old else name for name in row[1]]

  return change


def repeat(initialisers, nodes):
  nodes.append(['Concat', ['onnx::Concat_1', 'resized'], 'again'])


def go_round(initialisers, nodes):
  nodes[:] = [row for row in nodes if row[2] != 'as_square']
  nodes.append(['Reshape', ['patches'], 'as_square'])


def second_matrix(initialisers, nodes):
  added = next(row for row in nodes if row[0] == 'Add')
  initialisers['other'] = np.ones((made.WIDTH, made.WIDTH), np.float32)
  nodes.append(['MatMul', ['y', 'other'], 'z'])
  nodes.append(['Add', [added[1][0], 'z'], 'sum'])


def flat_matrix(initialisers, nodes):
  matrix = next(row for row in nodes if row[0] == 'MatMul')[1][1]
  initialisers[matrix] = initialisers[matrix].ravel()


def make_twice(initialisers, nodes):
  nodes.append(['Relu', ['x'], 'positions'])


GRAPHS = {
  'a value made twice': (make_twice, 'two nodes make one value'),
  'no products': (drop('MatMul'), r'the matrix to backbone.*bias cannot be told .* 0 tensors'),
  'no sums': (drop('Add'), 'the matrix to backbone'),
  'two matrices to a bias': (second_matrix, '2 tensors in its place'),
  'a matrix of one dimension': (flat_matrix, 'the matrix to backbone'),
  'no positions': (drop('Concat'), 'the positions cannot be told .* 0 tensors'),
  'positions twice': (repeat, 'the positions cannot be told .* 2 tensors'),
  'positions that are computed': (drop('Transpose'), 'the positions cannot be told'),
  'positions in a circle': (go_round, 'the positions cannot be told'),
  'positions of nothing': (rename('onnx::Reshape_2', 'nothing'), 'the positions cannot be told'),
}


@pytest.mark.parametrize('name', GRAPHS)
def test_what_the_graph_does_not_tell_is_refused(tmp_path, values, name):
  change, says = GRAPHS[name]
  initialisers, nodes = made.parts(values)
  change(initialisers, nodes)
  (tmp_path / 'tower.onnx').write_bytes(made.write(initialisers, nodes))
  with pytest.raises(UserError, match=says) as error:
    made.read(tmp_path / 'tower.onnx')
  assert '\n' not in str(error.value)


def test_generated_files_are_refused_in_one_line_or_read(fuzz):
  outcomes = fuzz('onnx', count=300)['outcomes']
  assert min(outcomes[kind] for kind in ('refused', 'identical', 'changed')) > 0
