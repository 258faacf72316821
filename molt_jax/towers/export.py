"""A trained image tower as a Hugging Face directory, for `transformers.CLIPVisionModel` and for
`backbones.image.path`.
"""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from molt_jax.runtime import atomic
from molt_jax.towers import base, tensor_plan
from molt_jax.towers.clip.config import ClipVisionConfig
from molt_jax.towers.preprocessing import ImageSpec


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
    params: of its `VisionTransformer` with the head 'pool'.
    config: its architecture.
    preprocess: what it wants to see.
    dtype: 'float16' or 'float32', of the weights on disk; config.json asks for float32 in memory
      either way.

  Returns:
    `directory`.
  """
  named = tensor_plan.hugging_face_tensors(params, base.family_of({}, 'image', ''))
  tensors = {f'vision_model.{name}': w.astype(np.dtype(dtype)) for name, w in named.items()}
  contents = {'config.json': _config(config), 'preprocessor_config.json': _preprocessor(preprocess)}
  with atomic.folder(directory) as folder:
    content = safetensors.numpy.save(tensors, metadata={'format': 'pt'})
    (folder / 'model.safetensors').write_bytes(content)
    for name, content in contents.items():
      (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  return directory


def _config(config: ClipVisionConfig) -> dict[str, Any]:
  return {
    'architectures': ['CLIPVisionModel'],
    'model_type': 'clip_vision_model',
    'dtype': 'float32',
    'num_channels': 3,
    'attention_dropout': 0.0,
    'projection_dim': config.hidden_size,  # Only states are written: there is no projection.
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'hidden_size': config.hidden_size,
    'intermediate_size': config.intermediate_size,
    'image_size': config.image_size,
    'patch_size': config.patch_size,
    'hidden_act': config.hidden_act,
    'layer_norm_eps': config.layer_norm_eps,
  }


def _preprocessor(spec: ImageSpec) -> dict[str, Any]:
  square = {'height': spec.size, 'width': spec.size}
  crop = spec.resize == 'crop'
  return {
    'image_processor_type': 'CLIPImageProcessor',
    'do_convert_rgb': True,
    'do_resize': True,
    'size': {'shortest_edge': spec.size} if crop else square,
    'resample': spec.resample,
    'do_center_crop': crop,
    'crop_size': square,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(spec.mean),
    'image_std': list(spec.std),
  }
