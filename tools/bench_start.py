"""Processor seconds until something answers: `--help`, an import, a prediction, the first step.

  python tools/bench_start.py --workdir=DIR --image=FILE [--config=quickstart] [--json]

Each is a process of its own, `--rounds` times in turn; medians. DIR is a trained run; its
predictions find their compiled programs in the cache of this machine, after one that is not
counted. The first training step of `--config` is taken from where the states of both towers are
there (its `features.store`, which is filled before if it lacks some): once with an empty cache of
compiled programs, once with what that left.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.errors import UserError
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

FLAGS = (
  Flag('workdir', 'folder of a run of molt_jax.train', required=True),
  Flag('image', 'image file to predict from', required=True),
  Flag('text', 'text to predict from', 'a red apple'),
  Flag('config', 'preset', 'quickstart'),
  Flag('rounds', 'processes of each kind', 3, type=int, rule=at_least(1)),
  Flag(
    'one_step', 'used by this tool itself: takes the first step and prints its time', switch=True
  ),
  Flag('json', 'print JSON', switch=True),
)
CACHE = 'JAX_COMPILATION_CACHE_DIR'


def cpu_seconds(arguments: Sequence[str], environment: Mapping[str, str] | None = None):
  """Runs a process of Python to its end.

  Returns:
    (processor seconds of all its threads, what it printed).

  Raises:
    UserError: it failed; with its last message.
  """
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(
      [sys.executable, *arguments],
      stdout=subprocess.PIPE,
      stderr=errors,
      env={**os.environ, **(environment or {})},
    )
    printed = process.stdout.read()  # Until it ends.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      errors.seek(0)
      lines = errors.read().decode().strip().splitlines() or ['it failed']
      raise UserError(lines[-1].removeprefix('error: '))
  return usage.ru_utime + usage.ru_stime, printed.decode()


def first_step(config) -> float:
  """Returns the processor seconds from states that are there to the end of the first step."""
  import jax

  from molt_jax.data import pipeline
  from molt_jax.features import opening
  from molt_jax.runtime import sharding
  from molt_jax.training import train_state
  from molt_jax.training.assembly import assemble
  from molt_jax.training.losses import make_objective

  assembly = assemble(config)
  source = assembly.data.splits['train']
  wanted = {'train': (source, source.present)}
  frozen, stored = opening.open_features(assembly.extraction, wanted)
  start = time.process_time()
  batches = pipeline.train_iterator(
    source,
    assembly.preprocess,
    pipeline.Batching(
      batch_size=config.train.batch_size,
      pack=sharding.packing(config, assembly.mesh),
      num_threads=config.input.num_threads,
      prefetch=config.input.prefetch,
    ),
    seed=config.seed,
    stored=stored['train'],
  )
  from molt_jax.profiling.workload import Workload

  tx = train_state.make_optimizer(config, 1000)
  workload = Workload(assembly, make_objective(assembly), tx)
  batch = sharding.put_batch(next(iter(batches)), assembly.mesh)
  _, metrics = workload.step()(workload.state(), frozen, batch)
  jax.block_until_ready(metrics)
  return time.process_time() - start


def measure(flags, step_arguments: Sequence[str]) -> dict[str, float]:
  """Returns name -> median processor seconds."""
  predict = ['-m', 'molt_jax.predict', f'--workdir={flags.workdir}']
  commands = {
    'help': ['-m', 'molt_jax.train', '--help'],
    'import_molt_jax': ['-c', 'import molt_jax'],
    'import_molt_jax_predict': ['-c', 'import molt_jax.predict'],
    'predict_text': [*predict, f'--text={flags.text}'],
    'predict_image': [*predict, f'--image={flags.image}'],
  }
  for arguments in commands.values():
    cpu_seconds(arguments)  # Compiles, and brings files into memory.
  taken = {name: [] for name in (*commands, 'first_step', 'first_step_cached')}
  cpu_seconds([__file__, '--one_step', *step_arguments])
  for _ in range(flags.rounds):
    for name, arguments in commands.items():
      taken[name].append(cpu_seconds(arguments)[0])
    with tempfile.TemporaryDirectory(prefix='molt_jax_cache_') as cache:
      for name in ('first_step', 'first_step_cached'):
        _, printed = cpu_seconds([__file__, '--one_step', *step_arguments], {CACHE: cache})
        taken[name].append(float(printed.splitlines()[-1]))
  return {name: statistics.median(seconds) for name, seconds in taken.items()}


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, overrides = parse(
    'python tools/bench_start.py',
    'Processor seconds until something answers.',
    FLAGS,
    argv,
    schema=CLASSIFIER,
  )
  if flags.one_step:
    print(first_step(CLASSIFIER.load(flags.config, overrides)))
    return
  found = measure(flags, [word for word in argv if word != '--json'])
  if flags.json:
    print(json.dumps(found))
  else:
    for name, seconds in found.items():
      print(f'{name:24} {seconds:.2f} CPU seconds')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
