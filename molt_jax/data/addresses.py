"""Images at addresses: fetched once, and kept."""

import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

from molt_jax import errors
from molt_jax.data import bounds, formats
from molt_jax.data.pictures import Picture
from molt_jax.errors import UserError
from molt_jax.runtime import atomic, console

SECONDS = 30  # That a server may take for one image.
THREADS = 16  # That fetch images.
ATTEMPTS = 64  # Images of which one at least must be there.


def is_address(text: str) -> bool:
  """Whether a string is a URL."""
  return re.match(r'[A-Za-z][A-Za-z0-9+.-]+://', text) is not None


@dataclasses.dataclass(frozen=True)
class Address(Picture):
  """An image at a URL that fsspec opens; fetched once and kept in a folder.

  Attributes:
    url: where it is.
    cache: folder that keeps what was fetched.
  """

  url: str
  cache: str

  @property
  def path(self) -> pathlib.Path:
    """Where it is kept."""
    return pathlib.Path(self.cache) / hashlib.sha256(self.url.encode()).hexdigest()

  def read(self) -> bytes:
    """See `Picture`. What could not be fetched is not tried again by this process."""
    if self.path.exists():
      return formats.read_file(self.path)
    if self.url in _failed:
      raise OSError(errno.EIO, _failed[self.url])
    try:
      content = _fetched(self.url)
    except OSError as error:
      _failed[self.url] = error.strerror or str(error)
      raise
    atomic.write(self.path, content)
    return content

  def number(self) -> int:
    """See `Picture`."""
    return zlib.crc32(self.url.encode())


@functools.cache
def _file_system(protocol: str) -> Any:
  """Returns the file system of a protocol.

  Raises:
    UserError: fsspec does not know it, or lacks a package for it.
  """
  import fsspec  # Where no image has an address, it need not be imported.

  options = {}
  if protocol in ('http', 'https'):
    import aiohttp

    options['client_kwargs'] = {'timeout': aiohttp.ClientTimeout(total=SECONDS)}
  try:
    return fsspec.filesystem(protocol, **options)
  except (ImportError, ValueError) as error:
    why = ' '.join(str(error).split())
    raise UserError(
      f'images at addresses {protocol}:// cannot be fetched ({why}): install what is missing, or '
      'save the images as files'
    ) from error


def check_protocol(url: str) -> None:
  """Raises UserError where addresses of this kind cannot be fetched here at all."""
  _file_system(url.partition('://')[0].lower())


_failed: dict[str, str] = {}  # Address -> why it could not be fetched.


def fetch(images: Sequence[Address]) -> None:
  """Fetches what is not kept yet, several at once; what fails is found again when it is read.

  Raises:
    UserError: the folder cannot be written, or none of the first ones can be fetched.
  """
  wanted = [image for image in dict.fromkeys(images) if not image.path.exists()]
  if not wanted:
    return
  for url in {image.url.partition('://')[0].lower(): image.url for image in wanted}.values():
    check_protocol(url)
  folder = pathlib.Path(wanted[0].cache)
  with errors.explained(f'images that are fetched cannot be kept in {str(folder)!r}'):
    folder.mkdir(parents=True, exist_ok=True)
  with (
    console.progress('fetching images', len(wanted), 'images') as bar,
    concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
  ):
    whys = []
    for first in range(0, len(wanted), ATTEMPTS):
      for why in pool.map(_why_not, wanted[first : first + ATTEMPTS]):
        bar.advance()
        whys += [why] if why else []
      if first == 0 and len(whys) == min(ATTEMPTS, len(wanted)) > 1:
        raise UserError(
          f'none of the first {len(whys)} images can be fetched ({wanted[0].url}: {whys[0]}): is '
          'the network there? Or save the images as files'
        )


def _why_not(image: Address) -> str:
  try:
    image.read()
  except OSError as error:
    return error.strerror or str(error)
  return ''


def _fetched(url: str) -> bytes:
  try:
    with _file_system(url.partition('://')[0].lower()).open(url, 'rb') as file:
      content = file.read(bounds.MAX_FILE_BYTES + 1)
  except (OSError, UserError):
    raise
  # Libraries of the protocols raise what they like: aiohttp's errors, botocore's, TimeoutError.
  except Exception as error:
    why = ' '.join(str(error).split()) or type(error).__name__
    raise OSError(errno.EIO, f'it cannot be fetched: {why}') from error
  if len(content) > bounds.MAX_FILE_BYTES:
    raise OSError(errno.EFBIG, bounds.TOO_LARGE)
  return content
