"""Does the input pipeline keep ahead of training? `python tools/bench_pipeline.py
[--config=configs/quickstart.py] [--json] [--out=FILE]`.

Times the pipeline alone (read, decode, resize to `--size` pixels, normalise, tokenise, batch) with
several numbers of workers, which are threads (`input.num_threads`), on the config's data set and on
made-up JPEG photographs; and the config's training step on a batch that is there, `live` (towers
run) and `stored` (their hidden states come with the batch, as with `features.store`). All take
turns within a round, so that other work on the machine weighs on all of them; numbers are medians
over rounds. A ratio above 1 means that the pipeline keeps ahead of that step.
"""

import dataclasses
import io
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import Rule, at_least
from molt_jax.data import pipeline
from molt_jax.profiling.timing import Parts
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import atomic, console, sharding
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag
from molt_jax.training.assembly import assemble

SIDES = Rule(
  'WIDTHxHEIGHT such as 500x375', lambda v: re.fullmatch(r'[1-9][0-9]*x[1-9][0-9]*', v) is not None
)
FLAGS = (
  Flag(
    'config',
    'preset whose data set, tokenizer and training step are measured',
    'configs/quickstart.py',
  ),
  Flag('workers', 'numbers of threads', (1, 2), type=int, rule=at_least(1), many=True),
  Flag('size', 'side of the images that come out, pixels', 224, type=int, rule=at_least(1)),
  Flag('photos', 'WIDTHxHEIGHT of the made-up photographs', '500x375', rule=SIDES),
  Flag('rounds', 'rounds of turns', 5, type=int, rule=at_least(1)),
  Flag('batches', 'batches per turn', 4, type=int, rule=at_least(1)),
  Flag('out', 'file to write the JSON to', ''),
  Flag('json', 'print JSON', switch=True),
)
DISTINCT = 16  # Photographs that are made; decoding does not know that they come again.


class Photographs:
  """JPEG photographs of smooth noise with the texts and labels of another source."""

  def __init__(self, source, width: int, height: int):
    self._source, self.ids, self.labels = source, source.ids, source.labels
    self.present = np.stack([np.ones(len(source), bool), source.present[:, 1]], axis=1)
    rng = np.random.default_rng(0)
    self._files = [_photograph(rng, width, height) for _ in range(DISTINCT)]
    self.mean_bytes = statistics.mean(map(len, self._files))

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self.read(index, image=True)

  def read(self, index, *, image):
    return {
      **self._source.read(index, image=False),
      'image': self._files[index % DISTINCT] if image else None,
    }


def _photograph(rng, width, height) -> bytes:
  """Noise at several scales, which compresses about as photographs do."""
  layers = [
    Image.fromarray(
      rng.integers(0, 256, (max(2, height // s), max(2, width // s), 3), np.uint8)
    ).resize((width, height), Image.Resampling.BICUBIC)
    for s in (128, 32, 8, 2)
  ]
  mixed = sum(
    weight * np.asarray(layer, np.float32)
    for weight, layer in zip((0.5, 0.25, 0.15, 0.1), layers, strict=True)
  )
  buffer = io.BytesIO()
  Image.fromarray(mixed.astype(np.uint8)).save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def _loader(source, preprocess, config, threads: int, batches: int) -> Callable[[], float]:
  """Returns a function that gives images/s over some batches, made by as many threads."""

  def images_per_second():
    # From a cold start: what lies ready when a clock starts later would count as made in no time.
    start = time.perf_counter()
    iterator = pipeline.train_iterator(
      source,
      preprocess,
      pipeline.Batching(batch_size=config.train.batch_size, num_threads=threads, prefetch=threads),
      seed=0,
    )
    for _ in range(batches):
      next(iterator)
    return batches * config.train.batch_size / (time.perf_counter() - start)

  return images_per_second


def _steppers(config, num_classes: int, batches: int) -> dict[str, Callable[[], float]]:
  """Returns name -> a function that gives images/s of some training steps on a batch that is
  there.
  """
  workload = Workload.open(config, num_classes=num_classes)
  frozen, batch = workload.frozen(), sharding.put_batch(workload.batch(), workload.mesh)
  stored = Parts(workload, frozen, batch).stored_batch()
  return {
    name: _stepper(workload, *inputs, batches)
    for name, inputs in {'live': (frozen, batch), 'stored': (dict.fromkeys(frozen), stored)}.items()
  }


def _stepper(workload, frozen, batch, batches) -> Callable[[], float]:
  step, state = workload.step(), workload.state()

  def images_per_second():
    nonlocal state
    start = time.perf_counter()
    for _ in range(batches):
      state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    return batches * workload.config.train.batch_size / (time.perf_counter() - start)

  return images_per_second


def measure(
  config,
  *,
  name: str,
  workers: Sequence[int],
  size: int,
  sides: tuple[int, int],
  rounds: int,
  batches: int,
) -> dict:
  """Returns the report."""
  assembly = assemble(config)
  data = assembly.data
  preprocess = dataclasses.replace(assembly.preprocess, image_size=size)
  sources = {
    data.name: data.splits['train'],
    'photographs': Photographs(data.splits['train'], *sides),
  }
  turns = {
    f'{what}, {threads} worker{"s" if threads > 1 else ""}': _loader(
      source, preprocess, config, threads, batches
    )
    for what, source in sources.items()
    for threads in workers
  }
  steps = _steppers(config, len(data.class_names), batches)
  for run in steps.values():
    run()  # Compiles.
  rates = {what: [] for what in (*turns, *steps)}
  for number in range(rounds):
    for what, run in (turns | steps).items():
      rates[what].append(run())
    console.log(
      f'round {number + 1}: '
      + ', '.join(f'{what} {values[-1]:.0f}/s' for what, values in rates.items())
    )
  median = {what: statistics.median(values) for what, values in rates.items()}
  return {
    'config': name,
    'size': size,
    'batch_size': config.train.batch_size,
    'photograph': {'sides': sides, 'bytes': sources['photographs'].mean_bytes},
    'cores': len(os.sched_getaffinity(0)),
    'images_per_second': median,
    'all_rounds': rates,
    'ratio': {what: {step: median[what] / median[step] for step in steps} for what in turns},
  }


@command
def main(argv: Sequence[str]) -> None:
  """Command line of the tool."""
  flags, overrides = parse(
    'python tools/bench_pipeline.py',
    'Input pipeline against training step.',
    FLAGS,
    argv,
    schema=CLASSIFIER,
  )
  report = measure(
    CLASSIFIER.load(flags.config, overrides),
    name=flags.config,
    workers=flags.workers,
    size=flags.size,
    sides=tuple(map(int, flags.photos.split('x'))),
    rounds=flags.rounds,
    batches=flags.batches,
  )
  text = json.dumps(report, indent=2)
  if flags.out:
    atomic.write(pathlib.Path(flags.out), text + '\n')
  if flags.json:
    print(text)
    return
  for name, rate in report['images_per_second'].items():
    ratios = ', '.join(
      f'{value:.2f} x the {step} step' for step, value in report['ratio'].get(name, {}).items()
    )
    print(f'{name}: {rate:.0f} images/s' + (f', {ratios}' if ratios else ''))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
