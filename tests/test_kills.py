"""SIGKILL at random moments, many of them during a save: the run that comes out is the
uninterrupted one, bit for bit.

More kills than the usual two: pytest tests/test_kills.py --kills=20
"""

import multiprocessing
import random
import time

import pytest

from molt_jax import train
from molt_jax.config import resolved
from molt_jax.runtime import logbook
from molt_jax.training import checkpoint_files


@pytest.fixture(scope='module')
def start(tmp_path_factory, make_tiny_config):
  """Returns a function that starts the train command in a process of its own, in the given
  folder.
  """
  config = make_tiny_config()
  config.method, config.missing.views, config.missing.distill_weight = 'late_fusion', False, 0.0
  config.train.epochs, config.train.eval_every = 2.0, 6
  config.train.save_every, config.train.log_every = 2, 1
  preset = tmp_path_factory.mktemp('preset') / 'preset.py'
  preset.with_name('config.json').write_text(resolved.to_json(config))
  preset.write_text(
    'import pathlib\nfrom molt_jax.config import from_json\n'
    'def get_config():\n  return '
    'from_json(pathlib.Path(__file__).with_name("config.json").read_text())\n'
  )
  processes = multiprocessing.get_context('forkserver')
  processes.set_forkserver_preload(['molt_jax.train'])

  def call(workdir):
    process = processes.Process(
      target=train.main, args=([f'--config={preset}', f'--workdir={workdir}'],)
    )
    process.start()
    return process

  return call


def _saving(workdir):
  return any('tmp' in path.name for path in (workdir / 'checkpoints').glob('*/*'))


def _wait(process, workdir, step, seconds, *, during_save):
  """Waits until the moment to kill: seconds after a step was saved, or then at the next save."""
  while process.is_alive() and _latest(workdir) < step:
    time.sleep(0.002)
  time.sleep(seconds)
  while during_save and process.is_alive() and not _saving(workdir):
    time.sleep(0.0005)


def _latest(workdir):
  folder = workdir / 'checkpoints' / checkpoint_files.LATEST
  return max((int(path.name) for path in folder.glob('*') if path.name.isdigit()), default=0)


def test_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(
  start, tmp_path, same_run, pytestconfig
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  process = start(whole)
  process.join()
  assert process.exitcode == 0
  draw = random.Random(0)
  num_kills, kills, saves = int(pytestconfig.getoption('kills')), 0, 0
  while kills < num_kills:
    before = _latest(killed)
    process = start(killed)
    during_save = kills % 2 == 0
    step, seconds = before + draw.randrange(0, 14, 2), draw.uniform(0.0, 0.3)
    _wait(process, killed, step, seconds, during_save=during_save)
    saves += _saving(killed)
    process.kill()
    process.join()
    kills += 1
    assert _latest(killed) >= before
    assert [
      line['step']
      for line in logbook.read(killed)
      if line['kind'] == 'train' and line['step'] <= before
    ] == list(range(1, before + 1))
    if (
      killed / 'evaluation.json'
    ).exists():  # It came to its end: begin anew for the remaining kills.
      same_run(whole, killed)
      killed = tmp_path / f'killed_{kills}'
  assert saves >= num_kills // 4, 'too few kills landed in a save to mean anything'
  process = start(killed)
  process.join()
  assert process.exitcode == 0
  same_run(whole, killed)
