"""The published data sets end to end on miniatures: prepare, load, train, evaluate."""

import json
import pathlib

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from molt_jax import train
from molt_jax.config.classifier import CLASSIFIER
from molt_jax.data import datasets, modalities
from molt_jax.errors import UserError
from molt_jax.evaluation import metrics, thresholds
from molt_jax.training import checkpoint_files

CHOICES = {
  'mm_imdb': {'text': 'longest', 'genres': 'all'},
  'upmc_food101': {'text': 'title'},
  'snli_ve': {'neutral': 'original'},
  'hateful_memes': {},
}


@pytest.mark.parametrize('name', CHOICES)
def test_presets_are_the_papers_setting_and_have_variants(name):
  file = str(pathlib.Path(__file__).parents[1] / 'configs' / f'{name}.py')
  paper, small, robust, both = (
    CLASSIFIER.load(file + variant) for variant in ('', ':small', ':robust', ':small,robust')
  )
  printed = {
    'molt.width': 1024,
    'molt.layers': '-4:',
    'cca.weight': 0.1,
    'loss.weight': 0.9,
    'optimizer.learning_rate': 4e-4,
    'backbones.dtype': 'bfloat16',
    'compute_dtype': 'bfloat16',
    'missing.views': False,
    'molt.input_norm': 'none',
    'fusion.residual': False,
  }
  assert {field: CLASSIFIER.get(paper, field) for field in printed} == printed
  assert (
    'llama-7b' in paper.backbones.text.path
    and 'clip-vit-large-patch14' in paper.backbones.image.path
  )
  assert all(
    config.backbones.text.path.startswith('pkg://') and config.train.epochs == 1
    for config in (small, both)
  )
  default = CLASSIFIER.default()
  for field in ('missing', 'cca', 'fusion'):
    assert robust[field] == both[field] == default[field] and small[field] == paper[field]
  assert both.backbones == small.backbones and robust.backbones == paper.backbones
  with pytest.raises(
    UserError, match="no variant 'tiny' after the colon; give one of small, robust"
  ):
    CLASSIFIER.load(file + ':tiny')


@pytest.fixture
def seen(monkeypatch):
  """The logits [C, N, K], labels [N, ...] and weights [C, N] of each evaluation that was ranked."""
  batches, computed, observe, compute = [], [], metrics.Ranking.observe, metrics.Ranking.compute

  def observed(self, *batch):
    batches.append([np.asarray(x) for x in batch])
    observe(self, *batch)

  def done(self):
    found = {
      'logits': np.concatenate([b[0] for b in batches], 1),
      'label': np.concatenate([b[1] for b in batches]),
      'weight': np.concatenate([b[2] for b in batches], 1),
    }
    computed.append(found)
    batches.clear()
    return compute(self)

  monkeypatch.setattr(metrics.Ranking, 'observe', observed)
  monkeypatch.setattr(metrics.Ranking, 'compute', done)
  return computed


@pytest.mark.parametrize('name', CHOICES)
def test_it_trains_and_its_results_are_scikit_learns_and_name_what_changes_scores(
  make_tiny_config, miniature, tmp_path, seen, name
):
  config = make_tiny_config()
  config.dataset.name, config.dataset.path, config.dataset.data_dir = (
    name,
    str(miniature(name)),
    str(tmp_path / 'data'),
  )
  config.dataset.allow_count_mismatch, config.dataset.multi_label = True, name == 'mm_imdb'
  config.loss.class_weights, config.eval.threshold = 'balanced', 'validation'
  config.method, config.missing.views, config.classifier.kind = (
    'late_fusion',
    False,
    'linear',
  )  # Few programs, soon compiled.
  config.train.batch_size = config.eval.batch_size = 12
  config.train.log_every = 1
  config.train.epochs = 2 * 12 / len(datasets.load_dataset(config).splits['train'])
  record = train.train(config, tmp_path / 'run')
  lines = [
    json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = [line['loss'] for line in lines if line['kind'] == 'train']
  assert len(losses) == 2 and np.isfinite(losses).all()
  assert record == json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
  assert record['dataset'] == {'name': name, **CHOICES[name], 'allow_count_mismatch': True}
  assert bool(seen) == (name in ('mm_imdb', 'hateful_memes'))
  meta = checkpoint_files.load_model(tmp_path / 'run', 'best')[0]
  source = datasets.load_dataset(config).splits['test']
  validations = [line for line in lines if line['kind'] == 'validation']
  of_test = seen[len(validations)] if seen else None
  for c, result in enumerate(record['results'].values() if seen else ()):
    live = of_test['weight'][c] > 0
    logits_nk, label = of_test['logits'][c][live], of_test['label'][live]
    assert result['num_examples'] == len(label)
    if name == 'hateful_memes':
      assert result['auroc'] == pytest.approx(
        roc_auc_score(label, logits_nk[:, 1] - logits_nk[:, 0]), rel=1e-6
      )
      continue
    left_nm = source.present & np.array(list(modalities.KEPT.values())[c])
    found_n = thresholds.of_examples(meta['thresholds'], left_nm[left_nm.any(axis=1)])
    given_nk = 1 / (1 + np.exp(-logits_nk)) > found_n[:, None]
    for average in ('micro', 'macro', 'samples', 'weighted'):
      assert result[f'f1_{average}'] == pytest.approx(
        f1_score(label, given_nk, average=average, zero_division=0), rel=1e-6
      )
    there_k = label.any(axis=0)  # Most of the 23 genres are not in the miniature.
    assert result['auroc'] == pytest.approx(
      roc_auc_score(label[:, there_k], logits_nk[:, there_k], average='macro'), rel=1e-6
    )
