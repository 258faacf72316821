"""What a trained run answers to batches of examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from molt_jax.data import packing
from molt_jax.data.modalities import MODALITIES, PATTERNS
from molt_jax.evaluation import trained
from molt_jax.features.frozen import load_frozen, needed
from molt_jax.methods.base import ClassVectors
from molt_jax.runtime import compiling, sharding

ARRAYS = ('image', 'tokens', 'token_mask', 'present')  # Of an example, that answers are made of.


class Forward:
  """The towers and the method of a run, compiled. A tower is loaded when an example first needs it.

  Attributes:
    variables: what was trained, {'params', 'statistics'}.
  """

  def __init__(self, run: trained.Trained):
    self._run, self._assembly = run, run.assembly
    self._multi_label = bool(run.config.dataset.multi_label)
    self.variables = run.variables()
    self._frozen: dict[str, Any] = dict.fromkeys(MODALITIES)
    self._class_vectors = ClassVectors(run.assembly.method)
    self._with_names: Mapping[str, Any] | None = None
    self._plain = compiling.jit(self._probabilities)
    self._of_patterns = compiling.jit(self._log_patterns)

  def towers(self, used: Sequence[bool]) -> dict[str, Any]:
    """Returns the parameters of the towers that inputs of these modalities go through, loaded where
    they are not yet; None for the others.
    """
    assembly = self._assembly
    there = [m for m, use in zip(MODALITIES, used, strict=True) if use]
    modalities = needed(assembly.method.reads, there)
    new = [m for m in modalities if self._frozen[m] is None]
    if new:
      self._run.check_towers(new)
      loaded = load_frozen(self._run.config, assembly.mesh, assembly.method.reads, new)
      self._frozen |= {m: loaded[m] for m in new}
    return {m: self._frozen[m] if m in modalities else None for m in MODALITIES}

  def step(self, used: Sequence[bool]) -> Callable[[Mapping[str, Any]], jax.Array]:
    """Returns what makes probabilities [B, K] of a batch that is on the devices and has no other
    modalities than these.
    """
    frozen = self.towers(used)
    return lambda batch: self._plain(self._ready(frozen), frozen, batch)

  def probabilities(
    self, examples: Sequence[Mapping[str, np.ndarray]], *, once: bool = False
  ) -> np.ndarray:
    """Returns float32[B, K] of a batch of examples: softmax's, or each label's own sigmoid.

    Args:
      examples: what `data.pipeline.single_example` returns.
      once: the program is not run again, so that compiling it is most of the work.
    """
    step = compiling.jit_once(self._probabilities) if once else self._plain
    return self._computed(examples, step)

  def log_patterns(self, examples: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Returns log-probabilities under each missing pattern, float32[V, B, K]; towers run once where
    the method does not say otherwise.
    """
    return self._computed(examples, self._of_patterns)

  def _computed(
    self, examples: Sequence[Mapping[str, np.ndarray]], step: Callable[..., Any]
  ) -> np.ndarray:
    mesh = self._assembly.mesh
    rows = mesh.shape['data']
    while rows < len(examples):  # Few batch sizes, so that few programs are compiled.
      rows *= 2
    empty = {name: np.zeros_like(examples[0][name]) for name in ARRAYS}
    filled = [*examples, *[empty] * (rows - len(examples))]
    batch = {name: np.stack([example[name] for example in filled]) for name in ARRAYS}
    frozen = self.towers(batch['present'].any(axis=0))
    pack = sharding.packing(self._run.config, mesh)
    batch = sharding.put_batch(_packed(batch, pack), mesh)
    return np.asarray(step(self._ready(frozen), frozen, batch))[..., : len(examples), :]

  def _ready(self, frozen: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the variables with what the classes' names become, computed once."""
    if self._with_names is None:
      self._with_names = self._class_vectors(self.variables, frozen)
    return self._with_names

  def _probabilities(self, variables, frozen, batch):
    method = self._assembly.method
    features = method.features(frozen, batch)
    logits_bk = method(variables, frozen, features, batch, batch['present']).logits_bk
    return jax.nn.sigmoid(logits_bk) if self._multi_label else jax.nn.softmax(logits_bk)

  def _log_patterns(self, variables, frozen, batch):
    method = self._assembly.method
    features = method.features(frozen, batch)
    log = jax.nn.log_sigmoid if self._multi_label else jax.nn.log_softmax

    def one(keep_m):
      present_bm = batch['present'] & keep_m[None]
      return log(method(variables, frozen, features, batch, present_bm).logits_bk)

    return jax.lax.map(one, jax.numpy.asarray(PATTERNS))


def _packed(batch: dict[str, np.ndarray], pack: tuple[int, int] | None) -> dict[str, np.ndarray]:
  """Cuts padding off the texts of a batch, and says where real tokens are where that is less.

  Numbers of tokens are powers of two, so that few programs are compiled.
  """
  if pack is None:
    return batch
  mask_bt = batch['token_mask']
  groups_gr = packing.groups(len(mask_bt), pack)
  length = packing.padded_length(mask_bt.sum(axis=1).max(), mask_bt.shape[1])
  most = int(mask_bt[groups_gr].sum(axis=(1, 2)).max())
  size = max(packing.SHORTEST, 1 << max(0, most - 1).bit_length())
  mask_bt = mask_bt[:, :length]
  cut = {'tokens': batch['tokens'][:, :length], 'token_mask': mask_bt}
  return batch | cut | packing.token_positions(mask_bt, groups_gr, size)
