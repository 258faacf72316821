"""The configuration schema: every field with its default, its meaning and its legal values.

A preset (a file in `configs/`) starts from `default_config()` and overrides visible lines. `load_config` reads a preset and the command
line's overrides, `validate` checks every value. A mistake is a `UserError` of one line: what, which value, what is legal, what to do.
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


class UserError(ValueError):
  """A mistake that the user can repair; command lines print it as one line and exit with 2."""


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


def below(low: float, high: float) -> Rule:
  return Rule(f'a number >= {low} and < {high}', lambda v: low <= v < high)


NON_EMPTY = Rule('a non-empty string', bool)
ANY_STRING = Rule('a string', lambda v: True)
FLAG = Rule('True or False', lambda v: True)
AXIS = Rule('a positive number of devices, or -1 for all that remain', lambda v: v == -1 or v > 0)

SCHEMA: dict[str, Any] = {
    'seed': Field(0, at_least(0), 'Root of every random stream: parameters, data order, dropout, missing-modality draws.'),
    'platform': Field('auto', one_of('auto', 'cpu', 'gpu', 'tpu'), 'Where to compute; auto takes the best that JAX finds.'),
    'mesh': {
        'data': Field(-1, AXIS, 'Devices along the data axis (the batch is split over them).'),
        'model': Field(1, AXIS, 'Devices along the model axis (weights are split over them).'),
    },
    'dataset': {
        'name': Field('table', one_of('table', 'openmoji'), 'table is your own folder of CSV or JSONL files and images.'),
        'path': Field('', ANY_STRING, 'table: the folder that holds train.csv (or .jsonl) and test.csv.'),
        'data_dir': Field('~/.cache/molt_jax/datasets', NON_EMPTY, 'Where prepared data sets are kept.'),
        'multi_label': Field(False, FLAG, 'Whether an example can have several labels (joined by | in a table).'),
        'validation_fraction': Field(0.1, Rule('a number > 0 and < 1', lambda v: 0 < v < 1), 'Share of train set aside when there is no validation file.'),
    },
    'image': {
        'resize': Field('crop', one_of('crop', 'letterbox'), 'crop: shortest side to size, centre crop (CLIP); letterbox: longest side to size, padded.'),
    },
    'text': {
        'max_tokens': Field(64, at_least(1), 'Tokens kept of each text.'),
    },
    'input': {
        'num_threads': Field(2, at_least(1), 'Threads that decode images and tokenise.'),
        'prefetch': Field(4, at_least(1), 'Batches prepared ahead of the training step.'),
    },
    'backbones': {
        'dtype': Field('bfloat16', one_of('float32', 'bfloat16'), 'Type of frozen weights and of computation in the towers.'),
        'attention': Field('xla', one_of('xla', 'cudnn'), 'Implementation of jax.nn.dot_product_attention in the towers.'),
        'text': {
            'path': Field('', NON_EMPTY, 'LLaMA-family tower: Hugging Face directory or hub id, .gguf file, pkg://package/file, or random:NAME.'),
        },
        'image': {
            'path': Field('', NON_EMPTY, 'CLIP vision tower: Hugging Face directory or hub id, pkg://package/folder, or random:NAME.'),
        },
    },
    'method': Field('molt', one_of('molt', 'late_fusion'), 'late_fusion: pooled E_i and E_t, concatenated, MLP (the baseline without MoLT).'),
    'compute_dtype': Field('bfloat16', one_of('float32', 'bfloat16'), 'Type of computation in the head; parameters, norms, softmax and losses are float32.'),
    'molt': {
        'num_layers': Field(4, at_least(1), 'L_s: last layers of each tower that are tapped.'),
        'width': Field(1024, at_least(1), 'd_c: width of the common space.'),
        'num_heads': Field(1, at_least(1), 'Attention heads in the common space; must divide molt.width.'),
        'input_norm': Field('standardize', one_of('none', 'rms', 'standardize'), 'Parameter-free normalisation of the taps; standardize uses per-channel training statistics.'),
        'cross_attention': Field(True, FLAG, 'Eq. 2; off: H is zero (first ablation of Table 2).'),
        'layer_weights': Field(True, FLAG, 'Learn M of eq. 5; off: the plain mean over layers.'),
    },
    'fusion': {
        'attention': Field(True, FLAG, 'Eq. 6; off: the classifier reads H_r alone.'),
        'residual': Field(True, FLAG, 'The classifier reads the fused vector + H_r.'),
    },
    'classifier': {
        'kind': Field('mlp', one_of('linear', 'mlp'), 'mlp: LayerNorm, one hidden layer with GELU, dropout.'),
        'hidden': Field(512, at_least(1), 'Width of the hidden layer.'),
        'dropout': Field(0.3, below(0, 1), 'Dropout rate before the last layer.'),
    },
    'missing': {
        'strategy': Field('robust', one_of('robust', 'null', 'zero'), 'What stands in for an absent modality.'),
        'train_dropout': Field(0.3, below(0, 1), 'Share of complete training pairs that lose one modality at random in a step, never both.'),
        'train_rate': Field(0.0, between(0, 1), 'Share of the training rows that lack a modality for good (protocol).'),
        'train_type': Field('both', one_of('text', 'image', 'both'), 'What those rows lack; both: half of them text, half image.'),
        'eval_rate': Field(0.0, between(0, 1), 'Share of validation rows that lack a modality for good.'),
        'eval_type': Field('both', one_of('text', 'image', 'both'), 'What those rows lack.'),
    },
    'cca': {
        'weight': Field(0.1, at_least(0), 'alpha of eq. 8; 0 leaves L_CCA out (second ablation of Table 2).'),
        'ridge': Field(1e-3, more_than(0), 'Ridge of each covariance, relative to its mean eigenvalue trace/d.'),
    },
    'loss': {
        'weight': Field(0.9, more_than(0), 'beta of eq. 8.'),
        'class_weights': Field('none', one_of('none', 'balanced'), 'balanced: weights inverse to class frequency in train (positives when multi-label).'),
    },
    'optimizer': {
        'learning_rate': Field(4e-4, more_than(0), 'Peak learning rate of Adam.'),
        'schedule': Field('cosine', one_of('constant', 'cosine'), 'cosine decays to zero at the last step.'),
        'warmup_steps': Field(0, at_least(0), 'Steps of linear warm-up.'),
        'weight_decay': Field(0.0, at_least(0), 'Decoupled weight decay of matrices (biases, norms and M are exempt).'),
        'clip_norm': Field(0.0, at_least(0), 'Clip gradients to this global norm; 0: off.'),
    },
    'train': {
        'batch_size': Field(32, at_least(1), 'Examples a step, over all devices.'),
        'epochs': Field(10, more_than(0), 'Passes over the training split; fractions are allowed.'),
        'log_every': Field(10, at_least(1), 'Steps between lines in metrics.jsonl.'),
        'eval_every': Field(0, at_least(0), 'Steps between validations; 0: once an epoch.'),
        'save_every': Field(0, at_least(0), 'Steps between checkpoints; 0: at each validation.'),
    },
    'eval': {
        'batch_size': Field(64, at_least(1), 'Examples a step in evaluation, over all devices.'),
        'select': Field('best', one_of('best', 'latest'), 'Which checkpoint evaluation and prediction read: best on validation, or the latest.'),
    },
}


def fields(schema: Mapping[str, Any] = SCHEMA, prefix: str = '') -> Iterator[tuple[str, Field]]:
  """Yields (dotted name, Field) over the schema."""
  for key, value in schema.items():
    if isinstance(value, Field):
      yield prefix + key, value
    else:
      yield from fields(value, prefix + key + '.')


def default_config() -> ml_collections.ConfigDict:
  """Returns a fresh, locked config that holds every field's default."""
  def build(schema):
    return {k: v.default if isinstance(v, Field) else build(v) for k, v in schema.items()}
  return ml_collections.ConfigDict(build(SCHEMA)).lock()
