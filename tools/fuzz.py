"""Throws generated inputs at the entry points and counts what came of them.

  python tools/fuzz.py images --count=10000 --seed=0 --out=fuzz_images.json

A generator is a module of `tools/fuzzing/` with one function:

  trial(rng, folder) -> dict[str, int]

It makes one input from `rng` (a NumPy generator), gives it to the product, and returns how often
which outcome came, e.g. {'used': 1} or {'refused': 1}; `folder` is an empty directory of the
trial's own. It raises where the product did something that it must not do: an exception other than
its one-line errors, a value that is not finite, a wrong result without a word. Trial i of seed s
can be repeated alone with `--first=i --count=1 --seed=s`.
"""

import argparse
import collections
import importlib
import json
import pathlib
import resource
import shutil
import sys
import tempfile
import time
import traceback

import numpy as np

ROOT = pathlib.Path(__file__).parent
SHOWN_FAILURES = 20


def names() -> list[str]:
  """Returns the names of all generators."""
  return sorted(path.stem for path in (ROOT / 'fuzzing').glob('[a-z]*.py'))


def load(name: str):
  """Returns the module of a generator."""
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  return importlib.import_module(f'fuzzing.{name}')


def fuzz(name: str, *, count: int, seed: int = 0, first: int = 0) -> dict:
  """Runs `count` trials of a generator, the first of them number `first`.

  Returns:
    'outcomes' (outcome -> how often), 'failures' (the first ones: trial, error), 'num_failures',
    'slowest_seconds' (of one trial) and 'peak_megabytes' (of the process).
  """
  generator = load(name)
  outcomes, failures, slowest, num_failures = collections.Counter(), [], 0.0, 0
  for number in range(first, first + count):
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f'fuzz_{name}_'))
    start = time.monotonic()
    try:
      outcomes.update(generator.trial(np.random.default_rng([seed, number]), folder))
    except Exception as error:  # Whatever comes out of a trial is a finding, of any type.
      num_failures += 1
      where = ''.join(traceback.format_tb(error.__traceback__)[-2:])
      if len(failures) < SHOWN_FAILURES:
        failures.append({'trial': number, 'error': f'{type(error).__name__}: {error}', 'at': where})
    finally:
      slowest = max(slowest, time.monotonic() - start)
      shutil.rmtree(folder, ignore_errors=True)
  return {
    'generator': name,
    'seed': seed,
    'first': first,
    'count': count,
    'outcomes': dict(sorted(outcomes.items())),
    'num_failures': num_failures,
    'failures': failures,
    'slowest_seconds': round(slowest, 3),
    'peak_megabytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='+', choices=[*names(), 'all'])
  parser.add_argument('--count', type=int, default=1000, help='trials of each generator')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0, help='number of the first trial')
  parser.add_argument('--out', help='write the results there as JSON')
  args = parser.parse_args()
  wanted = names() if 'all' in args.names else args.names
  results = [fuzz(name, count=args.count, seed=args.seed, first=args.first) for name in wanted]
  text = json.dumps(results, indent=2) + '\n'
  if args.out:
    pathlib.Path(args.out).write_text(text)
  print(text, end='')
  return int(any(result['num_failures'] for result in results))


if __name__ == '__main__':
  sys.exit(main())
