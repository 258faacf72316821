"""Times the CCA loss, value and gradient, against autodiff through `jnp.linalg.eigh` and against
PyTorch and cca-zoo, in one run.

  python tools/bench_cca.py [--quick] [--n=256,2048 --d=1024 --layers=1] [--json=FILE]

For every n x d x layers: the median over rounds of one jitted value-and-gradient call, and of the
processor time of all its threads (`cpu_seconds`). In each round every implementation runs once, in
turn, so that a busy machine slows all alike; `ratio` is the median over rounds of (other / ours
with 'eigh') in the same round, `cpu_ratio` that of processor times. An implementation is timed
once where one call takes longer than the budget, and `finite` tells whether its gradient was;
`error` is that of the gradient against autodiff in float64 (PyTorch), relative, in the Frobenius
norm, the larger one of both views: null where either is not finite or the loss is another. On a
machine that does other work too, set OPENBLAS_NUM_THREADS=1: LAPACK's threads wait for each other
by spinning.

  eigh, newton_schulz   `cca_loss`, both solvers
  autodiff              the same loss by jax.grad through eigh of the d x d covariances and svd
  torch                 the same by PyTorch autograd
  cca_zoo               cca-zoo's CCALoss (sum of squared correlations), if it is installed
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from molt_jax.objectives.cca.estimators import make_estimator
from molt_jax.objectives.cca.loss import cca_loss
from molt_jax.runtime import compiling

QUICK = flags.DEFINE_boolean('quick', False, 'Only n = 32 and 256, d = 64 and 1024, one layer.')
N = flags.DEFINE_list('n', None, 'Batch sizes in the place of the usual ones.')
D = flags.DEFINE_list('d', None, 'Widths in the place of the usual ones.')
LAYERS = flags.DEFINE_list('layers', None, 'Numbers of layers in the place of the usual ones.')
JSON = flags.DEFINE_string('json', None, 'File for the results; without it they are only printed.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Rounds at most.', lower_bound=1)
BUDGET = flags.DEFINE_float(
  'budget', 4.0, 'Seconds for the rounds of one implementation at one size.', lower_bound=0
)

RIDGE = 1e-3
SIZES = {
  False: ((32, 64, 256, 1024, 4096), (64, 256, 1024), (1, 4)),
  True: ((32, 256), (64, 1024), (1,)),
}


def naive_loss(x_nd, y_nd):
  """The definition, as it would be written for autodiff."""
  n = x_nd.shape[0]

  def whiten(v_nd):
    v_nd = v_nd - v_nd.mean(0, keepdims=True)
    s_dd = v_nd.T @ v_nd / (n - 1)
    e_d, u_dd = jnp.linalg.eigh(s_dd + RIDGE * jnp.trace(s_dd) / len(s_dd) * jnp.eye(len(s_dd)))
    return v_nd, (u_dd / jnp.sqrt(e_d)[None, :]) @ u_dd.T

  (x_nd, p_dd), (y_nd, q_dd) = whiten(x_nd), whiten(y_nd)
  f_dd = p_dd @ (x_nd.T @ y_nd / (n - 1)) @ q_dd
  return -jnp.sum(jnp.sqrt(jnp.abs(jnp.linalg.eigvalsh(f_dd.T @ f_dd)))) / min(n - 1, len(f_dd))


def jax_caller(loss):
  """Value and gradient of the sum over layers; `loss` takes [L, n, d]."""
  step = compiling.jit(
    jax.value_and_grad(lambda x_lnd, y_lnd: jnp.sum(loss(x_lnd, y_lnd)), argnums=(0, 1))
  )

  def prepare(x_lnd, y_lnd):
    arrays = jax.device_put((x_lnd, y_lnd))
    return lambda: jax.block_until_ready(step(*arrays))

  return prepare


def torch_naive_loss(views):
  """`naive_loss` in PyTorch."""
  import torch

  n, whitened = len(views[0]), []
  for v_nd in views:
    v_nd = v_nd - v_nd.mean(0, keepdim=True)
    s_dd = v_nd.T @ v_nd / (n - 1)
    e_d, u_dd = torch.linalg.eigh(
      s_dd + RIDGE * torch.trace(s_dd) / len(s_dd) * torch.eye(len(s_dd))
    )
    whitened.append((v_nd, (u_dd / e_d.sqrt()) @ u_dd.T))
  (x_nd, p_dd), (y_nd, q_dd) = whitened
  f_dd = p_dd @ (x_nd.T @ y_nd / (n - 1)) @ q_dd
  return -torch.linalg.eigvalsh(f_dd.T @ f_dd).abs().sqrt().sum() / min(n - 1, len(f_dd))


def torch_caller(loss):
  import torch

  def prepare(x_lnd, y_lnd):
    views = [torch.from_numpy(v).requires_grad_() for v in (x_lnd, y_lnd)]

    def call():
      value = sum(loss([x_nd, y_nd]) for x_nd, y_nd in zip(*views, strict=True))
      return value.detach().numpy(), [g.numpy() for g in torch.autograd.grad(value, views)]

    return call

  return prepare


def implementations():
  """name -> prepare(x_lnd, y_lnd) -> call() -> (value, gradients); PyTorch's only where it is
  installed.
  """
  found = {
    solver: jax_caller(functools.partial(cca_loss, ridge=RIDGE, solver=solver))
    for solver in ('eigh', 'newton_schulz')
  }
  found['autodiff'] = jax_caller(
    lambda x_lnd, y_lnd: jnp.stack([naive_loss(x, y) for x, y in zip(x_lnd, y_lnd, strict=True)])
  )
  try:
    found['torch'] = torch_caller(torch_naive_loss)
    from cca_zoo.deep.objectives import CCALoss

    found['cca_zoo'] = torch_caller(CCALoss(reg_covar=RIDGE))
  except ImportError as error:
    print(f'left out: {error}', file=sys.stderr)
  return found


def exact_gradients(views):
  """The gradients of `torch_naive_loss`, summed over layers, in float64; None without PyTorch or
  where they are not finite.
  """
  try:
    call = torch_caller(torch_naive_loss)(*(v_lnd.astype(np.float64) for v_lnd in views))
  except ImportError:
    return None
  gradients = call()[1]
  return gradients if all(np.isfinite(g).all() for g in gradients) else None


def gradient_error(found, exact):
  """Returns the larger relative error of both views; None where there is no number."""
  error = max(
    float(np.linalg.norm(np.asarray(one) - other) / np.linalg.norm(other))
    for one, other in zip(found, exact, strict=True)
  )
  return error if np.isfinite(error) else None


def measure(prepared, exact, rounds, budget):
  """Seconds and processor seconds of each implementation in each round, whether its gradient was
  finite, and its error.
  """
  seconds, cpu, finite = {name: [] for name in prepared}, {name: [] for name in prepared}, {}
  error = dict.fromkeys(prepared)
  for name, call in prepared.items():
    start, cpu_start = time.perf_counter(), time.process_time()
    _, gradients = call()  # Compiles.
    finite[name] = all(bool(np.isfinite(np.asarray(g)).all()) for g in gradients)
    if exact and name != 'cca_zoo':
      error[name] = gradient_error(gradients, exact)
    del gradients
    if time.perf_counter() - start < 20 * budget:
      continue
    seconds[name].append(time.perf_counter() - start)
    cpu[name].append(time.process_time() - cpu_start)
  for _ in range(rounds):
    for name, call in prepared.items():
      if sum(seconds[name]) > budget:
        continue
      start, cpu_start = time.perf_counter(), time.process_time()
      call()
      seconds[name].append(time.perf_counter() - start)
      cpu[name].append(time.process_time() - cpu_start)
  return seconds, cpu, finite, error


def ratios(seconds):
  """Median over rounds of the time of each other implementation over ours."""
  ours = seconds['eigh']
  return {
    name: statistics.median(b / a for a, b in zip(ours, times, strict=False))
    for name, times in seconds.items()
    if name != 'eigh'
  }


def medians(seconds):
  """Median over rounds of each implementation."""
  return {name: statistics.median(times) for name, times in seconds.items()}


def row(n, d, layers, callers):
  rng = np.random.default_rng([n, d, layers])
  views = [rng.normal(size=(layers, n, d)).astype(np.float32) for _ in range(2)]
  prepared = {name: prepare(*views) for name, prepare in callers.items()}
  how = exact_gradients(views), ROUNDS.value, BUDGET.value
  seconds, cpu, finite, error = measure(prepared, *how)
  return {
    'n': n,
    'd': d,
    'layers': layers,
    'finite': finite,
    'error': error,
    'seconds': medians(seconds),
    'cpu_seconds': medians(cpu),
    'rounds': {name: len(times) for name, times in seconds.items()},
    'ratio': ratios(seconds),
    'cpu_ratio': ratios(cpu),
  }


def estimator_step(name):
  """Seconds and floating-point operations (as XLA counts them) of one value and gradient of an
  estimator.
  """
  estimator = make_estimator(name)
  x_lbd, y_lbd = jax.random.normal(jax.random.key(0), (2, 4, 64, 1024))

  def loss(state, x_lbd, y_lbd):
    value, *rest = estimator.loss(state, x_lbd, y_lbd)
    return value, rest

  step = (
    compiling.jit(jax.value_and_grad(loss, argnums=(1, 2), has_aux=True))
    .lower(estimator.init(4, 1024), x_lbd, y_lbd)
    .compile()
  )
  state, seconds = estimator.init(4, 1024), []
  for _ in range(20):
    start = time.perf_counter()
    (_, (state, _)), _ = jax.block_until_ready(step(state, x_lbd, y_lbd))
    seconds.append(time.perf_counter() - start)
  return {
    'name': name,
    'layers': 4,
    'batch': 64,
    'width': 1024,
    'seconds': statistics.median(seconds),
    'flops': step.cost_analysis()['flops'],
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {argv[1:]}')
  callers, rows = implementations(), []
  ns, ds, layer_counts = (
    usual if given.value is None else tuple(map(int, given.value))
    for usual, given in zip(SIZES[QUICK.value], (N, D, LAYERS), strict=True)
  )
  print(f'{"n":>5} {"d":>5} {"L":>2}  ' + '  '.join(f'{name:>22}' for name in callers))
  for layers in layer_counts:
    for d in ds:
      for n in ns:
        rows.append(row(n, d, layers, callers))
        ms, ratio, finite = (rows[-1][key] for key in ('seconds', 'ratio', 'finite'))
        cells = (
          f'{ms[name] * 1e3:.2f} ms x{ratio.get(name, 1):.1f}{"" if finite[name] else " NaN"}'
          for name in callers
        )
        print(
          f'{n:>5} {d:>5} {layers:>2}  ' + '  '.join(f'{cell:>22}' for cell in cells), flush=True
        )
  estimators = [estimator_step(name) for name in ('moving_average', 'batch')]
  for step in estimators:
    print(
      f'{step["name"]}, 4 layers, batch 64, width 1024: {step["seconds"] * 1e3:.2f} ms, '
      f'{step["flops"] / 1e6:.0f} MFLOP'
    )
  if JSON.value:
    packages = ('jax', 'jaxlib', 'numpy', 'torch', 'cca-zoo')
    installed = {
      dist.metadata['Name'].lower().replace('_', '-'): dist.version
      for dist in importlib.metadata.distributions()
    }
    record = {
      'command': ' '.join(['python', 'tools/bench_cca.py', *sys.argv[1:]]),
      'ridge': RIDGE,
      'versions': {name: installed[name] for name in packages if name in installed}
      | {'python': platform.python_version()},
      'device': jax.devices()[0].device_kind,
      'processors': os.cpu_count(),
      'machine': platform.machine(),
      'environment': {
        name: os.environ[name]
        for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'XLA_FLAGS')
        if name in os.environ
      },
      'rows': rows,
      'estimators': estimators,
    }
    pathlib.Path(JSON.value).write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
