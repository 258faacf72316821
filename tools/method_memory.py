"""Memory of a training step of each method with LLaMA-7B and CLIP ViT-L/14, on paper: `python
tools/method_memory.py [--method=molt,maple]`.

Prints a Markdown table of GB per device, from steps that are compiled for CPU devices without
weights: nothing is allocated or run. Arguments (weights, what is trained, batch) are exact on any
backend. Temporaries are an upper estimate for a GPU or TPU: a CPU multiplies bfloat16 in float32
and holds what enters and leaves a product in it, too. Where a step does not fit its card, it is
compiled again with `train.accumulate`.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.config.methods import METHODS
from molt_jax.errors import UserError
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import console
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice

FLAGS = (
  Flag('method', 'methods', tuple(METHODS), rule=choice(*METHODS), many=True),
  Flag('text', 'text tower', 'random:llama-7b'),
  Flag('image', 'image tower', 'random:clip-vit-l-14'),
  Flag('rows', 'examples of a step', 32, type=int, rule=at_least(1)),
  Flag('tokens', 'tokens per text', 128, type=int, rule=at_least(1)),
  Flag('accumulate', 'microbatches where a step does not fit', 8, type=int, rule=at_least(1)),
)
# A CPU would convert the matrices of all layers to float32 before the loop over them, as it has no
# product of bfloat16; machine code is not run.
AS_ON_AN_ACCELERATOR = {
  'xla_disable_hlo_passes': (
    'while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion'
  ),
  'xla_backend_optimization_level': 0,
}


class Place(NamedTuple):
  """Devices of `size` GB, and how towers lie on them."""

  name: str
  quantization: str
  devices: int
  size: float


PLACES = (
  Place('24 GB, int8', 'int8', 1, 24),
  Place('2 x 24 GB, bfloat16', 'none', 2, 24),
  Place('80 GB, bfloat16', 'none', 1, 80),
)


def gigabytes(flags, method: str, place: Place, accumulate: int = 1) -> float:
  """Returns what a step takes of each device.

  Raises:
    UserError: the method does not take these towers.
  """
  config = CLASSIFIER.default()
  config.platform, config.dataset.path, config.method = 'cpu', 'unread', method
  config.backbones.text.path, config.backbones.image.path = flags.text, flags.image
  config.backbones.quantization = place.quantization
  config.text.max_tokens, config.train.batch_size = flags.tokens, flags.rows
  config.train.accumulate, config.mesh.data, config.mesh.model = accumulate, 1, place.devices
  work = Workload.open(CLASSIFIER.validate(config), num_classes=101)
  program = work.step().lower(*work.shapes()).compile(compiler_options=AS_ON_AN_ACCELERATOR)
  memory = program.memory_analysis()
  # What is updated in place is counted among the arguments and the results.
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return (held + memory.temp_size_in_bytes) / 1e9


def cell(flags, method: str, place: Place) -> str:
  """GB of a step, and of one with microbatches where that does not fit."""
  try:
    whole = gigabytes(flags, method, place)
  except UserError as error:
    console.log(f'{method}, {place.name}: {error}')
    return 'refused'
  if whole <= place.size or flags.accumulate == 1:
    return f'{whole:.1f}'
  parts = gigabytes(flags, method, place, flags.accumulate)
  fits = '' if parts <= place.size else ', does not fit'
  return f'{whole:.1f}; {parts:.1f} in {flags.accumulate} microbatches{fits}'


@command
def main(argv: Sequence[str]) -> None:
  """Command line of the tool."""
  what = 'Memory of a training step of each method, on paper.'
  flags, _ = parse('python tools/method_memory.py', what, FLAGS, argv)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(place.devices for place in PLACES))
  print('| method | ' + ' | '.join(place.name for place in PLACES) + ' |')
  print('|---|' + '--:|' * len(PLACES))
  for method in flags.method:
    cells = [cell(flags, method, place) for place in PLACES]
    print(f'| `{method}` | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
