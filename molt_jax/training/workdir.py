"""The folder of a run: tried by writing before anything is loaded, and locked by the training in
it.

The lock is the kernel's (flock) and ends with the process that holds it, however that ends. Only
training takes it: an evaluation or a report may be made beside.
"""

import contextlib
import datetime
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import ml_collections

from molt_jax import errors
from molt_jax.config import resolved
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console, processes
from molt_jax.training import resuming

LOCK = '.lock'
# What commands write there beside config.json and checkpoints/.
WRITTEN = (
  'metrics.jsonl',
  'events',
  'evaluation.json',
  'run.json',
  'not_finite.json',
  'predictions.npz',
  'mistakes.json',
  'pairs.npz',
  'calibration.npz',
  'pair_evaluation.json',
  'tower',
)


def try_out(folder: pathlib.Path, flag: str = '--workdir') -> None:
  """Raises UserError unless files can be written to the folder, which is there."""
  atomic.try_out(folder, tried=f'{flag}: {str(folder)!r} cannot be written')


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
  """Makes the folder of a run and keeps other training out of it during the block.

  A folder that was made here and in which no run began is removed again.

  Raises:
    UserError: it cannot be made or written, another process trains in it, or it holds something
      else under the names of a run's files.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(_made(folder))
    _check_ours(folder)
    try_out(folder)
    with errors.explained(f'--workdir: {str(folder)!r} cannot be locked'):
      stack.enter_context(_locked(folder))
    yield


@contextlib.contextmanager
def _made(folder: pathlib.Path) -> Iterator[None]:
  new = []
  try:
    with errors.explained(f'--workdir: {str(folder)!r} cannot be made'):
      if not str(folder).isprintable():
        _check_encodable(folder)
      if folder.exists() and not folder.is_dir():
        raise UserError(f'--workdir: {str(folder)!r} is a file; give a folder')
      new = [path for path in (folder, *folder.parents) if not path.exists()]
      folder.mkdir(parents=True, exist_ok=True)
    yield
  finally:
    with contextlib.suppress(OSError):  # Not empty: a run began.
      for path in new:
        path.rmdir()


def _check_encodable(folder: pathlib.Path) -> None:
  try:
    os.fspath(folder).encode()
  except UnicodeEncodeError as error:  # TensorStore, which writes checkpoints, takes no other.
    raise UserError(
      f'--workdir: {str(folder)!r} is not UTF-8; give a folder whose name is'
    ) from error


def _check_ours(folder: pathlib.Path) -> None:
  """Raises UserError where a run would overwrite, or trip over, what is no run's."""
  checkpoints = folder / 'checkpoints'
  with errors.explained(f'--workdir: {str(checkpoints)!r} cannot be read'):
    for part in (checkpoints, *checkpoints.glob('*')):
      if part.exists() and not part.is_dir():
        raise UserError(f'--workdir: {str(part)!r} is a file and no folder; move it away')
    strange = [path for path in checkpoints.glob('*/*') if not _is_checkpoint(path)]
    began = (folder / 'config.json').exists() or any(checkpoints.glob('*/[0-9]*'))
    others = [] if began else [name for name in WRITTEN if (folder / name).exists()]
  if strange:
    raise UserError(f'--workdir: {str(strange[0])!r} is no checkpoint of a run; move it away')
  if others:
    raise UserError(
      f'--workdir: {str(folder)!r} holds {", ".join(others[:3])} and no run (neither config.json '
      'nor a checkpoint); give a new or empty folder'
    )


def _is_checkpoint(path: pathlib.Path) -> bool:
  """Whether Orbax knows it, or is not disturbed by it: a step, an unfinished one, a hidden file."""
  is_step = path.name.isdecimal() and path.is_dir()
  return is_step or '.orbax-checkpoint-tmp' in path.name or path.name.startswith('.')


# ---- The lock ------------------------------------------------------------------------------------

_held_descriptors: set[int] = set()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  descriptor = _lock(folder)
  _held_descriptors.add(descriptor)
  try:
    yield
  finally:
    _held_descriptors.discard(descriptor)
    with contextlib.suppress(OSError):
      (folder / LOCK).unlink()
    os.close(descriptor)


def _lock(folder: pathlib.Path) -> int:
  while True:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = _holder(os.pread(descriptor, 4096, 0))
      os.close(descriptor)
      raise UserError(
        f'--workdir: {holder} trains in {str(folder)!r}; wait for it, stop it, or give another '
        'folder'
      ) from None
    except OSError as error:
      console.log(
        f'{folder} cannot be locked ({error.strerror}): see to it that nothing else trains in it'
      )
    if _is_at(descriptor, folder / LOCK):
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, _own_name(), 0)
      return descriptor
    os.close(descriptor)  # Its last holder removed it between our opening and our locking it.


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except FileNotFoundError:
    return False


def _own_name() -> bytes:
  since = datetime.datetime.now().isoformat(' ', 'minutes')
  return f'process {os.getpid()} on {socket.gethostname()} (since {since})'.encode()


def _holder(content: bytes) -> str:
  text = content.decode(errors='replace')
  # Empty where it has just taken the lock and not yet said its name.
  return text if text.startswith('process ') and text.isprintable() else 'another process'


def _let_go() -> None:
  """In a forked child: the lock shall end with its parent."""
  for descriptor in _held_descriptors:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, descriptor)
    os.close(nothing)
  _held_descriptors.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def working_in(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes the folder of a run and keeps other training out of it; see `held`.

  Args:
    config: of the run.
    folder: where it is.

  Raises:
    UserError: as `held`, or the folder holds a run with another config.
  """
  with held(folder) if processes.is_main() else contextlib.nullcontext():
    check_config(config, folder)
    yield folder


def check_config(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Raises UserError if the folder holds a run with another config."""
  if not (folder / 'config.json').exists():
    return
  begun = resuming.schema_of(config).read_run(folder)
  changed = resolved.differences(begun, as_begun(config, folder))
  changed = [line for line in changed if line.split(':')[0] not in resuming.FREE_ON_RESUME]
  if resuming.has_more_epochs(begun, config):
    changed = [line for line in changed if line.split(':')[0] not in resuming.LENGTH]
  if changed:
    raise UserError(
      f'--workdir: {str(folder)!r} holds a run with another config ({"; ".join(changed)}); give '
      'another folder or that config'
    )


def as_begun(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """Returns the config with what the run in the folder, if there is one, chose from its data."""
  if not (folder / 'config.json').exists():
    return config
  return resolved.with_choices(config, resuming.schema_of(config).read_run(folder))


def claim(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """Writes config.json; called when nothing is left that the user could have to mend first."""
  atomic.write(folder / 'config.json', resolved.to_json(config) + '\n')
