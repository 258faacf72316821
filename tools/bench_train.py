"""Our training step against PyTorch's (`tools/baseline_torch.py`) on noise: `python
tools/bench_train.py [--json] [--out=FILE]`.

Every case trains the same head on the same architectures, batch and sizes. Contestants take turns
within a case, so that other work on the machine weighs on all of them (on an idle machine the
ratios are steadier, and PyTorch's threads do not spin against ours: OMP_WAIT_POLICY=PASSIVE).

  paper   our step with the paper's settings: one view, hidden states as they are, linear
          classifier, CCA over the batch: what the baseline computes
  robust  our default step, three views of each example, normalised hidden states, MLP classifiers:
          the baseline computes less

`live` runs the towers, `store` reads their hidden states from a batch, as training does from the
second epoch on (`features.store`). Texts have the lengths that --lengths says: our text tower
computes their real tokens alone (`live`) or padding too (`live_padded`); the baseline pads to the
longest of the batch. The defaults are the quickstart's: SmolLM2-135M, the shipped vision tower,
batches of 64, texts of 6 +- 3.6 tokens, at most 16 (--width=128 --preset=robust is its head).
`tools/bench_gpu.sh` calls this with LLaMA-7B and CLIP ViT-L/14.
"""

import functools
import gc
import itertools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import sys
from collections.abc import Iterator, Sequence

import attribute_dict  # noqa: F401 (before the package: it may stand in for ml_collections)
import jax
import numpy as np

import molt_jax
from molt_jax.config import presets
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import Rule, at_least
from molt_jax.profiling import timing
from molt_jax.profiling.flops import PEAK_FLOPS, matmul_flops
from molt_jax.profiling.timing import Parts
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import atomic, console, sharding
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice
from molt_jax.towers import architectures

SHIPPED = 'openmoji'
CONTESTANTS = ('live', 'live_padded', 'store', 'baseline', 'baseline_compiled')
PAPER = {
  name: presets.PAPER[name]
  for name in (
    'molt.input_norm',
    'fusion.residual',
    'classifier.kind',
    'classifier.dropout',
    'classifier.per_pattern',
    'missing.views',
    'cca.estimator',
    'optimizer.schedule',
  )
}
PRESETS = {'paper': PAPER, 'robust': {}}
LENGTHS = Rule(
  'full, or mean,standard deviation such as 6,3.6',
  lambda v: v == 'full' or re.fullmatch(r'[\d.]+,[\d.]+', v) is not None,
)
FLAGS = (
  Flag('text', 'text architecture', 'smollm2-135m', rule=choice(*architectures.LLAMA)),
  Flag(
    'image',
    f'image architecture, or {SHIPPED}: the shipped tower',
    SHIPPED,
    rule=choice(*architectures.CLIP_VISION, SHIPPED),
  ),
  Flag('tokens', 'most tokens of a text', 16, type=int, rule=at_least(1)),
  Flag(
    'lengths',
    'of texts: mean and standard deviation in tokens (log-normal), or full: all have --tokens',
    '6,3.6',
    rule=LENGTHS,
  ),
  Flag('batch', 'batch sizes', (64,), type=int, rule=at_least(1), many=True),
  Flag('width', 'd_c', (128, 1024), type=int, rule=at_least(1), many=True),
  Flag('preset', 'settings', tuple(PRESETS), rule=choice(*PRESETS), many=True),
  Flag(
    'contestants',
    'what takes turns',
    ('live', 'live_padded', 'store', 'baseline'),
    rule=choice(*CONTESTANTS),
    many=True,
  ),
  Flag('dtype', 'of towers and head', 'float32', rule=choice('float32', 'bfloat16')),
  Flag('attention', 'in our towers', 'xla', rule=choice('xla', 'cudnn')),
  Flag('quantization', 'of our towers', 'none', rule=choice('none', 'int8', 'int4')),
  Flag('solver', 'of our CCA', 'eigh', rule=choice('eigh', 'newton_schulz')),
  Flag('classes', 'number of classes', 101, type=int, rule=at_least(1)),
  Flag('rounds', 'timed steps of each contestant', 5, type=int, rule=at_least(1)),
  Flag('compile', 'only compile our steps, without memory for the towers', switch=True),
  Flag('out', 'file to write the JSON to', ''),
  Flag('json', 'print JSON', switch=True),
)


def shape_of(kind: str, name: str) -> dict:
  """The Hugging Face configuration of a tower."""
  if name == SHIPPED:
    return json.loads(
      (pathlib.Path(molt_jax.__file__).parent / 'pretrained' / SHIPPED / 'config.json').read_text()
    )
  return {'text': architectures.LLAMA, 'image': architectures.CLIP_VISION}[kind][name]


def lengths(flags, rows: int) -> np.ndarray:
  """Tokens of each text, as --lengths says; the same for all contestants."""
  if flags.lengths == 'full':
    return np.full(rows, flags.tokens)
  mean, std = map(float, flags.lengths.split(','))
  spread = math.sqrt(math.log1p((std / mean) ** 2))
  drawn = np.random.default_rng(0).lognormal(math.log(mean) - spread**2 / 2, spread, rows)
  return np.clip(np.rint(drawn), 1, flags.tokens).astype(int)


def make_config(flags, *, batch: int, width: int, preset: str):
  """The config of a case."""
  config = CLASSIFIER.default()
  values = {
    'dataset.path': 'unread',
    'text.max_tokens': flags.tokens,
    'train.batch_size': batch,
    'molt.width': width,
    'backbones.text.path': f'random:{flags.text}',
    'backbones.image.path': f'pkg://molt_jax/pretrained/{SHIPPED}'
    if flags.image == SHIPPED
    else f'random:{flags.image}',
    'classifier.hidden': min(512, 2 * width),
    'backbones.dtype': flags.dtype,
    'compute_dtype': flags.dtype,
    'backbones.attention': flags.attention,
    'backbones.quantization': flags.quantization,
    'cca.solver': flags.solver,
    'cca.num_directions': min(16, width),
    'mesh.data': 1,
    **PRESETS[preset],
  }
  for name, value in values.items():
    *parents, leaf = name.split('.')
    functools.reduce(lambda c, part: c[part], parents, config)[leaf] = value
  return CLASSIFIER.validate(config)


class Ours:
  """Steps of one case; towers are shared between cases."""

  def __init__(self, config, classes, frozen, length_b):
    self.workload = Workload.open(config, num_classes=classes)
    self.host = self.workload.batch(length_b=length_b)
    self._batch = sharding.put_batch(self.host, self.workload.mesh)
    self.frozen = frozen

  def load(self):
    """Makes the towers, unless they were given."""
    self.frozen = self.frozen or self.workload.frozen()
    return self.frozen

  def runs(self, wanted):
    """Contestant -> a function that does one step."""
    stored = Parts(self.workload, self.frozen, self._batch).stored_batch
    return {
      name: self._stepper(frozen, batch)
      for name, (frozen, batch) in self._arguments(wanted, self.frozen, stored).items()
    }

  def compile(self, wanted):
    """Compiles the steps that `runs` would run, which finds them in JAX's cache then."""
    state, frozen, _ = self.workload.shapes()
    for own, batch in self._arguments(wanted, frozen, self._stored_shapes).values():
      self.workload.step().lower(state, own, batch).compile()

  def _arguments(self, wanted, frozen, stored):
    """Contestant -> towers and batch of its step."""
    found = {'live': lambda: (frozen, self._batch)}
    padded = {name: x for name, x in self._batch.items() if name != 'token_position'}
    found['live_padded'] = lambda: (frozen, padded)
    found['store'] = lambda: (dict.fromkeys(frozen), stored())
    return {name: make() for name, make in found.items() if name in wanted}

  def _stored_shapes(self):
    features = self.workload.method.features
    shapes = jax.eval_shape(
      lambda frozen, batch: timing.with_features(batch, features(frozen, batch)),
      self.workload.shapes()[1],
      self._batch,
    )
    place = jax.NamedSharding(self.workload.mesh, jax.P('data'))
    return {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in shapes.items()
    }

  def flops(self):
    """FLOPs of the matrix products of a live step."""
    state, frozen, _ = self.workload.shapes()
    return matmul_flops(self.workload.step(), state, frozen, self._batch)

  def _stepper(self, frozen, batch):
    step, state = self.workload.step(), self.workload.state()

    def run():
      nonlocal state
      state, metrics = step(state, frozen, batch)
      return metrics

    return run


class Theirs:
  """Steps of the baseline; towers are shared between cases."""

  def __init__(self, flags):
    import baseline_torch
    import torch

    self._lib, self._torch, self._flags = baseline_torch, torch, flags
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self._shapes = shape_of('text', flags.text), shape_of('image', flags.image)
    self._towers = baseline_torch.make_towers(*self._shapes, self.device)

  def runs(self, wanted, workload, host):
    """Contestant -> a function that does one step; its loss waits for the device."""
    config = workload.config
    settings = self._lib.Settings(
      width=config.molt.width,
      num_layers=workload.method.num_layers,
      num_classes=self._flags.classes,
      ridge=config.cca.ridge,
    )
    batch = self._lib.make_batch(host, self.device)
    baselines = {
      name: self._lib.Baseline(
        *self._shapes,
        settings,
        device=self.device,
        compiled=name == 'baseline_compiled',
        towers=self._towers,
      )
      for name in ('baseline', 'baseline_compiled')
      if name in wanted
    }
    return {name: functools.partial(baseline.step, batch) for name, baseline in baselines.items()}

  def versions(self):
    return {
      'torch': self._torch.__version__,
      'torch_threads': self._torch.get_num_threads(),
      'baseline_device': self.device,
    }

  def forget_peak(self):
    if self.device == 'cuda':
      self._torch.cuda.empty_cache()
      self._torch.cuda.reset_peak_memory_stats()

  def peak(self):
    return self._torch.cuda.max_memory_allocated() if self.device == 'cuda' else None


def _cases_of(flags):
  return itertools.product(flags.batch, flags.width, flags.preset)


def _ours(flags, batch, width, preset, frozen=None):
  config = make_config(flags, batch=batch, width=width, preset=preset)
  return Ours(config, flags.classes, frozen, lengths(flags, batch))


def measure(flags) -> Iterator[dict]:
  """Yields the report after each case, which is said on stderr too."""
  wanted = flags.contestants
  theirs = Theirs(flags) if any(name.startswith('baseline') for name in wanted) else None
  frozen, cases = None, []
  for batch, width, preset in _cases_of(flags):
    ours = _ours(flags, batch, width, preset, frozen)
    frozen = ours.load()
    runs = ours.runs(wanted)
    if theirs:
      theirs.forget_peak()
      runs |= theirs.runs(wanted, ours.workload, ours.host)
    taken = timing.seconds_in_turn(runs, rounds=flags.rounds)
    case = _case(batch, width, preset, taken, theirs)
    case['real_tokens'] = int(ours.host['token_mask'].sum())
    if 'live' in taken:
      case |= _utilisation(ours.flops(), statistics.median(taken['live']))
    cases.append(case)
    console.log(_line(cases[-1]))
    yield _report(flags, cases, theirs)
    del runs, ours
    gc.collect()


def _report(flags, cases, theirs):
  return {
    'text': flags.text,
    'image': flags.image,
    'tokens': flags.tokens,
    'lengths': flags.lengths,
    'classes': flags.classes,
    'dtype': flags.dtype,
    'attention': flags.attention,
    'quantization': flags.quantization,
    'solver': flags.solver,
    'rounds': flags.rounds,
    'cases': cases,
    'device': jax.devices()[0].device_kind,
    'cpus': os.cpu_count(),
    'load_average': os.getloadavg()[0],
    'omp_wait_policy': os.environ.get('OMP_WAIT_POLICY', 'default'),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      **(theirs.versions() if theirs else {}),
    },
  }


def _case(batch, width, preset, taken, theirs):
  case = {
    'batch': batch,
    'width': width,
    'preset': preset,
    'seconds': {name: timing.spread(values) for name, values in taken.items()},
  }
  baselines = [name for name in taken if name.startswith('baseline')]
  case['speedup'] = {  # Medians over rounds of the ratio within a round.
    f'{ours}_over_{baseline}': statistics.median(
      b / a for a, b in zip(taken[ours], taken[baseline], strict=True)
    )
    for ours in CONTESTANTS[:3]
    if ours in taken
    for baseline in baselines
  }
  case['examples_per_second'] = {
    name: batch / statistics.median(values) for name, values in taken.items()
  }
  stats = jax.devices()[0].memory_stats() or {}
  case['peak_bytes'] = {
    'ours_so_far': stats.get('peak_bytes_in_use'),
    'baseline': theirs.peak() if theirs else None,
  }
  return case


def _utilisation(flops, seconds):
  """Of a live step; MFU is the share of what the device could do, where that is known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return {'live_flops': flops, 'live_mfu': peak and flops / seconds / peak}


def _line(case):
  seconds = ', '.join(f'{name} {1e3 * s["median"]:.1f} ms' for name, s in case['seconds'].items())
  ratios = ', '.join(
    f'{name.replace("_over_", " ")} {ratio:.2f}x' for name, ratio in case['speedup'].items()
  )
  mfu = case.get('live_mfu')
  found = (seconds, ratios, mfu and f'live MFU {mfu:.0%}')
  said = '; '.join(part for part in found if part)
  return f'batch {case["batch"]}, width {case["width"]}, {case["preset"]}: {said}'


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, _ = parse(
    'python tools/bench_train.py',
    "Our training step against PyTorch's.",
    FLAGS,
    argv,
  )
  if flags.compile:
    for case in _cases_of(flags):
      _ours(flags, *case).compile(flags.contestants)
    return
  out = pathlib.Path(flags.out)
  out.parent.mkdir(parents=True, exist_ok=True)  # Before the work, not after it.
  for found in measure(flags):
    report = json.dumps(found, indent=2)
    if flags.out:  # After each case: what is cut off keeps those that were done.
      atomic.write(out, report + '\n')
  if flags.json:
    print(report)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
