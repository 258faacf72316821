"""Live training steps against steps from the feature store, and the cost of filling it: `python
tools/bench_store.py [--json]`.

The steps are those of `molt_jax.train`, batches and transfers included: live and stored, and each
with padding computed too (what packing saves is no merit of the store, and makes `speedup` smaller
than `speedup_over_padded`). They take turns, so that other work on the machine weighs on all.
`speedup_cpu` is that of the processor time of all threads, which other work changes little.
Filling is timed between two live forward passes over the same rows; loading the towers, which a
live run does too, is taken off for their ratio. Programs are compiled, or in the cache, before the
clock starts. Few rows are not what training has: Grain's shuffle takes some 19 ms an epoch, however
short that is.
"""

import contextlib
import itertools
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.data import pipeline
from molt_jax.data.modalities import MODALITIES
from molt_jax.features import opening
from molt_jax.features.frozen import load_frozen
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import compiling, sharding
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice
from molt_jax.training import train_state
from molt_jax.training.assembly import assemble
from molt_jax.training.losses import make_objective

FLAGS = (
  Flag('config', 'preset', 'configs/quickstart.py'),
  Flag('rows', 'training examples to use', 2048, type=int, rule=at_least(1)),
  Flag('rounds', 'rounds of live steps and stored steps in turn', 6, type=int, rule=at_least(1)),
  Flag('dtype', 'of stored hidden states', 'bfloat16', rule=choice('float32', 'bfloat16', 'int8')),
  Flag('json', 'print JSON', switch=True),
)
STORED_PER_LIVE = 8  # Stored steps a live step, since they are short.


class Subset:
  """The first rows of a source."""

  def __init__(self, source, count):
    self._source, self._count = source, min(count, len(source))
    self.ids, self.labels, self.present = (
      source.ids[:count],
      source.labels[:count],
      source.present[:count],
    )

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    return self._source[index]

  def read(self, index, *, image):
    return self._source.read(index, image=image)


class Bench:
  """One model, one split, a store in a temporary folder."""

  def __init__(self, config: ml_collections.ConfigDict, rows: int):
    assembly = assemble(config)
    self.config, self.mesh, self.assembly = config, assembly.mesh, assembly
    self.source = Subset(assembly.data.splits['train'], rows)
    tx = train_state.make_optimizer(config, 1000)
    workload = Workload(assembly, make_objective(assembly), tx)
    self.state, self.step = workload.state, workload.step()
    start = time.perf_counter()
    self.frozen = load_frozen(config, self.mesh, assembly.method.reads)
    self.load_seconds = time.perf_counter() - start

  def batches(self, stored, *, padded=False):
    return pipeline.train_iterator(
      self.source,
      self.assembly.preprocess,
      pipeline.Batching(
        batch_size=self.config.train.batch_size,
        pack=None if padded else sharding.packing(self.config, self.mesh),
        num_threads=self.config.input.num_threads,
        prefetch=self.config.input.prefetch,
      ),
      seed=0,
      stored=stored,
    )

  def fill(self):
    """Returns (stored hidden states, seconds)."""
    start = time.perf_counter()
    wanted = {'train': (self.source, self.source.present)}
    _, stored = opening.open_features(self.assembly.extraction, wanted)
    return stored['train'], time.perf_counter() - start

  def forward(self):
    """Returns the seconds that the towers take for all rows once, as a live epoch runs them
    (decoding included).
    """
    features = self.assembly.method.features
    forward = compiling.jit(lambda *x: jax.tree.map(lambda leaf: leaf.sum(), features(*x)))
    batches = pipeline.eval_batches(
      self.source,
      self.assembly.preprocess,
      pipeline.Batching(
        batch_size=self.config.train.batch_size, pack=sharding.packing(self.config, self.mesh)
      ),
    )
    for batch in one_of_each_size(batches):
      jax.block_until_ready(forward(self.frozen, sharding.put_batch(batch, self.mesh)))
    start = time.perf_counter()
    for batch in batches:
      jax.block_until_ready(forward(self.frozen, sharding.put_batch(batch, self.mesh)))
    return time.perf_counter() - start

  def seconds(self, state, frozen, batches, steps):
    """Runs steps as training does; returns (state, (seconds, processor seconds) a step)."""
    start, cpu = time.perf_counter(), time.process_time()
    for batch in itertools.islice(batches, steps):
      state, metrics = self.step(state, frozen, sharding.put_batch(batch, self.mesh))
    jax.block_until_ready(metrics)
    return state, ((time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps)


def one_of_each_size(batches):
  """Batches of all the shapes that occur, so that every program is compiled before the clock
  starts.
  """
  return {str({name: x.shape for name, x in batch.items()}): batch for batch in batches}.values()


def _lanes(bench: Bench, stored) -> dict[str, list]:
  """name -> [state, frozen towers, batches, steps a turn, seconds a step so far]."""
  nothing = dict.fromkeys(MODALITIES)
  lanes = {
    'live': [bench.frozen, bench.batches(None), 1],
    'live_padded': [bench.frozen, bench.batches(None, padded=True), 1],
    'store_padded': [nothing, bench.batches(stored, padded=True), STORED_PER_LIVE],
    'store': [nothing, bench.batches(stored), STORED_PER_LIVE],
  }
  return {name: [bench.state(), *lane, []] for name, lane in lanes.items()}


def _head_seconds(bench: Bench, state, stored, rounds: int) -> float:
  """Median seconds of a step on one stored batch that is on the device already."""
  nothing, taken = dict.fromkeys(MODALITIES), []
  on_device = sharding.put_batch(next(iter(bench.batches(stored))), bench.mesh)
  for _ in range(rounds * STORED_PER_LIVE):
    start = time.perf_counter()
    state, metrics = bench.step(state, nothing, on_device)
    jax.block_until_ready(metrics)
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def measure(config: ml_collections.ConfigDict, rows: int, rounds: int) -> dict:
  """Returns the measurements; all times are medians over the rounds."""
  bench = Bench(config, rows)
  bench.fill()  # Compiles.
  shutil.rmtree(config.features.store)
  forward = [bench.forward()]
  stored, fill_seconds = bench.fill()
  forward.append(bench.forward())
  _, again = bench.fill()
  lanes = _lanes(bench, stored)
  for batch in one_of_each_size(itertools.islice(bench.batches(None), rounds + 1)):
    bench.step(bench.state(), bench.frozen, sharding.put_batch(batch, bench.mesh))
  for turn in range(rounds + 1):
    for lane in lanes.values():
      lane[0], seconds = bench.seconds(*lane[:4])
      lane[4] += [seconds] if turn else []  # The first turn compiles.
  head_seconds = _head_seconds(bench, lanes['store'][0], stored, rounds)
  taken, cpu = ({name: [x[i] for x in lane[4]] for name, lane in lanes.items()} for i in (0, 1))
  step_seconds = {
    f'{name}_step_seconds': statistics.median(seconds) for name, seconds in taken.items()
  }
  speedup, over_padded = (
    statistics.median(a / b for a, b in zip(taken[name], taken['store'], strict=True))
    for name in ('live', 'live_padded')
  )
  size = sum(path.stat().st_size for path in _files(config))
  return {
    'rows': len(bench.source),
    'batch_size': config.train.batch_size,
    'dtype': config.features.dtype,
    **step_seconds,
    'head_step_seconds': head_seconds,
    **{
      f'{name}_images_per_second': config.train.batch_size / step_seconds[f'{name}_step_seconds']
      for name in ('live', 'store')
    },
    'cpu_seconds': {name: statistics.median(seconds) for name, seconds in cpu.items()},
    'speedup': speedup,
    'speedup_cpu': statistics.median(a / b for a, b in zip(cpu['live'], cpu['store'], strict=True)),
    'speedup_over_padded': over_padded,
    'load_seconds': bench.load_seconds,
    'fill_seconds': fill_seconds,
    'forward_seconds': float(np.mean(forward)),
    'fill_over_forward': (fill_seconds - bench.load_seconds) / float(np.mean(forward)),
    'open_full_store_seconds': again,
    'store_bytes': size,
    'bytes_per_row': size / len(bench.source),
  }


def _files(config):
  return [path for path in pathlib.Path(config.features.store).rglob('*') if path.is_file()]


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, overrides = parse(
    'python tools/bench_store.py',
    'Live steps against steps from the store.',
    FLAGS,
    argv,
    schema=CLASSIFIER,
  )
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix='molt_jax_store_'))
    config = CLASSIFIER.load(
      flags.config,
      {**overrides, 'features.store': f'{directory}/store', 'features.dtype': flags.dtype},
    )
    result = measure(config, flags.rows, flags.rounds)
  if flags.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f'{name:24} {value:.4g}' if isinstance(value, float) else f'{name:24} {value}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
