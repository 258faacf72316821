"""FLOP counts against closed forms and XLA, the split of a step, and the tools that report them; on
a machine without data packages too.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.profiling import flops
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import command_line

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def workload():
  config = CLASSIFIER.default()
  config.dataset.path = 'unread'
  config.text.max_tokens, config.train.batch_size, config.mesh.data = 8, 8, 1
  config.backbones.text.path, config.backbones.image.path = (
    'random:llama-tiny',
    'random:clip-vit-tiny',
  )
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.molt.width = config.classifier.hidden = 32
  config.ridge.landmarks = -1  # As presets have it.
  return Workload.open(CLASSIFIER.validate(config), num_classes=5)


def test_products_are_counted_as_often_as_they_run():
  a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))

  def f(a, b):
    once = jnp.einsum('bij,bjk->bik', a, b)
    looped = jax.lax.scan(lambda c, _: (c @ jnp.ones((7, 7)), None), once[0], None, length=11)[0]
    branched = jax.lax.cond(
      looped.sum() > 0, lambda x: x @ jnp.ones((7, 2)), lambda x: x[:, :2], looped
    )
    return jax.jit(jnp.sum)(branched)

  assert flops.matmul_flops(f, a, b) == 2 * (3 * 4 * 5 * 7 + 11 * 4 * 7 * 7 + 4 * 7 * 2)
  # A product and its gradient are three products.
  gradient = jax.grad(lambda w, x: (x @ w).sum(), argnums=(0, 1))
  assert flops.matmul_flops(gradient, jnp.ones((5, 7)), jnp.ones((4, 5))) == 3 * 2 * 4 * 5 * 7


@pytest.mark.parametrize('rows, tokens', [(8, 8), (2, 5)])
def test_towers_take_the_flops_of_their_closed_forms(workload, rows, tokens):
  llama, clip = workload.modules['text'], workload.modules['image']
  _, frozen, _ = workload.shapes()
  text = (
    jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    jax.ShapeDtypeStruct((rows, tokens), bool),
  )
  image = jax.ShapeDtypeStruct((rows, 64, 64, 3), jnp.float32)
  assert flops.matmul_flops(
    lambda p, *x: llama.apply({'params': p}, *x, states=range(-4, 0)), frozen['text'], *text
  ) == flops.decoder_flops(llama.config, rows, tokens)
  assert flops.matmul_flops(
    lambda p, x: clip.apply({'params': p}, x, states=range(-4, 0)), frozen['image'], image
  ) == flops.vision_flops(clip.config, rows)


def test_llama_7b_takes_two_flops_a_weight_and_token():
  from molt_jax.towers import architectures
  from molt_jax.towers.decoder import DecoderConfig

  config = DecoderConfig.from_hf(architectures.LLAMA['llama-7b'])
  matrices, tokens = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 128
  attention = 32 * 4 * tokens * tokens * 4096  # Q K' and A V, over all pairs.
  assert flops.decoder_flops(config, 32, tokens) == 32 * (2 * matrices * tokens + attention)


def test_xla_counts_the_same_where_no_loop_hides_it(workload):
  """One layer, so that counting a loop's body once is counting it right; XLA adds elementwise
  work.
  """
  from molt_jax.towers.decoder import Decoder, DecoderConfig
  from molt_jax.towers.loading import abstract_params, nn

  config = DecoderConfig.from_hf(
    {
      'vocab_size': 64,
      'hidden_size': 128,
      'intermediate_size': 512,
      'num_hidden_layers': 1,
      'num_attention_heads': 4,
    }
  )
  module = Decoder(config, jnp.dtype('float32'), 'xla')
  shapes = (
    nn.unbox(abstract_params(module)),
    jax.ShapeDtypeStruct((4, 32), jnp.int32),
    jax.ShapeDtypeStruct((4, 32), bool),
  )
  counted = (
    jax.jit(lambda p, t, m: module.apply({'params': p}, t, m, states=range(-1, 0)))
    .lower(*shapes)
    .compile()
    .cost_analysis()['flops']
  )
  assert 1.0 < counted / flops.decoder_flops(config, 4, 32) < 1.1


def test_random_towers_keep_states_near_one(workload):
  batch = workload.batch()
  features = jax.jit(workload.method.features)(workload.frozen(), batch)
  for x_lbnd in (features.image_lbid, features.text_lbtd):
    assert 0.3 < float(jnp.std(x_lbnd)) < 10


PRESET = """
from molt_jax.config import default_config
def get_config():
  config = default_config()
  config.dataset.path = 'unread'
  config.text.max_tokens, config.train.batch_size, config.mesh.data = 8, 8, 1
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.backbones.dtype = config.compute_dtype = 'float32'
  config.molt.width, config.cca.estimator, config.missing.views = 32, 'batch', False
  return config
"""
BARE = """
import runpy, sys
class Lacking:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in (
      'ml_collections', 'grain', 'tensorflow_datasets', 'array_record', 'gguf', 'qwix', 'PIL',
      'tensorboardX',
    ):
      raise ModuleNotFoundError(name, name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'ml_collections' else find(name, *a)
sys.meta_path.insert(0, Lacking())
sys.path.insert(0, sys.argv[1] + '/tools')
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_the_tool_runs_on_noise_without_any_data_package(tmp_path):
  (tmp_path / 'tiny.py').write_text(PRESET)
  command = [
    sys.executable,
    '-c',
    BARE,
    str(ROOT),
    str(ROOT / 'tools/profile_step.py'),
    f'--config={tmp_path}/tiny.py',
    '--rounds=2',
    '--json',
    f'--trace={tmp_path}/trace',
    '--config.train.batch_size=4',
  ]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  out = subprocess.run(
    command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  report = json.loads(out.stdout)
  assert (
    report['batch_size'] == 4 and report['step_seconds']['median'] > 0 and report['mfu'] is None
  )
  assert set(report['parts']) == {'image_tower', 'text_tower', 'head', 'cca', 'optimizer'}
  assert sum(
    part['share'] for part in (*report['parts'].values(), report['rest'])
  ) == pytest.approx(1)
  towers = sum(report['parts'][name]['flops'] for name in ('image_tower', 'text_tower'))
  assert towers == report['flops']['towers_closed_form']
  assert report['flops']['step'] == sum(part['flops'] for part in report['parts'].values())
  assert report['flops']['xla_counting_loops_once'] < report['flops']['step']
  busy = report['trace']['busy_seconds']
  assert all(busy[name] > 0 for name in report['parts']) and busy['unknown'] < 0.3 * sum(
    busy.values()
  )
  assert list((tmp_path / 'trace').rglob('*.xplane.pb'))
  memory = report['memory']
  assert (
    memory['step'] == memory['argument'] + memory['temp'] + memory['output'] - memory['alias'] > 0
  )


@pytest.mark.parametrize(
  'arguments, says',
  [
    (['--rounds=none'], '--rounds'),
    (['--data=more'], '--data'),
    (['--config.molt.wdth=3'], 'molt.width'),
    (['--traces=x'], 'did you mean --trace'),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, says):
  (tmp_path / 'tiny.py').write_text(PRESET)
  monkeypatch.syspath_prepend(str(ROOT / 'tools'))
  import profile_step

  assert profile_step.main([f'--config={tmp_path}/tiny.py', *arguments]) == 2
  err = capsys.readouterr().err
  assert says in err and err.count('\n') == 1


def test_costs_of_methods_are_near_their_rule(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'tools')
  import bench_methods

  sizes = ['--text=random:llama-tiny', '--image=random:clip-vit-tiny', '--resolution=64']
  sizes += ['--tokens=32', '--batch=2', '--rounds=1']
  flags = command_line.parse('bench', '', bench_methods.FLAGS, sizes)[0]
  found = bench_methods.case('mora', flags)
  assert found['enters_at'] == {'image': 4, 'text': 2}
  forward = found['forward_gflop']
  # Two of six layers and two of four, forward and backward.
  rule = 2 * (forward['image'] * 2 / 6 + forward['text'] * 2 / 4) / sum(forward.values())
  assert found['by_rule'] == pytest.approx(rule, abs=2e-3)
  # The image's patches are embedded below, and the new weights have gradients of their own.
  assert found['by_rule'] < found['counted'] < 1.2 * found['by_rule']
  assert found['measured'] > 0 and set(found['seconds']) == {'forward', 'mora'}


# ---- The baseline --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tools():
  pytest.importorskip('torch', reason='the baseline is written in PyTorch, which is not installed')
  sys.path.insert(0, str(ROOT / 'tools'))
  import baseline_torch
  import bench_train

  yield bench_train, baseline_torch
  sys.path.remove(str(ROOT / 'tools'))


def copy_head(head, params):
  """Our head's parameters into the baseline's."""
  import torch

  params = jax.tree.map(np.asarray, params)

  def put(module, kernel, bias):
    module.weight.data, module.bias.data = (
      torch.tensor(kernel.T.copy()),
      torch.tensor(np.array(bias)),
    )

  def put_map(
    module, ours, layer
  ):  # A bias of keys moves all scores of a query alike: we have none.
    kernel = ours['kernel'][layer]
    put(module, kernel, ours['bias'][layer] if 'bias' in ours else np.zeros_like(kernel[0]))

  translation, fusion, logits = (
    params['translation'],
    params['fusion'],
    params['classifier']['logits'],
  )
  head.layer_weights.data = torch.tensor(params['layer_weights'].copy())
  for k, layer in enumerate(head.layers):
    for m in ('image', 'text'):
      for role in ('project', 'query', 'key', 'value'):
        put_map(getattr(layer, role)[m], translation[f'{m}_{role}'], k)
      layer.norm[m].weight.data = torch.tensor(translation[f'{m}_norm']['scale'][k].copy())
      layer.norm[m].bias.data = torch.tensor(translation[f'{m}_norm']['bias'][k].copy())
  put_map(head.query, fusion['query'], 0)
  for m in ('image', 'text'):
    put_map(head.key[m], fusion[f'{m}_key'], 0)
    put_map(head.value[m], fusion[f'{m}_value'], 0)
  put(head.classifier, logits['kernel'], logits['bias'])


def test_the_baseline_computes_what_our_paper_preset_does(tools):
  """Same weights, same batch, more rows than directions: the same losses, and the same
  cross-entropy after a step of either.
  """
  import torch

  from molt_jax.towers import architectures
  from molt_jax.towers.tensor_plan import hugging_face_tensors

  bench_train, baseline_torch = tools
  sizes = [
    '--text=llama-tiny',
    '--image=clip-vit-tiny',
    '--tokens=6',
    '--lengths=3,2',
    '--classes=5',
    '--batch=24',
    '--width=8',
    '--preset=paper',
  ]
  flags = command_line.parse(
    'bench', '', bench_train.FLAGS, [*sizes, '--contestants=live,baseline', '--rounds=2']
  )[0]
  config = bench_train.make_config(flags, batch=24, width=8, preset='paper')
  ours = bench_train.Ours(config, 5, None, bench_train.lengths(flags, 24))
  ours.load()
  assert 'token_position' in ours.host
  ours.host['label'] = np.arange(24, dtype=np.int32) % 5
  baseline = baseline_torch.Baseline(
    architectures.LLAMA['llama-tiny'],
    architectures.CLIP_VISION['clip-vit-tiny'],
    baseline_torch.Settings(8, 4, 5),
  )
  families = {kind: spec.family for kind, spec in ours.workload.assembly.towers.items()}
  for tower, kind in ((baseline.text, 'text'), (baseline.image, 'image')):
    tensors = {
      name: torch.tensor(np.array(x))
      for name, x in hugging_face_tensors(ours.frozen[kind], families[kind]).items()
    }
    missing, unexpected = tower.load_state_dict(tensors, strict=False)
    assert not unexpected and all('post_layernorm' in name for name in missing)
  state = ours.workload.state()
  copy_head(baseline.head, state.params)
  theirs = baseline_torch.make_batch(ours.host)
  step = ours.workload.step()
  for _ in range(2):
    with torch.no_grad():
      loss, ce, cca = (float(x) for x in baseline.loss(theirs))
    baseline.step(theirs)
    state, metrics = step(state, ours.frozen, ours.host)
    assert float(metrics['loss_ce']) == pytest.approx(ce, rel=1e-4)
    assert float(metrics['loss_cca']) == pytest.approx(cca, rel=1e-3)
    assert float(metrics['loss']) == pytest.approx(loss, rel=1e-3)
  *_, report = bench_train.measure(flags)
  assert (
    set(report['cases'][0]['speedup']) == {'live_over_baseline'}
    and report['cases'][0]['seconds']['baseline']['median'] > 0
  )


def test_the_baseline_survives_the_gradient_of_small_batches(tools):
  import torch

  baseline_torch = tools[1]
  x, y = (
    torch.randn(6, 16, generator=torch.Generator().manual_seed(i), requires_grad=True)
    for i in range(2)
  )
  loss = baseline_torch.cca_loss(x, y, 1e-3)
  loss.backward()
  assert -1.01 < loss.item() < -0.5 and x.grad.isfinite().all() and y.grad.isfinite().all()


def test_every_command_of_the_gpu_benchmark_is_legal(tmp_path, tools):
  import profile_step

  bench_train = tools[0]
  fake = tmp_path / 'python'
  fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
  fake.chmod(0o755)
  environment = {**os.environ, 'OUT': str(tmp_path / 'out'), 'PYTHON': str(fake)}
  subprocess.run(
    ['bash', str(ROOT / 'tools/bench_gpu.sh')], env=environment, check=True, capture_output=True
  )
  names = {'robust', 'flash', 'int8', 'paper', 'compiled', 'texts', 'profile', 'batches'}
  commands = [line.split() for line in (tmp_path / 'commands').read_text().splitlines()]
  compiled_first = [command for command in commands if {'--compile', '--rounds=1'} & {*command}]
  assert len(compiled_first) == 10 and len(commands) == 10 + len(names)
  for script, *arguments in commands:
    tool = {'tools/bench_train.py': bench_train, 'tools/profile_step.py': profile_step}[script]
    schema = None if tool is bench_train else CLASSIFIER
    flags, overrides = command_line.parse('x', '', tool.FLAGS, arguments, schema=schema)
    names -= {pathlib.Path(flags.out).stem}
    if tool is profile_step:
      config = CLASSIFIER.load(str(ROOT / flags.config), overrides)
      assert (config.train.batch_size, config.text.max_tokens, config.molt.width) == (32, 128, 1024)
    else:
      for preset in flags.preset:
        config = bench_train.make_config(flags, batch=32, width=flags.width[0], preset=preset)
    assert (
      config.backbones.text.path == 'random:llama-7b'
      and config.backbones.dtype == config.compute_dtype == 'bfloat16'
    )
  assert not names


def gpu_benchmark(out, *arguments):
  """What came of tools/bench_gpu.sh."""
  return subprocess.run(
    ['bash', str(ROOT / 'tools/bench_gpu.sh'), *arguments],
    env={**os.environ, 'OUT': str(out), 'PYTHON': sys.executable},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_gpu_benchmark_names_what_it_can_measure(tmp_path):
  done = gpu_benchmark(tmp_path, 'robust', 'flesh')
  assert done.returncode == 2 and not done.stdout
  assert "error: 'flesh' is no measurement; give one or several of robust flash" in done.stderr


def test_steps_are_compiled_beforehand_and_found_again(tmp_path):
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path)}
  towers = ['--text=llama-tiny', '--image=clip-vit-tiny', '--contestants=live,live_padded,store']
  sizes = ['--tokens=8', '--lengths=6,3', '--batch=4', '--width=16', '--preset=robust']
  command = [sys.executable, str(ROOT / 'tools/bench_train.py'), *towers, *sizes]
  steps = []
  for more in ('--compile', '--rounds=1'):
    subprocess.run([*command, more], env=environment, check=True, capture_output=True)
    steps.append({path.name for path in tmp_path.glob('jit_train_step-*-cache')})
  assert steps[0] == steps[1] and len(steps[0]) == 3


def test_the_gpu_benchmark_runs_with_tiny_shapes(tmp_path):
  out = gpu_benchmark(tmp_path, '--small', 'int8')
  assert out.returncode == 0, out.stdout + (tmp_path / 'log.txt').read_text()
  assert {path.stem for path in tmp_path.glob('*.json')} == {'int8'}
  report = json.loads((tmp_path / 'int8.json').read_text())
  case = report['cases'][0]
  assert report['quantization'] == 'int8' and case['seconds']['live']['median'] > 0
  assert case['live_flops'] > 0 and case['live_mfu'] is None  # Nobody says what this CPU could do.
