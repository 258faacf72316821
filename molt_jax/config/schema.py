"""The configuration schema: every field with its default, its meaning and its legal values.

A preset (a file in `configs/`) starts from `default_config()` and overrides visible lines.
`load_config` reads a preset and the command line's overrides, `validate` checks every value. A
mistake is a `UserError` of one line: what, which value, what is legal, what to do.

`SCHEMA` is what train, evaluate and predict read; `PRETRAIN_SCHEMA` what pretrain reads. Functions
take SCHEMA unless they are given the other.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from molt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
  """What values a field may take: `text` for the reader, `holds` for the machine."""

  text: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Field:
  """One configuration field."""

  default: Any
  rule: Rule
  meaning: str


def one_of(*values: Any) -> Rule:
  return Rule('one of ' + ', '.join(map(repr, values)), lambda v: v in values)


def at_least(low: float) -> Rule:
  return Rule(f'a number >= {low}', lambda v: v >= low)


def more_than(low: float) -> Rule:
  return Rule(f'a number > {low}', lambda v: v > low)


def between(low: float, high: float) -> Rule:
  return Rule(f'a number from {low} to {high}', lambda v: low <= v <= high)


def inside(low: float, high: float) -> Rule:
  return Rule(f'a number > {low} and < {high}', lambda v: low < v < high)


def below(low: float, high: float) -> Rule:
  return Rule(f'a number >= {low} and < {high}', lambda v: low <= v < high)


NON_EMPTY = Rule('a non-empty string', bool)
ANY_STRING = Rule('a string', lambda v: True)
FLAG = Rule('True or False', lambda v: True)
AXIS = Rule('a positive number of devices, or -1 for all that remain', lambda v: v == -1 or v > 0)

SCHEMA: dict[str, Any] = {
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
        'published '
        'sets, as they are unpacked.'
      ),
    ),
    'path': Field(
      '',
      ANY_STRING,
      'The folder of the data set; table: it holds train.csv (or .jsonl) and test.csv.',
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
      'What is used at all; one alone makes a specialist.',
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
    'mm_imdb': {
      'text': Field(
        'longest',
        one_of('longest', 'outline', 'first', 'all'),
        'Which plot; outline: else the first; all: one example a plot.',
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
      one_of('crop', 'letterbox'),
      'crop: as the tower has it, shortest side to size and centre crop, or (squash) both '
      'sides to size; letterbox: longest side to size, padded.',
    ),
  },
  'text': {
    'max_tokens': Field(64, at_least(1), 'Tokens kept of each text.'),
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
      'Type of frozen weights and of computation in the towers.',
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
          'LLaMA-family tower: Hugging Face directory or hub id, .gguf file, pkg://package/file, '
          'or '
          'random:NAME.'
        ),
      ),
    },
    'image': {
      'path': Field(
        '',
        ANY_STRING,
        'CLIP vision tower: Hugging Face directory or hub id, pkg://package/folder, or random:NAME.',
      ),
    },
  },
  'features': {
    'store': Field(
      '',
      ANY_STRING,
      (
        'Folder that keeps the taps of frozen towers, computed once for all runs; empty: towers '
        'run '
        'in each step.'
      ),
    ),
    'dtype': Field(
      'bfloat16',
      one_of('float32', 'bfloat16', 'int8'),
      'Type that taps are stored in; int8: with one scale a token and layer.',
    ),
  },
  'method': Field(
    'molt',
    one_of('molt', 'late_fusion'),
    'late_fusion: pooled E_i and E_t, concatenated, MLP (the baseline without MoLT).',
  ),
  'compute_dtype': Field(
    'bfloat16',
    one_of('float32', 'bfloat16'),
    'Computation in the head; parameters, norms, softmax, losses stay float32.',
  ),
  'molt': {
    'num_layers': Field(4, at_least(1), 'L_s: last layers of each tower that are tapped.'),
    'width': Field(1024, at_least(1), 'd_c: width of the common space.'),
    'num_heads': Field(
      1, at_least(1), 'Attention heads in the common space; must divide molt.width.'
    ),
    'input_norm': Field(
      'standardize',
      one_of('none', 'rms', 'standardize'),
      'Normalises the taps; standardize: by training statistics.',
    ),
    'cross_attention': Field(True, FLAG, 'Eq. 2; off: H is zero (first ablation of Table 2).'),
    'layer_weights': Field(True, FLAG, 'Learn M of eq. 5; off: the plain mean over layers.'),
  },
  'fusion': {
    'attention': Field(True, FLAG, 'Eq. 6; off: the classifier reads H_r alone.'),
    'residual': Field(True, FLAG, 'The classifier reads the fused vector + H_r.'),
  },
  'classifier': {
    'kind': Field(
      'mlp', one_of('linear', 'mlp'), 'mlp: LayerNorm, one hidden layer with GELU, dropout.'
    ),
    'hidden': Field(512, at_least(1), 'Width of the hidden layer.'),
    'dropout': Field(0.3, below(0, 1), 'Dropout rate before the last layer.'),
    'per_pattern': Field(
      True,
      FLAG,
      (
        'A classifier each for complete, image-only and text-only rows, where views or dropout '
        'train '
        'them (MoLT).'
      ),
    ),
  },
  'missing': {
    'strategy': Field(
      'robust',
      one_of('robust', 'translate', 'null', 'zero'),
      'What stands in for an absent modality.',
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
        'Train the complete, the image-only and the text-only view of each example in every step; '
        'towers run once.'
      ),
    ),
    'view_weight': Field(
      1.0,
      more_than(0),
      'Weight of the cross-entropy of each single-modality view, against 1 of the complete view.',
    ),
    'distill_weight': Field(
      0.0,
      at_least(0),
      'Weight of the KL divergence of the single-modality views from the complete view.',
    ),
    'distill_temperature': Field(2.0, between(0.01, 100), 'Temperature of that divergence.'),
    'train_rate': Field(
      0.0, between(0, 1), 'Share of the training rows that lack a modality for good (protocol).'
    ),
    'train_type': Field(
      'both',
      one_of('text', 'image', 'both'),
      'What those rows lack; both: half of them text, half image.',
    ),
    'eval_rate': Field(
      0.0, between(0, 1), 'Share of validation rows that lack a modality for good.'
    ),
    'eval_type': Field('both', one_of('text', 'image', 'both'), 'What those rows lack.'),
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
    'batch_size': Field(32, at_least(1), 'Examples a step, over all devices.'),
    'accumulate': Field(
      1,
      at_least(1),
      'Parts that a batch is worked through in, for memory; the update is that of the whole batch.',
    ),
    'epochs': Field(10.0, more_than(0), 'Passes over the training split; fractions are allowed.'),
    'log_every': Field(10, at_least(1), 'Steps between lines in metrics.jsonl.'),
    'eval_every': Field(0, at_least(0), 'Steps between validations; 0: once an epoch.'),
    'save_every': Field(0, at_least(0), 'Steps between checkpoints; 0: at each validation.'),
  },
  'eval': {
    'batch_size': Field(64, at_least(1), 'Examples a step in evaluation, over all devices.'),
    'select': Field(
      'best',
      one_of('best', 'latest'),
      'Which checkpoint evaluation and prediction read: best on validation, or the latest.',
    ),
  },
}


def _pick(group: str, *names: str) -> dict[str, Any]:
  return {name: SCHEMA[group][name] for name in names}


def _objective(default: float, meaning: str) -> Field:
  return Field(default, at_least(0), f'Weight of {meaning}.')


PRETRAIN_SCHEMA: dict[str, Any] = {
  **{name: SCHEMA[name] for name in ('seed', 'platform', 'mesh', 'dataset')},
  'image': SCHEMA['image'],
  'text': _pick('text', 'max_tokens'),
  'input': {
    **_pick('input', 'num_threads', 'prefetch'),
    'cache': Field(
      True,
      FLAG,
      'Keep the decoded pictures in memory, at most twice as large as the tower reads them.',
    ),
    'text_store': Field(
      '~/.cache/molt_jax/texts',
      ANY_STRING,
      'Folder that keeps the pooled states of frozen texts; empty: made in each run.',
    ),
  },
  'backbones': {
    'attention': SCHEMA['backbones']['attention'],
    'image': {
      'path': Field(
        '',
        ANY_STRING,
        (
          'CLIP vision tower: Hugging Face directory or hub id, pkg://package/folder; empty: as '
          'below.'
        ),
      ),
      'pretrained': Field(
        False,
        FLAG,
        'Start from the weights of path; off: from scratch, in the architecture of path.',
      ),
      'freeze': Field(False, FLAG, 'Train the projection head alone, on the tower as it is.'),
      'size': Field(
        64, at_least(1), 'Side of the images, pixels (this and the next four: where path is empty).'
      ),
      'patch': Field(8, at_least(1), 'Side of a patch, pixels.'),
      'width': Field(192, at_least(1), 'Width of the tokens.'),
      'layers': Field(6, at_least(1), 'Layers.'),
      'heads': Field(3, at_least(1), 'Attention heads; must divide width.'),
    },
    'text': {
      'kind': Field(
        'llama',
        one_of('llama', 'clip'),
        'llama: mean of the last states; clip: the end-of-text token of a CLIP tower.',
      ),
      'path': Field(
        '',
        NON_EMPTY,
        (
          'Text tower: Hugging Face directory or hub id, .gguf file, pkg://package/file, or '
          'random:NAME.'
        ),
      ),
      'pretrained': Field(
        True,
        FLAG,
        'Start from the weights of path; off: from scratch, in the architecture of path.',
      ),
      'freeze': Field(
        True,
        FLAG,
        (
          'Train the projection head alone; each text goes through the tower once, before the '
          'first '
          'step.'
        ),
      ),
    },
  },
  'compute_dtype': Field(
    'bfloat16',
    one_of('float32', 'bfloat16'),
    'Computation in towers and heads; trained weights and losses stay float32.',
  ),
  'projection': {
    'width': Field(256, at_least(1), 'Width of the space that images and texts share.'),
  },
  'temperature': {
    'init': Field(0.07, inside(0, 1), 'tau at the start; the learned scale is 1 / tau.'),
    'max_scale': Field(100.0, more_than(1), 'The scale is clipped here.'),
  },
  'augment': {
    'image': {
      'min_area': Field(
        0.6,
        between(0.01, 1),
        'Smallest share of the picture that a random crop keeps; 1: no crops.',
      ),
      'max_aspect': Field(1.2, between(1, 4), 'Largest ratio of the sides of a crop.'),
      'flip': Field(0.5, between(0, 1), 'Chance of a horizontal flip.'),
      'color': Field(
        0.1,
        below(0, 1),
        (
          'Brightness, contrast and saturation change by up to this share; mild, or the tower '
          'ignores colour.'
        ),
      ),
      'kept': Field(
        1.0,
        between(0.05, 1),
        (
          'Share of its patches that a view keeps in training, at random (FLIP); layers compute no '
          'others.'
        ),
      ),
      'across': Field(
        False,
        FLAG,
        (
          'Second view of an image (v2v and others): of any picture with the same text, not only '
          'of '
          'the same one.'
        ),
      ),
    },
    'text': {
      'delete': Field(0.0, below(0, 1), 'Chance that a word is left out.'),
      'swap': Field(0.0, between(0, 1), 'Chance that a word changes places with another.'),
    },
  },
  'objective': {
    'v2t': _objective(0.5, 'InfoNCE of finding the text of each image'),
    't2v': _objective(0.5, 'InfoNCE of finding the image of each text'),
    'v2v': _objective(0.0, 'InfoNCE of finding the other view of each image'),
    't2t': _objective(
      0.0, 'InfoNCE of finding the other view of each text; needs text augmentation'
    ),
    'orthogonality': _objective(
      0.0, 'deep feature separation: each embedding orthogonal to its independent feature'
    ),
    'contrastive_separation': _objective(
      0.0, 'deep feature separation: InfoNCE between two views of the independent features'
    ),
    'uniformity': _objective(
      0.0, 'deep feature separation: independent features spread over the sphere'
    ),
    'brownian_bridge': _objective(0.0, 'the augmented image on the bridge between image and text'),
    'geometric_original': _objective(0.0, 'geometric consistency within and across the modalities'),
    'geometric_augmented': _objective(
      0.0, 'geometric consistency of the originals and the other views'
    ),
    'reconstruction': _objective(
      0.0,
      (
        'finding the pixels of each patch in its token by a linear map, so that the tower keeps '
        'what '
        'they show'
      ),
    ),
  },
  'optimizer': SCHEMA['optimizer'],
  'train': _pick('train', 'batch_size', 'epochs', 'log_every', 'eval_every', 'save_every'),
  'eval': SCHEMA['eval'],
  'export': {
    'dtype': Field(
      'float16',
      one_of('float16', 'float32'),
      'Type of the weights in the Hugging Face directory DIR/tower.',
    ),
  },
}


def fields(schema: Mapping[str, Any] = SCHEMA, prefix: str = '') -> Iterator[tuple[str, Field]]:
  """Yields (dotted name, Field) over the schema."""
  for key, value in schema.items():
    if isinstance(value, Field):
      yield prefix + key, value
    else:
      yield from fields(value, prefix + key + '.')


def default_config(schema: Mapping[str, Any] = SCHEMA) -> ml_collections.ConfigDict:
  """Returns a fresh, locked config that holds every field's default."""

  def build(schema):
    return {k: v.default if isinstance(v, Field) else build(v) for k, v in schema.items()}

  return ml_collections.ConfigDict(build(schema)).lock()


def load_config(
  preset: str, overrides: Mapping[str, str] | None = None, *, schema: Mapping[str, Any] = SCHEMA
) -> ml_collections.ConfigDict:
  """Reads a preset file and applies overrides, then validates.

  Args:
    preset: `FILE.py` or `FILE.py:ARGUMENT`; the file defines `get_config()` (or
      `get_config(argument)`).
    overrides: dotted field name -> value as written on a command line.
    schema: of the command that reads it.

  Raises:
    UserError: no such file, no `get_config` in it, a preset of another command, an unknown field, a
      value of the wrong type or outside its legal range.
  """
  config = _read_preset(preset)
  lacking = {name for name, _ in fields(schema)} ^ {name for name, _ in _flatten(config.to_dict())}
  if lacking:
    raise UserError(
      f'--config: {preset!r} is a preset of another command (config.{min(lacking)}); give one of '
      'this command'
    )
  for name, text in (overrides or {}).items():
    default = get(config, name, schema)
    set_field(config, name, _parse(name, text, default))
  return validate(config, schema)


def _read_preset(preset: str) -> ml_collections.ConfigDict:
  file, _, argument = preset.partition(':')
  if not pathlib.Path(file).is_file():
    raise UserError(f'--config: no file {file!r}; give a preset such as configs/quickstart.py')
  spec = importlib.util.spec_from_file_location('molt_jax_preset', file)
  if spec is None:
    raise UserError(
      f'--config: {file!r} is no Python file; give a preset such as configs/quickstart.py'
    )
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
  except UserError:
    raise
  # A preset is the user's own program: whatever it raises is theirs to repair.
  except (Exception, SystemExit) as error:
    raise UserError(
      f'--config: {file} cannot be read: {type(error).__name__}: {_one_line(error)}'
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'--config: get_config() of {file!r} returns {article(type(config).__name__)}; return what '
      'default_config() of molt_jax.config makes, changed'
    )
  return config


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


def get(config: Mapping[str, Any], name: str, schema: Mapping[str, Any] = SCHEMA) -> Any:
  """Returns the value of the dotted field `name`; an unknown one is a `UserError` that suggests its
  neighbours.
  """
  known = dict(fields(schema))
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [
      k for k in known if k.split('.')[-1] == name.split('.')[-1]
    ]
    hint = (
      f'did you mean {" or ".join(near)}?'
      if near
      else 'see molt_jax/config/schema.py for the fields'
    )
    raise UserError(f'config.{name}: no such field; {hint}')
  for part in name.split('.'):
    config = config[part]
  return config


def set_field(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
  """Sets the dotted field `name` of a locked config."""
  *parents, leaf = name.split('.')
  for part in parents:
    config = config[part]
  config[leaf] = value


def _parse(name: str, text: str, default: Any) -> Any:
  if isinstance(default, str):
    return text
  words = {'true': True, 'false': False}
  try:
    value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):  # The last two: nested too deeply.
    value = text
  return _typed(name, value, default)


def _typed(name: str, value: Any, default: Any) -> Any:
  """Returns `value` in the type of `default`; an int may stand for a float and nothing else changes
  type.
  """
  if isinstance(default, float) and type(value) is int:
    return float(value) if abs(value) < 2**1023 else math.inf  # Which no field allows.
  if type(value) is not type(default):
    raise UserError(
      f'config.{name}: {value!r} is of type {type(value).__name__}; give '
      f'{article(type(default).__name__)} such as {default!r}'
    )
  return value


def article(noun: str) -> str:
  return f'an {noun}' if noun[0] in 'aeiou' else f'a {noun}'


def validate(
  config: ml_collections.ConfigDict, schema: Mapping[str, Any] = SCHEMA
) -> ml_collections.ConfigDict:
  """Checks every field, alone and together; returns the config.

  Raises:
    UserError: names the field, its value, the legal values.
  """
  for name, field in fields(schema):
    value = _typed(name, get(config, name, schema), field.default)
    if (isinstance(value, float) and not math.isfinite(value)) or not field.rule.holds(value):
      raise UserError(
        f'config.{name}: {value!r} is not legal; give {field.rule.text} ({field.meaning})'
      )
    if isinstance(value, str):
      _check_text(name, value)
  for wrong, message in (_pretrain_rules if schema is PRETRAIN_SCHEMA else _joint_rules)(config):
    if wrong:
      raise UserError(message)
  return config


def _check_text(name: str, value: str) -> None:
  """Refuses what no path can be, so that no field needs to be asked whether it is one."""
  if '\0' in value:
    raise UserError(f'config.{name}: {value!r} has a NUL character; leave it out')
  if value.startswith('~'):
    try:
      pathlib.Path(value).expanduser()
    except RuntimeError as error:
      raise UserError(
        f'config.{name}: {value!r} begins with a home folder that is not known; set HOME, or '
        'give the whole path'
      ) from error


def _joint_rules(c: ml_collections.ConfigDict) -> tuple[tuple[bool, str], ...]:
  return (
    (
      c.molt.width % c.molt.num_heads != 0,
      (
        f'config.molt.num_heads: {c.molt.num_heads} does not divide config.molt.width = '
        f'{c.molt.width}; give a divisor'
      ),
    ),
    (
      c.train.batch_size % c.train.accumulate != 0,
      (
        f'config.train.accumulate: {c.train.accumulate} does not divide config.train.batch_size = '
        f'{c.train.batch_size}; give a divisor'
      ),
    ),
    _has_a_folder(c),
    *(
      (not c.backbones[m].path, f'config.backbones.{m}.path: empty; give the {m} tower')
      for m in modalities(c)
    ),
    (
      c.missing.strategy == 'translate' and c.method != 'molt',
      (
        f"config.missing.strategy: 'translate' needs config.method='molt', not {c.method!r}: there "
        'is no common space; give robust, null or zero'
      ),
    ),
    (
      c.cca.estimator != 'batch' and c.cca.num_directions > c.molt.width,
      (
        f'config.cca.num_directions: {c.cca.num_directions} is more than config.molt.width = '
        f'{c.molt.width}; give at most that'
      ),
    ),
    (
      c.missing.views and c.missing.train_dropout > 0,
      (
        f'config.missing.train_dropout: {c.missing.train_dropout} beside '
        'config.missing.views=True, '
        'which trains every absence; give one of them'
      ),
    ),
  )


def _has_a_folder(c: ml_collections.ConfigDict) -> tuple[bool, str]:
  held = (
    'train.csv and test.csv' if c.dataset.name == 'table' else f'{c.dataset.name} as it is unpacked'
  )
  return (
    c.dataset.name != 'openmoji' and not c.dataset.path,
    f'config.dataset.path: empty; give the folder that holds {held}',
  )


def _pretrain_rules(c: ml_collections.ConfigDict) -> tuple[tuple[bool, str], ...]:
  image, text = c.backbones.image, c.backbones.text
  rewrites = c.augment.text.delete > 0 or c.augment.text.swap > 0
  return (
    _has_a_folder(c),
    (
      c.dataset.modalities != 'image,text',
      (
        f'config.dataset.modalities: {c.dataset.modalities!r}, but pretraining pairs images with '
        "texts; give 'image,text'"
      ),
    ),
    (
      c.train.batch_size < 2,
      (
        f'config.train.batch_size: {c.train.batch_size} leaves nothing to contrast a pair with; '
        'give '
        'at least 2, better hundreds'
      ),
    ),
    (
      image.freeze and text.freeze,
      (
        'config.backbones.image.freeze: True beside config.backbones.text.freeze=True leaves no '
        'tower to train; set one of them False'
      ),
    ),
    *(
      (
        c.backbones[m].freeze and not c.backbones[m].pretrained,
        (
          f'config.backbones.{m}.freeze: True beside config.backbones.{m}.pretrained=False keeps '
          'random weights; set pretrained True, or freeze False'
        ),
      )
      for m in ('image', 'text')
    ),
    (
      image.pretrained and not image.path,
      (
        'config.backbones.image.pretrained: True without config.backbones.image.path; give the '
        'tower '
        'whose weights to start from'
      ),
    ),
    (
      not image.path and image.width % image.heads != 0,
      (
        f'config.backbones.image.heads: {image.heads} does not divide config.backbones.image.width '
        '= '
        f'{image.width}; give a divisor'
      ),
    ),
    (
      not image.path and image.patch > image.size,
      (
        f'config.backbones.image.patch: {image.patch} is more than config.backbones.image.size = '
        f'{image.size}; give at most that'
      ),
    ),
    (
      text.freeze and rewrites,
      'config.augment.text: delete or swap is not 0 beside config.backbones.text.freeze=True, '
      'whose texts go through the tower once, unchanged; '
      'set both to 0, or freeze to False',
    ),
    (
      c.objective.t2t > 0 and not rewrites,
      f'config.objective.t2t: {c.objective.t2t} compares two views of a text, but texts are not '
      'varied; set config.augment.text.delete or swap, '
      'or give 0',
    ),
    (
      c.objective.reconstruction > 0 and image.freeze,
      f'config.objective.reconstruction: {c.objective.reconstruction} is for an image tower that '
      'learns, which '
      'config.backbones.image.freeze=True prevents; give 0, or set freeze False',
    ),
    (
      not any(c.objective.values()),
      'config.objective: every weight is 0; give at least one a weight, e.g. v2t=0.5 and t2v=0.5',
    ),
  )


def modalities(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the modalities that are used at all, in the order of the columns of `present`."""
  return tuple(config.dataset.modalities.split(','))


def data_choices(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the choices of a published data set that change scores, by name; {} where it has
  none.
  """
  return (
    config.dataset[config.dataset.name].to_dict() if config.dataset.name in config.dataset else {}
  )


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the resolved config as indented JSON, fields in schema order."""
  return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, schema: Mapping[str, Any] = SCHEMA) -> ml_collections.ConfigDict:
  """Reads what `to_json` wrote; fields unknown to this version are an error."""
  return from_dict(json.loads(text), schema)


def read_json(path: pathlib.Path, remedy: str) -> Any:
  """Reads a JSON file that a command wrote; `remedy` ends the error's sentence.

  Raises:
    UserError: it cannot be read, or is no JSON: cut or damaged.
  """
  try:
    return json.loads(path.read_bytes().decode('utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, RecursionError) as error:  # What is nested too deep is not ours either.
    raise UserError(f'{path} is damaged (not JSON in UTF-8); {remedy}') from error


def read_run(
  workdir: pathlib.Path, schema: Mapping[str, Any] = SCHEMA
) -> ml_collections.ConfigDict:
  """Reads config.json of a run's folder; `schema` is that of the command that trained it.

  Raises:
    UserError: there is no run of that command, or the file is damaged.
  """
  command = 'molt_jax.pretrain' if schema is PRETRAIN_SCHEMA else 'molt_jax.train'
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(
      f'--workdir: no run in {str(workdir)!r} (config.json is not there); give the --workdir of '
      f'a run of python -m {command}'
    )
  saved = read_json(path, 'delete it and give the train command again, which writes it anew')
  try:
    return from_dict(saved, schema)
  except UserError as error:
    raise UserError(
      f'--workdir: {str(workdir)!r} holds no run of python -m {command} ({error})'
    ) from error


def from_dict(saved: Any, schema: Mapping[str, Any] = SCHEMA) -> ml_collections.ConfigDict:
  """Makes a config of nested dicts, as `to_json` writes them; unknown fields are an error."""
  if not isinstance(saved, Mapping):
    raise UserError(f'config: {type(saved).__name__}, not an object of fields')
  config = default_config(schema)
  for name, value in _flatten(saved):
    set_field(config, name, _typed(name, value, get(config, name, schema)))
  return validate(config, schema)


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, prefix + key + '.')
    else:
      yield prefix + key, value


def config_hash(config: ml_collections.ConfigDict) -> str:
  """Returns 16 hexadecimal digits that identify the resolved config."""
  return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
  """Returns `name: old -> new` for every field that differs, of two configs of one schema."""
  before, after = dict(_flatten(old.to_dict())), dict(_flatten(new.to_dict()))
  return [
    f'{name}: {before[name]!r} -> {after[name]!r}' for name in before if before[name] != after[name]
  ]
