"""`jax.jit` with as much of a CPU compiler's work as a program is worth.

Of what runs for hours on an accelerator, compiling is nothing; of the first minutes on a laptop it
is most. Other backends take their own defaults, and what XLA_FLAGS say of the same goes before.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# The levels above find nothing to do in loops that XLA has fused: steps of training and forward
# passes of towers come out the same to the bit and as fast, and are compiled in 0.85 of the time.
_USUAL = {'xla_backend_optimization_level': 1}
# Code that is not optimised is ready in a third of the time.
_QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
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


def _known(options):
  """Those of the options that this version has, where they are for this backend; else None."""
  said = any(name in os.environ.get('XLA_FLAGS', '') for name in options)
  if said or jax.default_backend() != 'cpu':
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
