"""Pictures from files to hidden states on disk, against PyTorch with a DataLoader: `python
tools/bench_extract.py --pictures=FOLDER [--json]`.

Both decode, resize and normalise the same pictures, run the same tower (the preset's image tower)
and keep the same hidden states, pooled alike, in bfloat16: ours as training with `features.store`
does, the other as `tools/extract_torch.py` does, which is what one would write. Rounds take turns,
and every run is a process of its own.

A process extracts a few pictures twice and all of them then. Loading the tower, compiling it (from
the cache) and starting workers are the same in the last two, so `pictures_per_second` is of their
difference; `whole_seconds` is all that the longest takes. `busy` is the share of the processors
that a process kept at work while it took that difference; the rest was idle or another's.
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.errors import UserError
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

FLAGS = (
  Flag('pictures', 'folder of pictures', required=True),
  Flag('rows', 'pictures to extract', 800, type=int, rule=at_least(2)),
  Flag('few', 'pictures of the run before', 64, type=int, rule=at_least(1)),
  Flag('rounds', 'rounds of both in turn', 3, type=int, rule=at_least(1)),
  Flag('batch', 'batch sizes of PyTorch, each a contestant', (16, 64), type=int, many=True),
  Flag('workers', "of PyTorch's DataLoader", 2, type=int, rule=at_least(0)),
  Flag('config', 'preset', 'quickstart'),
  Flag('job', 'used by this tool itself: extracts what that file says', ''),
  Flag('json', 'print JSON', switch=True),
)
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp')
COMPARED = 16  # Pictures whose states are compared.


class Pictures:
  """A split of pictures without texts."""

  def __init__(self, files: Sequence[str]):
    self.ids, self.labels = list(files), [0] * len(files)
    self.present = np.tile([True, False], (len(files), 1))

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, index):
    return self.read(index, image=True)

  def read(self, index, *, image):
    """See `data.sources.Source`."""
    content = pathlib.Path(self.ids[index]).read_bytes() if image else None
    return {'id': self.ids[index], 'image': content, 'text': None, 'label': 0}


def cpu_seconds() -> float:
  """Of this process."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def opened(config):
  """Returns what extracts features."""
  from molt_jax.training.assembly import assemble

  return assemble(config, class_names=('a', 'b'))


def extract(job, overrides) -> None:
  """Extracts as `features.store` does; prints seconds and processor seconds of each run, and keeps
  the first states.
  """
  from molt_jax.features import opening

  taken = []
  for number, count in enumerate(job['runs']):
    store = f'{job["out"]}.{number}'
    start, cpu = time.perf_counter(), cpu_seconds()
    config = CLASSIFIER.load(job['config'], {**overrides, 'features.store': store})
    source = Pictures(job['pictures'][:count])
    wanted = {'train': (source, source.present)}
    _, stored = opening.open_features(opened(config).extraction, wanted, ['image'])
    taken.append([time.perf_counter() - start, cpu_seconds() - cpu])
  kept = stored['train']['image']
  first = [kept.read(kept.keys[n][0]) for n in range(min(COMPARED, len(source)))]
  np.save(f'{job["out"]}.npy', np.stack(first).astype(np.float32))
  print(json.dumps(taken))


def run(script: str, arguments: Sequence[str]) -> list[list[float]]:
  """Runs a contestant; returns what its last line says."""
  command = [sys.executable, script, *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError((done.stderr.strip().splitlines() or ['it failed'])[-1])
  return json.loads(done.stdout.splitlines()[-1])


def jobs_of(flags, overrides, folder: str) -> dict[str, tuple[str, dict]]:
  """Returns contestant -> (its program, its job); saves the tower for PyTorch."""
  import torch_towers

  from molt_jax.features.frozen import describe_towers
  from molt_jax.towers import loading

  files = sorted(p for p in pathlib.Path(flags.pictures).rglob('*') if p.suffix.lower() in ENDINGS)
  step = max(len(files) // flags.rows, 1)
  pictures = [str(path.resolve()) for path in files[::step][: flags.rows]]
  if len(pictures) <= flags.few:
    raise UserError(f'--pictures: {flags.pictures!r} has {len(pictures)} pictures; give a folder '
                    f'with more than --few = {flags.few}')  # fmt: skip
  config = CLASSIFIER.load(flags.config, overrides)
  spec = describe_towers(config)['image'].preprocess
  c = config.backbones.image
  tower = loading.load_tower(c.path, modality='image', dtype='float32', resolution=c.resolution)
  torch_towers.image_twin(tower).save_pretrained(f'{folder}/model')
  states = opened(config).method.reads['image'].states
  job = {
    'pictures': pictures,
    'runs': [flags.few, flags.few, len(pictures)],
    'config': flags.config,
  }
  own = {**job, 'out': f'{folder}/ours'}
  other = {'model': f'{folder}/model', 'size': tower.config.image_size, 'mean': spec.mean}
  other |= {'std': spec.std, 'states': states, 'cells': config.molt.cells}
  jobs = {'molt_jax': (__file__, own)}
  for batch_size in flags.batch:
    how = {'batch_size': batch_size, 'workers': flags.workers, 'out': f'{folder}/theirs'}
    script = str(pathlib.Path(__file__).parent / 'extract_torch.py')
    jobs[f'pytorch_{batch_size}'] = script, job | other | how
  return jobs


def difference(folder: str) -> float:
  """Largest difference of the compared states, over the largest of them."""
  import safetensors.torch

  ours = np.load(f'{folder}/ours.npy')
  theirs = safetensors.torch.load_file(f'{folder}/theirs')
  theirs = np.stack([theirs[str(n)].float().numpy() for n in range(len(ours))])
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def measure(flags, overrides) -> dict:
  """Returns the report."""
  with tempfile.TemporaryDirectory(prefix='molt_jax_extract_') as folder:
    jobs = jobs_of(flags, overrides, folder)
    rounds = []
    for number in range(flags.rounds):
      rounds.append({})
      for name, (script, job) in jobs.items():
        path = pathlib.Path(folder) / 'job.json'
        job = {**job, 'out': f'{job["out"]}{number}' if script == __file__ else job['out']}
        path.write_text(json.dumps(job))
        own = script == __file__
        words = [f'--{name}={value}' for name, value in overrides.items()]
        given = [f'--job={path}', f'--pictures={folder}', *words] if own else [str(path)]
        rounds[-1][name] = run(script, given)
        if own:
          pathlib.Path(f'{job["out"]}.npy').replace(f'{folder}/ours.npy')
    apart = difference(folder)
  _, few, rows = job['runs']
  return _report(rounds, rows, few) | {'difference': apart}


def _report(rounds: Sequence[dict], rows: int, few: int) -> dict:
  cores = len(os.sched_getaffinity(0))
  found = {}
  for name in rounds[0]:
    short, long = (np.array([turn[name][i] for turn in rounds]) for i in (1, 2))
    seconds, cpu = (long - short).T
    found[name] = {
      'pictures_per_second': statistics.median((rows - few) / seconds),
      'cpu_ms_per_picture': 1e3 * statistics.median(cpu / (rows - few)),
      'busy': statistics.median(cpu / seconds / cores),
      'whole_seconds': statistics.median(long[:, 0]),
    }
  speedup = {}
  for name in list(rounds[0])[1:]:
    pairs = [[turn[x][2][0] - turn[x][1][0] for x in (name, 'molt_jax')] for turn in rounds]
    speedup[name] = statistics.median(theirs / ours for theirs, ours in pairs)
  return {
    'pictures': rows,
    'few': few,
    'rounds': len(rounds),
    'cores': cores,
    'load_average': os.getloadavg()[0],
    'contestants': found,
    'speedup': speedup,
  }


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  what = 'Pictures to hidden states, against PyTorch with a DataLoader.'
  flags, overrides = parse('python tools/bench_extract.py', what, FLAGS, argv, schema=CLASSIFIER)
  if flags.job:
    extract(json.loads(pathlib.Path(flags.job).read_text()), overrides)
    return
  report = measure(flags, overrides)
  if flags.json:
    print(json.dumps(report, indent=1))
    return
  for name, x in report['contestants'].items():
    print(
      f'{name}: {x["pictures_per_second"]:.1f} pictures/s, {x["cpu_ms_per_picture"]:.1f} CPU ms a '
      f'picture, processors {100 * x["busy"]:.0f} % busy, {x["whole_seconds"]:.1f} s in all'
    )
  for name, ratio in report['speedup'].items():
    print(f'molt_jax is {ratio:.2f} times as fast as {name}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
