"""The scores of a tower pair against brute force, scikit-learn and PyTorch."""

import numpy as np
import pytest
import sklearn.decomposition
import sklearn.linear_model
import sklearn.metrics
from optional_torch import torch
from PIL import Image

from molt_jax.data.sources import UNLABELLED
from molt_jax.errors import UserError
from molt_jax.pairs import retrieval as retrieval_lib
from molt_jax.pairs.probes import linear_probe, pixels, principal_components
from molt_jax.pairs.retrieval import class_prompts, evaluate_pair, retrieval, zero_shot


def rows(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
  return np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)


# Retrieval.


def brute_force(image_nc, text_mc, image_of_text, texts):
  """Sorted lists and membership, one query after the other."""
  scores_nm = unit(image_nc) @ unit(text_mc).T
  captions = [
    {texts[m] for m in range(len(texts)) if image_of_text[m] == n} for n in range(len(image_nc))
  ]
  found = {'image_to_text': [], 'text_to_image': []}
  for n in range(len(image_nc)):
    if captions[n]:
      found['image_to_text'].append([texts[m] in captions[n] for m in np.argsort(-scores_nm[n])])
  for m in range(len(texts)):
    found['text_to_image'].append(
      [texts[m] in captions[n] for n in np.argsort(-scores_nm[:, m]) if captions[n]]
    )
  return {
    way: {f'R@{k}': np.mean([any(hits[:k]) for hits in lists]) for k in (1, 5, 10)}
    for way, lists in found.items()
  }


@pytest.mark.parametrize('block', [1024, 7])
def test_retrieval_matches_brute_force(block, monkeypatch):
  """Several texts an image, none for some, and a third of the texts equal to another."""
  monkeypatch.setattr(retrieval_lib, 'BLOCK_ROWS', block)
  rng = np.random.default_rng(0)
  image_nc, text_mc, image_of_text = rows(30, 6), rows(50, 6, seed=1), rng.integers(0, 28, 50)
  texts = [f'text {i}' for i in rng.integers(0, 35, 50)]
  text_mc += 1.5 * image_nc[image_of_text]
  assert retrieval(image_nc, text_mc, image_of_text=image_of_text, texts=texts) == brute_force(
    image_nc, text_mc, image_of_text, texts
  )
  assert retrieval(image_nc, text_mc[:30]) == brute_force(
    image_nc, text_mc[:30], np.arange(30), list(map(str, range(30)))
  )


def test_equal_texts_are_equally_right():
  image_nc = np.eye(4, dtype=np.float32)
  text_mc = image_nc[[1, 0, 2, 3]]  # Images 0 and 1 find each other's text.
  assert retrieval(image_nc, text_mc)['image_to_text']['R@1'] == 0.5
  assert retrieval(image_nc, text_mc, texts=['flag', 'flag', 'sun', 'moon']) == {
    way: {'R@1': 1.0, 'R@5': 1.0, 'R@10': 1.0} for way in ('image_to_text', 'text_to_image')
  }


def test_a_collapsed_space_finds_nothing():
  same_nc = np.ones((40, 5), np.float32)
  assert set(retrieval(same_nc, same_nc)['image_to_text'].values()) == {0.0}
  assert set(zero_shot(same_nc, np.zeros(40, int), np.ones((9, 1, 5))).values()) == {0.0}


# Zero-shot classification.


def test_zero_shot_matches_scikit_learn():
  image_nc, prompts_kpc, labels = (
    rows(60, 8),
    rows(12, 3, 8, seed=1),
    np.random.default_rng(2).integers(0, 12, 60),
  )
  scores_nk = unit(image_nc) @ unit(unit(prompts_kpc).mean(axis=1)).T
  assert zero_shot(image_nc, labels, prompts_kpc) == {
    f'top{k}': sklearn.metrics.top_k_accuracy_score(labels, scores_nk, k=k, labels=range(12))
    for k in (1, 3, 5)
  }


def test_prompts_name_the_class():
  assert class_prompts(['face-smiling', 'sky_weather'], ['{}', 'a drawing of {}.']) == [
    ['face smiling', 'a drawing of face smiling.'],
    ['sky weather', 'a drawing of sky weather.'],
  ]


@pytest.mark.parametrize(
  'call, said',
  [
    (lambda: zero_shot(rows(4, 3), [0] * 4, rows(1, 2, 3)), 'zero-shot: 1 class'),
    (lambda: retrieval(rows(1, 3), rows(1, 3)), r'retrieval: 1 image\(s\) with a text'),
    (lambda: class_prompts(['a'], ['a picture']), "templates: 'a picture' is not legal"),
    (lambda: class_prompts(['a'], []), "templates: '' is not legal"),
    (
      lambda: linear_probe(
        {'train': rows(4, 3), 'validation': rows(2, 3)}, {'train': [1] * 4, 'validation': [1, 1]}
      ),
      'linear probe: 1 class',
    ),
    (
      lambda: linear_probe(
        {'train': rows(4, 3), 'validation': rows(0, 3)}, {'train': [1, 0, 1, 0], 'validation': []}
      ),
      '0 validation rows',
    ),
  ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(call, said):
  with pytest.raises(UserError, match=said) as error:
    call()
  assert '\n' not in str(error.value)


# The shape of the common space.


def test_alignment_uniformity_and_gap_match_their_definitions(monkeypatch):
  monkeypatch.setattr(retrieval_lib, 'BLOCK_ROWS', 7)
  image_nc, text_nc = rows(20, 6) + 1, rows(20, 6, seed=1) * 3
  results = evaluate_pair(
    image_nc, text_nc, labels=np.arange(20) % 3, class_prompts_kpc=rows(3, 2, 6)
  )
  v, t = torch.tensor(unit(image_nc)), torch.tensor(unit(text_nc))
  assert results['alignment'] == pytest.approx((v - t).norm(dim=1).pow(2).mean().item(), rel=1e-5)
  assert results['uniformity_image'] == pytest.approx(
    torch.pdist(v).pow(2).mul(-2).exp().mean().log().item(), rel=1e-5
  )
  assert results['uniformity_text'] == pytest.approx(
    torch.pdist(t).pow(2).mul(-2).exp().mean().log().item(), rel=1e-5
  )
  assert results['modality_gap'] == pytest.approx((v.mean(0) - t.mean(0)).norm().item(), rel=1e-5)
  assert set(results['zero_shot']) == {'top1', 'top3', 'top5'} and 'zero_shot' not in evaluate_pair(
    image_nc, text_nc
  )


# Linear probes.


def classes(n, seed, d=10, num_classes=4):
  """Overlapping classes, channels of very different scale, one of them constant."""
  rng = np.random.default_rng(seed)
  label_n = rng.integers(0, num_classes, n)
  x_nd = 0.7 * rows(num_classes, d, seed=9)[label_n] + rng.normal(size=(n, d))
  x_nd[:, 3] = 5
  return (x_nd * 10.0 ** np.linspace(-2, 2, d)).astype(np.float32), label_n


@pytest.mark.parametrize('strength', [0.001, 0.1, 10.0])
def test_probe_matches_scikit_learn(strength):
  splits = {
    split: classes(n, seed)
    for seed, (split, n) in enumerate({'train': 300, 'validation': 150, 'test': 200}.items())
  }
  features, labels = ({split: pair[i] for split, pair in splits.items()} for i in (0, 1))
  mean_d, deviation_d = (
    features['train'].mean(0),
    np.where(features['train'].std(0) > 0, features['train'].std(0), 1),
  )
  scaled = {split: (x_nd - mean_d) / deviation_d for split, x_nd in features.items()}
  reference = sklearn.linear_model.LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(
    scaled['train'], labels['train']
  )
  got = linear_probe(features, labels, strengths=[strength])
  assert got['C'] == strength
  for split, accuracy in got['accuracy'].items():
    assert accuracy == pytest.approx(
      reference.score(scaled[split], labels[split]), abs=1.01 / len(labels[split])
    )


def test_probe_chooses_on_validation_and_repeats_itself():
  splits = {
    split: classes(n, seed)
    for seed, (split, n) in enumerate({'train': 60, 'validation': 150, 'test': 200}.items())
  }
  features, labels = ({split: pair[i] for split, pair in splits.items()} for i in (0, 1))
  got = linear_probe(features, labels)
  by_strength = got['validation_by_C']
  assert got['C'] == min(
    c for c, accuracy in by_strength.items() if accuracy == max(by_strength.values())
  )
  assert got['accuracy']['validation'] == by_strength[got['C']]
  assert linear_probe(features, labels) == got
  labels['test'] = (labels['test'] + 1) % 4  # Nothing is chosen on test.
  assert linear_probe(features, labels)['validation_by_C'] == by_strength


def test_rows_without_a_label_do_not_count():
  splits = {
    split: classes(n, seed)
    for seed, (split, n) in enumerate({'train': 60, 'validation': 150, 'test': 200}.items())
  }
  features, labels = ({split: pair[i] for split, pair in splits.items()} for i in (0, 1))
  more = {split: np.insert(x_nd, [0, 7], 1e3, axis=0) for split, x_nd in features.items()}
  known = {split: np.insert(label_n, [0, 7], UNLABELLED) for split, label_n in labels.items()}
  assert linear_probe(more, known) == linear_probe(features, labels)
  image_nc, prompts_kpc = rows(60, 8), rows(4, 3, 8, seed=1)
  assert zero_shot(
    np.insert(image_nc, [0, 7], 1, axis=0), known['train'], prompts_kpc
  ) == zero_shot(image_nc, labels['train'], prompts_kpc)


@pytest.mark.parametrize('count', [40, 9])
def test_principal_components_match_scikit_learn(count):
  """More rows than columns, and fewer."""
  train_nd, test_nd = rows(count, 12) * np.linspace(1, 4, 12, dtype=np.float32), rows(7, 12, seed=1)
  reference = sklearn.decomposition.PCA(5, svd_solver='full').fit(train_nd)
  got = principal_components({'train': train_nd, 'test': test_nd}, 5)
  np.testing.assert_allclose(np.abs(got['test']), np.abs(reference.transform(test_nd)), atol=1e-4)
  assert principal_components({'train': train_nd[:4]}, 5)['train'].shape == (4, 4)


def test_pixels_and_their_components_tell_colours_apart():
  rng = np.random.default_rng(0)
  colours = np.array([(200, 30, 30), (30, 180, 40), (40, 60, 210)])
  labels = {'train': np.arange(45) % 3, 'validation': np.arange(15) % 3, 'test': np.arange(30) % 3}
  images = {
    split: [
      Image.fromarray(np.clip(colours[k] + rng.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8))
      for k in label_n
    ]
    for split, label_n in labels.items()
  }
  features = {split: pixels(batch, size=8) for split, batch in images.items()}
  assert (
    features['test'].shape == (30, 192)
    and features['test'].min() >= 0
    and features['test'].max() <= 1
  )
  for rows_of in (features, principal_components(features, 4)):
    assert linear_probe(rows_of, labels)['accuracy']['test'] == 1


# What there is no score of.


@pytest.mark.parametrize(
  ('images', 'texts', 'labels', 'kinds', 'there'),
  [
    (0, 0, [], 3, set()),
    (1, 0, [1], 3, {'zero_shot'}),
    (1, 1, [1], 3, {'modality_gap', 'alignment', 'zero_shot'}),
    (4, 1, [0, 1, 2, 0], 3, {'modality_gap', 'alignment', 'zero_shot', 'uniformity_image'}),
    (4, 0, [0, 1, 2, 0], 3, {'zero_shot', 'uniformity_image'}),
    (
      4,
      4,
      [UNLABELLED] * 4,
      3,
      {
        'modality_gap',
        'alignment',
        'uniformity_image',
        'uniformity_text',
        'image_to_text',
        'text_to_image',
      },
    ),
    (
      4,
      4,
      [0] * 4,
      1,
      {
        'modality_gap',
        'alignment',
        'uniformity_image',
        'uniformity_text',
        'image_to_text',
        'text_to_image',
      },
    ),
  ],
)
@pytest.mark.filterwarnings('error')
def test_what_the_rows_do_not_determine_is_left_out(images, texts, labels, kinds, there):
  found = evaluate_pair(
    rows(images, 5),
    rows(texts, 5, seed=1),
    image_of_text=list(range(texts)),
    labels=labels,
    class_prompts_kpc=rows(kinds, 2, 5, seed=2),
  )
  assert set(found) == there
  assert np.isfinite(
    [
      x
      for value in found.values()
      for x in (value.values() if isinstance(value, dict) else [value])
    ]
  ).all()


def test_a_split_without_a_known_label_has_no_accuracy():
  splits = ('train', 'validation', 'test')
  features = {split: rows(9, 4, seed=seed) for seed, split in enumerate(splits)}
  labels = {'train': [0, 1, 2] * 3, 'validation': [0] * 9, 'test': [UNLABELLED] * 9}
  assert set(linear_probe(features, labels)['accuracy']) == {'train', 'validation'}


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e38])
def test_features_that_are_no_numbers_score_nothing(value):
  """Nothing ranks above NaN: without a check such towers would find everything."""
  good, bad = rows(6, 4), rows(6, 4, seed=1)
  bad[2] = value
  with pytest.raises(UserError, match='of 6 features are not finite'):
    retrieval(good, bad)
  with pytest.raises(UserError, match='not finite'):
    zero_shot(bad, [0, 1] * 3, rows(2, 2, 4))
  if value > 1e37:  # A probe standardises what is merely long.
    return
  splits = {'train': bad, 'validation': good}
  with pytest.raises(UserError, match='not finite'):
    linear_probe(splits, dict.fromkeys(splits, [0, 1] * 3))


def test_no_picture_has_no_row():
  assert pixels([], size=4).shape == (0, 48)
