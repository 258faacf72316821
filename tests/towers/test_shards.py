"""Tensors of a directory: which files count, and weights that must not be loaded."""

import functools
import json
import os
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy
from optional_torch import needs_torch, torch

from molt_jax.errors import UserError
from molt_jax.towers import loading, shards

INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def whole(hf, tmp_path_factory):
  """A tiny LLaMA in one file."""
  path = tmp_path_factory.mktemp('whole')
  hf.save(hf.llama(), path)
  return path


@pytest.fixture
def one(whole, tmp_path):
  """A copy of it."""
  return shutil.copytree(whole, tmp_path / 'one')


@pytest.fixture
def two(one):
  """The same in two shards."""
  tensors = safetensors.numpy.load_file(one / 'model.safetensors')
  (one / 'model.safetensors').unlink()
  where = {n: f'model-{1 + i % 2}.safetensors' for i, n in enumerate(sorted(tensors))}
  for file in set(where.values()):
    safetensors.numpy.save_file({n: w for n, w in tensors.items() if where[n] == file}, one / file)
  write_index(one, where)
  return one


def write_index(folder, weight_map, **more):
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map, 'metadata': {}, **more}))


def read_index(folder):
  return json.loads((folder / INDEX).read_text())['weight_map']


def load(folder):
  return loading.load_tower(str(folder), modality='text', dtype='float32', attention='xla')


def change(folder, *, file='model.safetensors', **tensors):
  old = safetensors.numpy.load_file(folder / file)
  safetensors.numpy.save_file({**old, **tensors}, folder / file)


Q = 'layers.0.self_attn.q_proj.weight'


def _remove_weight_map(folder):
  (folder / INDEX).write_text('{"metadata": {}}')


def _send_to(name):
  def damage(folder):
    write_index(folder, {**read_index(folder), Q: name})

  return damage


def _swap(folder):
  where = read_index(folder)
  other = next(n for n in where if where[n] != where[Q])
  write_index(folder, {**where, Q: where[other]})


def _drop_shard(folder):
  (folder / 'model-2.safetensors').unlink()


def _copy_tensor(folder):
  w = {n: w for f in folder.glob('model-*') for n, w in safetensors.numpy.load_file(f).items()}[Q]
  for file in ('model-1.safetensors', 'model-2.safetensors'):
    change(folder, file=file, **{Q: w})


def _pipe(folder):
  (folder / 'model-2.safetensors').unlink()
  os.mkfifo(folder / 'model-2.safetensors')


def _device(folder):
  (folder / 'model-2.safetensors').unlink()
  (folder / 'model-2.safetensors').symlink_to('/dev/zero')


def _pointer(folder):
  (folder / 'model-2.safetensors').write_text('version https://git-lfs.github.com/spec/v1\n')


def _unknown_key(folder):
  write_index(folder, read_index(folder), more=1)


INDEXES = {
  'no weight_map': (_remove_weight_map, 'lists no tensors'),
  'a number for a file': (_send_to(7), 'is in 7; legal is the name of a file'),
  'an absolute path': (_send_to('/dev/zero'), "is in '/dev/zero'; legal"),
  'a path outside': (_send_to('../model.safetensors'), 'legal is the name of a file beside it'),
  'dots': (_send_to('..'), 'legal is the name|only .safetensors'),
  'a NUL': (_send_to('a\0.safetensors'), 'legal is the name'),
  'a pickle': (_send_to('pytorch_model.bin'), 'only .safetensors files'),
  'the other shard': (_swap, r'where it is not .1 such tensors'),
  'a shard is missing': (_drop_shard, 'lacks model-2.safetensors'),
  'a tensor in both': (_copy_tensor, 'which of the two is meant'),
  'a pipe': (_pipe, 'a named pipe, not a file'),
  'a device': (_device, 'a device, not a file'),
  'a Git LFS pointer': (_pointer, 'git lfs pull'),
  'an unknown key': (_unknown_key, "'more', unknown here"),
}


@pytest.mark.parametrize('name', INDEXES)
def test_a_damaged_index_is_one_line(two, name):
  damage, says = INDEXES[name]
  damage(two)
  with pytest.raises(UserError, match=says) as error:
    loading.describe_tower(str(two), modality='text')
  assert '\n' not in str(error.value)


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a.shapes, b.shapes, strict=True))


def test_a_whole_file_beside_shards_counts_if_they_hold_the_same(two, whole):
  """transformers loads the whole file and does not look at the index."""
  shutil.copy(whole / 'model.safetensors', two)
  found = shards.find(two)
  assert {t.file.name for t in found.values()} == {'model.safetensors'}
  change(two, **{Q: np.zeros_like(found[Q].read())})
  with pytest.raises(
    UserError, match='model.safetensors and, listed in .*index.json, other weights'
  ):
    shards.find(two)
  for file in two.glob('model-*'):
    file.unlink()
  assert (shards.find(two)[Q].read() == 0).all()


def test_an_index_may_list_the_whole_file(one):
  write_index(
    one, dict.fromkeys(safetensors.numpy.load_file(one / 'model.safetensors'), 'model.safetensors')
  )
  assert len(shards.find(one)) == len(read_index(one))


def _header(folder, edit):
  raw = (folder / 'model.safetensors').read_bytes()
  (size,) = struct.unpack('<Q', raw[:8])
  head = edit(raw[8 : 8 + size])
  (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(head)) + head + raw[8 + size :])


def _twice(head):
  first = head.index(b'"layers.')
  end = head.index(b'}', first) + 1
  return head[:end] + b',' + head[first:end] + head[end:]


HEADERS = {
  'a name twice': (_twice, 'is there twice'),
  'no JSON': (lambda head: head[:-3] + b'xyz', 'damaged or cut short'),
  'deep': (lambda head: b'[' * 5000, 'damaged or cut short'),
  'a shape too large': (
    lambda head: head.replace(b'[97,32]', b'[97,99999999999999999999]'),
    'damaged',
  ),
  'an empty tensor too large': (
    lambda head: head.replace(
      b'{"', b'{"more":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]},"', 1
    ),
    "damaged: 'more' is said to have the shape",
  ),
  'made by TensorFlow': (
    lambda head: head.replace(b'"format":"pt"', b'"format":"tf"'),
    "made with 'tf'.*implemented: pt",
  ),
}


@pytest.mark.parametrize('name', HEADERS)
def test_a_damaged_header_is_one_line(one, name):
  edit, says = HEADERS[name]
  _header(one, edit)
  with pytest.raises(UserError, match=says) as error:
    loading.describe_tower(str(one), modality='text')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('length', [0, 7, 2**40, 2**63])
def test_a_header_of_another_length_is_one_line(one, length):
  raw = (one / 'model.safetensors').read_bytes()
  (one / 'model.safetensors').write_bytes(struct.pack('<Q', length) + raw[8:])
  with pytest.raises(UserError, match='damaged or cut short'):
    loading.describe_tower(str(one), modality='text')


@pytest.mark.parametrize('kind', [bool, np.int8, np.int64, np.uint8, np.float64])
def test_weights_of_other_types_are_refused_by_name(one, kind):
  """float64 too: we would halve it, and what exceeds float32 would be infinite."""
  w = safetensors.numpy.load_file(one / 'model.safetensors')[Q]
  change(one, **{Q: w.astype(kind)})
  with pytest.raises(UserError, match=f'{Q} has type .* instead of F32, F16, BF16'):
    loading.describe_tower(str(one), modality='text')


@needs_torch
def test_bfloat16_and_float16_are_read_as_torch_reads_them(one):
  import safetensors.torch  # Imports PyTorch.

  tensors = safetensors.torch.load_file(one / 'model.safetensors')
  for kind in (torch.bfloat16, torch.float16):
    safetensors.torch.save_file(
      {n: w.to(kind) for n, w in tensors.items()}, one / 'model.safetensors'
    )
    ours = np.asarray(load(one).params['norm']['scale'])
    np.testing.assert_array_equal(ours, tensors['norm.weight'].to(kind).float().numpy())


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('everywhere', [True, False])
def test_weights_that_are_not_finite_are_refused_by_name(one, value, everywhere):
  w = safetensors.numpy.load_file(one / 'model.safetensors')['layers.1.mlp.up_proj.weight']
  w = (
    np.full_like(w, value)
    if everywhere
    else np.where(np.arange(w.size).reshape(w.shape) == 77, value, w)
  )
  change(one, **{'layers.1.mlp.up_proj.weight': w.astype(np.float32)})
  with pytest.raises(UserError, match='layers.1.mlp.up_proj.weight holds NaN or infinity'):
    load(one)


def test_what_is_finite_in_the_file_must_be_finite_where_it_is_computed_with(one):
  w = safetensors.numpy.load_file(one / 'model.safetensors')['norm.weight']
  change(one, **{'norm.weight': np.full_like(w, 3.4e38)})
  load(one)
  with pytest.raises(UserError, match='norm.weight holds NaN or infinity'):
    loading.load_tower(str(one), modality='text', dtype='bfloat16', attention='xla')


@pytest.mark.parametrize('method', ['int8', 'int4'])
def test_quantising_notices_what_is_not_finite(hf, tmp_path, method):
  model = hf.llama(hidden_size=64, intermediate_size=64, num_attention_heads=2)
  with torch.no_grad():
    model.layers[0].mlp.gate_proj.weight[3, 5] = float('nan')
  path = hf.save(model, tmp_path)
  with pytest.raises(UserError, match='layers.0.mlp.gate_proj.weight holds NaN'):
    loading.load_tower(path, modality='text', dtype='float32', attention='xla', quantization=method)


def test_two_tensors_for_one_parameter_are_refused(one):
  w = safetensors.numpy.load_file(one / 'model.safetensors')['norm.weight']
  change(one, **{'model.norm.weight': w})
  with pytest.raises(
    UserError, match="'model.norm.weight' and 'norm.weight'|'norm.weight' and 'model.norm.weight'"
  ):
    loading.describe_tower(str(one), modality='text')


ABSURD = {
  'vocab_size': 2**20,
  'hidden_size': 2**16,
  'intermediate_size': 2**20,
  'num_hidden_layers': 2**14,
  'head_dim': 2**14,
  'num_attention_heads': 2**19,
}


@pytest.mark.parametrize('key', ABSURD)
def test_sizes_are_believed_when_the_tensors_have_them(one, key):
  """A batch or a table of angles of this size is never made; loading asks for the layers."""
  config = json.loads((one / 'config.json').read_text())
  config.pop('head_dim')
  config[key] = ABSURD[key]
  if key == 'num_attention_heads':
    config |= {'head_dim': 8, 'num_key_value_heads': 1}
  (one / 'config.json').write_text(json.dumps(config))
  use = (
    load
    if key == 'num_hidden_layers'
    else functools.partial(loading.describe_tower, modality='text')
  )
  with pytest.raises(UserError, match='the tensors do not fit the configuration') as error:
    use(str(one))
  assert '\n' not in str(error.value) and len(str(error.value)) < 10_000


def test_an_image_tower_of_absurd_size_is_refused_before_an_image_is_made(hf, tmp_path):
  path = hf.save(hf.clip(), tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**config, 'image_size': 2000}))
  with pytest.raises(
    UserError, match=r'position_embedding.weight has shape \(5, 32\) instead of \(62501, 32\)'
  ):
    loading.load_tower(path, modality='image', dtype='float32', attention='xla')


def test_a_tower_larger_than_the_machine_is_one_line(monkeypatch):
  monkeypatch.setattr(loading, 'total_memory', lambda: 10_000)
  with pytest.raises(
    UserError, match='takes 0.0 GB.*more than the 0.0 GB of this machine.*bfloat16'
  ) as error:
    loading.load_tower('random:llama-tiny', modality='text', dtype='float32', attention='xla')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'path, says',
  [
    ('a\0b', 'NUL'),
    ('x' * 5000, 'cannot be opened|does not exist'),
    ('~nobody-of-this-name/x', 'cannot be opened'),
    ('pkg://__main__/x', 'not installed'),
    ('', 'does not exist|no config.json'),
  ],
)
def test_paths_that_cannot_be_are_one_line(path, says, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=says) as error:
    loading.describe_tower(path, modality='text')
  assert str(error.value).isprintable()
