"""MoLT in float64 PyTorch, one sample and one layer at a time, from the paper's equations. Slow on
purpose: it is what the tests believe.

A sample is {'image': [L tensors [I, D_i]] or None, 'text': [L tensors [T, D_t]] or None}: only what
is present and valid is in it, so that nothing else can leak. Parameters come as a nested dict of
tensors with a leading layer axis where there is one per layer.
"""

import dataclasses
import math

import torch
from torch.nn import functional as F

OTHER = {'image': 'text', 'text': 'image'}


@dataclasses.dataclass(frozen=True)
class Settings:
  method: str
  strategy: str
  input_norm: str
  num_heads: int
  cross_attention: bool
  layer_weights: bool
  fusion_attention: bool
  fusion_residual: bool
  classifier: str
  per_pattern: bool


def samples_of(states, mask, present):
  """NumPy {'image': [L, B, I, D], 'text': [L, B, T, D]} (either may be None), mask [B, T], present
  [B, 2] -> list of samples.
  """

  def rows(modality, b, keep):
    return [torch.tensor(layer[b][keep], dtype=torch.float64) for layer in states[modality]]

  return [
    {
      'image': rows('image', b, slice(None)) if present[b][0] else None,
      'text': rows('text', b, mask[b]) if present[b][1] else None,
    }
    for b in range(len(present))
  ]


def channel_statistics(samples, modality, layer):
  """(mean [D], deviation [D]) over every token of the modality in the samples; None when there is
  none.
  """
  tokens = [s[modality][layer] for s in samples if s[modality] is not None]
  if not tokens:
    return None
  tokens = torch.cat(tokens)
  return tokens.mean(0), tokens.std(0, correction=0)


def normalise(x, kind, statistics):
  if kind == 'rms':
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
  if kind == 'standardize' and statistics is not None:
    mean, deviation = statistics
    return (x - mean) / torch.where(deviation > 1e-5 * mean.abs(), deviation, 1.0)
  return x


def prepare(sample, statistics, p, s, widths):
  """Normalises what is present and fills what is absent; a modality stays None when nothing stands
  in for it.
  """

  def absent(modality):
    if s.strategy == 'robust':
      return None
    layers = len(statistics[modality])
    if s.strategy == 'zero':
      return [torch.zeros(1, widths[modality], dtype=torch.float64)] * layers
    return [p['inputs'][modality]['null'][k][None] for k in range(layers)]

  def present(modality):
    return [
      normalise(x, s.input_norm, statistics[modality][k]) for k, x in enumerate(sample[modality])
    ]

  return {m: absent(m) if sample[m] is None else present(m) for m in OTHER}


def affine(x, p, layer=None):
  if layer is None:
    return x @ p['kernel'] + p['bias']
  return x @ p['kernel'][layer] + (p['bias'][layer] if 'bias' in p else 0)


def attention(q, k, v, num_heads):
  """SoftMax(Q K' / sqrt(d)) V, head by head over slices of the width."""
  size = q.shape[-1] // num_heads
  answers = []
  for n in range(num_heads):
    part = slice(n * size, (n + 1) * size)
    answers.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=-1) @ v[:, part])
  return torch.cat(answers, dim=-1)


def layer_norm(x, p, layer=None):
  scale, bias = (p['scale'], p['bias']) if layer is None else (p['scale'][layer], p['bias'][layer])
  return F.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-5)


def translate(x, p, s, layer):
  """Eq. 1-3 and the mean over tokens: {'image': [C] or None, 'text': [C] or None}."""
  projected = {m: affine(x[m][layer], p[f'{m}_project'], layer) for m in OTHER if x[m] is not None}
  pooled = dict.fromkeys(OTHER)
  for m, own in projected.items():
    h = torch.zeros_like(own)
    if s.cross_attention and OTHER[m] in projected:
      other, q = projected[OTHER[m]], affine(own, p[f'{m}_query'], layer)
      k, v = (affine(other, p[f'{OTHER[m]}_{role}'], layer) for role in ('key', 'value'))
      h = attention(q, k, v, s.num_heads)
    pooled[m] = layer_norm(h + own, p[f'{m}_norm'], layer).mean(0)
  return pooled


def mean_of(values):
  values = [v for v in values if v is not None]
  return sum(values) / len(values)


def classify(x, p, s):
  if s.classifier == 'mlp':
    x = F.gelu(affine(layer_norm(x, p['norm']), p['hidden']))
  return affine(x, p['logits'])


def molt(x, p, s, there):
  """Eq. 1-7 for one prepared sample: (logits [K], [{'image': [C], 'text': [C]} per layer])."""
  num_layers = len(next(v for v in x.values() if v is not None))
  last = p[f'alone_{there[0]}'] if s.per_pattern and len(there) == 1 else p['classifier']
  pooled = [translate(x, p['translation'], s, layer) for layer in range(num_layers)]
  weights = p['layer_weights'] if s.layer_weights else torch.ones(num_layers, dtype=torch.float64)
  joint = sum(weights[k] * mean_of(h.values()) for k, h in enumerate(pooled)) / num_layers
  if not s.fusion_attention:
    return classify(joint, last, s), pooled
  f = p['fusion']
  query = affine(joint, f['query'], 0)[None]
  memories = [
    [affine(x[m][-1], f[f'{m}_{role}'], 0) for role in ('key', 'value')]
    for m in OTHER
    if x[m] is not None
  ]
  answers = [attention(query, key, value, s.num_heads)[0] for key, value in memories]
  return classify(mean_of(answers) + (joint if s.fusion_residual else 0), last, s), pooled


def late_fusion(x, p, s, widths):
  """Means of the last states side by side."""
  means = [
    torch.zeros(widths[m], dtype=torch.float64) if x[m] is None else x[m][-1].mean(0) for m in OTHER
  ]
  return classify(torch.cat(means), p['classifier'], s), None


def head(samples, p, s, widths, statistics):
  """(logits [B, K], pooled per sample and layer); `statistics` is {modality: one (mean, deviation)
  or None per layer}.
  """
  if s.method == 'late_fusion':
    samples = [{m: None if x[m] is None else x[m][-1:] for m in OTHER} for x in samples]
    statistics = {m: v[-1:] for m, v in statistics.items()}
  prepared = [prepare(x, statistics, p, s, widths) for x in samples]
  outputs = [
    late_fusion(x, p, s, widths)
    if s.method == 'late_fusion'
    else molt(x, p, s, [m for m in OTHER if sample[m] is not None])
    for x, sample in zip(prepared, samples, strict=True)
  ]
  return torch.stack([logits for logits, _ in outputs]), [pooled for _, pooled in outputs]


def cca_loss(x, y, ridge):
  """Eq. 4 over its largest possible magnitude: -(sum of canonical correlations) / min(n - 1, d),
  ridge relative to trace / d.
  """
  n = len(x)
  x, y = x - x.mean(0), y - y.mean(0)

  def factor(z):
    s = z.T @ z / (n - 1)
    return torch.linalg.cholesky(s + ridge * s.trace() / len(s) * torch.eye(len(s), dtype=s.dtype))

  whiten = torch.linalg.solve_triangular(factor(x), x.T @ y / (n - 1), upper=False)
  f = torch.linalg.solve_triangular(factor(y), whiten.T, upper=False)
  return -torch.linalg.svdvals(f).sum() / min(n - 1, x.shape[1], y.shape[1])


def mean_cca_loss(pooled, complete, ridge):
  """L_CCA: the mean over layers, from the samples that have both modalities."""
  rows = [p for p, both in zip(pooled, complete, strict=True) if both]
  return sum(
    cca_loss(
      torch.stack([r[k]['image'] for r in rows]), torch.stack([r[k]['text'] for r in rows]), ridge
    )
    for k in range(len(rows[0]))
  ) / len(rows[0])


def cross_entropy(logits, label):
  return F.cross_entropy(logits, torch.as_tensor(label))


def binary_cross_entropy(logits, label):
  return F.binary_cross_entropy_with_logits(logits, torch.as_tensor(label, dtype=torch.float64))
