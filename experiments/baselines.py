"""What a user would do first, without training a network: kernel ridge and logistic regression on
raw pixels, on TF-IDF and on both, and probes of the hidden states of frozen towers.

Everything is chosen on validation. A baseline is a function `Inputs -> Found`.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from molt_jax.data import formats
from molt_jax.data.modalities import CONDITIONS, MODALITIES

SPLITS = ('train', 'validation', 'test')
HELD_OUT = SPLITS[1:]
COMPLETE, IMAGE_ALONE, TEXT_ALONE = CONDITIONS
ALONE = {'image': IMAGE_ALONE, 'text': TEXT_ALONE}
SIDE = 32
GAMMAS = (0.1, 0.3, 1.0)
SHARES = (0.3, 1.0, 3.0, 10.0)
STRENGTHS = 10.0 ** np.arange(-4, 3, 0.5)
INVERSE_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # C of logistic regression.
# Up to so many training examples kernels are exact, above they have so many landmarks (Nystroem).
MOST_EXACT, NUM_LANDMARKS = 5_000, 1_000


@dataclasses.dataclass(frozen=True)
class Inputs:
  """A data set as a baseline sees it; each attribute maps a split to its examples.

  Attributes:
    texts: strings, '' where absent.
    images: bytes of image files, None where absent.
    label: int[N].
    present: bool[N, 2], whether an example has an image, a text.
    states: modality -> split -> float32[L, N, D], pooled hidden states of a frozen tower, zeros
      where absent; None where they were not asked for.
    num_classes: K.
  """

  texts: Mapping[str, Sequence[str]]
  images: Mapping[str, Sequence[bytes | None]]
  label: Mapping[str, np.ndarray]
  present: Mapping[str, np.ndarray]
  states: Mapping[str, Mapping[str, np.ndarray]] | None
  num_classes: int

  @functools.cached_property
  def one_hot(self) -> np.ndarray:
    """float[N, K] of the training split."""
    return np.eye(self.num_classes)[self.label['train']]

  @functools.cached_property
  def basis(self) -> np.ndarray:
    """Positions of the training examples that kernels compare with: all, or landmarks."""
    count = len(self.label['train'])
    if count <= MOST_EXACT:
      return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, NUM_LANDMARKS, replace=False))

  def accuracy(self, split: str, score_nk: np.ndarray) -> float:
    """Returns the share of a split that a score gets right."""
    return float(np.mean(score_nk.argmax(axis=1) == self.label[split]))


@dataclasses.dataclass(frozen=True)
class Fit:
  """A classifier under one condition, chosen on validation.

  Attributes:
    validation: its accuracy there.
    score: split -> float[N, K]; the greatest is its answer.
    chosen: what was chosen.
  """

  validation: float
  score: Mapping[str, np.ndarray]
  chosen: Mapping[str, Any]


Found = Mapping[str, Fit]  # Condition -> classifier.
Kernel = Mapping[str, np.ndarray]  # Split -> [N, basis].


def best(fits: Iterable[Fit]) -> Fit:
  """Returns the best on validation, the first of equals."""
  return max(fits, key=lambda fit: fit.validation)


# ---- Kernel ridge --------------------------------------------------------------------------------


def ridge(kernel: Kernel, inputs: Inputs, **chosen: Any) -> Fit:
  """Fits one-hot kernel ridge, its strength chosen on validation."""
  rotate, value, target = _diagonal(kernel['train'], inputs)
  rotated = {split: kernel[split] @ rotate for split in HELD_OUT}
  found = None
  for strength in STRENGTHS:
    weight = target / (value + strength)[:, None]
    validation = inputs.accuracy('validation', rotated['validation'] @ weight)
    if found is None or validation > found[0]:
      found = validation, weight, strength
  validation, weight, strength = found
  score = {split: rotated[split] @ weight for split in HELD_OUT}
  return Fit(validation, score, {**chosen, 'strength': float(strength)})


def _diagonal(train, inputs):
  """Returns (R, e, t) such that kernel @ R @ (t / (e + strength)) is the answer of ridge."""
  if train.shape[0] == train.shape[1]:
    value, vector = np.linalg.eigh(train)
    return vector, np.maximum(value, 0), vector.T @ inputs.one_hot
  # Ridge on Nystroem features Z = K_nm K_mm^(-1/2), in the eigenbasis of Z^T Z.
  value, vector = np.linalg.eigh(train[inputs.basis].astype(np.float64))
  kept = value > 1e-9 * value[-1]
  root = vector[:, kept] / np.sqrt(value[kept])
  features = train @ root
  value, vector = np.linalg.eigh(features.T @ features)
  return root @ vector, np.maximum(value, 0), vector.T @ (features.T @ inputs.one_hot)


def rbf_kernel(
  features: Mapping[str, np.ndarray], inputs: Inputs, *, floor: float = 0.0
) -> list[Kernel]:
  """Returns a kernel for each of GAMMAS, over squared distances per dimension of standardised
  features; `floor` is added to standard deviations.
  """
  z = _standardised(features, floor)
  base = z['train'][inputs.basis]
  distance = {split: _squared_distance(x, base) for split, x in z.items()}
  return [{split: np.exp(-gamma * d) for split, d in distance.items()} for gamma in GAMMAS]


def _standardised(features, floor):
  flat = {split: x.reshape(len(x), -1) for split, x in features.items()}
  mean, std = flat['train'].mean(0), flat['train'].std(0)
  # A channel that hardly varies is noise.
  std += floor or 0.01 * std.mean()
  return {split: (x - mean) / std for split, x in flat.items()}


def _squared_distance(a, b):
  return ((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T) / a.shape[1]


def linear_kernel(features: Mapping[str, np.ndarray], inputs: Inputs) -> Kernel:
  """Returns the products of standardised features, per dimension, and of a constant."""
  z = _standardised(features, 0.0)
  base = z['train'][inputs.basis]
  return {split: 1 + x @ base.T / base.shape[1] for split, x in z.items()}


def mixed(text: Kernel, image: Kernel, share: float) -> Kernel:
  """Returns text + share * image."""
  return {split: text[split] + share * image[split] for split in SPLITS}


# ---- Pixels and TF-IDF ---------------------------------------------------------------------------


def pixels(inputs: Inputs) -> dict[str, np.ndarray]:
  """Returns split -> float[N, 32, 32, 3] from 0 to 1; zeros where there is no image."""
  single = len(inputs.label['train']) > MOST_EXACT
  found = {}
  for split, files in inputs.images.items():
    rows = [_small(file) if file else np.zeros((SIDE, SIDE, 3)) for file in files]
    found[split] = np.stack(rows).astype(np.float32 if single else np.float64)
  return found


@functools.lru_cache(maxsize=100_000)
def _small(file):
  image = Image.open(io.BytesIO(file), formats=formats.FORMATS).convert('RGB')
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255.0


def tfidf(inputs: Inputs, **how: Any) -> dict[str, Any]:
  """Returns split -> sparse [N, terms]."""
  vectorizer = TfidfVectorizer(sublinear_tf=True, **how)
  train = vectorizer.fit_transform(inputs.texts['train'])
  held_out = {split: vectorizer.transform(inputs.texts[split]) for split in HELD_OUT}
  return {'train': train, **held_out}


def text_kernel(inputs: Inputs) -> Kernel:
  """Returns the cosine of character TF-IDF, of one to five characters within words."""
  terms = tfidf(inputs, analyzer='char_wb', ngram_range=(1, 5))
  base = terms['train'][inputs.basis]
  return {split: (x @ base.T).toarray() for split, x in terms.items()}


def kernel_ridge(inputs: Inputs) -> Found:
  """Kernel ridge on character TF-IDF, RBF on 32 x 32 raw pixels, and their weighted sum."""
  texts, images = text_kernel(inputs), rbf_kernel(pixels(inputs), inputs, floor=0.05)
  alone = [ridge(image, inputs, gamma=gamma) for gamma, image in zip(GAMMAS, images, strict=True)]
  both = (
    ridge(mixed(texts, image, share), inputs, gamma=gamma, share=share)
    for gamma, image in zip(GAMMAS, images, strict=True)
    for share in SHARES
  )
  return {COMPLETE: best(both), IMAGE_ALONE: best(alone), TEXT_ALONE: ridge(texts, inputs)}


def linear_ridge(inputs: Inputs) -> Found:
  """Linear ridge on character TF-IDF, on 32 x 32 raw pixels, and on both."""
  texts, image = text_kernel(inputs), linear_kernel(pixels(inputs), inputs)
  both = (ridge(mixed(texts, image, share), inputs, share=share) for share in SHARES)
  alone = {IMAGE_ALONE: ridge(image, inputs), TEXT_ALONE: ridge(texts, inputs)}
  return {COMPLETE: best(both), **alone}


def logistic(inputs: Inputs) -> Found:
  """Logistic regression on TF-IDF of words and pairs of words and on the leading 200 principal
  components of 32 x 32 raw pixels; complete: the mean of the two log-probabilities, weighted.
  """
  terms = tfidf(inputs, ngram_range=(1, 2), token_pattern=r'(?u)\b\w+\b')
  image = _logistic(_components(pixels(inputs)), inputs)
  text = _logistic(terms, inputs)
  return {COMPLETE: late_fusion(text, image, inputs), IMAGE_ALONE: image, TEXT_ALONE: text}


def _components(features, count=200):
  """Returns split -> [N, count], in units of the first component's standard deviation."""
  flat = {split: x.reshape(len(x), -1) for split, x in features.items()}
  count = min(count, *flat['train'].shape)
  axes = PCA(count, svd_solver='randomized', random_state=0).fit(flat['train'])
  scale = np.sqrt(axes.explained_variance_[0])
  return {split: axes.transform(x) / scale for split, x in flat.items()}


def _logistic(features, inputs):
  found = []
  for strength in INVERSE_STRENGTHS:
    model = LogisticRegression(C=strength, max_iter=200, tol=1e-3)
    model.fit(features['train'], inputs.label['train'])
    score = {}
    for split in HELD_OUT:
      # A class without a training example is never the answer.
      score[split] = np.full((features[split].shape[0], inputs.num_classes), -50.0)
      score[split][:, model.classes_] = model.predict_log_proba(features[split])
    validation = inputs.accuracy('validation', score['validation'])
    found.append(Fit(validation, score, {'C': strength}))
  return best(found)


def late_fusion(text: Fit, image: Fit, inputs: Inputs) -> Fit:
  """Returns the weighted mean of two scores, its weight chosen on validation."""
  found = []
  for weight in (0.5, 0.25, 0.75, 0.1, 0.9):
    score = {s: (1 - weight) * text.score[s] + weight * image.score[s] for s in HELD_OUT}
    validation = inputs.accuracy('validation', score['validation'])
    found.append(Fit(validation, score, {'weight of image': weight}))
  return best(found)


def prior(inputs: Inputs) -> Found:
  """The most frequent class."""
  counts = np.bincount(inputs.label['train'], minlength=inputs.num_classes)
  score = {s: np.tile(counts, (len(inputs.label[s]), 1)) for s in HELD_OUT}
  fit = Fit(inputs.accuracy('validation', score['validation']), score, {})
  return dict.fromkeys(CONDITIONS, fit)


# ---- Probes of hidden states ---------------------------------------------------------------------


def linear_probe(inputs: Inputs, *, states: slice) -> Found:
  """Linear ridge on pooled hidden states of each tower, and on both towers'."""
  kernels = {m: [linear_kernel(_chosen(inputs, m, states), inputs)] for m in MODALITIES}
  return _probes(kernels, inputs, [{}])


def rbf_probe(inputs: Inputs, *, states: slice) -> Found:
  """Kernel ridge with RBF kernels of the same."""
  kernels = {m: rbf_kernel(_chosen(inputs, m, states), inputs) for m in MODALITIES}
  return _probes(kernels, inputs, [{'gamma': gamma} for gamma in GAMMAS])


def fused_probe(inputs: Inputs, *, states: slice) -> Found:
  """Late fusion of the unimodal RBF probes."""
  found = {}
  for modality in MODALITIES:
    kernels = rbf_kernel(_chosen(inputs, modality, states), inputs)
    found[ALONE[modality]] = best(
      ridge(kernel, inputs, gamma=gamma) for kernel, gamma in zip(kernels, GAMMAS, strict=True)
    )
  return {COMPLETE: late_fusion(found[TEXT_ALONE], found[IMAGE_ALONE], inputs), **found}


def _chosen(inputs, modality, states):
  """Returns split -> [N, L * D]; where the modality is absent the mean of the training split."""
  found = {}
  for split, x_lnd in inputs.states[modality].items():
    x_nld = np.moveaxis(x_lnd[states], 0, 1)
    found[split] = x_nld.reshape(len(x_nld), -1)
  column = MODALITIES.index(modality)
  there = {split: inputs.present[split][:, column] for split in found}
  mean = found['train'][there['train']].mean(axis=0)
  return {split: np.where(there[split][:, None], x, mean) for split, x in found.items()}


def _probes(kernels, inputs, settings):
  """Chooses a kernel for each modality alone; complete: the weighted sum of these two."""
  found, chosen = {}, {}
  for modality in MODALITIES:
    fits = [ridge(k, inputs, **how) for k, how in zip(kernels[modality], settings, strict=True)]
    found[ALONE[modality]] = best(fits)
    chosen[modality] = kernels[modality][fits.index(best(fits))]
  both = (
    ridge(mixed(chosen['text'], chosen['image'], share), inputs, share=share)
    for share in (0.1, *SHARES)
  )
  return {COMPLETE: best(both), **found}


Baseline = Callable[[Inputs], Found]
LAST, ALL = slice(-1, None), slice(None)
PIXELS_AND_TFIDF: dict[str, Baseline] = {
  'most frequent class': prior,
  'kernel ridge, pixels and TF-IDF': kernel_ridge,
  'linear ridge, pixels and TF-IDF': linear_ridge,
  'logistic regression, pixels and TF-IDF': logistic,
}
PROBES: dict[str, Baseline] = {
  'linear probe, last state': functools.partial(linear_probe, states=LAST),
  'linear probe, all states': functools.partial(linear_probe, states=ALL),
  'RBF probe, last state': functools.partial(rbf_probe, states=LAST),
  'RBF probe, all states': functools.partial(rbf_probe, states=ALL),
  'late fusion of RBF probes, all states': functools.partial(fused_probe, states=ALL),
}
