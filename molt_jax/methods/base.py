"""The seam between methods and the harness: what a method is, and the table of them.

A method is a static object without arrays. The harness asks it what it reads of the frozen towers
(`reads`), makes its variables (`init`), computes or fetches what depends on frozen towers alone
(`features`), and calls it once for each missing pattern. Training, evaluation, prediction,
profiling and pretraining know nothing else of it.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import ml_collections
from flax import linen as nn

from molt_jax.config.methods import METHODS
from molt_jax.data.modalities import MODALITIES
from molt_jax.features import cells, hidden_states
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.ridge_kernels import Examples
from molt_jax.runtime import compiling
from molt_jax.towers.loading import TowerSpec

# Of a modality without a tower: a head's parameters for it are there, tiny, and meet nothing.
UNUSED_WIDTH = 1


@dataclasses.dataclass(frozen=True)
class Training:
  """How a training step calls a method.

  Attributes:
    rngs: keys by name: 'dropout', 'patches'.
    update: whether to return new statistics.
  """

  rngs: Mapping[str, jax.Array]
  update: bool = True


class Method(Protocol):
  """What the harness asks of a method.

  Attributes:
    reads: modality -> what is read of its tower.
    modules: modality -> the Linen module of its tower, or None.
    over_patterns: jax.vmap for a method whose towers do not depend on what is missing, so that
      they run once for all missing patterns; jax.lax.map otherwise.
    loss_weights: weights of `Output.losses_b`.
    branch_weights: weights of the cross-entropies of `Output.branches_bk`; their sum is 1.
    closed_form: statistics that are fitted in closed form, by `training.ridge_fit`.
    of_names: statistics that `start` makes of the names of the classes.
    is_trained: whether anything is learned by gradient descent; a run without is one step, which
      changes nothing.
    weighs_head: whether what is in closed form is weighed against a head at each validation.
  """

  reads: Mapping[str, Reads]
  modules: Mapping[str, nn.Module | None]
  over_patterns: Any
  loss_weights: Mapping[str, float]
  branch_weights: Mapping[str, float]
  closed_form: tuple[str, ...]
  of_names: tuple[str, ...]
  is_trained: bool
  weighs_head: bool

  def init(self, key: jax.Array) -> Any:
    """Returns what is trained, boxed with logical axes: {'params'} and perhaps {'statistics'}."""

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables that a run begins with, given new ones: with what comes from files."""

  def features(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Any:
    """Returns what depends on frozen towers alone, from the batch where a store gave it."""

  def fit_inputs(self, variables: Any, frozen: Any, features: Any, batch: Any) -> Any:
    """Returns what `closed_form` is fitted to, of a batch: modality -> name -> float32[B, ...]."""

  def fit(self, training: Examples, held: Examples) -> dict[str, Any]:
    """Returns the statistics of `closed_form`, by name; {} of one: it stays as it is.

    Args:
      training: what `fit_inputs` returned for training examples.
      held: the same of validation examples, to choose by.
    """

  def __call__(
    self,
    variables: Mapping[str, Any],
    frozen: Mapping[str, Any],
    features: Any,
    batch: Mapping[str, jax.Array],
    present_bm: jax.Array,
    training: Training | None = None,
  ) -> Output:
    """Runs the method for one missing pattern.

    Args:
      variables: 'params' and 'statistics'.
      frozen: modality -> parameters of its tower, or None.
      features: as `features` returned them.
      batch: see `data.pipeline`.
      present_bm: bool[B, 2], the modalities that may be read; no bit of another enters.
      training: how a training step calls it; None: evaluation, which draws nothing.
    """

  def constrain(self, params: Any) -> Any:
    """Returns parameters after an update within their legal range."""


class Defaults:
  """What most methods share of `Method`."""

  def read_names(self, params: Any) -> dict[str, Any]:
    """Returns the statistics that follow from the names of the classes, placed as `params` are."""
    del params
    return {}

  def class_vectors(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """Returns what the classes' names become in the text tower, which a call takes from
    variables['class_vectors'] where it is there; None: it is another for each example.
    """
    del variables, frozen
    return None

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `Method`."""
    return {}

  @property
  def branch_weights(self) -> Mapping[str, float]:
    """See `Method`."""
    return {}

  @property
  def closed_form(self) -> tuple[str, ...]:
    """See `Method`."""
    return ()

  @property
  def of_names(self) -> tuple[str, ...]:
    """See `Method`."""
    return ()

  @property
  def is_trained(self) -> bool:
    """See `Method`."""
    return True

  @property
  def weighs_head(self) -> bool:
    """See `Method`."""
    return False

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `Method`."""
    del frozen
    return dict(variables)

  def features(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> HiddenStates:
    """See `Method`: hidden states, from the batch or the towers."""
    stored = hidden_states.from_store(batch)
    if stored is not None:
      return stored
    states = {modality: reads.states for modality, reads in self.reads.items()}
    found = hidden_states.extract(self.modules, frozen, batch, states)
    if found.image_lbid is None:
      return found
    architecture, wanted = self.modules['image'].config, self.reads['image'].cells
    return found.replace(image_lbid=cells.pool(found.image_lbid, architecture, wanted))

  def constrain(self, params: Any) -> Any:
    """See `Method`."""
    return params


class ClassVectors:
  """Computes once, for all batches of an evaluation, the vectors of classes by their names."""

  def __init__(self, method: Method):
    self._reads_names = any(x.names_from is not None for x in method.reads.values())
    self._compute = compiling.jit(lambda variables, frozen: method.class_vectors(variables, frozen))

  def __call__(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the variables with 'class_vectors' where the method has such."""
    found = self._compute(variables, frozen) if self._reads_names else None
    return variables if found is None else {**variables, 'class_vectors': found}


def run_patterns(
  method: Method,
  variables: Mapping[str, Any],
  frozen: Mapping[str, Any],
  features: Any,
  batch: Mapping[str, jax.Array],
  present_vbm: jax.Array,
  training: Training,
) -> tuple[Output, Any]:
  """Runs a method in training for each missing pattern of a batch.

  Args:
    method, variables, frozen, features, batch: see `Method`.
    present_vbm: bool[V, B, 2], the patterns; all have the same content to read.
    training: its key of dropout is split over patterns, the others are shared.

  Returns:
    (outputs stacked over patterns, new statistics).
  """
  dropout_v = jax.random.split(training.rngs['dropout'], len(present_vbm))

  def one(pattern):
    present_bm, dropout = pattern
    of_pattern = Training({**training.rngs, 'dropout': dropout}, training.update)
    return method(variables, frozen, features, batch, present_bm, of_pattern)

  if method.over_patterns is jax.lax.map:
    out_v = jax.lax.map(one, (present_vbm, dropout_v))
  else:
    out_v = method.over_patterns(one)((present_vbm, dropout_v))
  # Statistics are of what may be read at all, so every pattern finds the same.
  statistics = variables.get('statistics', {})
  if out_v.statistics is not None:
    statistics = jax.tree.map(lambda x: x[0], out_v.statistics)
  return out_v.replace(statistics=None), statistics


def make_method(
  config: ml_collections.ConfigDict,
  towers: Mapping[str, TowerSpec],
  *,
  num_classes: int,
  class_names: tuple[str, ...] = (),
) -> Method:
  """Returns the method that `config.method` names.

  Args:
    config: of a classifier.
    towers: modality -> description, of those that are used.
    num_classes: K.
    class_names: the classes; only methods that read names need them.

  Raises:
    UserError: a tower is not what the method needs.
  """
  build = importlib.import_module(METHODS[config.method].module).build
  return build(config, towers, num_classes=num_classes, class_names=class_names)


def tower_modules(
  config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec], reads: Mapping[str, Reads]
) -> dict[str, nn.Module | None]:
  """Returns the Linen module of each tower, None for a modality that is not used."""
  c = config.backbones
  modules = dict.fromkeys(MODALITIES)
  for modality, tower in towers.items():
    how = {} if c.param_dtype == 'auto' else {'param_dtype': jax.numpy.dtype(c.param_dtype)}
    modules[modality] = tower.make_module(c.dtype, c.attention, heads=reads[modality].heads, **how)
  return modules


def widths(towers: Mapping[str, TowerSpec]) -> dict[str, int]:
  """Returns the width of each tower, `UNUSED_WIDTH` for a modality without one."""
  found = dict.fromkeys(MODALITIES, UNUSED_WIDTH)
  return found | {modality: tower.config.hidden_size for modality, tower in towers.items()}
