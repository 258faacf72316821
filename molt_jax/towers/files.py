"""Where a tower's files are: Hugging Face directory, also in a zip or by its hub id, GGUF or ONNX
file, file of an installed package, or nothing but a name (random weights).
"""

import pathlib
import re

import huggingface_hub

from molt_jax.errors import UserError
from molt_jax.runtime import files, zipped
from molt_jax.towers import open_clip, packaged
from molt_jax.towers.gguf_files import GgufFiles
from molt_jax.towers.hugging_face_files import directory_files
from molt_jax.towers.onnx_files import OnnxFiles
from molt_jax.towers.random_files import RandomFiles
from molt_jax.towers.tower_files import TowerFiles


def open_files(path: str, *, modality: str, resolution: int = 0) -> TowerFiles:
  """Finds a tower's files and reads their headers; no weights are loaded.

  Args:
    path: Hugging Face directory or hub id, .gguf file, .zip file of such a directory,
      pkg://package/relative/path, a name of `packaged.TOWERS`, or random:NAME.
    modality: 'image' or 'text', what the tower reads; the family follows from its files.
    resolution: side in pixels that an image tower shall read; 0: its own.

  Raises:
    UserError: nothing is there, it cannot be read, or it is no tower of this modality.
  """
  try:
    found = _open(path, modality)
    found.resolution = resolution
    return found
  except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: ~user without such a user.
    reason = files.reason(error)
    raise UserError(f'{files.printable(path)}: the tower cannot be opened ({reason})') from error


def _open(path: str, modality: str) -> TowerFiles:
  if '\0' in path:
    raise UserError(f'{files.printable(path)} is no path: it has a NUL character')
  if path.startswith('random:'):
    return RandomFiles(path, modality, path.removeprefix('random:'))
  local = packaged.find(path, modality) or pathlib.Path(path).expanduser()
  if local.is_dir():
    return directory_files(path, modality, local)
  if local.exists():
    if local.suffix == '.zip':
      return directory_files(path, modality, _zipped_directory(local))
    if local.suffix in FILES:
      return FILES[local.suffix](path, modality, local)
    raise UserError(
      f'{path!r} is a file that is no {", ".join(FILES)} or .zip; expected one of them, or a '
      'Hugging Face directory (config.json and safetensors)'
    )
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', path) or local.suffix == '.gguf':
    raise UserError(
      f'{path!r} does not exist; expected a Hugging Face directory or hub id, a .gguf file, a .zip '
      f'file, pkg://package/file, random:NAME, or one of {", ".join(packaged.TOWERS)}'
    )
  return directory_files(path, modality, _download(path))


# Files of one model each, by their suffix.
FILES = {'.gguf': GgufFiles, '.onnx': OnnxFiles}


def _zipped_directory(file: pathlib.Path) -> zipped.ZipPath:
  """The directory in a zip: its top, or the only folder in it that has a configuration."""
  top = zipped.folder(file)
  folders = [top / name for name in sorted({n.partition('/')[0] for n in top.members if '/' in n})]
  names = ('config.json', open_clip.CONFIG)
  found = [p for p in (top, *folders) if any((p / name).exists() for name in names)]
  if top in found:
    return top
  if len(found) != 1:
    raise UserError(
      f'{file} holds {len(found)} folders with a {names[0]}; expected one Hugging Face model '
      f'directory: {files.listed(sorted(top.members)) or "it is empty"}'
    )
  return found[0]


def _download(repo_id: str) -> pathlib.Path:
  """Fetches (or finds in the cache) the files of a hub repository that we read."""
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo_id,
        allow_patterns=['*.json', '*.safetensors', 'tokenizer.model'],
        # Of folders below it, sentence-transformers' 1_Pooling alone.
        ignore_patterns=['[!1]*/*'],
      )
    )
  except Exception as e:  # Of the hub, its client, the network below it, or the disk.
    reason = ' '.join(str(e).split())[:200]
    raise UserError(
      f'{repo_id!r} is no directory here and could not be fetched from the Hugging Face hub '
      f'({reason}); '
      'give the path of a local copy, or check the name and the network'
    ) from e
