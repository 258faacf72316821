"""Batches: epochs, resume, shards, the evaluation tail, absent modalities, unusable files, single
examples.
"""

import itertools

import grain
import numpy as np
import pytest
from PIL import Image

from molt_jax.data import cached, decode_report, examples, packing, pipeline, transforms
from molt_jax.errors import UserError


def indices(iterator, count):
  return np.concatenate([batch['index'] for batch in itertools.islice(iterator, count)])


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize('n,batch_size', [(23, 5), (4, 7), (1, 2), (12, 4)])
def test_every_epoch_is_another_permutation_and_nothing_is_dropped(
  make_source, make_preprocess, n, batch_size
):
  it = pipeline.train_iterator(
    make_source(n), make_preprocess(), pipeline.Batching(batch_size=batch_size), seed=0
  )
  stream = indices(it, -(-4 * n // batch_size))[: 4 * n].reshape(4, n)
  assert (np.sort(stream, axis=1) == np.arange(n)).all()
  assert n < 10 or len({tuple(epoch) for epoch in stream}) == 4


def test_order_depends_on_seed_and_epoch_alone(make_source, make_preprocess):
  def stream(seed, batch_size, n=20, **options):
    return indices(
      pipeline.train_iterator(
        make_source(n),
        make_preprocess(),
        pipeline.Batching(batch_size, **options),
        seed=seed,
      ),
      40 // batch_size,
    ).tolist()

  assert (
    stream(0, 4)
    == stream(0, 10)
    == stream(0, 4, num_threads=1, prefetch=1)
    == stream(0, 8, num_threads=3)
  )
  assert stream(1, 4)[:20] not in (stream(0, 4)[:20], stream(0, 4)[20:])


def test_resume_is_exact(make_source, make_preprocess):
  present = np.ones((10, 2), bool)
  present[3, 0] = False

  def make():
    return pipeline.train_iterator(
      make_source(10), make_preprocess(), pipeline.Batching(batch_size=4), seed=5, present=present
    )

  it = make()
  states, batches = [], []
  for _ in range(8):
    states.append(it.get_state())
    batches.append(next(it))
  for step in (7, 2, 0, 5):
    resumed = make()
    resumed.set_state(states[step])
    for want in batches[step:]:
      assert_same(next(resumed), want)


def test_evaluation_resumes_exactly(make_source, make_preprocess):
  grain.experimental.assert_equal_output_after_checkpoint(
    pipeline.eval_batches(make_source(10), make_preprocess(), pipeline.Batching(batch_size=4))
  )


@pytest.mark.parametrize('count', [2, 4])
def test_shards_joined_are_the_batch_of_a_single_process(make_source, make_preprocess, count):
  source, preprocess = make_source(10), make_preprocess()
  for make in (
    lambda **o: pipeline.train_iterator(source, preprocess, pipeline.Batching(8, **o), seed=1),
    lambda **o: iter(pipeline.eval_batches(source, preprocess, pipeline.Batching(8, **o))),
  ):
    whole = list(itertools.islice(make(), 4))
    shards = [
      list(itertools.islice(make(process_index=p, process_count=count), 4)) for p in range(count)
    ]
    for want, *parts in zip(whole, *shards, strict=True):
      assert_same({key: np.concatenate([part[key] for part in parts]) for key in want}, want)


def test_batch_size_must_divide_among_processes(make_source, make_preprocess):
  with pytest.raises(ValueError, match='batch_size 6'):
    pipeline.train_iterator(
      make_source(9), make_preprocess(), pipeline.Batching(batch_size=6, process_count=4), seed=0
    )


@pytest.mark.parametrize('count', [1, 2])
def test_packing_changes_the_padding_alone(make_source, make_preprocess, count):
  rng = np.random.default_rng(0)
  texts = ['x' * int(n) for n in rng.integers(1, 20, 24)]
  texts[3], texts[5] = 'y' * 70, None
  source, preprocess = make_source(24, texts=texts), make_preprocess(max_tokens=64)

  def make(**how):
    return pipeline.train_iterator(source, preprocess, pipeline.Batching(8, **how), seed=1)

  parts = [make(pack=(2, 2), process_index=p, process_count=count) for p in range(count)]
  lengths, whole = [], make()
  for _ in range(6):
    want, got = next(whole), [next(part) for part in parts]
    (length,) = {part['tokens'].shape[1] for part in got}  # All processes agree.
    lengths.append(length)
    assert length == packing.padded_length(want['token_mask'].sum(axis=1).max(), 64)
    position_gn = np.concatenate([part.pop('token_position') for part in got])
    for position_n, rows in zip(
      position_gn, ([0, 2], [1, 3], [4, 6], [5, 7]), strict=True
    ):  # Two devices, two parts of each one's rows.
      np.testing.assert_array_equal(
        position_n[position_n < 2 * length], np.flatnonzero(want['token_mask'][rows, :length])
      )
    for name in want:
      joined = np.concatenate([part[name] for part in got])
      np.testing.assert_array_equal(
        joined, want[name][:, :length] if name in ('tokens', 'token_mask') else want[name]
      )
    assert not want['token_mask'][:, length:].any()
  assert set(lengths) == {32, 64} and lengths.count(64) == 2
  resumed, part = make(pack=(2, 2), process_index=0, process_count=count), parts[0]
  resumed.set_state(part.get_state())
  assert_same(next(resumed), next(part))


def test_stored_texts_are_padded_to_the_longest_too(make_source, make_preprocess):
  rng = np.random.default_rng(0)
  states = {f'k{n}': rng.normal(size=(2, 1 + 5 * n, 3)).astype(np.float32) for n in range(8)}
  keys = [(key,) for key in [*states][:7]] + [()]
  stored = {
    'text': cached.CachedStates(
      keys, states.__getitem__, lambda key: states[key].shape[1], (2, 40, 3), np.dtype(np.float32)
    )
  }
  source, preprocess = make_source(8), make_preprocess(max_tokens=40)
  whole, fitted = (
    list(
      pipeline.eval_batches(
        source, preprocess, pipeline.Batching(batch_size=4, pack=pack), stored=stored
      )
    )
    for pack in (None, (1, 1))
  )
  assert [batch['text_states'].shape for batch in whole] == [(4, 2, 40, 3)] * 2
  assert (
    [batch['text_states'].shape[2] for batch in fitted]
    == [batch['token_mask'].shape[1] for batch in fitted]
    == [16, 32]
  )
  for want, got in zip(whole, fitted, strict=True):
    length = got['token_mask'].shape[1]
    assert not want['text_states'][:, :, length:].any() and not want['token_mask'][:, length:].any()
    assert_same(
      got,
      {
        **want,
        'text_states': want['text_states'][:, :, :length],
        'token_mask': want['token_mask'][:, :length],
      },
    )


def test_stored_texts_say_where_their_tokens_are_in_places_of_nearly_always_one_number(
  make_source, make_preprocess
):
  states = {f'k{n}': np.ones((2, n, 3), np.float32) for n in (2, 3, 16)}
  keys = [('k16',), *[('k2',), ('k3',)] * 31, ()]
  stored = {
    'text': cached.CachedStates(
      keys, states.__getitem__, lambda key: states[key].shape[1], (2, 16, 3), np.dtype(np.float32)
    )
  }
  batches = list(
    pipeline.eval_batches(
      make_source(64),
      make_preprocess(max_tokens=16),
      pipeline.Batching(batch_size=16, pack=(2, 2)),
      stored=stored,
    )
  )
  # Four rows of a device and part: 16 and three times 2 or 3 tokens are more than usual.
  assert [batch['token_position'].shape for batch in batches] == [(4, 28)] + [(4, 24)] * 3
  for batch in batches:
    for position_n, rows in zip(batch['token_position'], packing.groups(16, (2, 2)), strict=True):
      np.testing.assert_array_equal(
        position_n[position_n < 64], np.flatnonzero(batch['token_mask'][rows])
      )


def test_content_of_a_batch(make_source, make_preprocess):
  source, preprocess = make_source(4), make_preprocess()
  (batch,) = pipeline.eval_batches(source, preprocess, pipeline.Batching(batch_size=4))
  assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
    'image': ((4, 8, 8, 3), 'float32'),
    'tokens': ((4, 6), 'int32'),
    'token_mask': ((4, 6), 'bool'),
    'present': ((4, 2), 'bool'),
    'label': ((4,), 'int32'),
    'weight': ((4,), 'float32'),
    'index': ((4,), 'int32'),
  }
  for n in range(4):
    image = transforms.preprocess_image(
      transforms.decode(source.images[n]),
      size=8,
      mean=preprocess.mean,
      std=preprocess.std,
      resize='crop',
    )
    np.testing.assert_array_equal(batch['image'][n], image)
    assert (
      batch['tokens'][n].tolist() == [ord(c) for c in f'text {n}'] and batch['label'][n] == n % 3
    )
  assert batch['token_mask'].all() and batch['present'].all() and batch['weight'].all()


def test_the_evaluation_tail_has_weight_zero(make_source, make_preprocess):
  source = make_source(10)
  batches = list(pipeline.eval_batches(source, make_preprocess(), pipeline.Batching(batch_size=4)))
  assert [batch['image'].shape[0] for batch in batches] == [4, 4, 4]
  assert np.concatenate([batch['index'] for batch in batches]).tolist() == [*range(10), -1, -1]
  assert np.concatenate([batch['weight'] for batch in batches]).tolist() == [1] * 10 + [0, 0]
  tail = {key: value[2:] for key, value in batches[-1].items()}
  assert (
    not any(tail[key].any() for key in ('image', 'present', 'token_mask', 'label'))
    and (tail['tokens'] == 7).all()
  )


def test_iterating_twice_gives_the_same(make_source, make_preprocess):
  batches = pipeline.eval_batches(
    make_source(5), make_preprocess(), pipeline.Batching(batch_size=2)
  )
  for first, second in zip(batches, batches, strict=True):
    assert_same(first, second)


def test_multi_label_vectors(make_source, make_preprocess):
  source = make_source(3, labels=[(0, 2), (1,), (0, 1, 2)])
  (batch,) = pipeline.eval_batches(
    source, make_preprocess(multi_label=True), pipeline.Batching(batch_size=4)
  )
  assert batch['label'].dtype == np.float32 and batch['label'].tolist() == [
    [1, 0, 1],
    [0, 1, 0],
    [1, 1, 1],
    [0, 0, 0],
  ]


def test_absent_content_is_constant_and_never_read(make_source, make_preprocess):
  source = make_source(4, texts=['a', None, 'c', 'd'])
  present = np.array([[0, 1], [1, 1], [1, 0], [1, 1]], bool)
  (batch,) = pipeline.eval_batches(
    source, make_preprocess(), pipeline.Batching(batch_size=4), present=present
  )
  assert batch['present'].tolist() == [[False, True], [True, False], [True, False], [True, True]]
  assert not batch['image'][0].any() and source.read_images == {1, 2, 3}
  assert (
    (batch['tokens'][1:3] == 7).all()
    and not batch['token_mask'][1:3].any()
    and batch['weight'].all()
  )


def test_a_row_left_with_nothing_weighs_nothing(make_source, make_preprocess):
  source = make_source(2, texts=[None, 'b'])
  (batch,) = pipeline.eval_batches(
    source,
    make_preprocess(),
    pipeline.Batching(batch_size=2),
    present=np.array([[0, 1], [1, 1]], bool),
  )
  assert (
    batch['weight'].tolist() == [0, 1]
    and batch['index'].tolist() == [0, 1]
    and not batch['present'][0].any()
  )


def test_unusable_files_cost_their_example_one_modality(make_source, make_preprocess):
  broken = [b'', b'no image', None]
  good = make_source(1).images[0]
  source = make_source(4, images=[*broken, good], texts=['a', None, 'c', ''])
  source.present[3, 1] = True  # A text of which the tokenizer leaves nothing.
  preprocess = make_preprocess()
  batches = pipeline.eval_batches(source, preprocess, pipeline.Batching(batch_size=4))
  for _ in range(2):
    (batch,) = batches
    assert batch['present'].tolist() == [
      [False, True],
      [False, False],
      [False, True],
      [True, False],
    ]
    assert batch['weight'].tolist() == [1, 0, 1, 1] and not batch['image'][:3].any()
  assert preprocess.report.counts() == {'image': 2, 'text': 1}
  assert preprocess.report.line() == (
    '2 unusable images treated as absent: e0 (the file is empty), e1 (not an image, or of an '
    'unknown format); '
    '1 unusable text treated as absent: e3 (no tokens)'
  )


def test_a_file_that_vanished_is_an_absent_image(make_source, make_preprocess):
  class Vanished(type(make_source(1))):
    def read(self, index, *, image):
      if image and index == 1:
        raise FileNotFoundError(2, 'No such file or directory')
      return super().read(index, image=image)

  source, preprocess = make_source(3), make_preprocess()
  (batch,) = pipeline.eval_batches(
    Vanished(source.images, source.texts, source.labels),
    preprocess,
    pipeline.Batching(batch_size=3),
  )
  assert batch['present'][:, 0].tolist() == [
    True,
    False,
    True,
  ] and preprocess.report.line().endswith('e1 (No such file or directory)')


def test_the_report_keeps_the_first_names():
  report = decode_report.DecodeReport(keep=2)
  assert report.line() == '' and report.counts() == {}
  for n in (0, 1, 2, 3, 1):
    report.add(f'e{n}', 'image', 'broken')
  assert (
    report.line() == '4 unusable images treated as absent: e0 (broken), e1 (broken), and 2 more'
  )


def test_present_must_fit_the_source(make_source, make_preprocess):
  with pytest.raises(ValueError, match=r'bool\[4, 2\]'):
    pipeline.eval_batches(
      make_source(4),
      make_preprocess(),
      pipeline.Batching(batch_size=2),
      present=np.ones((3, 2), bool),
    )


def test_single_example_takes_path_image_and_array(make_preprocess, tmp_path):
  preprocess = make_preprocess()
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
  image.save(tmp_path / 'x.png')
  want = examples.single_example(preprocess, image, 'hi')
  assert {key: value.shape for key, value in want.items()} == {
    'image': (8, 8, 3),
    'tokens': (6,),
    'token_mask': (6,),
    'present': (2,),
  }
  assert want['tokens'].tolist() == [104, 105, 7, 7, 7, 7] and want['present'].all()
  for form in (tmp_path / 'x.png', str(tmp_path / 'x.png'), np.asarray(image)):
    assert_same(examples.single_example(preprocess, form, 'hi'), want)
  assert examples.single_example(preprocess, np.asarray(image)[..., 0])['present'].tolist() == [
    True,
    False,
  ]
  only_text = examples.single_example(preprocess, text='hi')
  assert only_text['present'].tolist() == [False, True] and not only_text['image'].any()


def test_single_example_refuses_in_one_line(make_preprocess, tmp_path):
  (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  cases = [
    (None, None, 'neither'),
    (None, '  ', 'neither'),
    (tmp_path / 'no.png', 'x', 'cannot be opened (No such file'),
    (tmp_path, None, 'cannot be opened'),
    (tmp_path / 'broken.png', 'x', 'cannot be decoded'),
    (np.zeros((2, 2, 3)), None, 'float64[2, 2, 3]'),
    (np.zeros((0, 2), np.uint8), None, 'uint8[0, 2]'),
  ]
  for image, text, message in cases:
    with pytest.raises(UserError) as error:
      examples.single_example(make_preprocess(), image, text)
    assert message in str(error.value) and '\n' not in str(error.value)
