"""Kills commands at random moments, many while they write, and compares what comes out in the end.

  python tools/kills.py [--work=train,store,prepare,pretrain,evaluate,report] [--kills=20]
  [--seed=0]

Each kind of work is first done without a kill. Then the same command is started and killed
(SIGKILL) again and again; what it leaves when it comes to its end must be what the first one left,
bit for bit. Times and the order of folders are not compared.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import tiny_run

TIMES = ('images_per_second', 'epoch_seconds')
MODULES = ('train', 'pretrain', 'evaluate', 'report', 'describe')


@dataclasses.dataclass(frozen=True)
class Work:
  """A kind of work.

  Attributes:
    module: of molt_jax, whose `main` does it.
    flags: function of the folder of the trial -> arguments.
    result: function of that folder -> what is compared.
    writing: patterns of what is there only while something is written, in that folder.
    moments: when it is killed or waited for writing: shares of the time that it takes.
    begin: makes the folder of a trial, from that of the inputs.
    patch: attributes to set before the work, 'module.NAME' -> value.
  """

  module: str
  flags: Callable[[pathlib.Path], list[str]]
  result: Callable[[pathlib.Path], dict[str, Any]]
  writing: tuple[str, ...]
  moments: tuple[float, float] = (0.1, 0.9)
  begin: Callable[[pathlib.Path, pathlib.Path], None] = lambda inputs, folder: folder.mkdir()
  patch: tuple[tuple[str, Any], ...] = ()


# ---- What is compared ----------------------------------------------------------------------------


def checkpoint(run: pathlib.Path) -> dict[str, Any]:
  """Returns every array of the latest checkpoint and the position of the data, as bytes."""
  import jax
  import orbax.checkpoint as ocp

  steps = (run / 'checkpoints' / 'latest').iterdir()
  folder = max(steps, key=lambda path: int(path.name)).absolute()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = {'position': (folder / 'data' / 'metadata').read_text(), 'step': folder.name}
  for item in ('model', 'optimizer'):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      args = {item: ocp.args.StandardRestore(fallback_sharding=device)}
      tree = checkpointer.restore(folder, args=ocp.args.Composite(**args))[item]
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      found[f'{item} {jax.tree_util.keystr(path)}'] = np.asarray(x).tobytes()
  return found


def log(run: pathlib.Path) -> dict[str, Any]:
  """Returns the lines of metrics.jsonl without times."""
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
  return {f'line {number}': line for number, line in enumerate(kept)}


def arrays(path: pathlib.Path) -> dict[str, Any]:
  """Returns the members of an npz file, as bytes."""
  with np.load(path) as saved:
    return {f'{path.name} {name}': saved[name].tobytes() for name in saved.files}


def files(folder: pathlib.Path, *patterns: str) -> dict[str, Any]:
  """Returns the content of files, by name."""
  found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
  return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def scores(run: pathlib.Path) -> dict[str, Any]:
  """Returns what an evaluation leaves."""
  return files(run, 'evaluation.json', 'mistakes.json') | arrays(run / 'predictions.npz')


def trained(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what training leaves."""
  run = folder / 'run'
  return checkpoint(run) | log(run) | scores(run) | arrays(run / 'pairs.npz')


def pretrained(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what pretraining leaves."""
  run = folder / 'run'
  return checkpoint(run) | log(run) | files(run, 'tower/*')


def stored(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the entries of a feature store, wherever they lie, and the training from them."""
  found = files(folder, 'store/*/spec.json')
  for shard in sorted(folder.glob('store/*/*.safetensors')):
    entries = safetensors.numpy.load_file(shard)
    found |= {f'{shard.parent.name} {key}': x.tobytes() for key, x in entries.items()}
  return found | trained(folder)


def prepared(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the files of a prepared data set, and its description."""
  found = files(folder, 'data/**/*.json', 'data/**/*array_record*', 'described/*')
  for path in folder.glob('data/**/rows.npz'):
    found |= arrays(path)
  return found


# ---- The kinds -----------------------------------------------------------------------------------


def finished(inputs: pathlib.Path, folder: pathlib.Path) -> None:
  """Begins with a finished run."""
  shutil.copytree(inputs / 'finished', folder)


def evaluated(inputs: pathlib.Path, folder: pathlib.Path) -> None:
  """Begins with a finished run from which the files of its evaluation are taken."""
  finished(inputs, folder)
  for name in ('evaluation.json', 'mistakes.json', 'predictions.npz'):
    (folder / 'run' / name).unlink()


def works(inputs: pathlib.Path) -> dict[str, Work]:
  """Returns the kinds of work over the inputs that `make_inputs` made."""

  def run(folder):
    return [f'--workdir={folder / "run"}']

  def train(folder):
    return [f'--config={inputs / "train.py"}', *run(folder)]

  def fill(folder):
    return [
      *train(folder),
      f'--config.features.store={folder / "store"}',
      '--config.features.dtype=float32',
      '--config.train.epochs=0.25',
    ]

  def prepare(folder):
    return [
      f'--config={inputs / "imdb.py"}',
      f'--out={folder / "described"}',
      f'--config.dataset.data_dir={folder / "data"}',
      '--allow_count_mismatch',
    ]

  def pretrain(folder):
    return [f'--config={inputs / "pretrain.py"}', *run(folder)]

  def page(folder):
    return files(folder, 'run/report.html')

  of_run = ('run/.tmp-*', 'run/checkpoints/*/*tmp*')
  one_shard_an_input = (('features.store.SHARD_BYTES', 1),)
  return {
    'train': Work('train', train, trained, of_run),
    'store': Work(
      'train', fill, stored, ('store/*/.tmp-*',), moments=(0.0, 0.4), patch=one_shard_an_input
    ),
    'prepare': Work('describe', prepare, prepared, ('data/*/*/*incomplete*/*', 'described/.tmp-*')),
    'pretrain': Work('pretrain', pretrain, pretrained, of_run),
    'evaluate': Work(
      'evaluate', run, lambda folder: scores(folder / 'run'), ('run/.tmp-*',), begin=evaluated
    ),
    'report': Work('report', run, page, ('run/.tmp-*',), begin=finished),
  }


IMDB = """import pathlib, sys
from molt_jax import config as lib

def get_config():
  config = lib.default_config()
  config.dataset.name, config.dataset.path = 'mm_imdb', {path!r}
  config.dataset.multi_label = True
  config.backbones.text.path, config.backbones.image.path = {towers!r}
  return config
"""


def make_inputs(inputs: pathlib.Path, names: list[str]) -> None:
  """Writes what the kinds of work need."""
  import make_fixture

  tiny_run.make(inputs)
  if 'prepare' in names:
    make_fixture.make('mm_imdb', inputs / 'imdb', examples=200)
    towers = str(inputs / 'llama'), str(inputs / 'clip')
    preset = IMDB.format(path=str(inputs / 'imdb'), towers=towers)
    (inputs / 'imdb.py').write_text(preset)
  if {'evaluate', 'report'} & set(names):
    (inputs / 'finished').mkdir()
    process = start(works(inputs)['train'], inputs / 'finished')
    process.join()
    assert process.exitcode == 0, (inputs / 'finished' / 'stderr').read_text()


# ---- Killing -------------------------------------------------------------------------------------


def _do(module: str, flags: list[str], printed: pathlib.Path, patch) -> None:
  """In a process of its own: does the work, what it prints goes to files."""
  import importlib

  from molt_jax import commands

  for name, descriptor in (('stdout', 1), ('stderr', 2)):
    os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
  for name, value in patch:
    owner, _, attribute = name.rpartition('.')
    setattr(importlib.import_module(f'molt_jax.{owner}'), attribute, value)
  commands.end(importlib.import_module(f'molt_jax.{module}').main(flags))


@functools.cache
def _context():
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([f'molt_jax.{module}' for module in MODULES])
  return context


def start(work: Work, folder: pathlib.Path, printed: pathlib.Path | None = None):
  """Starts the work in a folder; modules are loaded already, so that kills hit the work itself.

  What it prints goes to files in `printed`; default: in that folder.
  """
  arguments = work.module, work.flags(folder), printed or folder, work.patch
  process = _context().Process(target=_do, args=arguments)
  process.start()
  return process


def is_writing(work: Work, folder: pathlib.Path) -> bool:
  return any(next(folder.glob(pattern), None) for pattern in work.writing)


def _wait(process, work, folder, seconds: float, *, for_writing: bool) -> None:
  end = time.monotonic() + seconds
  while process.is_alive() and time.monotonic() < end:
    time.sleep(0.002)
  while for_writing and process.is_alive() and not is_writing(work, folder):
    time.sleep(0.0002)


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
  """Returns the names of what differs."""
  return sorted(name for name in one | two if one.get(name) != two.get(name))


def trial(
  work: Work, inputs: pathlib.Path, folder: pathlib.Path, *, kills: int, seed: int, whole: int = 2
) -> dict:
  """Does the work whole, so many times, and then with kills, the first of them while it writes.

  Returns:
    'kills', how many of them came while it was 'writing', how often the work 'finished', the names
    of what was 'differing' then, and of ends with another code than 0 what they 'failed' with.
  """
  counts = {'kills': 0, 'writing': 0, 'finished': 0, 'differing': [], 'failed': []}
  # All in a folder of one name, which is a part of some results. The second time finds its programs
  # compiled, and tells how long it takes.
  killed = folder / 'trial'
  expected = None
  for _ in range(whole):
    work.begin(inputs, killed)
    seconds = _finish(work, killed)
    expected = expected or work.result(killed)
    _compare(work, killed, expected, counts)
  draw = random.Random(seed)
  for attempt in range(3 * kills + 5):
    if counts['kills'] == kills:
      break
    if not killed.exists():
      work.begin(inputs, killed)
    process = start(work, killed)
    wait = draw.uniform(*work.moments) * seconds
    _wait(process, work, killed, wait, for_writing=attempt % 2 == 0)
    counts['writing'] += is_writing(work, killed)
    process.kill()
    process.join()
    if process.exitcode > 0:
      counts['failed'].append((killed / 'stderr').read_text()[-2000:])
      return counts
    counts['kills'] += process.exitcode < 0
    if process.exitcode == 0:  # It came to its end before; the next kills are of a new beginning.
      _compare(work, killed, expected, counts)
  if killed.exists():
    _finish(work, killed)
    _compare(work, killed, expected, counts)
  return counts


def _compare(work, folder, expected, counts) -> None:
  counts['finished'] += 1
  counts['differing'] += differences(expected, work.result(folder))
  left = [path for pattern in work.writing for path in folder.glob(pattern)]
  counts['differing'] += [f'left over: {path.name}' for path in left]
  shutil.rmtree(folder)


def _finish(work: Work, folder: pathlib.Path) -> float:
  began = time.monotonic()
  process = start(work, folder)
  process.join()
  if process.exitcode != 0:
    raise RuntimeError((folder / 'stderr').read_text()[-2000:])
  return time.monotonic() - began


def main(argv: list[str]) -> int:
  from molt_jax.config.fields import at_least
  from molt_jax.runtime.command_line import parse
  from molt_jax.runtime.flags import Flag, choice

  legal = tuple(works(pathlib.Path()))
  flags, _ = parse(
    'python tools/kills.py',
    'Kill commands at random moments.',
    (
      Flag('work', 'kinds of work', legal, rule=choice(*legal), many=True),
      Flag('kills', 'of each kind', 20, type=int, rule=at_least(1)),
      Flag('seed', 'of the moments', 0, type=int, rule=at_least(0)),
    ),
    argv,
  )
  names = flags.work
  with tempfile.TemporaryDirectory(prefix='kills_') as folder:
    folder = pathlib.Path(folder)
    os.environ.update(tiny_run.environment(folder / 'xla'))
    make_inputs(folder / 'inputs', names)
    failed = False
    for name in names:
      (folder / name).mkdir()
      work = works(folder / 'inputs')[name]
      counts = trial(work, folder / 'inputs', folder / name, kills=flags.kills, seed=flags.seed)
      print(json.dumps({'work': name, **counts}), flush=True)
      failed |= bool(counts['differing'] or counts['failed'])
      shutil.rmtree(folder / name)
  return int(failed)


if __name__ == '__main__':
  from molt_jax.runtime.command_line import command

  sys.exit(command(main)(sys.argv[1:]))
