"""What a training step of each method costs that runs layers of a tower itself, from the hidden
state that a feature store would give it: `python tools/bench_methods.py [--json] [--out=FILE]`.

Costs are multiples of one forward pass of both towers on the same batch. By rule: a frozen layer
costs two forward passes of it (one, and the gradient of what goes through it), so that a method
that enters at state j of L costs 2 (1 - j / L) of that tower, PMF twice that (its prompts ask, then
fuse); tokens that a method adds are not in the rule. Counted: matrix products of the step's
program. Measured: the median over rounds of the ratio within a round, a step and a forward pass in
turn, so that other work on the machine weighs on both.

The towers have random weights (no files are needed), the examples are complete and have one missing
pattern, so that the step is what the rule is of; our default has three patterns a step.
"""

import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import Rule, at_least
from molt_jax.config.methods import METHODS
from molt_jax.config.resolved import set_field
from molt_jax.profiling import flops, timing
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import atomic, compiling, console, sharding
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag

LIVE = ('mora', 'pmf', 'mmrl', 'mmrlpp', 'prompt_fuse', 'mmbt', 'maple', 'map', 'dcp')
# How often a step runs each of the layers that it runs.
PASSES = {'pmf': 2}
FORWARD = 'forward'
RANDOM = Rule('random:NAME, a tower without files', lambda path: path.startswith('random:'))
FLAGS = (
  Flag('text', 'text tower', 'random:minilm-l6', rule=RANDOM),
  Flag('image', 'image tower', 'random:dinov2-small', rule=RANDOM),
  Flag('resolution', 'pixels along a side of an image', 112, type=int, rule=at_least(1)),
  Flag('tokens', 'tokens of each text', 16, type=int, rule=at_least(1)),
  Flag('batch', 'examples of a step', 8, type=int, rule=at_least(1)),
  Flag('classes', 'number of classes', 23, type=int, rule=at_least(1)),
  Flag('rounds', 'timed steps of each method; 0: products are counted alone', 5, type=int),
  Flag('out', 'file to write the JSON to', ''),
  Flag('json', 'print JSON', switch=True),
)


def make_config(flags: Any, method: str) -> ml_collections.ConfigDict:
  """Returns the config of a method's steps."""
  config = CLASSIFIER.default()
  values = {
    'dataset.path': 'unread',
    'method': method,
    'text.max_tokens': flags.tokens,
    'text.padding': 'max_tokens',
    'train.batch_size': flags.batch,
    'backbones.text.path': flags.text,
    'backbones.image.path': flags.image,
    'backbones.image.resolution': flags.resolution,
    'backbones.dtype': 'float32',
    'compute_dtype': 'float32',
    'missing.views': False,
    'mesh.data': 1,
  }
  if METHODS[method].names:
    values[f'{method}.classes'] = 'head'
  for name, value in values.items():
    set_field(config, name, value)
  return CLASSIFIER.validate(config)


def by_rule(method: str, reads: Mapping[str, Any], towers: Mapping[str, Any]) -> float:
  """Returns the cost of a step by rule.

  Args:
    method: its name.
    reads: modality -> `features.frozen.Reads`.
    towers: modality -> (depth, FLOPs of a forward pass).
  """
  cost = 0.0
  for modality, (depth, forward) in towers.items():
    lowest = reads[modality].lowest
    share = 0 if lowest is None else 1 - lowest / depth
    cost += 2 * PASSES.get(method, 1) * share * forward
  return cost / sum(forward for _, forward in towers.values())


def stored(features: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the batch with features in the place of what they were computed from."""
  found = dict(batch)
  for modality, given in (('image', 'image'), ('text', 'tokens')):
    states_lbnd = features.of(modality)
    if states_lbnd is not None:
      found.pop(given)
      found[f'{modality}_states'] = jnp.moveaxis(states_lbnd, 0, 1)
  return found


class Step:
  """A method's step from stored states, and its towers."""

  def __init__(self, config, num_classes):
    self.workload = Workload.open(config, num_classes=num_classes)
    self.towers = self.workload.frozen()
    self.batch = sharding.put_batch(self.workload.batch(), self.workload.mesh)
    method = self.workload.method
    self._stored = stored(compiling.jit(method.features)(self.towers, self.batch), self.batch)
    live = {m for m, reads in method.reads.items() if reads.lowest is not None}
    self._frozen = {m: params if m in live else None for m, params in self.towers.items()}
    self._step, self._state = self.workload.step(), self.workload.state()
    self.parameters = sum(x.size for x in jax.tree.leaves(self._state.params))
    self.flops = flops.matmul_flops(self._step, self._state, self._frozen, self._stored)

  def __call__(self):
    self._state, metrics = self._step(self._state, self._frozen, self._stored)
    return metrics


def measure(flags: Any) -> dict[str, Any]:
  """Returns the report; a method at a time, so that only its own towers are in memory."""
  cases = {}
  for name in LIVE:
    cases[name] = case(name, flags)
    console.log(_line(name, cases[name]))
  fields = ('text', 'image', 'resolution', 'tokens', 'batch', 'classes', 'rounds')
  return {
    **{name: getattr(flags, name) for name in fields},
    'methods': cases,
    'device': jax.devices()[0].device_kind,
    'cpus': len(os.sched_getaffinity(0)),
    'load_average': os.getloadavg()[0],
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
  }


def case(name: str, flags: Any) -> dict[str, Any]:
  """Returns the costs of one method, as multiples of a forward pass of both towers."""
  step = Step(make_config(flags, name), flags.classes)
  plain = Workload.open(make_config(flags, 'late_fusion'), num_classes=flags.classes)
  forward, towers, batch = compiling.jit(plain.method.features), step.towers, step.batch
  alone = {
    m: flops.matmul_flops(forward, {**dict.fromkeys(towers), m: towers[m]}, batch)
    for m in plain.modules
  }
  sizes = {m: (module.config.num_layers, alone[m]) for m, module in plain.modules.items()}
  reads = step.workload.method.reads
  runs = {FORWARD: lambda: forward(towers, batch), name: step}
  taken = timing.seconds_in_turn(runs, rounds=flags.rounds) if flags.rounds else {}
  return {
    'enters_at': {m: reads[m].lowest for m in reads},
    'of_layers': {m: depth for m, (depth, _) in sizes.items()},
    'parameters': step.parameters,
    'forward_gflop': {m: round(x / 1e9, 3) for m, x in alone.items()},
    'by_rule': round(by_rule(name, reads, sizes), 3),
    'counted': round(step.flops / sum(alone.values()), 3),
    **_measured(taken, name),
  }


def _measured(taken, name):
  if not taken:
    return {}
  ratios = [a / b for a, b in zip(taken[name], taken[FORWARD], strict=True)]
  seconds = {run: timing.spread(values) for run, values in taken.items()}
  return {'measured': round(statistics.median(ratios), 3), 'seconds': seconds}


def _line(name, case):
  measured = f', measured {case["measured"]:.2f}' if 'measured' in case else ''
  return (
    f'{name}: by rule {case["by_rule"]:.2f} forward passes, counted {case["counted"]:.2f}{measured}'
  )


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  what = "Steps of methods that run layers of a tower, against the towers' forward pass."
  flags, _ = parse('python tools/bench_methods.py', what, FLAGS, argv)
  report = json.dumps(measure(flags), indent=1)
  if flags.out:
    atomic.write(pathlib.Path(flags.out), report + '\n')
  if flags.json:
    print(report)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
