"""`jax.jit` with as much of a compiler's work as a program is worth."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# Backend -> options; others take their own defaults. What XLA_FLAGS say of the same goes before.
#
# On a CPU the levels above find nothing to do in loops that XLA has fused: steps of training and
# forward passes of towers come out the same to the bit and as fast, and are compiled in 0.85 of the
# time. Without the fusion emitters, which jaxlib 0.10 can do without, a training step is compiled
# in 0.8 of the time and runs as fast.
#
# A GPU's compiler makes and times a kernel for each of dozens of ways to tile every product,
# and for several of every fusion; a step has two hundred of the one and six hundred of the other.
_GPU = {
  'xla_gpu_enable_triton_gemm': False,
  'xla_gpu_experimental_enable_fusion_autotuner': False,
}
_CPU = {'xla_cpu_use_fusion_emitters': False}
_USUAL = {'cpu': _CPU | {'xla_backend_optimization_level': 1}, 'gpu': _GPU}
# Code that is not optimised is ready in a third of the time.
_QUICK = {
  'cpu': _CPU | {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True},
  'gpu': _GPU,
}


def jit(function: Callable[..., Any], **options: Any) -> Any:
  """`jax.jit` of a program that is run often."""
  return jax.jit(function, compiler_options=_usual(), **options)


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jax.jit` of a program that is run a few times, so that compiling it is most of the work.

  The backend is asked for at the first call, so that this decorates functions of a module.
  """

  @functools.cache
  def compiled():
    return jax.jit(function, compiler_options=_quick(), **options)

  return functools.wraps(function)(lambda *arguments: compiled()(*arguments))


@functools.cache
def _usual() -> dict[str, Any] | None:
  return _known(_USUAL)


@functools.cache
def _quick() -> dict[str, Any] | None:
  return _known(_QUICK)


def _known(options_of):
  """Those of this backend's options that this version has; None if flags say some of them."""
  options = options_of.get(jax.default_backend(), {})
  if any(name in os.environ.get('XLA_FLAGS', '') for name in options):
    return None
  return {name: value for name, value in options.items() if _has(name, value)} or None


def _has(name, value):
  try:
    jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      raise
    return False
  return True
