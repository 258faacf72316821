"""Methods that are a head over hidden states: towers run whole, and their states may be stored.

With `backbones.MODALITY.trainable`, a tower runs from its lowest trained layer on in each step.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from molt_jax.config.layers import of_modality, select
from molt_jax.config.methods import METHODS
from molt_jax.data.modalities import MODALITIES
from molt_jax.features import cells
from molt_jax.features.frozen import Reads
from molt_jax.features.hidden_states import HiddenStates
from molt_jax.methods import base, trainable
from molt_jax.methods.parts import kernel_ridge, ridge_solver
from molt_jax.methods.parts.fusion import CLASSIFIERS
from molt_jax.methods.parts.inputs import InputPair
from molt_jax.methods.parts.interface import Output
from molt_jax.methods.parts.prototypes import Margins
from molt_jax.methods.parts.ridge_kernels import Examples
from molt_jax.towers.loading import TowerSpec

RIDGE = 'ridge'  # The regression's variables among the statistics.
MARGIN = 'margin'  # The logits that prototypes are trained by, among the branches.


@dataclasses.dataclass(frozen=True)
class HeadMethod(base.Defaults):
  """A head over hidden states of both towers; see `base.Method`.

  Attributes:
    head: Linen module, called as head(states, present_bm, train=, content_bm=, weight_b=), in
      training also with label= where it has `margins`.
    states: modality -> hidden states that the head reads, numbered from 0.
    reads: modality -> what is read of the tower.
    modules: modality -> the tower's module, None for one that is not used.
    trained: modality -> path -> shape of the tower's parameters that are trained.
    cells: along a side, whose means the head reads in the place of patches; 0: every patch.
    landmarks: of the kernel ridge regression beside the head (`parts.kernel_ridge`); 0: none.
    kernel: of the regression, a key of `kernel_ridge.KERNELS`.
    is_trained: see `base.Method`; False: the regression is all there is.
    num_classes: K.
    multi_label: whether an example can have several labels.
    contrast: weight of the contrast of prototypes (`parts.prototypes`), where the head has some.
    over_patterns: see `base.Method`.
  """

  head: nn.Module
  states: Mapping[str, tuple[int, ...]]
  reads: Mapping[str, Reads]
  modules: Mapping[str, nn.Module | None]
  trained: Mapping[str, Mapping[str, Any]]
  cells: int = 0
  landmarks: int = 0
  kernel: str = 'rbf'
  is_trained: bool = True
  num_classes: int = 0
  multi_label: bool = False
  contrast: float = 0.0
  over_patterns: Any = jax.vmap

  @property
  def num_layers(self) -> int:
    """L, the hidden states of each tower that the head reads."""
    return max(len(states) for states in self.states.values())

  @property
  def margins(self) -> Margins | None:
    """What training does to the logits of prototypes; None for another classifier."""
    return getattr(self.head, 'margins', None)

  @property
  def loss_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return {'supcon': self.contrast}

  @property
  def branch_weights(self) -> Mapping[str, float]:
    """See `base.Method`."""
    return {MARGIN: 1.0} if self.margins else {}

  @property
  def closed_form(self) -> tuple[str, ...]:
    """See `base.Method`."""
    return (RIDGE,) if self.landmarks else ()

  @property
  def weighs_head(self) -> bool:
    """See `base.Method`."""
    return self.landmarks > 0 and self.is_trained

  def init(self, key: jax.Array) -> Any:
    """See `base.Method`."""
    found = {}
    for modality, module in self.modules.items():
      shape = (self.num_layers, 1, 1, module.config.hidden_size) if module else None
      found[modality] = None if shape is None else jnp.zeros(shape)
    example = HiddenStates(found['image'], found['text'], jnp.ones((1, 1), bool))
    variables = self.head.init(key, example, jnp.ones((1, 2), bool), train=False)
    variables = {'params': {}, **variables}
    if self.landmarks:
      statistics = {**variables.get('statistics', {}), RIDGE: self._empty_ridge()}
      variables = {**variables, 'statistics': statistics}
    return {**variables, 'params': {**variables['params'], **trainable.new(self.trained)}}

  def _empty_ridge(self) -> dict[str, Any]:
    shapes = {}
    for modality, module in self.modules.items():
      shapes[modality] = None
      if module:
        architecture = module.config
        tokens = 1 if modality == 'text' else cells.num_tokens(architecture, self.cells)
        shapes[modality] = (len(self.states[modality]), tokens, architecture.hidden_size)
    sizes = {'landmarks': self.landmarks, 'num_classes': self.num_classes}
    return kernel_ridge.empty(shapes, **sizes)

  def start(self, variables: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """See `base.Method`."""
    return {**variables, 'params': trainable.started(variables['params'], frozen, self.modules)}

  def __call__(self, variables, frozen, features, batch, present_bm, training=None) -> Output:
    """See `base.Method`."""
    params = dict(variables['params'])
    towers = params.pop(trainable.TOWERS, {})
    states = self._states(towers, frozen, features, batch)
    how = {}
    if training:
      how = {'content_bm': batch['present'], 'weight_b': batch['weight']}
      how |= {'rngs': {'dropout': training.rngs['dropout']}}
      how |= {'label': batch['label']} if self.margins else {}
    statistics = dict(variables.get('statistics', {}))
    ridge = statistics.pop(RIDGE, None)
    own = {'params': params, 'statistics': statistics}
    if not (training and training.update):
      out = self.head.apply(own, states, present_bm, train=training is not None, **how)
      return out if training or ridge is None else self._with_ridge(out, ridge, states, present_bm)
    out, changed = self.head.apply(
      own, states, present_bm, train=True, mutable=['statistics'], **how
    )
    kept = {} if ridge is None else {RIDGE: ridge}
    return out.replace(statistics={**changed.get('statistics', {}), **kept})

  def _with_ridge(self, out: Output, ridge, states, present_bm) -> Output:
    """The answer of head and regression together; each alone among the branches."""
    answer_bvk, able_bv = kernel_ridge.answers(ridge, states, present_bm, self.kernel)
    how = {'multi_label': self.multi_label}
    logits_bk = kernel_ridge.combine(ridge, out.logits_bk, answer_bvk, able_bv, **how)
    experts_bvk = kernel_ridge.experts(answer_bvk, ridge['temperature_v'], **how)
    branches_bk = {'head': out.logits_bk, RIDGE: experts_bvk}
    return out.replace(logits_bk=logits_bk, branches_bk=branches_bk)

  def fit(self, training: Examples, held: Examples) -> dict[str, Any]:
    """See `base.Method`."""
    how = {'landmarks': self.landmarks, 'multi_label': self.multi_label, 'kernel': self.kernel}
    return {RIDGE: ridge_solver.fit(training, held, **how) or {}}

  def fit_inputs(self, variables, frozen, features, batch) -> dict[str, dict[str, jax.Array]]:
    """See `base.Method`."""
    towers = variables['params'].get(trainable.TOWERS, {})
    states = self._states(towers, frozen, features, batch)
    found = {}
    for modality in MODALITIES:
      if states.of(modality) is not None:
        found[modality] = kernel_ridge.pool_modality(states, batch['present'], modality)
    return found

  def _states(self, towers, frozen, features: HiddenStates, batch) -> HiddenStates:
    """The states that the head reads; those above a trained layer are computed here."""
    found = {}
    for modality in MODALITIES:
      found[modality] = features.of(modality)
      if modality in towers and frozen.get(modality) is not None:
        tower = trainable.Live(modality, self.modules[modality], self.reads[modality])
        params = trainable.merged(tower.module, frozen[modality], towers[modality])
        found[modality] = tower.run(params, self.states[modality], found[modality], batch)
        if modality == 'image':
          config = self.modules[modality].config
          found[modality] = cells.pool(found[modality], config, self.cells)
    return features.replace(image_lbid=found['image'], text_lbtd=found['text'])


def build(
  config: ml_collections.ConfigDict,
  towers: Mapping[str, TowerSpec],
  states: Mapping[str, tuple[int, ...]],
  head: nn.Module,
  num_classes: int,
  num_cells: int = 0,
  kind: Callable[..., HeadMethod] = HeadMethod,
) -> HeadMethod:
  """Returns the method of a head.

  Args:
    config: reads `backbones`.
    towers: modality -> description, of those that are used.
    states: modality -> hidden states that the head reads.
    head: it.
    num_cells: see `HeadMethod.cells`.
    kind: makes the method, where it has a class of its own.
  """
  whole = {modality: Reads(wanted) for modality, wanted in states.items()}
  modules = base.tower_modules(config, towers, whole)
  reads, trained = {}, {}
  for modality, tower in towers.items():
    trained[modality] = trainable.leaves(config, modality, modules[modality])
    reads[modality] = trainable.reads(states[modality], trained[modality], tower)
    if modality == 'image' and not trained[modality]:
      reads[modality] = dataclasses.replace(reads[modality], cells=num_cells)
  return kind(
    head,
    states,
    reads,
    modules,
    trained,
    cells=num_cells,
    landmarks=config.ridge.landmarks,
    num_classes=num_classes,
    multi_label=config.dataset.multi_label,
    contrast=config.prototypes.supcon,
  )


# ---- What heads are made of ----------------------------------------------------------------------


def named_states(
  config: ml_collections.ConfigDict, towers: Mapping[str, TowerSpec]
) -> dict[str, tuple[int, ...]]:
  """Returns modality -> the hidden states that `layers` of the method's own section names.

  Raises:
    UserError: a tower does not have one of them.
  """
  layers, found = config[config.method].layers, {}
  for modality, tower in towers.items():
    field = f'config.{config.method}.layers'
    spec = of_modality(layers, modality)
    found[modality] = select(spec, tower.config.num_layers, field=field, tower=modality)
  return found


def make_head(config: ml_collections.ConfigDict, **sizes: int) -> nn.Module:
  """Returns the head that `config.method` names, of a method that is one.

  Call it as `head.apply({'params': p, 'statistics': s}, states, present_bm, train=...,
  content_bm=..., weight_b=..., rngs={'dropout': key})`, with `mutable=['statistics']` in
  training; it returns an `Output`. `s` is empty unless `config.molt.input_norm` is `standardize` or
  `config.missing.strategy` is `translate`.

  Args:
    config: reads method, compute_dtype, molt, fusion, classifier and missing.strategy.
    **sizes: num_layers (L), num_classes (K), image_width (D_i) and text_width (D_t), all given, so
      that the parameters never depend on which modality is present.

  Returns:
    A Linen module; `states` is `HiddenStates`, `present_bm` is bool[B, 2] (image, text),
    `weight_b` [B] marks padding by zero. `content_bm` bool[B, 2] (default: present_bm) says
    whose states may be read at all: training maps the head over several `present_bm` of one batch,
    and what depends on the states alone is then computed once. Without it nothing of a missing
    modality is read.
  """
  return importlib.import_module(METHODS[config.method].module).make_head(config, **sizes)


def inputs(
  config, num_layers: int, image_width: int, text_width: int, strategy: str = ''
) -> InputPair:
  """Returns what turns hidden states into token sequences; `strategy` '': as the config says."""
  return InputPair(
    num_layers=num_layers,
    image_width=image_width,
    text_width=text_width,
    norm=config.molt.input_norm,
    strategy=strategy or config.missing.strategy,
    dtype=jnp.dtype(config.compute_dtype),
  )


def classifier(config, num_classes: int, axis: str, kind: str = '') -> nn.Module:
  """Returns the classifier that the config describes, or one of another kind."""
  kind = kind or config.classifier.kind
  how = {'num_classes': num_classes, 'dropout': config.classifier.dropout, 'axis': axis}
  if kind == 'prototypes':
    return CLASSIFIERS[kind](scale=config.prototypes.scale, **how)
  dtype = jnp.dtype(config.compute_dtype)
  return CLASSIFIERS[kind](hidden=config.classifier.hidden, dtype=dtype, **how)


def margins(config) -> Margins:
  """Returns what training does to the logits of prototypes."""
  c = config.prototypes
  return Margins(c.scale, c.margin, c.margin_missing)


def own_margins(config) -> Margins | None:
  """The same, where prototypes are the classifier that the config describes."""
  return margins(config) if config.classifier.kind == 'prototypes' else None


def unimodal_classifiers(config, num_classes: int, axis: str) -> dict[str, nn.Module] | None:
  """Returns classifiers of examples with one modality; None where training shows no such examples,
  as one that has learned nothing would answer them.
  """
  shown = config.missing.views or config.missing.train_dropout > 0
  if not (config.classifier.per_pattern and shown):
    return None
  return {modality: classifier(config, num_classes, axis) for modality in MODALITIES}
