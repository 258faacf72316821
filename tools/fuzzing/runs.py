"""Damaged folders of runs: a bit, a cut, a deletion, an edit in any file, then a command opens it.

Refused in one line, or everything that was read is what was saved. What nothing protects are
numbers in the JSON files that people read (`PLAIN`): the outcome is `plain` where one was changed.
"""

import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from molt_jax import train
from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.errors import UserError
from molt_jax.evaluation import trained
from molt_jax.reporting import runs as report_runs
from molt_jax.runtime import logbook
from molt_jax.training import checkpoint, checkpoint_files, losses, resuming, train_state
from molt_jax.training.assembly import assemble
from molt_jax.training.workdir import check_config

COLOURS = {'red': (200, 30, 30), 'green': (30, 180, 40), 'blue': (40, 60, 210)}
PLAIN = ('evaluation.json', 'metrics.jsonl', 'run.json', 'mistakes.json')
MAX_LINES = 3  # On stderr: what is said beside the error.


def make_table(folder: pathlib.Path) -> pathlib.Path:
  """Writes a small data set of coloured squares."""
  (folder / 'images').mkdir(parents=True)
  for split, count in (('train', 12), ('validation', 3), ('test', 6)):
    lines = ['image,text,label']
    for n in range(count):
      name = list(COLOURS)[n % 3]
      Image.new('RGB', (16, 16), COLOURS[name]).save(folder / f'images/{split}_{n}.png')
      lines.append(f'images/{split}_{n}.png,a {name} square,{name}')
    (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')
  return folder


def make_config(table: pathlib.Path):
  """Returns a config that trains in seconds."""
  config = CLASSIFIER.default()
  config.dataset.path = str(table)
  config.text.max_tokens, config.text.padding = 8, 'max_tokens'
  config.backbones.text.path = 'random:llama-tiny'
  config.backbones.image.path = 'random:clip-vit-tiny'
  config.mesh.data, config.platform = 1, 'cpu'
  config.molt.layers, config.molt.width, config.classifier.hidden = '-1:', 8, 8
  config.cca.num_directions, config.cca.window = 4, 32
  config.train.batch_size, config.eval.batch_size = 4, 8
  config.train.epochs, config.train.eval_every, config.train.log_every = 1.0, 2, 1
  return CLASSIFIER.validate(config)


@functools.cache
def made() -> pathlib.Path:
  """Returns a folder with a small trained run, made once a process."""
  root = pathlib.Path(tempfile.mkdtemp(prefix='fuzz_run_'))
  train.train(make_config(make_table(root / 'table')), root / 'run')
  return root / 'run'


# ---- Damage --------------------------------------------------------------------------------------


def flip(rng, path: pathlib.Path) -> None:
  """Flips one to three bits."""
  content = bytearray(path.read_bytes())
  for _ in range(rng.integers(1, 4)):
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)


def cut(rng, path: pathlib.Path) -> None:
  """Leaves the first part of a file."""
  content = path.read_bytes()
  path.write_bytes(content[: rng.integers(len(content))])


def overwrite(rng, path: pathlib.Path) -> None:
  """Writes zeros or noise over a stretch."""
  content = bytearray(path.read_bytes())
  start, length = rng.integers(len(content)), rng.integers(1, 600)
  noise = rng.integers(0, 256 if rng.random() < 0.5 else 1, length, np.uint8).tobytes()
  content[start : start + length] = noise[: len(content) - start]
  path.write_bytes(content)


def delete(rng, path: pathlib.Path) -> None:
  """Deletes a file, or the folder that it is in."""
  if rng.random() < 0.5 or path.parent.name == 'run':
    path.unlink()
  else:
    shutil.rmtree(path.parent)


def replace(rng, path: pathlib.Path) -> None:
  """Puts a folder, nothing, or another file of the run in the place of a file."""
  others = [other for other in _files(_root(path)) if other != path]
  content = others[rng.integers(len(others))].read_bytes()
  path.unlink()
  how = rng.integers(3)
  if how == 0:
    path.mkdir()
  else:
    path.write_bytes(content if how == 1 else b'')


def edit(rng, path: pathlib.Path) -> None:
  """Changes a value somewhere in a JSON file, or flips bits where it is none."""
  try:
    lines = path.read_text().splitlines()
    whole = lines if path.suffix == '.jsonl' else ['\n'.join(lines)]
    number = rng.integers(len(whole))
    tree = json.loads(whole[number])
  except (ValueError, IndexError):
    flip(rng, path)
    return
  whole[number] = json.dumps(_edited(rng, tree))
  path.write_text('\n'.join(whole) + '\n')


VALUES = (
  None,
  True,
  -1,
  0,
  7,
  1e30,
  float('nan'),
  10**40,
  '',
  'x',
  'latest',
  '/nowhere',
  '\x00',
  [],
  [1],
  {},
  {'a': {'b': 1}},
)


def _edited(rng, tree: Any) -> Any:
  keys = list(tree) if isinstance(tree, dict) else []
  keys = range(len(tree)) if isinstance(tree, list) else keys
  if not keys or rng.random() < 0.15:
    return VALUES[rng.integers(len(VALUES))]
  key = keys[rng.integers(len(keys))]
  if isinstance(tree, dict) and rng.random() < 0.15:
    return {k: v for k, v in tree.items() if k != key} if rng.random() < 0.5 else {**tree, 'new': 1}
  copy = dict(tree) if isinstance(tree, dict) else list(tree)
  copy[key] = _edited(rng, tree[key])
  return copy


DAMAGES = (flip, cut, overwrite, delete, replace, edit)


def _root(path: pathlib.Path) -> pathlib.Path:
  return next(parent for parent in path.parents if parent.name == 'run')


def _files(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Every file with content that a command may read."""
  found = (path for path in sorted(workdir.rglob('*')) if path.is_file() and path.stat().st_size)
  return [path for path in found if 'events' not in path.parts]


# ---- Opening -------------------------------------------------------------------------------------


def _leaves(tree: Any) -> dict[str, bytes]:
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in found}


def _own(config: Any) -> list[str]:
  """The fields of a config that are not free to change in use."""
  changed = resolved.differences(CLASSIFIER.default(), config)
  return [line for line in changed if line.split(':')[0] not in resuming.FREE_IN_USE]


@functools.cache
def _assembly():
  return assemble(CLASSIFIER.read_run(made()))


def use(workdir: pathlib.Path) -> Any:
  """Opens a run as evaluate and predict do."""
  run = trained.open(workdir)
  run.check_towers()
  arrays = _leaves(run.variables())
  labels = trained.open_split(run, 'test')[0].labels
  return {'config': _own(run.config), 'meta': run.meta, 'arrays': arrays, 'labels': list(labels)}


class _Position:
  def set_state(self, position: Any) -> None:
    self.state = position


def resume(workdir: pathlib.Path) -> Any:
  """Opens a run as training does to go on."""
  assembly = _assembly()
  config, method = assembly.config, assembly.method
  check_config(config, workdir)
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    saved = checkpoints.meta()
    resumed, _ = resuming.resume(assembly, checkpoints, data_changed=False)
    tx = train_state.make_optimizer(config, 3)
    init_memory = functools.partial(losses.make_objective(assembly).init, method)
    state = train_state.create(method.init, tx, init_memory, seed=config.seed, mesh=assembly.mesh)
    state, position = checkpoints.restore(state) if saved else (None, None)
    checkpoints.move(iterator := _Position(), position) if saved else None
    logbook.read(workdir)
    best = checkpoints.best_score()
  finally:
    checkpoints.close()
  return {
    'meta': saved,
    'arrays': _leaves(state),
    'position': iterator.state if saved else None,
    'labels': list(resumed.data.splits['train'].labels),
    'best': best,
  }


def report(workdir: pathlib.Path) -> Any:
  """Opens a run as the report does."""
  (run,) = report_runs.read([workdir])
  arrays = {}
  for name in ('predictions', 'pairs'):
    found = getattr(run, name)
    arrays[name] = found and {key: np.asarray(x).tobytes() for key, x in vars(found).items()}
  return {
    'config': _own(run.config),
    'arrays': arrays,
    'evaluation': run.evaluation,
    'log': run.log,
    'about': run.about,
    'mistakes': run.mistakes,
  }


ENTRIES: dict[str, Callable[[pathlib.Path], Any]] = {'use': use, 'resume': resume, 'report': report}


@functools.cache
def saved(entry: str) -> Any:
  """Returns what an entry reads of the whole run."""
  return ENTRIES[entry](made())


def outcome(workdir: pathlib.Path, entry: str, damaged: pathlib.Path) -> str:
  """Opens a damaged run.

  Raises:
    AssertionError: what was read is not what was saved, or an error is not one line.
  """
  expected = saved(entry)
  try:
    with quiet() as lines:
      found = ENTRIES[entry](workdir)
  except UserError as error:
    assert '\n' not in str(error), error
    assert 'tensorstore' not in str(error).lower() and len(str(error)) < 1500, error
    return 'refused'
  finally:
    assert len(lines) <= MAX_LINES, [line[:200] for line in lines[:9]]
  other = [key for key in expected if _differ(found[key], expected[key])]
  if not other:
    return 'harmless'
  left = [
    checkpoint_files.find(workdir, (kind,))
    for kind in (checkpoint_files.LATEST, checkpoint_files.BEST)
  ]
  if None in left:  # A whole step was deleted: the other one is read, which is said.
    return 'other checkpoint'
  # A file that is gone is not read; what is then not shown is not shown wrong.
  beside = damaged.name in PLAIN or not damaged.is_file()
  assert beside and entry == 'report' and 'config' not in other, (entry, other, damaged)
  return 'plain' if damaged.is_file() else 'missing'


def _differ(one: Any, two: Any) -> bool:
  texts = [json.dumps(value, sort_keys=True, default=repr) for value in (one, two)]
  return texts[0] != texts[1]


class quiet:
  """Collects the lines that a block writes to the process's stderr, from Python or not."""

  def __enter__(self):
    self._file, self._kept, self.lines = tempfile.TemporaryFile(), os.dup(2), []
    os.dup2(self._file.fileno(), 2)
    return self.lines

  def __exit__(self, *exc):
    os.dup2(self._kept, 2)
    os.close(self._kept)
    self._file.seek(0)
    self.lines += self._file.read().decode(errors='replace').splitlines()
    self._file.close()


def trial(rng: np.random.Generator, folder: pathlib.Path) -> dict[str, int]:
  """Damages one file of a run and opens it by one entry."""
  workdir = pathlib.Path(shutil.copytree(made(), folder / 'run'))
  files = _files(workdir)
  # Half of the trials in the checkpoints, half in the few files beside them.
  inside = bool(rng.random() < 0.5)
  kept = [path for path in files if ('checkpoints' in path.parts) == inside]
  path = kept[rng.integers(len(kept))]
  damage = DAMAGES[rng.integers(len(DAMAGES))]
  damage(rng, path)
  entry = list(ENTRIES)[rng.integers(len(ENTRIES))]
  return {f'{entry}, {outcome(workdir, entry, path)}': 1}
