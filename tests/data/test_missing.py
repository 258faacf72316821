"""The missing-modality protocol: exact rates, never both, no dependence on the order of the
rows.
"""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from molt_jax.data import missing

IDS = st.lists(st.text(max_size=5), unique=True, max_size=60)
RATES = st.floats(0, 1)
KINDS = st.sampled_from(['text', 'image', 'both'])
SETTINGS = hypothesis.settings(max_examples=150)


@SETTINGS
@hypothesis.given(IDS, RATES, KINDS, st.integers(0, 2**40))
def test_rates_are_exact_and_no_row_loses_both(ids, rate, kind, seed):
  present_nm = missing.present_table(ids, rate=rate, kind=kind, seed=seed, split='train')
  lost_m = (~present_nm).sum(axis=0)
  assert present_nm.any(axis=1).all() or not ids
  assert abs(lost_m.sum() - rate * len(ids)) <= 0.5 + 1e-9
  assert {'text': lost_m[0] == 0, 'image': lost_m[1] == 0, 'both': 0 <= lost_m[1] - lost_m[0] <= 1}[
    kind
  ]


@SETTINGS
@hypothesis.given(IDS, RATES, KINDS, st.randoms(use_true_random=False))
def test_order_of_the_rows_does_not_matter(ids, rate, kind, random):
  shuffled = random.sample(ids, len(ids))
  draw = {'rate': rate, 'kind': kind, 'seed': 3, 'split': 'test'}
  first = dict(zip(ids, missing.present_table(ids, **draw).tolist(), strict=True))
  assert first == dict(zip(shuffled, missing.present_table(shuffled, **draw).tolist(), strict=True))


@SETTINGS
@hypothesis.given(IDS, RATES, RATES, KINDS)
def test_what_is_hit_stays_hit_at_a_higher_rate(ids, a, b, kind):
  low, high = (
    missing.present_table(ids, rate=rate, kind=kind, seed=0, split='train')
    for rate in sorted((a, b))
  )
  assert (high <= low).all()


@SETTINGS
@hypothesis.given(
  st.lists(st.sampled_from([(True, True), (True, False), (False, True)]), max_size=50), RATES, KINDS
)
def test_rows_incomplete_by_nature_are_left_alone_and_not_counted(natural, rate, kind):
  natural_nm = np.array(natural, bool).reshape(-1, 2)
  ids = [str(n) for n in range(len(natural))]
  present_nm = missing.present_table(
    ids, rate=rate, kind=kind, seed=1, split='train', present=natural_nm
  )
  complete = natural_nm.all(axis=1)
  assert (present_nm[~complete] == natural_nm[~complete]).all() and present_nm.any(axis=1).all()
  assert abs((~present_nm[complete]).sum() - rate * complete.sum()) <= 0.5 + 1e-9


def test_seed_and_split_change_the_draw():
  ids = [str(n) for n in range(200)]

  def draw(seed=0, split='train'):
    return missing.present_table(ids, rate=0.5, kind='text', seed=seed, split=split)

  assert (draw() == draw()).all()
  for other in (draw(seed=1), draw(split='test')):
    assert 0.3 < (draw() == other)[:, 1].mean() < 0.7


def test_the_draw_is_the_same_for_good():
  """A change here changes every result that was reported with a missing rate."""
  present_nm = missing.present_table(list('abcdefgh'), rate=0.5, kind='both', seed=0, split='test')
  assert [''.join(x for x, kept in zip('it', row, strict=True) if kept) for row in present_nm] == [
    'i',
    'it',
    'it',
    't',
    't',
    'i',
    'it',
    'it',
  ]


def test_ids_must_be_unique():
  with pytest.raises(ValueError, match='unique'):
    missing.present_table(['a', 'a'], rate=0.5, kind='text', seed=0, split='train')
