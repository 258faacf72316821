"""The default towers' forward passes against PyTorch's and ONNX Runtime's, in one process and in
turns: `python tools/bench_towers.py [--json]`.

All compute the same hidden states of the same inputs in float32 from the same weights, with as many
threads as there are processors. Ours is compiled as training and extraction compile it, PyTorch is
transformers' model in inference mode, ONNX Runtime runs what PyTorch exports of it; the latter is
left out where it (or onnxscript) is not installed.

  image    batches of --images pictures of noise, as the preset's image tower reads them
  equal    texts that all have --tokens tokens, so that padding makes no difference
  lengths  texts of --lengths tokens (log-normal, --tokens at most): our tower computes real tokens
           alone, PyTorch pads to the longest of the batch

In its turn each runs twice and the second time is taken, since threads of the one before wait for
work by spinning for a while. `speedup` is the median over rounds of (the other's / ours in the same
round and batch size), `over_best` that of the best batch sizes of both. Other work on the machine
makes PyTorch's OpenMP threads wait for one another by spinning too, which flatters us:
OMP_WAIT_POLICY=PASSIVE, the default here, removes most of that, and the report holds the load.
"""

import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
import torch
import torch_towers

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import Rule, at_least
from molt_jax.data import packing
from molt_jax.runtime import compiling
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice
from molt_jax.towers import loading

CASES = ('image', 'equal', 'lengths')
LENGTHS = Rule('mean,standard deviation', lambda v: re.fullmatch(r'[\d.]+,[\d.]+', v) is not None)
FLAGS = (
  Flag('case', 'what is compared', CASES, rule=choice(*CASES), many=True),
  Flag('images', 'batch sizes of images', (16, 32, 64), type=int, rule=at_least(1), many=True),
  Flag('texts', 'batch sizes of texts', (64,), type=int, rule=at_least(1), many=True),
  Flag('tokens', 'most tokens of a text', 16, type=int, rule=at_least(1)),
  Flag('lengths', 'of texts, mean and standard deviation', '6,3.6', rule=LENGTHS),
  Flag('rounds', 'timed rounds', 7, type=int, rule=at_least(1)),
  Flag('config', 'preset', 'quickstart'),
  Flag('json', 'print JSON', switch=True),
)
PACKAGES = ('jax', 'torch', 'transformers', 'onnxruntime')
Run = Callable[[], Sequence[np.ndarray]]


class Selected(torch.nn.Module):
  """Some hidden states of an image tower, for ONNX."""

  def __init__(self, model, states: Sequence[int]):
    super().__init__()
    self._model, self._states = model, states

  def forward(self, images):
    """Returns a tuple of [B, I, D]."""
    found = self._model(images, output_hidden_states=True).hidden_states
    return tuple(found[i] for i in self._states)


def ours(tower, states: Sequence[int], inputs: Sequence[np.ndarray]) -> Run:
  """Returns a function that runs our tower."""
  step = compiling.jit(lambda params, *x: tower.module.apply({'params': params}, *x, states=states))
  on_device = jax.device_put(tuple(inputs))
  return lambda: step(tower.params, *on_device).block_until_ready()


def pytorch(model, states: Sequence[int], **inputs: torch.Tensor) -> Run:
  """Returns a function that runs transformers' model."""

  def run():
    with torch.inference_mode():
      found = model(**inputs, output_hidden_states=True).hidden_states
    return [found[i].numpy() for i in states]

  return run


def onnx(model, states: Sequence[int], images: torch.Tensor) -> Run | None:
  """Returns a function that runs ONNX Runtime; None: it is not installed."""
  try:
    import onnxruntime
    import onnxscript  # noqa: F401 (the exporter is made of it)
  except ImportError:
    return None
  selected = Selected(model, states).eval()
  program = torch.onnx.export(selected, (images,), dynamo=True, verbose=False)
  content = program.model_proto.SerializeToString()
  session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
  given = {session.get_inputs()[0].name: images.numpy()}
  return lambda: session.run(None, given)


def image_runs(flags, tower, model, states, rows: int) -> dict[str, Run]:
  """Contestant -> a function that runs `rows` images."""
  size = tower.config.image_size
  images = np.random.default_rng(0).standard_normal((rows, size, size, 3), np.float32)
  turned = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
  runs = {
    'molt_jax': ours(tower, states, (images,)),
    'pytorch': pytorch(model, states, pixel_values=turned),
    'onnxruntime': onnx(model, states, turned),
  }
  return {name: run for name, run in runs.items() if run is not None}


def drawn_lengths(flags, rows: int) -> np.ndarray:
  """Tokens of each text, int[rows]."""
  mean, std = map(float, flags.lengths.split(','))
  spread = math.sqrt(math.log1p((std / mean) ** 2))
  drawn = np.random.default_rng(0).lognormal(math.log(mean) - spread**2 / 2, spread, rows)
  return np.clip(np.rint(drawn), 1, flags.tokens).astype(int)


def text_runs(flags, tower, model, states, length_b: np.ndarray) -> dict[str, Run]:
  """Contestant -> a function that runs texts of these lengths."""
  shape = len(length_b), int(length_b.max())
  tokens = np.random.default_rng(0).integers(0, tower.config.vocab_size, shape).astype(np.int32)
  mask = np.arange(shape[1])[None] < length_b[:, None]
  positions = packing.token_positions(mask, packing.groups(len(mask), (1, 1)))
  given = {'input_ids': torch.from_numpy(tokens).long(), 'use_cache': False}
  given['attention_mask'] = torch.from_numpy(mask).long()
  own = (tokens, mask, positions.get('token_position'))
  return {'molt_jax': ours(tower, states, own), 'pytorch': pytorch(model, states, **given)}


def seconds_in_turn(runs: Mapping[str, Run], rounds: int) -> dict[str, list[list[float]]]:
  """Contestant -> (wall, processor) seconds of each round."""
  taken = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      run()  # Threads of the one before wait by spinning for a while; the first time it compiles.
      wall, cpu = time.perf_counter(), time.process_time()
      run()
      taken[name].append([time.perf_counter() - wall, time.process_time() - cpu])
  return taken


def difference(runs: Mapping[str, Run], mask: np.ndarray | None) -> float:
  """Largest difference of real tokens' last states from ours, over the largest of them."""
  own, *others = (np.asarray(run()[-1]) for run in runs.values())
  seen = np.ones(own.shape[:2], bool) if mask is None else mask
  return max(float(np.abs(x - own)[seen].max() / np.abs(own[seen]).max()) for x in others)


def row(runs: Mapping[str, Run], rows: int, rounds: int, mask=None) -> dict:
  """Measures one case at one batch size."""
  taken = {name: np.array(x) for name, x in seconds_in_turn(runs, rounds).items()}
  own = taken['molt_jax'][:, 0]
  return {
    'batch': rows,
    'ms': {name: 1e3 * statistics.median(x[:, 0]) / rows for name, x in taken.items()},
    'cpu_ms': {name: 1e3 * statistics.median(x[:, 1]) / rows for name, x in taken.items()},
    'speedup': {
      name: statistics.median(x[:, 0] / own) for name, x in taken.items() if name != 'molt_jax'
    },
    'difference': difference(runs, mask),
  }


def over_best(rows: Sequence[dict]) -> float:
  """The best other, at its best batch size, against ours at our best."""
  own = min(one['ms']['molt_jax'] for one in rows)
  return min(ms for one in rows for name, ms in one['ms'].items() if name != 'molt_jax') / own


def measure(flags, overrides) -> dict:
  """Returns case -> its rows, and the best against the best."""
  config = CLASSIFIER.load(flags.config, overrides)
  c, found = config.backbones, {}
  if 'image' in flags.case:
    how = {'modality': 'image', 'dtype': 'float32', 'resolution': c.image.resolution}
    tower = loading.load_tower(c.image.path, **how)
    model, states = torch_towers.image_twin(tower), _spread(tower)
    found['image'] = [
      row(image_runs(flags, tower, model, states, rows), rows, flags.rounds)
      for rows in flags.images
    ]
  texts = [case for case in flags.case if case != 'image']
  if texts:
    tower = loading.load_tower(c.text.path, modality='text', dtype='float32')
    model, states = torch_towers.text_twin(tower), _spread(tower)
  for case in texts:
    found[case] = []
    for rows in flags.texts:
      full = np.full(rows, flags.tokens)
      length_b = full if case == 'equal' else drawn_lengths(flags, rows)
      mask = np.arange(length_b.max())[None] < length_b[:, None]
      runs = text_runs(flags, tower, model, states, length_b)
      found[case].append(row(runs, rows, flags.rounds, mask))
  return {case: {'rows': rows, 'over_best': over_best(rows)} for case, rows in found.items()}


def _spread(tower) -> tuple[int, ...]:
  """Four hidden states evenly over the tower, the last among them."""
  n = tower.config.num_layers
  return tuple(n * k // 4 for k in (1, 2, 3, 4))


def _about(flags) -> dict:
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    'rounds': flags.rounds,
    'tokens': flags.tokens,
    'lengths': flags.lengths,
    'threads': torch.get_num_threads(),
    'load_average': os.getloadavg()[0],
    'omp_wait_policy': os.environ['OMP_WAIT_POLICY'],
    'versions': versions,
  }


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  what = "Towers against PyTorch's and ONNX Runtime's."
  flags, overrides = parse('python tools/bench_towers.py', what, FLAGS, argv, schema=CLASSIFIER)
  report = measure(flags, overrides)
  if flags.json:
    print(json.dumps(_about(flags) | {'cases': report}, indent=1))
    return
  for case, found in report.items():
    for one in found['rows']:
      ms = ', '.join(
        f'{name} {ms:.2f} ms ({one["cpu_ms"][name]:.2f} CPU)' for name, ms in one['ms'].items()
      )
      ratios = ', '.join(f'{ratio:.2f} x {name}' for name, ratio in one['speedup'].items())
      print(f'{case}, batch {one["batch"]}: {ms}; {ratios}; difference {one["difference"]:.1e}')
    print(f'{case}: {found["over_best"]:.2f} times as fast as the best other, each at its best')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
