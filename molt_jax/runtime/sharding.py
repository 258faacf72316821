"""Devices, mesh and the rules that place named axes on it."""

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from molt_jax.config.resolved import modalities
from molt_jax.errors import UserError
from molt_jax.runtime import allocator

# Logical axis name -> mesh axis, for the towers. Megatron's split of a transformer: heads and the
# hidden layer of the MLP over `model`, so that a layer needs two all-reduces of its activations and
# its weights never move. The head is small (megabytes) and every device holds it whole.
# What devices send each other is listed and counted in `profiling.collectives`.
RULES: dict[str, str | None] = {
  'batch': 'data',
  'layers': None,
  'embed': None,
  'vocab': 'model',
  'heads': 'model',
  'kv_heads': 'model',
  'head_dim': None,
  'mlp': 'model',
  'patch': None,
  'position': None,
  'segment': None,
  'common': None,
  'hidden': None,
  'classes': None,
}
# Programs that took so long to compile are kept. JAX keeps those of a second; a tower is loaded by
# a dozen small ones.
_LEAST_TIME, _LEAST_SECONDS = 'jax_persistent_cache_min_compile_time_secs', 0.02


def make_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
  """Returns the ('data', 'model') mesh that `config.mesh` asks for on `config.platform`, over the
  devices of all processes.

  Raises:
    UserError: the platform is not there, the axes do not fit the number of devices, or a process
      would be left without any.
  """
  allocator.keep_memory()  # Before XLA has threads.
  devices = _devices(config.platform)
  _keep_compiled_programs()
  data, model = config.mesh.data, config.mesh.model
  if data == -1 and model == -1:
    raise UserError('config.mesh: data and model are both -1; give one of them a number')
  if data == -1:
    data = len(devices) // model
  if model == -1:
    model = len(devices) // data
  if data * model == 0 or data * model > len(devices):
    raise UserError(
      f'config.mesh: data x model = {config.mesh.data} x {config.mesh.model} does not fit '
      f'{len(devices)} {devices[0].platform} device(s)'
    )
  if jax.process_count() > 1 and data * model < len(devices):
    raise UserError(
      f'config.mesh: data x model = {data} x {model} leaves devices idle, and '
      f'{jax.process_count()} processes have {len(devices)}; give '
      'mesh.data=-1'
    )
  return jax.make_mesh(
    (data, model),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=devices[: data * model],
  )


def _keep_compiled_programs() -> None:
  """Keeps what XLA compiled on disk, so that resuming, evaluating and predicting start at once;
  JAX_COMPILATION_CACHE_DIR goes before.
  """
  # JAX says so, in several lines, for each program that it cannot keep.
  warnings.filterwarnings('ignore', message='Error writing persistent compilation cache')
  if _LEAST_TIME.upper() not in os.environ:
    jax.config.update(_LEAST_TIME, _LEAST_SECONDS)
  if jax.config.jax_compilation_cache_dir:
    return
  folder = os.path.expanduser('~/.cache/molt_jax/xla')
  with contextlib.suppress(OSError):  # Without one, programs are compiled in each process.
    os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK):
      jax.config.update('jax_compilation_cache_dir', folder)


def _devices(platform: str) -> list[jax.Device]:
  try:
    return jax.devices() if platform == 'auto' else jax.devices(platform)
  except RuntimeError as error:
    remedy = {
      'gpu': "pip install 'molt_jax[cuda12]' on a machine with an NVIDIA GPU",
      'tpu': "pip install 'molt_jax[tpu]' on a TPU machine",
    }
    found = sorted({d.platform for d in jax.devices()})
    raise UserError(
      f'config.platform: {platform!r} is not here, JAX finds {", ".join(found)}; give auto, or '
      f'{remedy.get(platform, "set JAX_PLATFORMS")}'
    ) from error


def param_shardings(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
  """Returns a function from a boxed abstract tree (of `jax.eval_shape`) to the sharding of each
  leaf.

  An axis that the devices do not divide evenly stays whole (SmolLM's 3 key heads on 2 devices). An
  unknown axis name raises ValueError.
  """

  def shardings(abstract_boxed):
    specs = nn.get_partition_spec(abstract_boxed)
    shapes = nn.unbox(abstract_boxed)
    return jax.tree.map(
      lambda leaf, spec: jax.NamedSharding(mesh, _fit(leaf.shape, spec, mesh)), shapes, specs
    )

  return shardings


def _fit(shape: tuple[int, ...], spec: jax.P, mesh: jax.sharding.Mesh) -> jax.P:
  axes = [_mesh_axis(name) for name in spec]
  return jax.P(
    *[
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=False)
    ]
  )


def _mesh_axis(name: str | None) -> str | None:
  if name is None:
    return None
  if name not in RULES:
    raise ValueError(f'unknown logical axis name {name!r}; known: {", ".join(RULES)}')
  return RULES[name]


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return jax.NamedSharding(mesh, jax.P())


def data_shard(mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Returns the part of each batch that this process reads, {'process_index', 'process_count'}, as
  the pipeline's functions take it.

  Processes along `model` read the same examples.

  Raises:
    UserError: the process's devices are no equal, unbroken part of the data axis.
  """
  here = [
    row
    for row, devices in enumerate(mesh.devices)
    if any(d.process_index == jax.process_index() for d in devices)
  ]
  count, remainder = divmod(mesh.shape['data'], len(here))
  if remainder or here[0] % len(here) or here != list(range(here[0], here[0] + len(here))):
    raise UserError(
      f'config.mesh: data x model = {mesh.shape["data"]} x {mesh.shape["model"]} gives process '
      f'{jax.process_index()} the rows of devices {here}, '
      'no equal part of the batch; give mesh.model a divisor or a multiple of the devices of a '
      'process'
    )
  return {'process_index': here[0] // len(here), 'process_count': count}


def packing(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, *, parts: int = 1
) -> tuple[int, int] | None:
  """Returns how the pipeline packs texts, (devices that examples are split over, microbatches
  that each works its own through in), or None: padded.
  """
  return (
    (mesh.shape['data'], parts)
    if config.text.get('padding') == 'packed' and 'text' in modalities(config)
    else None
  )


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh | None:
  """Returns the mesh of this process's own devices, None where a model axis spans processes."""
  if jax.process_count() == 1:
    return mesh
  here = [
    devices
    for devices in mesh.devices
    if all(d.process_index == jax.process_index() for d in devices)
  ]
  return (
    jax.sharding.Mesh(np.array(here), mesh.axis_names, axis_types=mesh.axis_types) if here else None
  )


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Returns the batch on the devices, examples split over `data`; each process gives its own."""
  rows = jax.NamedSharding(mesh, jax.P('data'))
  return {
    name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()
  }


def gather_rows(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  """Returns a function for use under jit that brings the rows of x [L, B, k], split over `data`, to
  every device.
  """

  def gather(x_lbk):
    # Gather x, not what it is made of.
    split = jax.NamedSharding(mesh, jax.P(None, 'data'))
    x_lbk = jax.lax.with_sharding_constraint(x_lbk, split)
    return jax.lax.with_sharding_constraint(x_lbk, replicated(mesh))

  return gather


def check_batch_size(name: str, size: int, mesh: jax.sharding.Mesh, *, parts: int = 1) -> None:
  """Raises UserError unless each of `parts` equal parts of `size` rows splits evenly over the
  mesh's data axis.
  """
  data = mesh.shape['data']
  if size % (data * parts):
    over = f'{data} devices' + (f' in {parts} parts (train.accumulate)' if parts > 1 else '')
    raise UserError(
      f'config.{name}: {size} rows do not split over {over}; give a multiple of {data * parts}'
    )
