"""Errors of the operating system and of memory as one line: what was tried, why not, what helps."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator


class UserError(ValueError):
  """A mistake that the user can repair; command lines print it as one line and exit with 2."""


def article(noun: str) -> str:
  """Returns the noun with 'a' or 'an' before it."""
  return f'an {noun}' if noun[0] in 'aeiou' else f'a {noun}'


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


# How TensorStore writes the number of an error, and what other libraries in C++ write of it.
_NUMBER = re.compile(r'os[_ ]error\D{0,10}(\d+)', re.IGNORECASE)
_TEXTS = {
  os.strerror(number): number
  for number in (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ELOOP,
  )
}


def reason(error: BaseException) -> tuple[str, str]:
  """Returns (what an error of the operating system or of memory says, what helps)."""
  if isinstance(error, MemoryError):
    return 'not enough memory', NO_MEMORY
  if isinstance(error, OSError) and error.errno is not None:
    return os.strerror(error.errno), REMEDIES.get(error.errno, 'mend that, or give another')
  return ' '.join(str(error).split()) or type(error).__name__, 'mend that, or give another'


def cause(error: BaseException) -> BaseException | None:
  """Returns the error of the operating system or of memory that an exception is or tells of.

  Libraries in C++ tell of it in the text of a RuntimeError or ValueError. None: it is none.
  """
  if isinstance(error, OSError | MemoryError):
    return error
  if isinstance(error, ValueError) and 'embedded null' in str(error):
    return OSError('there is a NUL in its name')
  if isinstance(error, RuntimeError | ValueError):
    text = str(error)
    if found := _NUMBER.search(text):
      return OSError(int(found[1]), '')
    number = next((number for words, number in _TEXTS.items() if words in text), None)
    return None if number is None else OSError(number, '')
  return None


@contextlib.contextmanager
def explained(tried: str, also: str = '') -> Iterator[None]:
  """Turns an error of the operating system or of memory into a `UserError` of one line.

  Args:
    tried: what the block does, as a sentence that says that it failed; it names the file.
    also: what to say beside the remedy.

  Raises:
    UserError: the block raised OSError, MemoryError, or what tells of one, see `cause`.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    found = cause(error)
    if found is None:
      raise
    why, remedy = reason(found)
    raise UserError(f'{tried} ({why}); {remedy}{also and f"; {also}"}') from error


def line(error: BaseException) -> str:
  """Returns the one line of an error that nothing nearer to its cause has explained.

  '' for one that `cause` finds nothing in: a mistake of ours.
  """
  found = cause(error)
  if found is None:
    return ''
  why, remedy = reason(found)
  names = [getattr(error, name, None) for name in ('filename', 'filename2')]
  where = ' -> '.join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
  if found is not error:  # The text of a library, which names the file somewhere.
    where = ' '.join(str(error).split())[:400]
  return f'{where}: {why}; {remedy}' if where else f'{why}; {remedy}'
