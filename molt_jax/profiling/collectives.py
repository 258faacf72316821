"""What devices send each other in a training step: counted from shapes, and found in a program.

With b examples per device and B in all, I and T tokens, D widths, L layers read and k directions of
L_CCA (d_c with cca.estimator=batch), that is all:

  over    kind        what                                                 numbers
  model   all-reduce  2 a layer of the text tower, 1 of its embedding      b T D_t, the towers' type
  model   all-reduce  2 a layer of the image tower                         b I D_i, the towers' type
  data    all-reduce  the gradient of the head                             its parameters, float32
  data    all-reduce  statistics of the hidden states (standardize)        2 L (D_i + D_t) float32
  data    all-reduce  sums of losses and of their weights                  some ten
  data    all-gather  the pairs of L_CCA, projected, and their weights     L B (2 k + 1) float32

A test finds these and no others in the compiled program (where gradients of parameters that two
branches share may be reduced once for each).
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from molt_jax.data.modalities import MODALITIES
from molt_jax.training.assembly import Assembly

# As XLA calls them.
KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
TYPES = {'f32': 'float32', 'bf16': 'bfloat16', 's32': 'int32', 'u32': 'uint32', 'pred': 'bool'}


class Collective(NamedTuple):
  """What devices along `axis` send each other in a step.

  `times` operations of `bytes` each, the size of the result on one device.
  """

  what: str
  kind: str
  axis: str
  times: int
  bytes: int


def collectives(assembly: Assembly, state: Any) -> list[Collective]:
  """Returns all collectives of a live training step without accumulation, from shapes alone.

  The dozen numbers of the losses are left out.

  Args:
    assembly: of a classifier; over `model` of one whose method is a head.
    state: its `TrainState`, arrays or shapes.
  """
  config, mesh, method = assembly.config, assembly.mesh, assembly.method
  found = []
  if mesh.shape['model'] > 1:
    for modality in MODALITIES:
      found += _of_tower(modality, method.modules[modality], config, mesh)
  if mesh.shape['data'] == 1:
    return found
  # The maps of imputation are fitted between steps.
  statistics = {name: x for name, x in state.statistics.items() if name != 'translator'}
  found.append(Collective('gradient of the head', 'all-reduce', 'data', 1, _bytes(state.params)))
  size = _bytes(statistics)
  found.append(Collective('statistics of hidden states', 'all-reduce', 'data', 1, size))
  if config.cca.weight and config.method == 'molt':
    k = config.molt.width if config.cca.estimator == 'batch' else config.cca.num_directions
    numbers = config.train.batch_size * method.num_layers * (2 * k + 1)
    found.append(Collective('pairs of L_CCA', 'all-gather', 'data', 1, 4 * numbers))
  return found


def _of_tower(
  name: str, tower: Any, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> list[Collective]:
  """Those over `model` of one tower; None: it does not run."""
  if tower is None:
    return []
  c, shards = tower.config, mesh.shape['model']
  rows = config.train.batch_size // mesh.shape['data']
  tokens = c.num_tokens if name == 'image' else config.text.max_tokens
  size = rows * tokens * c.hidden_size * np.dtype(config.backbones.dtype).itemsize
  # What does not divide stays whole.
  times = c.num_layers * sum(units % shards == 0 for units in (c.num_heads, c.intermediate_size))
  found = [Collective(f'{name} tower, layers', 'all-reduce', 'model', times, size)]
  if name == 'text' and c.vocab_size % shards == 0:
    found.append(Collective('text tower, embedding', 'all-reduce', 'model', 1, size))
  return found


def compiled_collectives(program: str) -> list[tuple[str, int, str]]:
  """Returns (kind, bytes of the result on a device, op name) of every collective of a program.

  program: text of the compiled program; a collective in a loop is there once.
  """
  found = []
  for shapes, kind, rest in re.findall(rf' = (.*?) ({"|".join(KINDS)})(?:-start)?\((.*)', program):
    size = sum(
      jnp.dtype(TYPES[name]).itemsize * math.prod(map(int, filter(None, dims.split(','))))
      for name, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes)
    )
    name = re.search(r'op_name="([^"]*)"', rest)
    found.append((kind, size, name.group(1) if name else ''))
  return found


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
