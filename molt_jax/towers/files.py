"""Where a tower's files are: Hugging Face directory, also in a zip or by its hub id, GGUF or ONNX
file, file of an installed package, or nothing but a name (random weights).
"""

import abc
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import huggingface_hub
import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files, zipped
from molt_jax.towers import (
  onnx,
  open_clip,
  packaged,
  preprocessing,
  sentence_files,
  shards,
  tokenizer,
  tokenizer_files,
)
from molt_jax.towers.base import Family, family_of, random_family
from molt_jax.towers.preprocessing import ImageSpec

RANDOM_SEED = 0
# Types of weights, as safetensors names them. Others are quantised, or no numbers at all.
WEIGHT_TYPES = ('F32', 'F16', 'BF16')


class TowerFiles(abc.ABC):
  """Files of one tower.

  Attributes:
    family: its row in `base.FAMILIES`.
    config: dict of the Hugging Face config.json (or its equivalent).
    identity: {'path': as given, 'sha256': of configuration and tensors}.
    where: what holds the configuration, for errors.
    shapes: Hugging Face tensor name -> shape; None where weights are random and any name can be
      read.
    types: Hugging Face tensor name -> type, where it is not one of WEIGHT_TYPES.
    resolution: side in pixels that an image tower shall read; 0: its own.
  """

  shapes: Mapping[str, tuple[int, ...]] | None = None
  types: Mapping[str, str] = {}

  def __init__(self, path: str, family: Family, config: dict[str, Any], sha256: str, where: str):
    self.family, self.config, self.where = family, config, where
    self.identity = {'path': path, 'sha256': sha256}
    self.resolution = 0

  @property
  def heads(self) -> tuple[str, ...]:
    """What the files have above the last hidden state, of `family.heads`."""
    rows = self.family.heads.items()
    return tuple(name for name, tensor in rows if self.shapes is None or tensor in self.shapes)

  @functools.cached_property
  def architecture(self) -> Any:
    """The configuration as our modules take it; of an image tower, for the images that it reads."""
    if self.family.modality == 'text':
      return self._pretrained
    return self._pretrained.at(self.preprocess().size, self.where)

  @functools.cached_property
  def _pretrained(self) -> Any:
    return self.family.config.from_hf(self.config, self.where)

  def unfused(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Takes tensors (with `part`) apart that hold several of ours in blocks of rows.

    Raises:
      UserError: one has another number of rows, or a part of it is there besides.
    """
    found = dict(tensors)
    fused = self.family.fused(self._pretrained) if self.family.fused else {}
    for template, parts in fused.items():
      for layer in range(self._pretrained.num_layers):
        name, first, rows = template.format(layer), 0, sum(parts.values())
        if (whole := found.pop(name, None)) is None:
          continue
        if whole.shape[0] != rows:
          raise UserError(
            f'{self.where}: {name} has {whole.shape[0]} rows instead of {rows}: the tensors do not '
            'fit the configuration'
          )
        for part, size in parts.items():
          if part.format(layer) in found:
            raise UserError(f'{self.where}: {part.format(layer)} is there, and in {name} too')
          found[part.format(layer)] = whole.part(first, size)
          first += size
    return found

  @property
  def is_resized(self) -> bool:
    """Whether an image tower reads images of another side than its own."""
    return self.resolution not in (0, self.own_preprocess().size)

  @abc.abstractmethod
  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads one tensor, by Hugging Face name and in Hugging Face's orientation; `shape` is the one
    it is known to have.
    """

  def number(self, name: str) -> float | None:
    """Reads a tensor of one number; None where there is none.

    Raises:
      UserError: it is no finite number.
    """
    if name not in (self.shapes or {}):
      return None
    value = np.asarray(self.read(name, self.shapes[name]), np.float32)
    if value.size != 1 or not np.isfinite(value).all():
      raise UserError(f'{self.identity["path"]}: {name} is no finite number; download it again')
    return float(value.reshape(()))

  @abc.abstractmethod
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The text tower's tokenizer."""

  def preprocess(self) -> ImageSpec:
    """What the image tower is given to see, of `resolution`.

    Raises:
      UserError: patches do not fill the resolution, or the files say what is not implemented.
    """
    own, side = self.own_preprocess(), self._pretrained.patch_size
    if not self.resolution:
      return own
    if self.resolution % side:
      fitting = max(side, self.resolution // side * side)
      raise UserError(
        f'config.backbones.image.resolution: {self.resolution}, which patches of {side} pixels '
        f'({self.identity["path"]}) do not fill; give a multiple such as {fitting}, or 0 for '
        f'{own.size}'
      )
    return own.at(self.resolution)

  def own_preprocess(self) -> ImageSpec:
    """What the image tower wants to see by its files."""
    family = self.family
    return preprocessing.spec(family.preprocessor, self._pretrained.image_size, self.where)


class RandomFiles(TowerFiles):
  """A named architecture; the weights are drawn from RANDOM_SEED."""

  def __init__(self, path: str, modality: str, name: str):
    family = random_family(path, name, modality)
    config = dict(family.architectures[name])
    content = json.dumps({'architecture': config, 'seed': RANDOM_SEED}, sort_keys=True)
    super().__init__(path, family, config, hashlib.sha256(content.encode()).hexdigest(), path)

  def read(self, name, shape):
    # NumPy on the host: the same on every platform and with any sharding, and nothing to compile.
    if name.endswith('.bias'):
      return np.zeros(shape, np.float32)
    if 'norm' in name.split('.')[-2].lower():
      return np.full(shape, 1 - getattr(self.architecture, 'norm_offset', 0.0), np.float32)
    if name.endswith('.lambda1'):  # Of LayerScale.
      return np.ones(shape, np.float32)
    rng = np.random.default_rng([RANDOM_SEED, zlib.crc32(name.encode())])
    # Variance 1 / fan-in; shapes are [out, in...], of tokens and positions with ones in front.
    inner = shape
    while len(inner) > 1 and inner[0] == 1:
      inner = inner[1:]
    return rng.standard_normal(shape, np.float32) / np.float32(math.prod(inner[1:]) ** 0.5)

  def own_preprocess(self):
    sizes = ('size', 'crop_size')  # Those of the architecture, in the place of the published ones.
    usual = {k: v for k, v in self.family.preprocessor.items() if k not in sizes}
    return preprocessing.spec(usual, self._pretrained.image_size, self.where)

  def tokenizer(self):
    with_end = getattr(self.architecture, 'ends_texts', False)
    made = tokenizer.byte_tokenizer(vocab_size=self.architecture.vocab_size, with_end=with_end)
    return dataclasses.replace(made, filled=_filled(self.architecture))


def _filled(architecture: Any) -> int:
  """Ids that every text of a text tower has; 0: texts are as long as they are."""
  return getattr(architecture, 'filled_length', 0)


class GgufFiles(TowerFiles):
  """A decoder in one GGUF file, or in several that llama.cpp has split."""

  def __init__(self, path: str, modality: str, file: pathlib.Path):
    if modality != 'text':
      raise UserError(
        f'{path!r}: a GGUF file holds a text tower; a CLIP tower is a Hugging Face '
        'directory or hub id'
      )
    # And with it the package of that name, which only these files need.
    from molt_jax.towers import gguf, gguf_models

    self._models = gguf_models
    self._reader = gguf.Reader(file)
    config = gguf_models.hf_config(self._reader)
    family = family_of(config, modality, str(file))
    super().__init__(path, family, config, _sha256(self._reader.paths), str(file))
    self._kind = self._reader.metadata['general.architecture']
    named = self._reader.tensors.items()
    tensors = {
      gguf_models.hf_name(n, self._kind): t for n, t in named if n not in gguf_models.ROPE_TENSORS
    }
    self._tensors = self.unfused(tensors)
    self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

  def read(self, name, shape):
    w = self._tensors[name].read()
    return self._models.restore(name, w, self.architecture, self._kind).reshape(shape)

  def tokenizer(self):
    return tokenizer.from_gguf(
      self._reader.metadata, vocab_size=self.architecture.vocab_size, where=self.where
    )


class HuggingFaceFiles(TowerFiles):
  """A directory with config.json and safetensors, as `save_pretrained` writes it, on the disk or
  within a zip.
  """

  def __init__(self, path: str, modality: str, directory: zipped.Place):
    self._directory = directory
    config = directory / 'config.json'
    if not config.exists():
      raise UserError(
        f'{path!r}: there is no config.json in {directory}; expected a Hugging Face model directory'
      )
    if (adapter := directory / 'adapter_config.json').exists():
      raise UserError(
        f'{adapter}: the directory holds an adapter (LoRA and the like), which transformers '
        'would put on the weights and which is not implemented here: merge it into them, '
        'model.merge_and_unload() and save_pretrained(DIR)'
      )
    content = files.read_json(config)
    family = family_of(content, modality, str(config))
    tensors = _named(shards.find(directory), family, directory)
    read = sorted({t.file for t in tensors.values()})
    self._pooling = sentence_files.read(directory) if hasattr(family.config, 'pooling') else None
    describing = [config, self._pooling.file] if self._pooling else [config]
    super().__init__(path, family, content, _sha256([*describing, *read]), str(config))
    self._tensors = self.unfused(tensors)
    self.shapes = {name: t.shape for name, t in self._tensors.items()}
    self.types = {n: t.dtype for n, t in self._tensors.items() if t.dtype not in WEIGHT_TYPES}

  @functools.cached_property
  def architecture(self):
    """See `TowerFiles`; a directory of sentence-transformers says how it pools."""
    architecture = super().architecture
    if self._pooling is None:
      return architecture
    return dataclasses.replace(architecture, pooling=self._pooling.mode)

  @property
  def heads(self):
    """See `TowerFiles`; the pooler of a model that was trained to pool otherwise is left over."""
    return tuple(head for head in super().heads if head != 'pool' or self._pooling is None)

  def read(self, name, shape):
    return self._tensors[name].read()

  def tokenizer(self):
    sizes = {'vocab_size': self.architecture.vocab_size, 'filled': _filled(self.architecture)}
    return tokenizer_files.read(self._directory, **sizes)

  def own_preprocess(self):
    return preprocessing.read(
      self._directory,
      self._pretrained.image_size,
      usual=self.family.preprocessor,
      any_size=self.family.any_size or self.resolution > 0,
    )


class OpenClipFiles(HuggingFaceFiles):
  """A directory of OpenCLIP, as the CLIPModel that it is."""

  def __init__(self, path: str, modality: str, directory: zipped.Place):
    content, self._asked = open_clip.read_config(directory, modality)
    where = directory / open_clip.CONFIG
    family = family_of(content, modality, str(where))
    weights, found = open_clip.tensors(directory)
    self._directory, self._pooling = directory, None
    self._tensors = _named(found, family, directory)
    TowerFiles.__init__(self, path, family, content, _sha256([where, weights]), str(where))
    self.shapes = {name: t.shape for name, t in self._tensors.items()}
    self.types = {n: t.dtype for n, t in self._tensors.items() if t.dtype not in WEIGHT_TYPES}

  def own_preprocess(self):
    asked, size = self._asked, self._pretrained.image_size
    spec = preprocessing.spec(asked, size, self.where)
    preprocessing.check_size(spec, size, self.resolution > 0, self.where)
    return spec


def _directory_files(path: str, modality: str, directory: zipped.Place) -> TowerFiles:
  layout = OpenClipFiles if open_clip.is_one(directory) else HuggingFaceFiles
  return layout(path, modality, directory)


def _named(tensors: Mapping[str, Any], family: Family, place: zipped.Place) -> dict[str, Any]:
  """Gives tensors (with `block`, where the family splits any) the names in the family's table:
  without the prefix of a larger model, renamed, one that holds several split.
  """
  named, origin = {}, {}
  for theirs, tensor in tensors.items():
    name = re.sub(family.prefix, '', theirs)
    for pattern, replacement in family.renamed.items():
      name = re.sub(pattern, replacement, name)
    for part_name, part in _parts(name, tensor, family):
      if part_name in named:
        raise UserError(
          f'{place} holds {files.shown(origin[part_name])} and {files.shown(theirs)}, two tensors '
          'for one parameter: which of them is meant is not known'
        )
      named[part_name], origin[part_name] = part, theirs
  return named


def _parts(name: str, tensor: Any, family: Family) -> Iterator[tuple[str, Any]]:
  """Yields the tensor, or the parameters of ours that it holds, by name."""
  for pattern, replacements in family.split:
    match, count = re.fullmatch(pattern, name), len(replacements)
    if match and tensor.shape and tensor.shape[0] % count == 0:
      for k, replacement in enumerate(replacements):
        yield match.expand(replacement), tensor.block(k, count)
      return
  yield name, tensor


class OnnxFiles(TowerFiles):
  """An image tower in an ONNX file of `packaged.TOWERS`, wherever it lies: no other file says which
  architecture it has.
  """

  def __init__(self, path: str, modality: str, file: pathlib.Path):
    row = packaged.of_content(file)
    if row is None:
      known = [name for name, row in packaged.TOWERS.items() if row.file.endswith('.onnx')]
      raise UserError(
        f'{path!r}: an ONNX file does not say which model it holds, and this one is not known; '
        f'known: {", ".join(known)}; give the Hugging Face directory that it was made of'
      )
    family = family_of(row.config, modality, str(file))
    self._weights = _named(onnx.dinov2(onnx.Graph(file), row.prefix), family, file)
    content = json.dumps(row.config, sort_keys=True).encode()
    sha256 = hashlib.sha256(content + row.sha256.encode()).hexdigest()
    super().__init__(path, family, dict(row.config), sha256, str(file))
    self.shapes = {name: weight.shape for name, weight in self._weights.items()}

  def read(self, name, shape):
    return self._weights[name].read()

  def tokenizer(self):
    raise AssertionError('an image tower has no tokenizer')


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
    return _directory_files(path, modality, local)
  if local.exists():
    if local.suffix == '.zip':
      return _directory_files(path, modality, _zipped_directory(local))
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
  return _directory_files(path, modality, _download(path))


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


def _sha256(paths: Iterable[files.Path]) -> str:
  """Hash over the contents of files, in this order."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(_digest(path, files.version(path)))
  return digest.hexdigest()


@functools.lru_cache
def _digest(path: files.Path, version: tuple[int, ...]) -> bytes:
  """Hash of a file, taken once: a tower is described before it is loaded."""
  del version
  with files.open_binary(path) as f:
    return hashlib.file_digest(f, 'sha256').digest()
