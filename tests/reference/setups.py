"""What a step needs, from a config, without data."""

import functools

import jax

from molt_jax.features.frozen import load_frozen
from molt_jax.training import train_state
from molt_jax.training.assembly import assemble
from molt_jax.training.losses import make_objective
from molt_jax.training.step import train_step


class Setup:
  """A classifier of three classes.

  Attributes:
    assembly, objective, tx: see `train_step`.
  """

  def __init__(self, config, tx, class_names=('a', 'b', 'c')):
    self.config = config
    self.assembly = assemble(config, class_names=class_names)
    self.method, self.mesh = self.assembly.method, self.assembly.mesh
    self.objective = make_objective(self.assembly)
    self.tx = tx

  def frozen(self):
    """The towers' parameters."""
    return load_frozen(self.config, self.mesh, self.method.reads)

  def state(self):
    """A new state."""
    init_memory = functools.partial(self.objective.init, self.method)
    how = {'seed': self.config.seed, 'mesh': self.mesh}
    return train_state.create(self.method.init, self.tx, init_memory, **how)

  def begin(self, frozen):
    """A new state with what comes from files."""
    state = self.state()
    variables = {'params': state.params, 'statistics': state.statistics}
    started = self.method.start(variables, frozen)
    return state.replace(params=started['params'], statistics=started['statistics'])

  def step_fn(self):
    """(state, frozen, batch) -> (state, metrics), not jitted."""
    how = {'method': self.method, 'objective': self.objective, 'tx': self.tx}
    return functools.partial(train_step, **how, accumulate=self.config.train.accumulate)

  def step(self, **options):
    """The same, jitted."""
    return jax.jit(self.step_fn(), **options)

  def logits(self, variables, frozen, batch):
    """Logits in evaluation, for what is present."""
    features = self.method.features(frozen, batch)
    return self.method(variables, frozen, features, batch, batch['present']).logits_bk
