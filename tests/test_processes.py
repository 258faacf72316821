"""One device, several, and several processes: the same run, checkpoints that go from one to the
other, no example lost or seen twice.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from molt_jax import train
from molt_jax.config import resolved
from molt_jax.errors import UserError
from molt_jax.runtime import logbook, processes, sharding
from molt_jax.runtime.signals import Interrupted

STEPS = 6  # An epoch.
# Trains as the command line does, notes the indices of the rows it is given, and may send itself
# SIGTERM when it gets batch number `stop_at`.
TRAIN = """
import json, pathlib, signal, sys
from molt_jax import train
from molt_jax.runtime import sharding
preset, note, workdir, stop_at = sys.argv[1:]
put, seen = sharding.put_batch, []
def noted(batch, mesh):
  if 'index' in batch and 'keep' not in batch:
    seen.append(batch['index'].tolist())
    if len(seen) == int(stop_at):
      signal.raise_signal(signal.SIGTERM)
  return put(batch, mesh)
sharding.put_batch = noted
code = train.main([f'--config={preset}', f'--workdir={workdir}'])
pathlib.Path(note).write_text(json.dumps(seen))
sys.exit(code)
"""
# Fills a feature store; notes the inputs it computed itself, those it finds, and what it finds
# unusable.
FILL = """
import json, pathlib, sys
from molt_jax import config
from molt_jax.features import opening, store
from molt_jax.runtime import processes
from molt_jax.training.assembly import assemble
preset, note = sys.argv[1:]
processes.join()
assembly = assemble(config.load_config(preset))
add, added = store.FeatureStore.add, []
store.FeatureStore.add = lambda self, key, x: (added.append(key), add(self, key, x))
wanted = {split: (source, source.present) for split, source in assembly.data.splits.items()}
_, stored = opening.open_features(assembly.extraction, wanted)
found = {split: {m: s.keys for m, s in states.items()} for split, states in stored.items()}
pathlib.Path(note).write_text(json.dumps([added, found, assembly.preprocess.report.line()]))
"""


def _config(make_tiny_config, data, model):
  config = make_tiny_config()
  config.mesh.data, config.mesh.model = data, model
  config.train.batch_size, config.train.epochs, config.train.eval_every, config.train.log_every = (
    8,
    1.0,
    3,
    1,
  )
  config.text.max_tokens = 24
  return config


def _start_two(script, config, folder, *arguments):
  """Runs a script in two processes with two devices each, as script(preset, note, *arguments of its
  own); returns [(exit code, stderr, note)].
  """
  folder.mkdir()
  (folder / 'config.json').write_text(resolved.to_json(config))
  (folder / 'preset.py').write_text(
    'import pathlib\nfrom molt_jax.config import from_json\n'
    'def get_config():\n  return '
    'from_json(pathlib.Path(__file__).with_name("config.json").read_text())\n'
  )
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  started, notes = [], [folder / f'{index}.json' for index in range(2)]
  for index, note in enumerate(notes):
    env = os.environ | {
      'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=4', 'device_count=2'),
      processes.ADDRESS: address,
      processes.COUNT: '2',
      processes.INDEX: str(index),
    }
    argv = [
      sys.executable,
      '-c',
      script,
      folder / 'preset.py',
      note,
      *(str(argument[index]) for argument in arguments),
    ]
    started.append(
      subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )
  try:
    errors = [process.communicate(timeout=900)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  if not all(note.exists() for note in notes):
    pytest.fail('\n\n'.join(errors), pytrace=False)
  return [
    (process.returncode, error, json.loads(note.read_text()))
    for process, error, note in zip(started, errors, notes, strict=True)
  ]


def _note(monkeypatch, stop_at=0):
  """Returns a list that gets the indices of each training batch that this process takes; batch
  number `stop_at` sends it SIGTERM.
  """
  put, seen = sharding.put_batch, []

  def noted(batch, mesh):
    if 'index' in batch and 'keep' not in batch:
      seen.append(batch['index'].tolist())
      if len(seen) == stop_at:
        signal.raise_signal(signal.SIGTERM)
    return put(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', noted)
  return seen


def _assert_epoch(batches):
  """Every example of the training split once."""
  assert sorted(row for rows in batches for row in rows) == list(range(48))


def _assert_as(workdir: pathlib.Path, whole: pathlib.Path, final_state):
  """The same losses at every step, the same validations, final state and scores, to float32's
  rounding.
  """
  lines = [
    [line for line in logbook.read(folder) if line['kind'] == 'train']
    for folder in (workdir, whole)
  ]
  assert [line['step'] for line in lines[0]] == list(range(1, STEPS + 1))
  for name in ('loss', 'loss_ce', 'loss_distill', 'loss_cca', 'grad_norm'):
    np.testing.assert_allclose(
      *([line[name] for line in run] for run in lines), rtol=1e-5, atol=1e-5, err_msg=name
    )
  states = [final_state(folder)[0] for folder in (workdir, whole)]
  assert states[0].keys() == states[1].keys() and final_state(workdir)[1] == final_state(whole)[1]
  for name in states[0]:
    if 'params' in name:
      np.testing.assert_allclose(
        *(np.frombuffer(state[name], np.float32) for state in states),
        rtol=1e-3,
        atol=1e-4,
        err_msg=name,
      )
  results = [
    json.loads((folder / 'evaluation.json').read_text())['results'] for folder in (workdir, whole)
  ]
  for name in results[0]:
    assert results[0][name] == pytest.approx(results[1][name], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope='module')
def whole(tmp_path_factory, make_tiny_config):
  """The folder of a run on one device."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  train.train(_config(make_tiny_config, 1, 1), workdir)
  return workdir


def test_two_processes_then_one_are_the_run_of_one_device(
  whole, make_tiny_config, tmp_path, monkeypatch, final_state
):
  """Two processes of two devices until one of them gets a signal, then one process of two."""
  four, two = _config(make_tiny_config, 2, 2), _config(make_tiny_config, 1, 2)
  run = tmp_path / 'run'
  stopped = _start_two(TRAIN, four, tmp_path / 'a', (run, run), (0, 2))
  assert [code for code, _, _ in stopped] == [128 + signal.SIGTERM] * 2, stopped
  (_, first_error, first), (_, second_error, second) = stopped
  assert 'stopped at step 4 of 6, saved' in first_error, first_error
  assert 'stopped' not in second_error, 'one speaks'
  assert [line['step'] for line in logbook.read(run) if line['kind'] == 'train'] == [1, 2, 3, 4]
  rest = _note(monkeypatch)
  train.train(two, run)
  _assert_as(run, whole, final_state)
  _assert_epoch(first[:4] + second[:4] + rest)


@pytest.mark.slow  # The other way round.
def test_one_process_then_two_are_the_run_of_one_device(
  whole, make_tiny_config, tmp_path, monkeypatch, final_state
):
  """One process of four devices until it gets a signal, then two processes of two."""
  four = _config(make_tiny_config, 2, 2)
  with monkeypatch.context() as patch:
    first = _note(patch, stop_at=2)
    with pytest.raises(Interrupted):
      train.train(four, tmp_path / 'run')
  run = tmp_path / 'run', tmp_path / 'run'
  finished = _start_two(TRAIN, four, tmp_path / 'b', run, (0, 0))
  assert [code for code, _, _ in finished] == [0, 0], finished
  _assert_as(tmp_path / 'run', whole, final_state)
  _assert_epoch([*first[:2], *finished[0][2], *finished[1][2]])


def test_two_processes_fill_one_store_together(make_tiny_config, tmp_path):
  config = _config(make_tiny_config, 2, 2)
  config.features.store, config.dataset.path = str(tmp_path / 'store'), str(tmp_path / 'table')
  shutil.copytree(make_tiny_config().dataset.path, config.dataset.path)
  (tmp_path / 'table' / 'images' / 'train_0.png').write_bytes(b'broken')
  filled = _start_two(FILL, config, tmp_path / 'fill')
  assert [code for code, _, _ in filled] == [0, 0], filled
  (added_0, found_0, report_0), (added_1, found_1, report_1) = (note for _, _, note in filled)
  assert added_0 and added_1 and not set(added_0) & set(added_1), 'nothing is computed twice'
  assert found_0 == found_1 and {
    key
    for split in found_0.values()
    for keys in split.values()
    for several in keys
    for key in several
  } == {*added_0, *added_1}
  assert (
    report_0 == report_1
    and report_0.startswith('1 unusable image')
    and not found_0['train']['image'][0]
  )


# ---- The parts -----------------------------------------------------------------------------------


class _Device:
  def __init__(self, process_index):
    self.process_index = process_index


class _Mesh:
  """Devices by process index, [data][model]."""

  def __init__(self, rows):
    self.devices = np.array([[_Device(p) for p in row] for row in rows])
    self.shape = dict(zip(('data', 'model'), self.devices.shape, strict=True))


@pytest.mark.parametrize(
  'rows, parts',
  [
    ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
    ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
    ([[0, 1]], [(0, 1), (0, 1)]),
    ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_each_process_reads_the_rows_of_its_devices(rows, parts, monkeypatch):
  for process, part in enumerate(parts):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    assert tuple(sharding.data_shard(_Mesh(rows)).values()) == part


def test_devices_that_are_no_equal_part_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with pytest.raises(UserError, match='no equal part of the batch'):
    sharding.data_shard(_Mesh([[0, 0], [0, 1], [1, 1]]))


def test_lines_are_said_once():
  assert (
    processes.lines_of_all('2 unusable images: é') == ['2 unusable images: é']
    and processes.lines_of_all('') == []
  )


@pytest.mark.parametrize(
  'address, count, index, words',
  [
    ('127.0.0.1:1', '2', '', "JAX_PROCESS_ID is ''"),
    ('127.0.0.1:1', 'two', '0', "JAX_NUM_PROCESSES is 'two'"),
    ('127.0.0.1:1', '2', '2', 'JAX_PROCESS_ID is 2, JAX_NUM_PROCESSES is 2'),
    ('127.0.0.1', '2', '0', "'127.0.0.1' is no address; give HOST:PORT"),
  ],
)
def test_an_incomplete_description_of_the_processes_is_refused(
  monkeypatch, capsys, address, count, index, words
):
  monkeypatch.setenv(processes.ADDRESS, address)
  monkeypatch.setenv(processes.COUNT, count)
  monkeypatch.setenv(processes.INDEX, index)
  preset = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
  assert train.main([f'--config={preset}', '--workdir=y']) == 2
  assert words in capsys.readouterr().err


# ---- Another process is gone ---------------------------------------------------------------------

# Joins, and does what its arguments say: process 0 the first, process 1 the second.
PAIR = """
import os, signal, sys, time
from molt_jax.errors import UserError
from molt_jax.runtime import command_line, lost, processes
lost.HEARTBEAT_SECONDS = 4
def fail():
  raise UserError('something to mend')
DEEDS = {
    'wait': lambda: processes.wait('never comes'),
    'work': lambda: time.sleep(300),
    'die': lambda: os.kill(os.getpid(), signal.SIGKILL),
    'fail': fail,
}
@command_line.command
def main(argv):
  processes.join()
  lost.tell_step(lambda: 40)
  processes.wait('all are here')
  DEEDS[argv[int(os.environ[processes.INDEX])]]()
sys.exit(main(sys.argv[1:]))
"""
GONE = (
  'error: another process of this run is gone; start all of them again, and the same command '
  'goes on from step 40\n'
)


def _start_pair(*arguments):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  return [
    subprocess.Popen(
      [sys.executable, '-c', PAIR, *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ
      | {processes.ADDRESS: address, processes.COUNT: '2', processes.INDEX: str(index)},
    )
    for index in range(2)
  ]


@pytest.mark.parametrize(
  'deeds, codes, messages',
  [
    # Process 0 runs the service by which the others are watched.
    (('die', 'work'), (-signal.SIGKILL, 75), ('', GONE)),
    # Nothing but the heartbeats that do not come tells of the end of process 1 here,
    (('work', 'die'), (75, -signal.SIGKILL), (GONE, '')),
    # and a broken connection here.
    (('wait', 'fail'), (75, 2), (GONE, 'error: something to mend\n')),
    (('fail', 'fail'), (2, 2), ('error: something to mend\n',) * 2),
  ],
)
def test_a_process_that_is_left_alone_ends_with_one_line_and_no_stack(deeds, codes, messages):
  pair = _start_pair(*deeds)
  try:
    errors = [process.communicate(timeout=240)[1] for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert tuple(process.returncode for process in pair) == codes, errors
  assert tuple(errors) == messages
