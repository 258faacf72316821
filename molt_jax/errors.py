"""Errors of the operating system and of memory as one line: what was tried, why not, what helps."""

import contextlib
import errno
import os
from collections.abc import Iterator

from molt_jax.config import UserError

# What helps, by the number of the error.
REMEDIES = {
    errno.ENOSPC: 'make room there',
    errno.EDQUOT: 'the quota there is used up: make room, or have it raised',
    errno.EFBIG: 'larger files are not allowed here: see ulimit -f',
    errno.EROFS: 'it is mounted read-only: give a folder that can be written',
    errno.EACCES: 'change its permissions, or give another',
    errno.EPERM: 'change its permissions, or give another',
    errno.ENOENT: 'a part of the path is not there: give another',
    errno.ENOTDIR: 'a part of the path is a file and no folder: give another',
    errno.EISDIR: 'it is a folder: give a file',
    errno.EEXIST: 'something else has that name: move it away, or give another',
    errno.ENOTEMPTY: 'something else has that name: move it away, or give another',
    errno.ELOOP: 'its symbolic links lead in a circle: mend them, or give another',
    errno.ENAMETOOLONG: 'give a shorter name',
    errno.EMFILE: 'this process has too many files open: raise the limit (ulimit -n)',
    errno.ENFILE: 'this machine has too many files open: close other programs',
    errno.EIO: 'the disk or the network fails: check it, or give a folder elsewhere',
    errno.ESTALE: 'the network folder was removed or remounted: start again',
    errno.ETIMEDOUT: 'the network does not answer: start again when it does',
    errno.ENOMEM: 'free memory, or give less to do at once',
    errno.EINVAL: 'the file system does not allow it: give a folder elsewhere',
}
NO_MEMORY = 'free memory, or give less to do at once (a smaller batch_size, fewer threads)'


def reason(error: BaseException) -> tuple[str, str]:
  """Returns (what an error of the operating system or of memory says, what helps)."""
  if isinstance(error, MemoryError):
    return 'not enough memory', NO_MEMORY
  if isinstance(error, OSError) and error.errno is not None:
    return os.strerror(error.errno), REMEDIES.get(error.errno, 'mend that, or give another')
  return ' '.join(str(error).split()) or type(error).__name__, 'mend that, or give another'


@contextlib.contextmanager
def explained(tried: str, also: str = '') -> Iterator[None]:
  """Turns an error of the operating system or of memory into a `UserError` of one line.

  Args:
    tried: what the block does, as a sentence that says that it failed; it names the file.
    also: what to say beside the remedy.

  Raises:
    UserError: the block raised OSError, MemoryError, or ValueError for a path with a NUL.
  """
  try:
    yield
  except (OSError, MemoryError) as error:
    why, remedy = reason(error)
    raise UserError(f'{tried} ({why}); {remedy}{also and f"; {also}"}') from error
  except ValueError as error:
    if 'null' not in str(error):
      raise
    raise UserError(f'{tried} (it has a NUL in its name); give another name') from error


def line(error: BaseException) -> str:
  """Returns the one line of an error that nothing nearer to its cause has explained."""
  why, remedy = reason(error)
  names = [getattr(error, name, None) for name in ('filename', 'filename2')]
  where = ' -> '.join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
  return f'{where}: {why}; {remedy}' if where else f'{why}; {remedy}'
