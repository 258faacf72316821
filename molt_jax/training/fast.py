"""What `--preset=fast` makes of a config."""

from collections.abc import Collection

import ml_collections

from molt_jax.config import qualities
from molt_jax.data import datasets
from molt_jax.runtime import console, processes
from molt_jax.training import ridge_fit


def choose(
  config: ml_collections.ConfigDict, given: Collection[str], *, begins_with: str = ''
) -> ml_collections.ConfigDict:
  """Returns the config of a quick run.

  Args:
    config: as it is.
    given: fields that the user has set, which are left alone.
    begins_with: folder of a run whose head is trained further; '': none.

  Raises:
    UserError: as `datasets.load_dataset`.
  """
  has_to = bool(begins_with) or qualities.has_to_train(config, given)
  trains = has_to or not _all_are_fitted(config)
  return qualities.apply(config, qualities.fast(config, trains=trains), given)


def _all_are_fitted(config):
  """Whether a regression is fitted to every training example; of a part of very many, it would know
  less than a head that has seen them all.
  """
  with console.silenced(), processes.main_first('data set'):
    data = datasets.load_dataset(config)
  return len(data.splits['train']) <= ridge_fit.LIMITS['train']
