"""Files that are whole or not there: whatever step of writing fails, and whatever a kill leaves."""

import errno
import os
import subprocess
import sys

import pytest

from molt_jax import errors
from molt_jax.errors import UserError
from molt_jax.runtime import atomic

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fails(*args, **kwargs):
  raise FULL


class _FullFile:
  """A file to which nothing can be written."""

  def __init__(self, file):
    self._file = file

  def __getattr__(self, name):
    return _fails if name in ('write', 'flush') else getattr(self._file, name)

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._file.close()


def _no_content(monkeypatch):
  import builtins

  opened = builtins.open

  def open_full(path, mode='r', *args, **kwargs):
    file = opened(path, mode, *args, **kwargs)
    return _FullFile(file) if mode == 'xb' else file

  monkeypatch.setattr(builtins, 'open', open_full)


STEPS = {
  'opening': lambda patch: patch.setattr('builtins.open', _fails),
  'writing': _no_content,
  'synchronising': lambda patch: patch.setattr(os, 'fsync', _fails),
  'renaming': lambda patch: patch.setattr(os, 'replace', _fails),
}


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize(
  'write',
  [
    lambda folder: atomic.write(folder / 'file', 'new'),
    lambda folder: atomic.write(folder / 'file', b'new', tried='the thing cannot be kept'),
    lambda folder: atomic.try_out(folder, tried='the thing cannot be kept'),
  ],
  ids=['text', 'bytes', 'trial'],
)
def test_a_write_that_fails_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, step, write):
  (tmp_path / 'file').write_text('old')
  with monkeypatch.context() as patch:
    STEPS[step](patch)
    if step == 'renaming' and 'try_out' in write.__code__.co_names:
      return  # Nothing is renamed.
    with pytest.raises(UserError, match='No space left on device.; make room') as error:
      write(tmp_path)
  assert '\n' not in str(error.value)
  assert str(error.value).startswith((str(tmp_path / 'file'), 'the thing cannot be kept'))
  assert [path.name for path in tmp_path.iterdir()] == ['file']
  assert (tmp_path / 'file').read_text() == 'old'


@pytest.mark.parametrize('step', ['synchronising', 'renaming'])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, step):
  with atomic.folder(tmp_path / 'folder') as folder:
    (folder / 'part').write_text('old')
  with monkeypatch.context() as patch:
    STEPS[step](patch)
    with (
      pytest.raises(UserError, match='folder cannot be written'),
      atomic.folder(tmp_path / 'folder') as folder,
    ):
      (folder / 'part').write_text('new')
  assert [path.name for path in tmp_path.iterdir()] == ['folder']
  assert (tmp_path / 'folder' / 'part').read_text() == 'old'
  with atomic.folder(tmp_path / 'folder') as folder:
    (folder / 'other').write_text('new')
  assert [path.name for path in tmp_path.glob('**/*')] == ['folder', 'other']


def test_a_block_that_fails_writes_nothing(tmp_path):
  with pytest.raises(KeyError), atomic.writing(tmp_path / 'file') as file:
    file.write(b'half')
    raise KeyError
  assert list(tmp_path.iterdir()) == []


def test_halves_of_surrogate_pairs_are_escaped(tmp_path):
  atomic.write(tmp_path / 'file', 'naïve \ud83d')
  assert (tmp_path / 'file').read_bytes() == 'naïve '.encode() + rb'\ud83d'


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
  code = (
    'import os, pathlib, signal, sys\nfrom molt_jax.runtime import atomic\n'
    'with atomic.writing(pathlib.Path(sys.argv[1]) / "file") as file:\n'
    '  file.write(b"half")\n  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  subprocess.run([sys.executable, '-c', code, tmp_path], check=False)
  (left,) = tmp_path.iterdir()
  assert atomic._NAME.fullmatch(left.name)
  own = atomic._temporary(tmp_path)  # Of a process that lives: this one.
  other = tmp_path / '.tmp-00000000-1-abc'  # Of another machine,
  aged = tmp_path / '.tmp-00000000-1-def'  # and long ago.
  foreign = tmp_path / '.tmp-mine'
  for path in (own, other, aged, foreign):
    path.write_text('x')
  os.utime(aged, (1, 1))
  atomic.write(tmp_path / 'file', 'whole')
  assert sorted(tmp_path.iterdir()) == sorted([own, other, foreign, tmp_path / 'file'])


# ---- Errors in words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  'error, words',
  [
    (OSError(errno.ENOSPC, 'x', '/a/b'), 'No space left on device); make room there'),
    (OSError(errno.EDQUOT, 'x'), 'quota'),
    (OSError(errno.EROFS, 'x'), 'mounted read-only'),
    (OSError(errno.EACCES, 'x'), 'permissions'),
    (OSError(errno.EIO, 'x'), 'the disk or the network fails'),
    (OSError(errno.ENAMETOOLONG, 'x'), 'give a shorter name'),
    (OSError(errno.ENOTDIR, 'x'), 'is a file and no folder'),
    (OSError(errno.ELOOP, 'x'), 'symbolic links'),
    (OSError(errno.EMFILE, 'x'), 'ulimit -n'),
    (OSError(errno.EFBIG, 'x'), 'ulimit -f'),
    (OSError(errno.ENOTTY, 'x'), 'Inappropriate ioctl for device); mend that'),
    (OSError('without a number'), 'without a number); mend that'),
    (MemoryError(), 'not enough memory); free memory'),
    (RuntimeError('write() failed: No space left on device; at byte 8'), 'make room there'),
    (ValueError("Failed writing: x [os_error_code='28']"), 'make room there'),
    (ValueError('open: OS error 30'), 'mounted read-only'),
    (ValueError('embedded null byte'), 'there is a NUL in its name'),
  ],
)
def test_errors_of_the_system_become_one_line(error, words):
  with pytest.raises(UserError) as found, errors.explained('it cannot be done', 'then go on'):
    raise error
  text = str(found.value)
  assert text.startswith('it cannot be done (') and words in text and text.endswith('; then go on')
  assert found.value.__cause__ is error and '\n' not in text


@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError('a bug'), ValueError('bad value')])
def test_mistakes_of_ours_stay_what_they_are(error):
  with pytest.raises(type(error)) as found, errors.explained('it cannot be done'):
    raise error
  assert found.value is error and errors.line(error) == ''


def test_what_is_explained_already_is_not_explained_again():
  with pytest.raises(UserError, match='^nearer$'), errors.explained('farther'):
    raise UserError('nearer')
