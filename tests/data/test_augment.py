"""Augmentation: what it may change, how far, and that it depends on (seed, epoch, id) alone."""

import collections
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molt_jax.data import pipeline
from molt_jax.data.examples import pixels
from molt_jax.pairs import augment, batches

NOTHING = augment.ImageAugmentation(min_area=1.0, max_aspect=1.0, flip=0.0, color=0.0)
SOME = augment.ImageAugmentation(min_area=0.4, max_aspect=1.5, flip=0.5, color=0.2)
AS_IS = augment.TextAugmentation(delete=0.0, swap=0.0)
EDA = augment.TextAugmentation(delete=0.3, swap=0.2)


def noise(width, height, seed=0):
  return Image.fromarray(
    np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  )


@settings(max_examples=200)
@given(
  st.integers(1, 300),
  st.integers(1, 300),
  st.floats(0.01, 1),
  st.floats(1, 4),
  st.integers(0, 2**32),
)
def test_crops_lie_inside_and_keep_their_area_and_aspect(width, height, min_area, max_aspect, seed):
  how = augment.ImageAugmentation(min_area=min_area, max_aspect=max_aspect, flip=0, color=0)
  left, top, right, bottom = augment.crop_box((width, height), how, np.random.default_rng(seed))
  assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
  side = min(width, height)
  area, aspect = (right - left) * (bottom - top) / side**2, (right - left) / (bottom - top)
  assert area <= 1 + 1e-6
  clipped = right - left > width - 1e-6 or bottom - top > height - 1e-6
  assert clipped or area >= min_area - 1e-6
  assert clipped or 1 / max_aspect - 1e-6 <= aspect <= max_aspect + 1e-6


def test_crops_move_about_and_their_areas_are_spread_evenly():
  how = augment.ImageAugmentation(min_area=0.4, max_aspect=1.0, flip=0, color=0)
  boxes = np.array(
    [augment.crop_box((100, 100), how, np.random.default_rng(seed)) for seed in range(2000)]
  )
  areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e4
  np.testing.assert_allclose(np.quantile(areas, [0.1, 0.5, 0.9]), [0.46, 0.7, 0.94], atol=0.03)
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  np.testing.assert_allclose(centres.mean(axis=0), 50, atol=0.7)
  assert (centres.std(axis=0) > 3).all()


@pytest.mark.parametrize('resize', ['crop', 'letterbox'])
@pytest.mark.parametrize('size', [(16, 16), (60, 32), (22, 80)])
def test_without_variation_training_sees_what_evaluation_sees(
  make_source, make_preprocess, resize, size
):
  """Exactly, but for the sub-pixel placement of crops and, in a letterbox, its edges and its colour
  (whole numbers).
  """
  buffer = io.BytesIO()
  noise(3, 3).resize(size, Image.Resampling.BICUBIC).save(buffer, 'PNG')
  source, preprocess = (
    make_source(2, images=[buffer.getvalue()] * 2),
    make_preprocess(image_size=16, resize=resize),
  )
  expected = pixels(Image.open(buffer).convert('RGB'), preprocess)
  ours = next(iterate(source, preprocess, image=NOTHING))['image'][0]
  if size == (16, 16):
    np.testing.assert_allclose(ours, expected, atol=1e-6)
  assert np.abs(ours - expected).mean() < 0.3 * expected.std()
  assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.85


def test_flip_and_colour_do_what_they_say():
  image = noise(8, 8)
  rng = np.random.default_rng(0)
  flipped = augment.augment_image(
    image, augment.ImageAugmentation(1, 1, flip=1, color=0), rng, size=8
  )
  np.testing.assert_array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])
  grey = Image.new('RGB', (8, 8), (100, 100, 100))
  values = [
    np.asarray(
      augment.augment_image(
        grey, augment.ImageAugmentation(1, 1, 0, color=0.2), np.random.default_rng(s), size=8
      )
    )[0, 0, 0]
    for s in range(300)
  ]
  assert (
    79 <= min(values) < 84 and 116 < max(values) <= 121
  )  # Contrast and saturation leave an even grey as it is.


@settings(max_examples=200)
@given(
  st.lists(st.sampled_from(['a', 'bb', 'ccc', 'dd', 'e']), min_size=1, max_size=12),
  st.floats(0, 0.99),
  st.floats(0, 1),
  st.integers(0, 2**32),
)
def test_texts_lose_and_swap_words_and_gain_none(words, delete, swap, seed):
  out = augment.augment_text(
    ' '.join(words), augment.TextAugmentation(delete, swap), np.random.default_rng(seed)
  ).split()
  assert 1 <= len(out) <= len(words)
  assert not collections.Counter(out) - collections.Counter(words)
  if not delete:
    assert len(out) == len(words)
  if not swap:
    rest = iter(words)
    assert all(word in rest for word in out)  # In their order.


def test_rates_of_deletion_and_of_swaps():
  text = ' '.join(map(str, range(50)))
  kept = [
    len(
      augment.augment_text(text, augment.TextAugmentation(0.3, 0), np.random.default_rng(s)).split()
    )
    for s in range(300)
  ]
  assert abs(np.mean(kept) - 35) < 1
  moved = [
    sum(
      a != b
      for a, b in zip(
        augment.augment_text(
          text, augment.TextAugmentation(0, 0.1), np.random.default_rng(s)
        ).split(),
        text.split(),
        strict=True,
      )
    )
    for s in range(300)
  ]
  assert abs(np.mean(moved) - 2 * 0.1 * 49) < 1.2
  assert augment.augment_text('two  spaces', AS_IS, np.random.default_rng(0)) == 'two  spaces'


def iterate(
  source,
  preprocess,
  *,
  image=SOME,
  text=AS_IS,
  views=1,
  batch_size=2,
  seed=0,
  threads=2,
  pooled=None,
  keep=True,
  across=False,
):
  how = batches.PairViews(
    image=image, text=text, num_views={'image': views, 'text': views}, across=across, keep=keep
  )
  return batches.train_iterator(
    source,
    preprocess,
    how,
    pipeline.Batching(batch_size=batch_size, num_threads=threads, prefetch=2),
    seed=seed,
    text_pooled_nd=pooled,
  )


def examples(iterator, count):
  """Index -> list of its rows, epoch after epoch."""
  seen = collections.defaultdict(list)
  while sum(map(len, seen.values())) < count:
    batch = next(iterator)
    for i, index in enumerate(batch['index']):
      seen[int(index)].append({name: x[i] for name, x in batch.items()})
  return seen


def same(one, two):
  return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def varied_source(make_source, n=6, **replace):
  return make_source(
    n,
    images=[png_of(noise(20, 20, seed=k)) for k in range(n)],
    texts=[f'a b c d {k}' for k in range(n)],
    **replace,
  )


def png_of(image):
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  return buffer.getvalue()


def test_views_are_a_function_of_seed_epoch_and_id(make_source, make_preprocess):
  source, preprocess = varied_source(make_source), make_preprocess(max_tokens=12)
  one = examples(iterate(source, preprocess, text=EDA, views=2, batch_size=2), 12)
  two = examples(
    iterate(source, preprocess, text=EDA, views=2, batch_size=3, threads=1, keep=False), 12
  )
  assert one.keys() == two.keys() == set(range(6))
  for index in one:
    assert same(one[index][0], two[index][0]) and same(one[index][1], two[index][1])
    first, second = one[index][:2]
    assert not np.array_equal(first['image'], second['image'])  # Another epoch, another view.
    assert not np.array_equal(first['image'], first['image_augmented'])
  other = examples(iterate(source, preprocess, text=EDA, views=2, seed=1), 6)
  assert not any(np.array_equal(one[index][0]['image'], other[index][0]['image']) for index in one)
  texts = [
    (row['tokens'].tolist(), row['tokens_augmented'].tolist())
    for rows in one.values()
    for row in rows
  ]
  assert sum(a != b for a, b in texts) > len(texts) // 2


def test_the_iterator_resumes_exactly(make_source, make_preprocess):
  source, preprocess = varied_source(make_source), make_preprocess()
  iterator = iterate(source, preprocess, views=2, batch_size=4)
  for _ in range(3):
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(4)]
  again = iterate(source, preprocess, views=2, batch_size=4)
  again.set_state(state)
  assert all(same(a, next(again)) for a in expected)


def test_incomplete_rows_are_left_out_and_broken_images_weigh_nothing(make_source, make_preprocess):
  source = varied_source(make_source)
  source.images[1], source.texts[2], source.images[4] = None, None, b'no image'
  source.present[1, 0] = source.present[2, 1] = False
  preprocess = make_preprocess()
  seen = examples(iterate(source, preprocess), 8)
  assert set(seen) == {0, 3, 4, 5}
  assert {index: rows[0]['weight'] for index, rows in seen.items()} == {0: 1, 3: 1, 4: 0, 5: 1}
  assert not seen[4][0]['image'].any() and preprocess.report.counts() == {'image': 1}


def test_pooled_texts_stand_for_tokens(make_source, make_preprocess):
  source = varied_source(make_source)
  pooled_nd = np.arange(12, dtype=np.float32).reshape(6, 2)
  for index, rows in examples(iterate(source, make_preprocess(), pooled=pooled_nd), 6).items():
    np.testing.assert_array_equal(rows[0]['text_pooled'], pooled_nd[index])
    assert 'tokens' not in rows[0]


def test_second_view_across_pictures_is_of_each_picture_with_that_text_and_of_no_other(
  make_source, make_preprocess
):
  colors = ['red', 'red', 'lime', 'blue', 'lime', 'red']
  grays = [40 * k + 20 for k in range(6)]
  source = make_source(
    6, images=[png_of(Image.new('RGB', (20, 20), (g, g, g))) for g in grays], texts=colors
  )
  preprocess = make_preprocess(max_tokens=4)
  plain = {
    index: rows[0]['image'][0, 0, 0]
    for index, rows in examples(iterate(source, preprocess, image=NOTHING), 6).items()
  }
  rows_of = examples(iterate(source, preprocess, image=NOTHING, views=2, across=True), 300)
  for index, rows in rows_of.items():
    assert {row['image'][0, 0, 0] for row in rows} == {plain[index]}
    assert {row['image_augmented'][0, 0, 0] for row in rows} == {
      plain[k] for k in range(6) if colors[k] == colors[index]
    }
