"""What a config turns into: devices, towers, data, method, preprocessing.

Every command, benchmark and experiment begins here. Reading data takes Grain and Pillow; what only
computes does without them, so they are imported where data are read.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_collections

from molt_jax.config.resolved import modalities as used_modalities
from molt_jax.data.sources import Dataset
from molt_jax.features import frozen
from molt_jax.methods.base import Method, make_method
from molt_jax.pairs import method as pairs
from molt_jax.pairs import towers as pair_towers
from molt_jax.runtime import console, processes, sharding
from molt_jax.towers.loading import TowerSpec

if TYPE_CHECKING:
  from molt_jax.data.pipeline import Batching, Preprocess
  from molt_jax.features.extract import Extraction


MOST_LANDMARKS = 4096


@dataclasses.dataclass(frozen=True)
class Assembly:
  """What a config turns into; arrays are not in it.

  Attributes:
    config: validated.
    mesh: the devices.
    towers: modality -> description of the tower, for those that are used.
    class_names: the classes, in the order of the method's logits.
    data: the data set, labelled by these classes; None where none is read.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  towers: Mapping[str, TowerSpec]
  class_names: tuple[str, ...]
  data: Dataset | None = None

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def is_pretraining(self) -> bool:
    """Whether the config is of pretraining, and not of a classifier."""
    return 'objective' in self.config

  @functools.cached_property
  def method(self) -> Method:
    """The method that the config names.

    Raises:
      UserError: a tower is not what it needs.
    """
    if self.is_pretraining:
      return pairs.make_method(self.config, self.towers, self.mesh)
    return make_method(
      self.config, self.towers, num_classes=self.num_classes, class_names=self.class_names
    )

  @functools.cached_property
  def preprocess(self) -> 'Preprocess':
    """How one example becomes arrays: the image tower's preprocessing, the text tower's
    tokenizer. It counts what could not be used, for the whole life of the assembly.
    """
    return make_preprocess(self.config, self.towers, num_classes=self.num_classes)

  @property
  def extraction(self) -> 'Extraction':
    """What computes features."""
    from molt_jax.features.extract import Extraction

    return Extraction(
      config=self.config,
      reads=self.method.reads,
      towers=self.towers,
      modules=self.method.modules,
      preprocess=self.preprocess,
      mesh=self.mesh,
    )

  def batching(self, name: str) -> 'Batching':
    """Returns how batches are made; `name` is 'train' or 'eval'."""
    from molt_jax.data.pipeline import Batching

    c = self.config
    return Batching(
      batch_size=c[name].batch_size,
      pack=sharding.packing(c, self.mesh, parts=parts_of(c, name)),
      num_threads=c.input.num_threads,
      prefetch=c.input.prefetch,
      **sharding.data_shard(self.mesh),
    )

  def eval_batches(self, source, stored=None, present=None) -> Any:
    """Returns a pass over a split in order; see `pipeline.eval_batches`.

    Args:
      source: the split.
      stored: its features by modality, in the place of images and texts.
      present: bool[N, 2], the modalities of each example that are wanted.
    """
    from molt_jax.data import pipeline

    return pipeline.eval_batches(
      source, self.preprocess, self.batching('eval'), present=present, stored=stored
    )

  def with_data(self, data: Dataset) -> 'Assembly':
    """Returns the assembly with another data set, and its classes."""
    return dataclasses.replace(self, data=data, class_names=tuple(data.class_names))


def assemble(
  config: ml_collections.ConfigDict, class_names: tuple[str, ...] | None = None
) -> Assembly:
  """Puts together what a config names.

  Args:
    config: validated, of a classifier or of pretraining.
    class_names: the classes of a method whose data are not read here, or whose names do not matter;
      None: the data set is loaded, and they are its own.

  Raises:
    UserError: devices, batch sizes, towers or data are not as they must be.
  """
  mesh = sharding.make_mesh(config)
  reads_data = class_names is None
  if reads_data:
    check_batch_sizes(config, mesh, ('train', 'eval'))
  towers, data = describe_towers(config), None
  if reads_data:
    from molt_jax.data import datasets

    with processes.main_first('data set'):
      data = datasets.load_dataset(config)
    class_names = data.class_names
    config = _with_landmarks(config, data)
  config = _with_text_length(config, towers, data)
  return Assembly(config, mesh, towers, tuple(class_names), data)


def _with_landmarks(config: ml_collections.ConfigDict, data: Dataset) -> ml_collections.ConfigDict:
  """Returns the config with `ridge.landmarks` chosen where it is -1: every training example, up to
  MOST_LANDMARKS.
  """
  if config.get('ridge', {}).get('landmarks') != -1:
    return config
  config = config.copy_and_resolve_references()
  config.ridge.landmarks = min(len(data.splits['train']), MOST_LANDMARKS)
  return config


def _with_text_length(
  config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec], data: Dataset | None = None
) -> ml_collections.ConfigDict:
  """Returns the config with `text.max_tokens` chosen from the training texts, where it is 0; the
  most there can be where there are none to look at.

  Raises:
    UserError: it is too low for the text tower.
  """
  reads_texts = 'text' in used_modalities(config)
  if reads_texts and config.text.max_tokens:
    towers['text'].tokenizer.check_length(config.text.max_tokens)
  if config.text.max_tokens:
    return config
  from molt_jax.data import text_length

  tokens = text_length.LEAST
  if reads_texts:
    most = min(text_length.MOST, towers['text'].config.max_positions)
    tokens = most
    if data is not None:
      found = text_length.choose(data.splits['train'], towers['text'].tokenizer.encode, most)
      console.log(found.message())
      tokens = found.tokens
  config = config.copy_and_resolve_references()
  config.text.max_tokens = tokens
  return config


def parts_of(config: ml_collections.ConfigDict, name: str) -> int:
  """Returns the microbatches that a batch of 'train' or 'eval' is worked through in."""
  return config.train.get('accumulate', 1) if name == 'train' else 1


def check_batch_sizes(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, names: tuple[str, ...]
) -> None:
  """Raises UserError unless the batches of 'train' or 'eval' split evenly over the devices."""
  for name in names:
    parts = parts_of(config, name)
    sharding.check_batch_size(f'{name}.batch_size', config[name].batch_size, mesh, parts=parts)


def describe_towers(config: ml_collections.ConfigDict) -> dict[str, TowerSpec]:
  """Opens the towers that a config names, without their weights."""
  if 'objective' in config:
    return pair_towers.describe_towers(config)
  return frozen.describe_towers(config)


def make_preprocess(
  config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec], *, num_classes: int
) -> 'Preprocess':
  """Returns how one example becomes arrays.

  Args:
    config: reads image, text and dataset.
    towers: modality -> description; a modality without one gets the least there is.
    num_classes: K.
  """
  from molt_jax.data.pipeline import Preprocess

  how: dict[str, Any] = {
    'image_size': 1,
    'mean': (0.0,) * 3,
    'std': (1.0,) * 3,
    'resize': config.image.resize,
    'encode': lambda text, max_tokens: (),
    'pad_id': 0,
    'max_tokens': 1,
  }
  if 'image' in towers:
    spec = towers['image'].preprocess
    how |= {'image_size': spec.size, 'mean': spec.mean, 'std': spec.std}
    how |= {'resample': spec.resample, 'rounded': spec.rounded}
    if config.image.resize == 'crop':  # As the tower was trained, which may be to squash.
      how |= {'resize': spec.resize, 'scaled': spec.scaled}
  if 'text' in towers:
    tokenizer = towers['text'].tokenizer
    how |= {'encode': tokenizer.encode, 'pad_id': tokenizer.pad_id}
    how |= {'max_tokens': config.text.max_tokens}
  return Preprocess(**how, num_classes=num_classes, multi_label=config.dataset.multi_label)
