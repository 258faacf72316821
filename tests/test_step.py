"""The step as compiled: exact accumulation, donation, no residuals of the towers, a program that
does not grow with their depth.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import optax
import pytest
from setups import Setup

from molt_jax.config import resolved
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import packing
from molt_jax.data.sources import UNLABELLED
from molt_jax.errors import UserError
from molt_jax.profiling.workload import Workload
from molt_jax.towers import architectures
from molt_jax.training import microbatching, monitor


def _batch(rows, *, size, tokens, seed=0):
  """Complete rows, some without image or text, one without both (it counts nothing), ragged
  texts.
  """
  rng = np.random.default_rng(seed)
  present = np.array(
    [[True, True], [True, True], [True, False], [False, True], [True, True]] * rows
  )[:rows]
  length_b = np.where(present[:, 1], rng.integers(1, tokens + 1, rows), 0)
  weight = np.ones(rows, np.float32)
  present[-1], weight[-1], length_b[-1] = False, 0, 0
  return {
    'image': rng.normal(size=(rows, size, size, 3)).astype(np.float32),
    'tokens': rng.integers(2, 200, (rows, tokens)).astype(np.int32),
    'token_mask': np.arange(tokens)[None, :] < length_b[:, None],
    'present': present,
    'weight': weight,
    'label': rng.integers(0, 3, rows).astype(np.int32),
  }


def make_setup(config):
  """The optimiser's state is the gradient."""
  return Setup(config, optax.chain(optax.trace(decay=0.0), optax.scale(-1e-2)))


def test_runs_that_differ_in_their_seed_share_a_program(tiny_config):
  texts = []
  for seed in (0, 1):
    tiny_config.seed = seed
    setup = make_setup(tiny_config)
    texts.append(
      setup.step()
      .lower(
        setup.state(),
        setup.frozen(),
        _batch(4, size=16, tokens=12),
      )
      .as_text()
    )
  assert texts[0] == texts[1]


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {
      'method': 'late_fusion',
      'dataset.multi_label': True,
      'missing.views': False,
      'missing.train_dropout': 0.4,
      'missing.strategy': 'null',
    },
  ],
  ids=['defaults', 'multi-label without pairs and views'],
)
def test_accumulation_is_the_whole_batch(tiny_config, fields):
  tiny_config.train.batch_size, tiny_config.classifier.dropout = 16, 0.0
  for name, value in fields.items():
    resolved.set_field(tiny_config, name, value)
  class_weight_k = np.array([0.5, 1.0, 2.0], np.float32)
  results = []
  for accumulate in (1, 4):
    tiny_config.train.accumulate = accumulate
    setup = make_setup(tiny_config)
    setup.objective = dataclasses.replace(setup.objective, class_weight_k=class_weight_k)
    frozen, state, step = setup.frozen(), setup.state(), setup.step()
    seen = []
    for seed in range(2):  # The second step has a past and statistics to add to.
      batch = _batch(16, size=16, tokens=12, seed=seed)
      if accumulate > 1:
        batch |= packing.token_positions(
          batch['token_mask'], packing.groups(16, (1, accumulate)), size=44
        )
      if tiny_config.dataset.multi_label:
        batch['label'] = np.eye(3, dtype=np.float32)[batch['label']]
      state, metrics = step(state, frozen, batch)
      seen.append(metrics)
    results.append(
      jax.device_get((seen, state.opt_state, state.statistics, state.cca, state.params))
    )
  for path, (one, four) in zip(
    [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(results[0])],
    zip(*map(jax.tree.leaves, results), strict=True),
    strict=True,
  ):
    # Directions fitted on a few past pairs amplify rounding; that number is only logged.
    tolerance = 1e-3 if 'held_out' in path else 2e-6
    np.testing.assert_allclose(
      four,
      one,
      rtol=2e-5,
      atol=tolerance * max(1.0, float(np.max(np.abs(one), initial=0))),
      err_msg=path,
    )


def test_a_row_without_a_label_takes_part_in_cca_alone(tiny_config):
  tiny_config.molt.input_norm, tiny_config.classifier.dropout = (
    'none',
    0.0,
  )  # So that the cross-entropy knows the other rows by nothing else.
  setup = make_setup(tiny_config)
  frozen, step = setup.frozen(), setup.step()
  labelled = _batch(16, size=16, tokens=12)
  some = np.arange(16) % 3 == 0
  blank = labelled | {'label': np.where(some, labelled['label'], UNLABELLED).astype(np.int32)}
  fewer = labelled | {'weight': labelled['weight'] * some}
  seen = {
    name: step(setup.state(), frozen, batch)[1]
    for name, batch in (('all', labelled), ('blank', blank), ('fewer', fewer))
  }
  np.testing.assert_allclose(seen['blank']['loss_ce'], seen['fewer']['loss_ce'], rtol=1e-6)
  np.testing.assert_allclose(seen['blank']['loss_cca'], seen['all']['loss_cca'], rtol=1e-6)
  assert (
    abs(seen['all']['loss_ce'] - seen['fewer']['loss_ce']) > 1e-4
    and abs(seen['all']['loss_cca'] - seen['fewer']['loss_cca']) > 1e-4
  )


def test_the_parts_of_a_batch_are_strided_and_join_again():
  x = np.arange(24).reshape(2, 12)
  parts = microbatching._cut({'x': x}, 3, 1)['x']
  assert parts.shape == (3, 2, 4) and parts[1].tolist() == x[:, 1::3].tolist()
  np.testing.assert_array_equal(microbatching._join(parts, 2), x)


# ---- As compiled ---------------------------------------------------------------------------------


def _compiled(tiny_config, monkeypatch, layers):
  """The step with towers of that many layers under a head that is cheap to compile."""
  for modality, name in (('text', 'llama-tiny'), ('image', 'clip-vit-tiny')):
    named = {'text': architectures.LLAMA, 'image': architectures.CLIP_VISION}[modality]
    monkeypatch.setitem(named, 'deep', {**named[name], 'num_hidden_layers': layers})
    tiny_config.backbones[modality].path = 'random:deep'
  tiny_config.method, tiny_config.missing.views = 'late_fusion', False
  work = Workload.open(tiny_config, num_classes=3)
  return work.step().lower(*work.shapes()).compile(), work.shapes()


def test_depth_costs_no_compilation_and_towers_keep_nothing_for_a_way_back(
  tiny_config, monkeypatch
):
  (shallow, _), (deep, (state, frozen, _)) = (
    _compiled(tiny_config, monkeypatch, layers) for layers in (2, 8)
  )
  instructions = [program.as_text().count(' = ') for program in (shallow, deep)]
  assert abs(instructions[1] - instructions[0]) <= 0.01 * instructions[0]
  temporary = [program.memory_analysis().temp_size_in_bytes for program in (shallow, deep)]
  one_layer = 4 * 12 * 64 * 4  # Hidden states of the text tower, float32.
  assert temporary[1] - temporary[0] < one_layer
  memory = deep.memory_analysis()
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  # Nothing of a tower's shape comes out, and the state is updated in place.
  assert memory.output_size_in_bytes < size(state) + 1024 < size(frozen)
  assert memory.alias_size_in_bytes >= size(state) - 1024


class _Late:
  """A number on the device; says when it is looked at."""

  def __init__(self, step, looked):
    self.step, self.looked = step, looked

  def __float__(self):
    self.looked.append(self.step)
    return 1.0


def make_monitor(config, lines, *, total, per_epoch=1):
  schedule = types.SimpleNamespace(total=total, per_epoch=per_epoch)
  log = types.SimpleNamespace(write=lambda kind, step, values: lines.__setitem__(step, values))
  return monitor.StepMonitor(config, None, schedule, lambda step: 0.1, log, [])


def test_the_loop_looks_at_a_loss_two_steps_late():
  config = CLASSIFIER.default()
  config.train.log_every = 1000
  looked = []
  watch = make_monitor(config, {}, total=1000)
  for step in range(1, 10):
    watch.dispatched(
      step, {'loss': _Late(step, looked), 'grad_norm': _Late(step, looked)}, np.arange(4)
    )
    assert max(looked, default=0) == max(step - monitor.IN_FLIGHT, 0)
  watch.drain()
  assert sorted(set(looked)) == list(range(1, 10))


@pytest.mark.parametrize(
  ('loss', 'norm', 'words'),
  [(np.nan, 1.0, 'loss nan at step 1'), (0.5, np.inf, 'gradient norm inf at step 1')],
)
def test_what_is_not_finite_is_named(loss, norm, words, tmp_path):
  watch = make_monitor(CLASSIFIER.default(), {}, total=9)
  watch._workdir, watch._ids = tmp_path, ['a', 'b']
  watch.dispatched(1, {'loss': np.float32(loss), 'grad_norm': np.float32(norm)}, np.arange(2))
  with pytest.raises(UserError, match=words):
    watch.drain()
  saved = json.loads((tmp_path / 'not_finite.json').read_text())
  assert saved['ids'] == ['a', 'b']
  assert saved['loss'] == str(loss) and saved['gradient norm'] == str(norm)


def test_speed_is_that_of_steps_that_were_waited_for(monkeypatch):
  config = CLASSIFIER.default()
  config.train.log_every, lines, now = 1, {}, [0.0]
  monkeypatch.setattr(monitor.time, 'monotonic', lambda: now[0])
  watch = make_monitor(config, lines, total=9, per_epoch=3)
  for step in range(1, 10):
    now[0] = 0.5 * step
    watch.dispatched(step, {'loss': np.float32(1), 'grad_norm': np.float32(1)}, np.arange(4))
  watch.drain()  # The last two have been computed long before they are looked at.
  assert {step: line.get('images_per_second') for step, line in lines.items()} == {
    1: None,
    **dict.fromkeys(range(2, 8), 8.0),
    8: None,
    9: None,
  }
