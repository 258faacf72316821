r"""Where the time and memory of a training step go:
`python tools/profile_step.py --config=configs/quickstart.py [--json] [--config.FIELD=VALUE]`.

Compiles the config's live step (towers included) and runs it on noise: compile time, seconds per
step, FLOPs, FLOP/s and, on known devices, MFU (model FLOPs utilisation), memory, and the split over
towers, head, CCA and optimiser, twice: from parts that are compiled on their own, and from a trace
of the whole step, which is kept for XProf (`xprof TRACE`). With --data=dataset it also trains on
the real input pipeline and tells how long a step waits for it.

`random:NAME` towers are drawn on the device (molt_jax/towers/architectures.py has the names), so
full-size models need no files:

  python tools/profile_step.py --config=configs/quickstart.py \
    --config.backbones.text.path=random:llama-7b \
    --config.backbones.image.path=random:clip-vit-l-14 \
    --config.backbones.dtype=bfloat16 --config.compute_dtype=bfloat16 \
    --config.text.max_tokens=128 --config.train.batch_size=32 --config.molt.width=1024

With noise for data, neither Grain nor TensorFlow Datasets nor ml_collections need be installed.
"""

import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import attribute_dict  # noqa: F401 (before the package: it may stand in for ml_collections)
import jax

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least
from molt_jax.data.modalities import MODALITIES
from molt_jax.profiling.flops import PEAK_FLOPS, decoder_flops, matmul_flops, vision_flops
from molt_jax.profiling.timing import Parts, seconds_in_turn, spread
from molt_jax.profiling.trace import trace_parts
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import atomic, sharding
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice

FLAGS = (
  Flag('config', 'preset', required=True),
  Flag('rounds', 'timed steps', 10, type=int, rule=at_least(1)),
  Flag(
    'data',
    "dataset: the config's own, through the input pipeline",
    'noise',
    rule=choice('noise', 'dataset'),
  ),
  Flag('classes', 'number of classes, for noise', 101, type=int, rule=at_least(1)),
  Flag('trace', 'folder for the trace; default: a new temporary one', ''),
  Flag('out', 'file to write the JSON to', ''),
  Flag('json', 'print JSON', switch=True),
)
TRACED = 3  # Steps in the trace.


class Stepper:
  """The compiled step and the state it goes on from."""

  def __init__(self, workload: Workload):
    start = time.perf_counter()
    self.compiled = workload.step().lower(*workload.shapes()).compile()
    self.compile_seconds = time.perf_counter() - start
    self.frozen, self._state = workload.frozen(), workload.state()

  def __call__(self, batch):
    self._state, metrics = self.compiled(self._state, self.frozen, batch)
    return metrics


def _part(call, seconds: float, step: float) -> dict:
  function, arguments = call
  flops = matmul_flops(function, *arguments)
  return {'seconds': seconds, 'share': seconds / step, 'flops': flops}


def _device(device: jax.Device, mesh: jax.sharding.Mesh) -> dict:
  return {
    'kind': device.device_kind,
    'platform': device.platform,
    'used': mesh.size,
    'load_average': os.getloadavg()[0],
  }


def measure(config, *, rounds: int, classes: int, data: str, trace: pathlib.Path) -> dict:
  """Returns what the tool prints, as a dict."""
  workload = Workload.open(config, num_classes=classes)
  stepper = Stepper(workload)
  host = workload.batch()
  batch = sharding.put_batch(host, workload.mesh)
  parts = Parts(workload, stepper.frozen, batch)
  calls = parts.calls()
  taken = seconds_in_turn(
    {
      'step': lambda: stepper(batch),
      'transfer': lambda: sharding.put_batch(host, workload.mesh),
      **{name: functools.partial(call, *arguments) for name, (call, arguments) in calls.items()},
    },
    rounds=rounds,
  )
  median = {name: statistics.median(values) for name, values in taken.items()}
  step = median['step']
  split = {name: _part(call, median[name], step) for name, call in calls.items()}
  rest = step - sum(part['seconds'] for part in split.values())
  device = jax.devices()[0]
  flops = matmul_flops(workload.step(), *workload.shapes())
  peak = PEAK_FLOPS.get(device.device_kind, 0) * workload.mesh.size or None
  return {
    'device': _device(device, workload.mesh),
    'batch_size': config.train.batch_size,
    'max_tokens': config.text.max_tokens,
    'quantization': config.backbones.quantization,
    'attention': config.backbones.attention,
    'backbones': {m: config.backbones[m].path for m in resolved.modalities(config)},
    'compile_seconds': stepper.compile_seconds,
    'step_seconds': spread(taken['step']),
    'examples_per_second': config.train.batch_size / step,
    'parts': split,
    'rest': {'seconds': rest, 'share': rest / step},
    'trace': _traced(stepper, batch, trace) | {'folder': str(trace)},
    'flops': {
      'step': flops,
      'towers_closed_form': _closed_form(workload),
      'xla_counting_loops_once': _xla_flops(stepper.compiled),
    },
    'flops_per_second': flops / step,
    'peak_flops_per_second': peak,
    'mfu': peak and flops / step / peak,
    'memory': _memory(stepper.compiled, device),
    'input': _pipeline(config, workload, stepper, rounds)
    if data == 'dataset'
    else {'data': 'noise', 'transfer_seconds': median['transfer']},
    'versions': {'jax': jax.__version__},
  }


def _xla_flops(compiled):
  return (compiled.cost_analysis() or {}).get('flops')


def _closed_form(workload):
  rows, tokens = workload.config.train.batch_size, workload.config.text.max_tokens
  image, text = (workload.modules.get(modality) for modality in MODALITIES)
  return (vision_flops(image.config, rows) if image else 0) + (
    decoder_flops(text.config, rows, tokens) if text else 0
  )


def _traced(stepper, batch, folder):
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level, options.host_tracer_level = 0, 2
  with jax.profiler.trace(str(folder), profiler_options=options):
    for i in range(TRACED):
      with jax.profiler.StepTraceAnnotation('train', step_num=i):
        jax.block_until_ready(stepper(batch))
  busy = trace_parts(folder, stepper.compiled.as_text(), steps=TRACED)
  total = sum(busy.values())
  return {
    'busy_seconds': busy,
    'share': {name: value / total if total else None for name, value in busy.items()},
  }


def _memory(compiled, device):
  m = compiled.memory_analysis()
  bytes_of = {
    name: getattr(m, f'{name}_size_in_bytes') for name in ('argument', 'temp', 'output', 'alias')
  }
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  return {
    **bytes_of,
    'step': bytes_of['argument'] + bytes_of['temp'] + bytes_of['output'] - bytes_of['alias'],
    'peak_of_the_process': peak,
  }


def _pipeline(config, workload, stepper, rounds):
  from molt_jax.data import datasets, pipeline

  data = datasets.load_dataset(config)
  iterator = pipeline.train_iterator(
    data.splits['train'],
    workload.assembly.preprocess,
    pipeline.Batching(
      batch_size=config.train.batch_size,
      num_threads=config.input.num_threads,
      prefetch=config.input.prefetch,
    ),
    seed=config.seed,
  )
  waits, metrics = [], None
  begin = time.perf_counter()
  for _ in range(rounds + 1):
    start = time.perf_counter()
    batch = next(iterator)
    waits.append(time.perf_counter() - start)
    jax.block_until_ready(metrics)  # One step is in flight while the next batch is fetched.
    metrics = stepper(
      sharding.put_batch({name: x for name, x in batch.items() if name != 'index'}, workload.mesh)
    )
  jax.block_until_ready(metrics)
  total = time.perf_counter() - begin
  return {
    'data': config.dataset.name,
    'wait_seconds': spread(waits[1:]),
    'wait_share': sum(waits[1:]) / total,
  }


@command
def main(argv: Sequence[str]) -> None:
  """Command line."""
  flags, overrides = parse(
    'python tools/profile_step.py',
    'Where the time and memory of a training step go.',
    FLAGS,
    argv,
    schema=CLASSIFIER,
  )
  config = CLASSIFIER.load(flags.config, overrides)
  classes = _classes(config) if flags.data == 'dataset' else flags.classes
  trace = pathlib.Path(flags.trace or tempfile.mkdtemp(prefix='molt_jax_trace_'))
  out = pathlib.Path(flags.out)
  out.parent.mkdir(parents=True, exist_ok=True)  # Before the work, not after it.
  result = measure(config, rounds=flags.rounds, classes=classes, data=flags.data, trace=trace)
  if flags.out:
    atomic.write(out, json.dumps(result, indent=2) + '\n')
  if flags.json:
    print(json.dumps(result))
  else:
    print('\n'.join(_lines(result)))


def _classes(config):
  from molt_jax.data import datasets

  return len(datasets.load_dataset(config).class_names)


def _lines(r):
  yield (
    f'{r["device"]["used"]} x {r["device"]["kind"]}, batch {r["batch_size"]} x '
    f'{r["max_tokens"]} tokens; compiled in {r["compile_seconds"]:.1f} s'
  )
  mfu = f', {100 * r["mfu"]:.1f} % of peak' if r['mfu'] else ''
  yield (
    f'step {1e3 * r["step_seconds"]["median"]:.2f} ms, {r["examples_per_second"]:.1f} examples/s, '
    f'{r["flops"]["step"] / 1e12:.3f} TFLOP, '
    f'{r["flops_per_second"] / 1e12:.3f} TFLOP/s{mfu}'
  )
  yield (
    f'memory of the step {r["memory"]["step"] / 1e9:.2f} GB, of which '
    f'{r["memory"]["temp"] / 1e9:.2f} GB temporary'
  )
  yield f'{"part":12} {"on its own":>14} {"share":>7} {"in the trace":>14}'
  parts = r['parts'] | {'rest': r['rest']}
  for name in (*r['trace']['share'], 'rest'):
    part, busy = parts.get(name), r['trace']['share'].get(name)
    own = f'{1e3 * part["seconds"]:11.2f} ms {100 * part["share"]:5.1f} %' if part else ' ' * 22
    traced = '-' if busy is None else f'{100 * busy:.1f} %'
    yield f'{name:12} {own} {traced:>14}'
  yield (
    'rest: what the parts cost more (or less) together than one after the other; trace: '
    f'{r["trace"]["folder"]}'
  )
  if 'wait_share' in r['input']:
    yield (
      f'input: a step waits {1e3 * r["input"]["wait_seconds"]["median"]:.2f} ms for its batch, '
      f'{100 * r["input"]["wait_share"]:.1f} % of the time'
    )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
