"""Weak scaling on paper: FLOPs and collectives of a training step on 1 ... 64 devices, `python
tools/weak_scaling.py [--check=8]`.

Prints a Markdown table, and what L_CCA takes of the FLOPs. Nothing is allocated or run: FLOPs are
those of the traced step's matrix products, bytes those of `collectives`. With --check the
step is also compiled for that many virtual CPU devices, and the bytes in the compiled program are
printed beside these.

With --methods the table is of those, on the data axis alone: what they train may lie in between the
layers of the towers, which a step then runs forward and backward.
"""

import sys
from collections.abc import Sequence

import jax

from molt_jax.config.classifier import CLASSIFIER
from molt_jax.config.fields import at_least, between, more_than
from molt_jax.config.methods import METHODS
from molt_jax.errors import UserError
from molt_jax.profiling import collectives, flops
from molt_jax.profiling.workload import Workload
from molt_jax.runtime import console
from molt_jax.runtime.command_line import command, parse
from molt_jax.runtime.flags import Flag, choice

DEVICES = (1, 2, 4, 8, 16, 32, 64)
FLAGS = (
  Flag('text', 'text tower', 'random:llama-7b'),
  Flag('image', 'image tower', 'random:clip-vit-l-14'),
  Flag('rows', 'examples per device', 32, type=int, rule=at_least(1)),
  Flag('tokens', 'tokens per text', 128, type=int, rule=at_least(1)),
  Flag(
    'flops',
    'peak FLOP/s of a device in bfloat16 (H100 SXM: 989e12)',
    989e12,
    type=float,
    rule=more_than(0),
  ),
  Flag(
    'mfu', 'share of the peak that one device reaches alone', 0.5, type=float, rule=between(0.01, 1)
  ),
  Flag(
    'link',
    'bytes/s each way of a device to those of its node (H100 SXM, NVLink 4: 450e9)',
    450e9,
    type=float,
    rule=more_than(0),
  ),
  Flag(
    'network',
    'bytes/s each way of a device to other nodes (one 400 Gb/s port a GPU: 50e9)',
    50e9,
    type=float,
    rule=more_than(0),
  ),
  Flag('node', 'devices per node', 8, type=int, rule=at_least(1)),
  Flag('methods', 'a table of these in the place of MoLT', (), rule=choice(*METHODS), many=True),
  Flag(
    'check',
    'compile for this many devices too, with model=1 and model=2, and print the bytes found; 0: no',
    0,
    type=int,
    rule=at_least(0),
  ),
)


def open_work(
  flags, devices: int, model: int, dtype: str = 'bfloat16', *, cca: bool = True, method='molt'
) -> Workload:
  """The step on that many devices, every one with its share of rows; without `cca` it has no
  L_CCA.
  """
  config = CLASSIFIER.default()
  config.method = method
  config.platform, config.mesh.data, config.mesh.model = 'cpu', devices // model, model
  config.backbones.text.path, config.backbones.image.path, config.backbones.dtype = (
    flags.text,
    flags.image,
    dtype,
  )
  config.text.max_tokens, config.train.batch_size = flags.tokens, flags.rows * devices
  config.cca.weight *= cca
  return Workload.open(config, num_classes=101)


def listed(work: Workload) -> list[collectives.Collective]:
  """The collectives of the step, from shapes."""
  return collectives.collectives(work.assembly, work.shapes()[0])


def flops_of(flags) -> tuple[float, float, float]:
  """FLOPs of one device's rows: (both towers, head, L_CCA's in the head)."""
  whole, without = (open_work(flags, 1, 1, cca=cca) for cca in (True, False))
  rows, modules = flags.rows, whole.modules
  towers = flops.decoder_flops(modules['text'].config, rows, flags.tokens) + flops.vision_flops(
    modules['image'].config, rows
  )
  step, rest = (flops.matmul_flops(work.step(), *work.shapes()) for work in (whole, without))
  return towers, step - towers, step - rest


def seconds_of(collective: collectives.Collective, work: Workload, flags) -> float:
  """Time on a ring: an all-reduce passes each byte 2 (n - 1) / n times through a device, an
  all-gather half as often.
  """
  n = work.mesh.shape[collective.axis]
  leaves_node = collective.axis == 'data' and work.mesh.devices.size > flags.node
  passes = (2 if collective.kind == 'all-reduce' else 1) * (n - 1) / n
  return (
    collective.times * collective.bytes * passes / (flags.network if leaves_node else flags.link)
  )


def check(flags, devices: int, model: int) -> None:
  """Compiles the step and counts its bytes; in float32, which is what a CPU computes in."""
  work = open_work(flags, devices, model, 'float32')
  found = collectives.compiled_collectives(work.step().lower(*work.shapes()).compile().as_text())
  depth = {
    'Decoder': work.modules['text'].config.num_layers,
    'VisionTransformer': work.modules['image'].config.num_layers,
  }
  total = {'model': 0, 'data': 0}
  for _, size, name in found:
    tower = next((tower for tower in depth if tower in name), None)
    total['model' if tower else 'data'] += size * (depth[tower] if tower and 'while' in name else 1)
  for axis, size in total.items():
    wanted = sum(x.times * x.bytes for x in listed(work) if x.axis == axis)
    console.log(
      f'{devices} devices, model={model}: {size:,} bytes over {axis} in the compiled program, '
      f'{wanted:,} listed'
    )


def compare_methods(flags) -> None:
  """Prints the table of methods; gradients are sent once, those of all that is trained."""
  at = (8, 64)
  print('| method | TFLOP a device | MB over `data` | ' + ' | '.join(f'on {n}' for n in at) + ' |')
  print('|---|--:|--:|' + '--:|' * len(at))
  for method in flags.methods:
    try:
      alone = open_work(flags, 1, 1, method=method)
    except UserError as error:
      console.log(f'{method} is left out: {error}')
      continue
    flop = flops.matmul_flops(alone.step(), *alone.shapes())
    compute, efficiency = flop / (flags.flops * flags.mfu), []
    for devices in at:
      work = open_work(flags, devices, 1, method=method)
      sent = sum(seconds_of(x, work, flags) for x in listed(work))
      efficiency.append(f'{100 * compute / (compute + sent):.0f} %')
    size = sum(x.times * x.bytes for x in listed(work)) / 1e6
    cells = (f'`{method}`', f'{flop / 1e12:.1f}', f'{size:,.0f}', *efficiency)
    print(f'| {" | ".join(cells)} |', flush=True)


@command
def main(argv: Sequence[str]) -> None:
  """Command line of the tool."""
  flags, _ = parse(
    'python tools/weak_scaling.py', 'Weak scaling of a training step on paper.', FLAGS, argv
  )
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(DEVICES))
  if flags.methods:
    compare_methods(flags)
    return
  print_table(flags)


def print_table(flags) -> None:
  """Prints the table of MoLT, and what --check finds."""
  towers, head, cca = flops_of(flags)
  alone = (towers + head) / (flags.flops * flags.mfu)
  print(
    '| devices | data x model | TFLOP a device | MB over `model` | MB over `data` | compute ms | '
    'collectives ms | efficiency |'
  )
  print('|--:|:-:|--:|--:|--:|--:|--:|--:|')
  for model in (1, 2):
    for devices in DEVICES:
      if devices < model:
        continue
      work = open_work(flags, devices, model)
      compute = (towers + head * model) / (
        flags.flops * flags.mfu
      )  # The head is whole on every device of the model axis.
      sent = sum(seconds_of(x, work, flags) for x in listed(work))
      megabytes = [
        sum(x.times * x.bytes for x in listed(work) if x.axis == axis) / 1e6
        for axis in ('model', 'data')
      ]
      print(
        f'| {devices} | {devices // model} x {model} | {(towers + head * model) / 1e12:.1f} | '
        f'{megabytes[0]:,.0f} | {megabytes[1]:,.0f} '
        f'| {1e3 * compute:.1f} | {1e3 * sent:.1f} | {100 * alone / (compute + sent):.0f} % |'
      )
  print(f'L_CCA takes {cca / 1e6:.1f} MFLOP of a step, {cca / (towers + head):.1e} of it.')
  if flags.check:
    for model in (1, 2):
      check(flags, flags.check, model)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
