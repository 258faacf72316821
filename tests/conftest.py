"""Every test runs on four virtual CPU devices, offline, with rank promotion an error."""

import ctypes
import gc
import importlib.metadata
import logging
import os
import pathlib
import warnings

import deprecations  # tests/reference/
import program_cache

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['OPENBLAS_NUM_THREADS'] = '1'
JAXLIB = importlib.metadata.version('jaxlib')
# Unoptimised machine code takes a fifth of the time to make, and these programs hardly run; the
# arithmetic is the same.
XLA_FLAGS = [
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_force_host_platform_device_count=4',
]
# XLA aborts the process on a flag it does not know, and later releases have no such flag.
if JAXLIB.startswith('0.10.'):
  XLA_FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join(XLA_FLAGS)
# Many tests compile the same tiny programs, some in processes of their own. A worker of
# pytest-xdist is such a process: its folder is chosen already.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  try:
    _folder = program_cache.folder(os.environ['XLA_FLAGS'])
    program_cache.tidy(_folder)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(_folder)
  except OSError as error:
    warnings.warn(f'compiled programs are not kept: {error}', stacklevel=1)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tracing makes and drops small objects by the million: by default a fifth of the time of these
# tests goes into looking for cycles among them.
gc.set_threshold(100_000, 50, 100)

import json  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# No example fails for the time that it takes: other work on the machine may take it.
hypothesis.settings.register_profile(
  'untimed', deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile('untimed')


def pytest_addoption(parser):
  parser.addoption('--kills', default='2', help='how often tests/test_kills.py kills a run')


def pytest_configure(config):
  for line in deprecations.filters():
    config.addinivalue_line('filterwarnings', line)
  logging.getLogger('absl').addFilter(deprecations.LogFilter())


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
  """Frees compiled programs after a module that has left many of them; what is needed again comes
  from the folder of compiled programs.
  """
  yield
  statm = pathlib.Path('/proc/self/statm')
  if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > MEMORY:
    jax.clear_caches()
    gc.collect()
    getattr(ctypes.CDLL(None), 'malloc_trim', int)(0)  # Of glibc alone.


def pytest_terminal_summary(terminalreporter):
  """What a Python without a CPU build of PyTorch leaves untested is said, not only counted."""
  skipped = terminalreporter.stats.get('skipped', [])
  count = sum('PyTorch, which is not installed' in str(report.longrepr) for report in skipped)
  if count:
    terminalreporter.write_line(f'PyTorch is not installed: {count} comparisons with it skipped')


MEMORY = 2 * 2**30  # Bytes of a worker, beyond which it frees what it can.
COLOURS = {'red': (200, 30, 30), 'green': (30, 180, 40), 'blue': (40, 60, 210)}


@pytest.fixture(scope='session')
def tiny_towers(tmp_path_factory) -> dict[str, str]:
  """Two Hugging Face directories, random weights: {'text': LLaMA of 3 layers with a byte-level
  tokenizer, 'image': CLIP vision of 3 layers}.
  """
  import tiny_models
  import tokenizers
  import transformers

  root = tmp_path_factory.mktemp('towers')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(
    ['a red square', 'a green square', 'the blue one'],
    tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  text = transformers.LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
  )
  tiny_models.make('LlamaForCausalLM', text).save_pretrained(root / 'llama')
  tokenizer.save(str(root / 'llama' / 'tokenizer.json'))
  names = {'bos_token': '<s>', 'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
  (root / 'llama' / 'tokenizer_config.json').write_text(json.dumps(names))
  image = transformers.CLIPVisionConfig(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
  )
  tiny_models.make('CLIPVisionModel', image).save_pretrained(root / 'clip')
  return {'text': str(root / 'llama'), 'image': str(root / 'clip')}


@pytest.fixture(scope='session')
def tiny_table(tmp_path_factory) -> pathlib.Path:
  """A folder in the own-data layout: 48 + 12 + 14 coloured squares of 3 classes; some rows lack the
  image or the text.
  """
  from PIL import Image

  root = tmp_path_factory.mktemp('table')
  (root / 'images').mkdir()
  rng = np.random.default_rng(0)
  for split, count in (('train', 48), ('validation', 12), ('test', 14)):
    lines = ['image,text,label']
    for i in range(count):
      name = list(COLOURS)[i % 3]
      noisy = np.clip(np.array(COLOURS[name]) + rng.normal(0, 30, (20, 20, 3)), 0, 255).astype(
        np.uint8
      )
      Image.fromarray(noisy).save(root / 'images' / f'{split}_{i}.png')
      image, text = f'images/{split}_{i}.png', f'"a {name} square, number {i}"'
      lines.append(f'{"" if i % 8 == 5 else image},{"" if i % 8 == 6 else text},{name}')
    (root / f'{split}.csv').write_text('\n'.join(lines) + '\n')
  return root


@pytest.fixture(scope='session')
def make_pretraining(tiny_towers, tiny_table):
  """Returns a function of overrides (dotted names): a config of pretraining that trains in seconds,
  36 pairs, 4.5 steps an epoch; without a store of texts.
  """
  from molt_jax.config import resolved
  from molt_jax.config.pretraining import PRETRAINING

  fields = {
    'dataset.path': str(tiny_table),
    'input.text_store': '',
    'text.max_tokens': 12,
    'mesh.data': 1,
    'compute_dtype': 'float32',
    'backbones.text.path': tiny_towers['text'],
    'backbones.image.size': 16,
    'backbones.image.patch': 8,
    'backbones.image.width': 16,
    'backbones.image.layers': 2,
    'backbones.image.heads': 2,
    'projection.width': 12,
    'optimizer.learning_rate': 3e-3,
    'optimizer.weight_decay': 0.1,
    'objective.v2v': 0.3,
    'objective.uniformity': 0.1,
    'train.batch_size': 8,
    'eval.batch_size': 8,
    'eval.select': 'latest',
    'train.epochs': 1.0,
    'export.dtype': 'float32',
  }

  def make(**overrides):
    config = PRETRAINING.default()
    for name, value in (fields | overrides).items():
      resolved.set_field(config, name, value)
    return PRETRAINING.validate(config)

  return make


@pytest.fixture(scope='session')
def make_tiny_config(tiny_towers, tiny_table):
  """Returns a function that makes a config that trains in seconds: 12 steps an epoch of 4 rows, one
  device.
  """
  from molt_jax.config import default_config

  def make():
    config = default_config()
    config.dataset.path = str(tiny_table)
    config.text.max_tokens, config.text.padding = (
      12,
      'max_tokens',
    )  # Batches this small would be packed in many sizes, each to be compiled.
    config.backbones.text.path, config.backbones.image.path = (
      tiny_towers['text'],
      tiny_towers['image'],
    )
    config.backbones.dtype = config.compute_dtype = 'float32'
    config.mesh.data = 1
    config.molt.layers, config.molt.width = '-2:', 16
    config.classifier.hidden = 16
    config.missing.distill_weight = 1.0  # Off by default; here every term of the loss is to count.
    config.cca.num_directions, config.cca.window = 4, 32
    config.optimizer.learning_rate = 3e-3
    config.train.batch_size, config.eval.batch_size = 4, 8
    config.train.epochs = 1.0
    return config

  return make


@pytest.fixture
def tiny_config(make_tiny_config):
  """A fresh tiny config."""
  return make_tiny_config()


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory, make_tiny_config) -> pathlib.Path:
  """The folder of a run of a few steps, which tests only read."""
  from molt_jax import train

  config = make_tiny_config()
  config.train.epochs = 0.5
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  train.train(config, workdir)
  return workdir


def _final_state(workdir):
  """Every array of the latest checkpoint, and its iterator position, as bytes."""
  folder = max((workdir / 'checkpoints' / 'latest').iterdir(), key=lambda p: int(p.name))
  import orbax.checkpoint as ocp

  from molt_jax.training import checkpoint

  with ocp.CheckpointManager(folder.parent, item_names=checkpoint.ITEMS) as manager:
    here = ocp.args.StandardRestore(
      fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )  # For one of other processes.
    out = manager.restore(int(folder.name), args=ocp.args.Composite(model=here, optimizer=here))
  arrays = {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_leaves_with_path([out['model'], out['optimizer']])
  }
  position = json.loads((folder / 'data' / 'metadata').read_text())
  return arrays, position


def _metric_lines(workdir):
  from molt_jax.runtime import logbook

  return [
    {k: v for k, v in line.items() if k != 'images_per_second'} for line in logbook.read(workdir)
  ]


def _assert_same_run(one, two):
  arrays_one, position_one = _final_state(one)
  arrays_two, position_two = _final_state(two)
  # Bare truths: with CI set, pytest would spend minutes on the difference of two files of bytes.
  differing = sorted(
    name for name in arrays_one | arrays_two if arrays_one.get(name) != arrays_two.get(name)
  )
  assert not differing, differing[:5]
  assert position_one == position_two
  same_metrics = _metric_lines(one) == _metric_lines(two)
  assert same_metrics
  assert (
    json.loads((one / 'evaluation.json').read_text())['results']
    == json.loads((two / 'evaluation.json').read_text())['results']
  )


@pytest.fixture(scope='session')
def final_state():
  """Function of a run's folder: every array of its latest checkpoint and its iterator position, as
  bytes.
  """
  return _final_state


@pytest.fixture(scope='session')
def same_run():
  """Function of two runs' folders: asserts equal parameters, moments, metrics, data position and
  results, bit for bit.
  """
  return _assert_same_run


@pytest.fixture(scope='session')
def make_fixture():
  """The tool that writes miniatures of the published data sets."""
  import sys

  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tools'))
  import make_fixture

  sys.path.remove(str(pathlib.Path(__file__).parents[1] / 'tools'))
  return make_fixture


@pytest.fixture(scope='session')
def miniature(make_fixture, tmp_path_factory):
  """Function (data set, layout=None) -> a folder with its miniature, each written once; tests that
  change one copy it first.
  """
  folders = {}

  def get(dataset, layout=None):
    if (dataset, layout) not in folders:
      folders[dataset, layout] = tmp_path_factory.mktemp(dataset) / 'source'
      make_fixture.make(dataset, folders[dataset, layout], layout=layout)
    return folders[dataset, layout]

  return get


@pytest.fixture(scope='session')
def fuzz():
  """Function (generator, count=, seed=) of `tools/fuzz.py`: runs trials, asserts that none failed,
  returns the outcomes.
  """
  import sys

  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tools'))
  import fuzz as tool

  def run(name, *, count, seed=0):
    result = tool.fuzz(name, count=count, seed=seed)
    assert result['num_failures'] == 0, result['failures'][:3]
    return result

  return run
