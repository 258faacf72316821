"""Full-size towers without weights: they build, and every parameter finds its place on 2 and on 8
devices.
"""

import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from molt_jax.config import default_config
from molt_jax.errors import UserError
from molt_jax.profiling import collectives
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import sharding
from molt_jax.towers import base, loading

# Parameters of the published models, counted from their configurations (no language-model head;
# CLIP without its final norm and projection).
SIZES = {
  'llama-7b': 6_607_343_616,
  'llama-13b': 12_852_024_320,
  'llama-70b': 68_714_504_192,
  'clip-vit-l-14': 303_177_728,
}

SCRIPT = """
import sys, jax
import math
from molt_jax.config import default_config
from molt_jax.runtime import sharding
from molt_jax.towers import loading
config = default_config()
config.mesh.data, config.mesh.model = 1, -1
mesh = sharding.make_mesh(config)
kept = jax.config.jax_compilation_cache_dir
assert kept.startswith('/tmp/.cache/molt_jax'), 'compiled programs are kept'
names = dict.fromkeys(('llama-7b', 'llama-13b', 'llama-70b'), 'text') | {'clip-vit-l-14': 'image'}
for name, kind in names.items():
  files = loading.open_files(f'random:{name}', modality=kind)
  module = loading.make_module(files, dtype='bfloat16', attention='xla')
  boxed = loading.abstract_params(module)
  shapes = jax.tree.leaves(jax.tree.map(lambda x: x, loading.nn.unbox(boxed)))
  places = jax.tree.leaves(sharding.param_shardings(mesh)(boxed))
  total = sum(x.size for x in shapes)
  parts = [p.shard_shape(x.shape) for x, p in zip(shapes, places, strict=True)]
  largest = sum(map(math.prod, parts))
  print(name, total, largest / total)
"""


@pytest.mark.parametrize('devices', [2, 8])
def test_published_sizes_build_and_split_over_devices(devices):
  flags = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'HOME': '/tmp',
    'PATH': '',
  }
  out = subprocess.run(
    [sys.executable, '-c', SCRIPT], env=flags, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  lines = [line.split() for line in out.stdout.splitlines()]
  assert {name: int(total) for name, total, _ in lines} == SIZES
  for name, _, share in lines:  # Norms, biases and position tables stay whole; they are a sliver.
    assert float(share) < 1.03 / devices, name


def test_the_compiled_step_has_the_collectives_that_are_listed_and_no_others():
  config = default_config()
  config.mesh.data = config.mesh.model = 2
  config.backbones.text.path, config.backbones.image.path = (
    'random:llama-tiny',
    'random:clip-vit-tiny',
  )
  config.backbones.dtype = config.compute_dtype = 'float32'
  (
    config.molt.layers,
    config.molt.width,
    config.classifier.hidden,
    config.text.max_tokens,
    config.train.batch_size,
  ) = '-2:', 32, 48, 24, 16
  work = Workload.open(config, num_classes=5)
  state, frozen, batch = work.shapes()
  found = collectives.compiled_collectives(
    work.step().lower(state, frozen, batch).compile().as_text()
  )
  listed = collectives.collectives(work.assembly, state)

  towers = [x for x in found if 'Decoder' in x[2] or 'VisionTransformer' in x[2]]
  assert all(kind == 'all-reduce' for kind, _, _ in towers), 'a weight of a tower moved'
  in_loops = [(size, name) for _, size, name in towers if 'while' in name]
  model_axis = [x for x in listed if x.axis == 'model']
  # A loop's operation is there once and runs once a layer. The image tower has three heads, which
  # do not split: one all-reduce a layer.
  depth = {
    'image': work.modules['image'].config.num_layers,
    'text': work.modules['text'].config.num_layers,
  }
  expected = [
    (x.bytes, x.times // depth[x.what.split()[0]]) for x in model_axis if 'layers' in x.what
  ]
  assert sorted(size for size, _ in in_loops) == sorted(
    size for size, times in expected for _ in range(times)
  )
  assert [size for _, size, name in towers if 'while' not in name] == [
    x.bytes for x in model_axis if 'embedding' in x.what
  ]

  rest = [x for x in found if x not in towers]
  assert {kind for kind, _, _ in rest} == {'all-reduce', 'all-gather'}
  # Beside the losses' sums, some ten numbers: XLA may reduce the gradient of what two branches
  # share (the fusion's query) before it adds them.
  for kind, spare in (('all-gather', 0.0), ('all-reduce', 0.05)):
    wanted = sum(x.bytes for x in listed if x.axis == 'data' and x.kind == kind)
    assert wanted <= sum(size for k, size, _ in rest if k == kind) <= (1 + spare) * wanted


def test_packed_texts_stay_on_their_device():
  """Each of two shards packs its own rows: the states are those of padded texts, and only the
  weights' axis is summed over.
  """
  config = default_config()
  config.mesh.data = config.mesh.model = 2
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.dtype, config.dataset.modalities = 'float32', 'text'
  config.molt.layers, config.text.max_tokens, config.train.batch_size = '-2:', 24, 8
  work = Workload.open(config, num_classes=5)
  batch = work.batch(length_b=np.array([3, 24, 1, 7, 20, 2, 9, 1]))
  assert batch['token_position'].shape == (2, 40)
  features, frozen = jax.jit(work.method.features), work.frozen()
  packed, padded = (
    sharding.put_batch({k: x for k, x in batch.items() if k not in left_out}, work.mesh)
    for left_out in ((), ('token_position',))
  )
  program = features.lower(frozen, packed).compile()
  assert {kind for kind, _, _ in collectives.compiled_collectives(program.as_text())} == {
    'all-reduce'
  }
  assert len(collectives.compiled_collectives(program.as_text())) == len(
    collectives.compiled_collectives(features.lower(frozen, padded).compile().as_text())
  )
  mask_bt = batch['token_mask']
  found = features(frozen, packed)
  np.testing.assert_allclose(
    found.text_lbtd[:, mask_bt],
    features(frozen, padded).text_lbtd[:, mask_bt],
    rtol=1e-5,
    atol=1e-5,
  )
  state = work.state()
  variables = {'params': state.params, 'statistics': state.statistics}
  head = jax.jit(lambda *x: work.method(*x)).lower(
    variables, dict.fromkeys(frozen), found, packed, packed['present']
  )
  assert found.token_position_gn is not None and not collectives.compiled_collectives(
    head.compile().as_text()
  )


def _mesh(data, model):
  config = default_config()
  config.mesh.data, config.mesh.model = data, model
  return sharding.make_mesh(config)


def test_every_axis_name_of_every_tower_has_a_rule():
  for family in base.FAMILIES:
    files = loading.open_files(f'random:{min(family.architectures)}', modality=family.modality)
    how = {'dtype': 'float32', 'attention': 'xla', 'heads': files.heads}
    boxed = loading.abstract_params(loading.make_module(files, **how))
    names = {
      axis
      for spec in jax.tree.leaves(
        nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, jax.P)
      )
      for axis in spec
      if axis
    }
    assert names and names <= set(sharding.RULES)


def test_an_axis_that_does_not_divide_stays_whole():
  boxed = {
    'w': nn.LogicallyPartitioned(jax.ShapeDtypeStruct((3, 8), 'float32'), ('kv_heads', 'mlp'))
  }
  assert sharding.param_shardings(_mesh(1, 2))(boxed)['w'].spec == jax.P(None, 'model')


@pytest.mark.parametrize(
  'data, model, shape', [(-1, 1, (4, 1)), (-1, 2, (2, 2)), (1, -1, (1, 4)), (2, 1, (2, 1))]
)
def test_the_mesh_takes_the_devices_that_remain(data, model, shape):
  assert tuple(_mesh(data, model).shape.values()) == shape


@pytest.mark.parametrize('data, model', [(-1, -1), (5, 1), (-1, 8), (3, 2)])
def test_a_mesh_that_does_not_fit_is_refused(data, model):
  with pytest.raises(UserError, match='config.mesh'):
    _mesh(data, model)


def test_a_platform_that_is_not_there_is_refused():
  config = ml_collections.ConfigDict(default_config())
  config.platform = 'tpu'
  with pytest.raises(UserError, match="'tpu' is not here"):
    sharding.make_mesh(config)
