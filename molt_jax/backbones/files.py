"""Where a tower's files are: Hugging Face directory or hub id, GGUF file, file of an installed package, or nothing but a name (random weights)."""

import abc
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import huggingface_hub
import numpy as np
import safetensors

from molt_jax.backbones import tokenizer
from molt_jax.backbones.architectures import ARCHITECTURES
from molt_jax.backbones.clip import ClipTextConfig, ClipVisionConfig
from molt_jax.backbones.llama import LlamaConfig
from molt_jax.config import UserError

CONFIGS = {'text': LlamaConfig, 'clip_text': ClipTextConfig, 'image': ClipVisionConfig}
RANDOM_SEED = 0
# Of tensor names, when the file holds a larger model around the tower.
PREFIX = {'text': r'^model\.', 'clip_text': r'^text_model\.', 'image': r'^vision_model\.'}
PICKLED = ('*.bin', '*.pt', '*.pth', '*.ckpt')


@dataclasses.dataclass(frozen=True)
class ImageSpec:
  """What the image tower wants to see: RGB in [0, 1], resized to `size` x `size`, minus `mean`, over `std`.

  `resample` is a `PIL.Image.Resampling` value (3 = bicubic).
  """

  size: int
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  resample: int = 3


class TowerFiles(abc.ABC):
  """Files of one tower.

  Attributes:
    kind: 'text' (LLaMA), 'clip_text' or 'image'.
    config: dict of the Hugging Face config.json (or its equivalent).
    identity: {'path': as given, 'sha256': of configuration and tensors}.
    shapes: Hugging Face tensor name -> shape; None where weights are random and any name can be read.
  """

  shapes: Mapping[str, tuple[int, ...]] | None = None

  def __init__(self, path: str, kind: str, config: dict[str, Any], sha256: str):
    self.kind, self.config, self.identity = kind, config, {'path': path, 'sha256': sha256}

  @functools.cached_property
  def architecture(self) -> LlamaConfig | ClipTextConfig | ClipVisionConfig:
    """The configuration as our modules take it."""
    return CONFIGS[self.kind].from_hf(self.config)

  @abc.abstractmethod
  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads one tensor, by Hugging Face name and in Hugging Face's orientation; `shape` is the one it is known to have."""

  @abc.abstractmethod
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The text tower's tokenizer."""

  def preprocess(self) -> ImageSpec:
    """What the image tower wants to see."""
    return ImageSpec(self.architecture.image_size)


class RandomFiles(TowerFiles):
  """A named architecture; the weights are drawn from RANDOM_SEED."""

  def __init__(self, path: str, kind: str, name: str):
    if name not in ARCHITECTURES[kind]:
      raise UserError(f'{path!r}: no {kind} architecture has this name; choose one of {", ".join("random:" + n for n in ARCHITECTURES[kind])}')
    config = dict(ARCHITECTURES[kind][name])
    content = json.dumps({'architecture': config, 'seed': RANDOM_SEED}, sort_keys=True)
    super().__init__(path, kind, config, hashlib.sha256(content.encode()).hexdigest())

  def read(self, name, shape):
    # NumPy on the host: the same on every platform and with any sharding, and nothing to compile.
    if name.endswith('.bias'):
      return np.zeros(shape, np.float32)
    if 'norm' in name.split('.')[-2]:
      return np.ones(shape, np.float32)
    draw = np.random.default_rng([RANDOM_SEED, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    return draw / np.float32(math.prod(shape[1:]) ** 0.5)  # Variance 1 / fan-in; shapes are [out, in...].

  def tokenizer(self):
    return tokenizer.byte_tokenizer(vocab_size=self.architecture.vocab_size, with_end=self.kind == 'clip_text')


class GgufFiles(TowerFiles):
  """A LLaMA-family model in one GGUF file."""

  def __init__(self, path: str, kind: str, file: pathlib.Path):
    if kind != 'text':
      raise UserError(f'{path!r}: a GGUF file holds a LLaMA text tower; a CLIP tower is a Hugging Face directory or hub id')
    from molt_jax.backbones import gguf  # And with it the package of that name, which only these files need.
    self._gguf = gguf
    self._reader = gguf.Reader(file)
    super().__init__(path, kind, gguf.hf_config(self._reader), _sha256([file]))
    self._names = {gguf.hf_name(name): name for name in self._reader.tensors if name != 'rope_freqs.weight'}
    self.shapes = {name: self._reader.tensors[theirs][1] for name, theirs in self._names.items()}

  def read(self, name, shape):
    return self._gguf.unpermute(name, self._reader.read(self._names[name]), self.architecture).reshape(shape)

  def tokenizer(self):
    return tokenizer.from_gguf(self._reader.metadata, vocab_size=self.architecture.vocab_size)


class HuggingFaceFiles(TowerFiles):
  """A directory with config.json and safetensors, as `save_pretrained` writes it."""

  def __init__(self, path: str, kind: str, directory: pathlib.Path):
    self._directory = directory
    if not (directory / 'config.json').exists():
      raise UserError(f'{path!r}: there is no config.json in {directory}; expected a Hugging Face model directory')
    files = _weight_files(directory)
    super().__init__(path, kind, _read_json(directory / 'config.json'), _sha256([directory / 'config.json', *files]))
    self._where, self.shapes = {}, {}
    for file in files:
      try:
        with safetensors.safe_open(file, framework='np') as f:
          for theirs in f.keys():  # noqa: SIM118 (safe_open is no mapping)
            name = re.sub(PREFIX[kind], '', theirs)
            self._where[name] = (file, theirs)
            self.shapes[name] = tuple(f.get_slice(theirs).get_shape())
      except safetensors.SafetensorError as e:
        raise UserError(f'{file} is damaged or cut short ({e}); download it again') from e

  def read(self, name, shape):
    file, theirs = self._where[name]
    with safetensors.safe_open(file, framework='np') as f:  # Opened anew so that pages already copied are given back.
      return f.get_tensor(theirs)

  def tokenizer(self):
    return tokenizer.from_directory(self._directory, vocab_size=self.architecture.vocab_size)

  def preprocess(self):
    return _image_spec(self._directory, self.architecture.image_size)


def open_files(path: str, *, kind: str) -> TowerFiles:
  """Finds a tower's files and reads their headers; no weights are loaded.

  Args:
    path: Hugging Face directory or hub id, .gguf file, pkg://package/relative/path, or random:NAME.
    kind: 'text', 'clip_text' or 'image'.

  Raises:
    UserError: nothing is there, or it is not a tower of this kind.
  """
  if path.startswith('random:'):
    return RandomFiles(path, kind, path.removeprefix('random:'))
  local = _package_path(path) if path.startswith('pkg://') else pathlib.Path(path).expanduser()
  if local.suffix == '.gguf' and local.is_file():
    return GgufFiles(path, kind, local)
  if local.is_dir():
    return HuggingFaceFiles(path, kind, local)
  if local.is_file():
    raise UserError(f'{path!r} is a file that is no .gguf; expected a Hugging Face directory (config.json and safetensors) or a .gguf file')
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', path) or local.suffix == '.gguf':
    raise UserError(f'{path!r} does not exist; expected a Hugging Face directory or hub id, a .gguf file, pkg://package/file, or random:NAME')
  return HuggingFaceFiles(path, kind, _download(path))


def _package_path(path: str) -> pathlib.Path:
  """Resolves pkg://package/relative/path."""
  package, _, relative = path.removeprefix('pkg://').partition('/')
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f'{path!r}: the package {package!r} is not installed; pip install {package.replace("_", "-")}')
  local = pathlib.Path(spec.submodule_search_locations[0], relative)
  if not local.exists():
    raise UserError(f'{path!r}: the installed package {package!r} holds no {relative!r}; it holds {_listing(local.parent)}')
  return local


def _listing(directory: pathlib.Path) -> str:
  names = sorted(p.name for p in directory.glob('*') if not p.name.startswith('_'))
  return ', '.join(names[:8]) or 'nothing there'


def _download(repo_id: str) -> pathlib.Path:
  """Fetches (or finds in the cache) the files of a hub repository that we read."""
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        repo_id, allow_patterns=['*.json', '*.safetensors', 'tokenizer.model'], ignore_patterns=['*/*']))
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
    reason = ' '.join(str(e).split())[:200]
    raise UserError(f'{repo_id!r} is no directory here and could not be fetched from the Hugging Face hub ({reason}); '
                    'give the path of a local copy, or check the name and the network') from e


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a model: one, or the shards that the index lists."""
  index = directory / 'model.safetensors.index.json'
  if index.exists():
    files = [directory / name for name in sorted(set(_read_json(index)['weight_map'].values()))]
    if missing := [f.name for f in files if not f.exists()]:
      raise UserError(f'{directory} lacks {", ".join(missing)}, which {index.name} lists: download them')
    return files
  if (directory / 'model.safetensors').exists():
    return [directory / 'model.safetensors']
  if pickled := [p.name for pattern in PICKLED for p in sorted(directory.glob(pattern))]:
    raise UserError(f'{directory} holds only pickled weights ({", ".join(pickled[:3])}), which can run code when they are read: '
                    'convert them with transformers, model.save_pretrained(DIR, safe_serialization=True)')
  raise UserError(f'{directory} holds no model.safetensors and no model.safetensors.index.json')


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(file.read_text('utf-8'))
  except ValueError as e:
    raise UserError(f'{file} is not valid JSON: {e}') from e


def _sha256(files: Iterable[pathlib.Path]) -> str:
  """Hash over the contents of files, in this order."""
  digest = hashlib.sha256()
  for file in files:
    with open(file, 'rb') as f:
      digest.update(hashlib.file_digest(f, 'sha256').digest())
  return digest.hexdigest()


def _image_spec(directory: pathlib.Path, image_size: int) -> ImageSpec:
  """Reads preprocessor_config.json (or the newer processor_config.json); CLIP's own values where there is neither."""
  if (file := directory / 'preprocessor_config.json').exists():
    c = _read_json(file)
  elif (file := directory / 'processor_config.json').exists():
    c = _read_json(file).get('image_processor', {})
  else:
    c = {}
  default = ImageSpec(image_size)
  sizes = {s for key in ('size', 'crop_size') for s in _sides(c.get(key, image_size))}
  if sizes != {image_size}:
    raise UserError(f'{file} asks for images of {sorted(sizes)} pixels, the tower reads {image_size}; another size or a crop of a larger image '
                    'is not implemented')
  for key, legal in (('do_resize', True), ('do_rescale', True), ('do_normalize', True), ('rescale_factor', 1 / 255)):
    if abs(c.get(key, legal) - legal) > 1e-9:
      raise UserError(f'{file} has {key} = {c[key]}, which is not implemented; implemented: {legal}')
  return ImageSpec(image_size, tuple(c.get('image_mean', default.mean)), tuple(c.get('image_std', default.std)), c.get('resample', default.resample))


def _sides(size: int | Mapping[str, int]) -> tuple[int, ...]:
  return tuple(size.values()) if isinstance(size, Mapping) else (size,)
