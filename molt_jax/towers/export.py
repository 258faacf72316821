"""Trained CLIP towers as Hugging Face directories: an image tower, for `backbones.image.path` and
`transformers.CLIPVisionModel`, or a pair, for both paths and `transformers.CLIPModel`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers

from molt_jax.runtime import atomic
from molt_jax.towers import base, tensor_plan
from molt_jax.towers.clip.config import OLD_EOS_ID, ClipTextConfig, ClipVisionConfig
from molt_jax.towers.loading import TowerSpec
from molt_jax.towers.preprocessing import ImageSpec
from molt_jax.towers.tokenizer import Tokenizer

PARTS = {'image': 'vision_model.', 'text': 'text_model.'}  # Before the names of their tensors.


def save_image_tower(
  directory: pathlib.Path,
  params: Any,
  config: ClipVisionConfig,
  preprocess: ImageSpec,
  *,
  dtype: str,
) -> pathlib.Path:
  """Writes config.json, model.safetensors and preprocessor_config.json; the directory appears, or
  replaces an older one, when all is written.

  Args:
    directory: where to.
    params: of its `VisionTransformer` with the head 'pool'; of a pair's, its projection is left
      out.
    config: its architecture.
    preprocess: what it wants to see.
    dtype: 'float16' or 'float32', of the weights on disk; config.json asks for float32 in memory
      either way.

  Returns:
    `directory`.
  """
  alone = {name: p for name, p in params.items() if name != 'projection'}
  tensors = _tensors(alone, 'image', dtype)
  # Only states are written: there is no projection.
  content = {**_vision(config), 'projection_dim': config.hidden_size}
  contents = {
    'config.json': {'architectures': ['CLIPVisionModel'], 'dtype': 'float32', **content},
    'preprocessor_config.json': _preprocessor(preprocess),
  }
  return _write(directory, tensors, contents)


def save_pair(
  directory: pathlib.Path,
  params: Mapping[str, Any],
  towers: Mapping[str, TowerSpec],
  preprocess: ImageSpec,
  *,
  dtype: str,
) -> pathlib.Path:
  """Writes both towers of a CLIP with their projections and temperature, as `save_image_tower`
  does, and the tokenizer.

  Args:
    directory: where to.
    params: {'image_tower', 'text_tower', 'log_scale'}, of towers with the head 'projection'.
    towers: what they are.
    preprocess, dtype: as there.

  Returns:
    `directory`.
  """
  image, text = towers['image'], towers['text']
  tensors = {'logit_scale': np.asarray(params['log_scale'], np.float32)}
  for modality in towers:
    tensors |= _tensors(params[f'{modality}_tower'], modality, dtype)
  config = {
    'architectures': ['CLIPModel'],
    'model_type': 'clip',
    'dtype': 'float32',
    'projection_dim': text.config.projection_size,
    'vision_config': _vision(image.config),
    'text_config': _text(text.config, text.tokenizer),
  }
  contents = {
    'config.json': config,
    'preprocessor_config.json': _preprocessor(preprocess),
    **_tokenizer(text.tokenizer, text.config.max_positions),
  }
  return _write(directory, tensors, contents)


def _write(
  directory: pathlib.Path, tensors: Mapping[str, np.ndarray], contents: Mapping[str, Any]
) -> pathlib.Path:
  with atomic.folder(directory) as folder:
    weights = safetensors.numpy.save(dict(tensors), metadata={'format': 'pt'})
    (folder / 'model.safetensors').write_bytes(weights)
    for name, content in contents.items():
      (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  return directory


def _tensors(params: Mapping[str, Any], modality: str, dtype: str) -> dict[str, np.ndarray]:
  """A tower's tensors by the names that they have in a CLIPModel."""
  family = base.family_of({'model_type': 'clip'}, modality, '')
  named = tensor_plan.hugging_face_tensors(params, family)
  found = {}
  for name, w in named.items():
    prefix = '' if name.endswith('_projection.weight') else PARTS[modality]
    found[prefix + name] = w.astype(np.dtype(dtype))
  return found


def _common(config: ClipVisionConfig | ClipTextConfig) -> dict[str, Any]:
  return {
    'attention_dropout': 0.0,
    'projection_dim': config.projection_size,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'hidden_size': config.hidden_size,
    'intermediate_size': config.intermediate_size,
    'hidden_act': config.hidden_act,
    'layer_norm_eps': config.layer_norm_eps,
  }


def _vision(config: ClipVisionConfig) -> dict[str, Any]:
  return {
    'model_type': 'clip_vision_model',
    'num_channels': 3,
    'image_size': config.image_size,
    'patch_size': config.patch_size,
    **_common(config),
  }


def _text(config: ClipTextConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  # With the id of old, the end of a text is its largest id.
  end = OLD_EOS_ID if config.eos_token_id is None else config.eos_token_id
  return {
    'model_type': 'clip_text_model',
    'vocab_size': config.vocab_size,
    'max_position_embeddings': config.max_positions,
    'bos_token_id': (*tokenizer.before, None)[0],
    'eos_token_id': end,
    'pad_token_id': tokenizer.pad_id,
    **_common(config),
  }


def _tokenizer(tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
  """Files of a tokenizer with the special tokens that it puts around every text."""
  backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
  around = {i: backend.id_to_token(i) for i in (*tokenizer.before, *tokenizer.after)}
  backend.add_special_tokens(list(around.values()))
  begin, end = ([around[i] for i in ids] for ids in (tokenizer.before, tokenizer.after))
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=[*begin, '$A', *end], special_tokens=[(token, i) for i, token in around.items()]
  )
  roles = {'bos_token': begin[:1], 'eos_token': end[-1:]}
  config = {role: tokens[0] for role, tokens in roles.items() if tokens}
  return {
    'tokenizer.json': json.loads(backend.to_str()),
    'tokenizer_config.json': {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_max_length': max_positions,
      'pad_token': backend.id_to_token(tokenizer.pad_id),
      **config,
    },
  }


def _preprocessor(spec: ImageSpec) -> dict[str, Any]:
  square = {'height': spec.size, 'width': spec.size}
  side = spec.scaled or spec.size
  shortest = spec.resize == 'crop'
  return {
    'image_processor_type': 'CLIPImageProcessor',
    'do_convert_rgb': True,
    'do_resize': True,
    'size': {'shortest_edge': side} if shortest else {'height': side, 'width': side},
    'resample': spec.resample,
    'do_center_crop': shortest or side > spec.size,
    'crop_size': square,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(spec.mean),
    'image_std': list(spec.std),
  }
