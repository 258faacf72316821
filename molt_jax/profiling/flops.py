"""FLOPs of matrix products, two for each multiply and add.

The body of a loop is counted as often as it runs; XLA's own cost analysis counts it once. That is
the convention of model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B).
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from molt_jax.towers.decoder import DecoderConfig
from molt_jax.towers.vision import VisionConfig

# Dense bfloat16 (TPU v6e and GPUs: with float32 accumulation) FLOP/s of one device by
# `jax.Device.device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12,
  'NVIDIA A10G': 70e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40S': 362e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GeForce RTX 3090': 71e12,
  'NVIDIA GeForce RTX 4090': 165e12,
  'TPU v3': 123e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products in `function(*args)` (arrays or shapes): 2 m n k each.

  Factorisations (`eigh`, `cholesky`, `svd`) and elementwise work are not counted; of a conditional,
  the costlier branch is.
  """
  # A program with options of its own for the compiler can be traced as it is alone.
  program = function if hasattr(function, 'trace') else jax.jit(function)
  return _flops(program.trace(*args).jaxpr.jaxpr)


def _flops(jaxpr) -> int:
  return sum(_COUNT.get(eqn.primitive.name, _inner_flops)(eqn) for eqn in jaxpr.eqns)


def _product_flops(eqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * summed


def _inner_flops(eqn) -> int:
  return sum(_flops(jaxpr) for jaxpr in _inner(eqn))


def _inner(eqn) -> list[Any]:
  found = []
  for value in eqn.params.values():
    values = value if isinstance(value, list | tuple) else (value,)
    jaxprs = [getattr(v, 'jaxpr', v) for v in values]
    found += [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, 'eqns')]
  return found


_COUNT = {
  'dot_general': _product_flops,
  'scan': lambda eqn: eqn.params['length'] * _inner_flops(eqn),
  'cond': lambda eqn: max(_flops(branch) for branch in _inner(eqn)),
}


def decoder_flops(config: DecoderConfig, rows: int, tokens: int) -> int:
  """FLOPs of a forward pass of a text tower without the language-model head, in closed form.

  Attention is over all pairs of tokens, as `xla` computes it.
  """
  c = config
  projections = (
    c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    + (2 + c.gated) * c.hidden_size * c.intermediate_size
  )
  attention = 2 * c.num_heads * c.head_dim * tokens
  return 2 * c.num_layers * rows * tokens * (projections + attention)


def vision_flops(config: VisionConfig, rows: int) -> int:
  """FLOPs of a forward pass of the vision tower, in closed form."""
  c = config
  patches = 2 * rows * c.grid**2 * 3 * c.patch_size**2 * c.hidden_size
  per_token = (
    4 * c.hidden_size**2
    + (3 if c.gated else 2) * c.hidden_size * c.intermediate_size
    + 2 * c.hidden_size * c.num_tokens
  )
  return patches + 2 * c.num_layers * rows * c.num_tokens * per_token
