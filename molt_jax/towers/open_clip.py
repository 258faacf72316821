"""A directory of OpenCLIP (Ilharco et al. 2021): open_clip_config.json and safetensors by names of
its own. It is read as the CLIPModel that it is; what that cannot express is refused by name.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from molt_jax.errors import UserError
from molt_jax.runtime import files
from molt_jax.runtime.zipped import Place
from molt_jax.towers import keys, open_clip_keys, shards
from molt_jax.towers.clip.config import OLD_EOS_ID

CONFIG = 'open_clip_config.json'
WEIGHTS = ('open_clip_model.safetensors', 'open_clip_pytorch_model.safetensors')
# Names of OpenCLIP -> those of a CLIPModel, one after the other.
RENAMED = {
  r'^visual\.proj$': 'visual_projection.weight',
  r'^(text\.)?text_projection$': 'text_projection.weight',
  r'^visual\.': 'vision_model.',
  r'^(text\.)?(positional_embedding|token_embedding|transformer|ln_final)': r'text_model.\2',
  r'\.class_embedding$': '.embeddings.class_embedding',
  r'\.positional_embedding$': '.embeddings.position_embedding.weight',
  r'\.token_embedding\.': '.embeddings.token_embedding.',
  r'\.conv1\.': '.embeddings.patch_embedding.',
  r'\.ln_pre\.': '.pre_layrnorm.',
  r'\.ln_post\.': '.post_layernorm.',
  r'\.ln_final\.': '.final_layer_norm.',
  r'\.transformer\.resblocks\.': '.encoder.layers.',
  r'\.ln_([12])\.': r'.layer_norm\1.',
  r'\.attn\.': '.self_attn.',
  r'\.mlp\.c_fc\.': '.mlp.fc1.',
  r'\.mlp\.c_proj\.': '.mlp.fc2.',
}
_QKV = re.compile(r'(.*\.self_attn)\.in_proj_(weight|bias)')
RESAMPLING = {'bilinear': 2, 'bicubic': 3}


@dataclasses.dataclass(frozen=True)
class Turned:
  """A matrix that is stored transposed."""

  tensor: shards.AnyTensor

  @property
  def file(self) -> Place:
    return self.tensor.file

  @property
  def name(self) -> str:
    return self.tensor.name

  @property
  def dtype(self) -> str:
    return self.tensor.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape[::-1]

  def read(self) -> np.ndarray:
    return np.ascontiguousarray(self.tensor.read().T)


def is_one(directory: Place) -> bool:
  """Whether a directory is OpenCLIP's: it has its configuration, and none of transformers (timm's
  has another kind).
  """
  if not (directory / CONFIG).exists():
    return False
  other = directory / 'config.json'
  if not other.exists():
    return True
  content = files.read_json(other)
  return isinstance(content, Mapping) and 'model_type' not in content and 'architecture' in content


def tensors(directory: Place) -> tuple[Place, dict[str, Any]]:
  """Returns the file of the weights, and its tensors by the names of a CLIPModel.

  Raises:
    UserError: there are no safetensors, or they are damaged.
  """
  there = [directory / name for name in WEIGHTS if (directory / name).exists()]
  if not there:
    raise UserError(
      f'{directory} holds no {" and no ".join(WEIGHTS)}; pickled weights can run code when they '
      'are read: save them with open_clip, save_for_hf(..., safe_serialization=True)'
    )
  found = {}
  for theirs, tensor in shards.headers(there[:1]).items():
    name = theirs
    for pattern, replacement in RENAMED.items():
      name = re.sub(pattern, replacement, name)
    match = _QKV.fullmatch(name)
    if match and tensor.shape and tensor.shape[0] % 3 == 0:
      for k, kind in enumerate('qkv'):
        found[f'{match[1]}.{kind}_proj.{match[2]}'] = tensor.block(k, 3)
    elif name in ('visual_projection.weight', 'text_projection.weight'):
      found[name] = Turned(tensor)
    else:
      found[name] = tensor
  return there[0], found


def read_config(directory: Place, modality: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (config.json of a CLIPModel, what preprocessor_config.json would say).

  Args:
    directory: has open_clip_config.json.
    modality: 'image' or 'text', the tower that is read; only its part is checked.

  Raises:
    UserError: a key is unknown, or a value is not what a CLIPModel can be.
  """
  where = str(directory / CONFIG)
  whole = files.read_json(directory / CONFIG)
  keys.check(whole, open_clip_keys.OPEN_CLIP, where)
  model = whole['model_cfg'] if isinstance(whole.get('model_cfg'), Mapping) else {}
  keys.check(model, open_clip_keys.OPEN_CLIP_MODEL, f'{where}: model_cfg')
  for name in ('embed_dim', 'vision_cfg', 'text_cfg'):
    if name not in model:
      raise UserError(f'{where} has no model_cfg.{name}: it is no configuration of OpenCLIP')
  common = {'hidden_act': 'quick_gelu' if model.get('quick_gelu') else 'gelu'}
  common['projection_dim'] = model['embed_dim']
  config: dict[str, Any] = {'model_type': 'clip', 'projection_dim': model['embed_dim']}
  if modality == 'image':
    keys.check(model['vision_cfg'], open_clip_keys.OPEN_CLIP_VISION, f'{where}: vision_cfg')
    config['vision_config'] = common | _vision(model['vision_cfg'])
  else:
    keys.check(model['text_cfg'], open_clip_keys.OPEN_CLIP_TEXT, f'{where}: text_cfg')
    config['text_config'] = common | _text(model['text_cfg'])
  part = f'{where}: preprocess_cfg'
  size = model['vision_cfg'].get('image_size', _DEFAULTS['image_size'])
  return config, _preprocessor(whole.get('preprocess_cfg') or {}, size, part)


# What OpenCLIP reads where a part is silent.
_DEFAULTS = {
  'layers': 12,
  'mlp_ratio': 4.0,
  'head_width': 64,
  'patch_size': 16,
  'image_size': 224,
  'context_length': 77,
  'vocab_size': 49408,
  'heads': 8,
}


def _vision(part: Mapping[str, Any]) -> dict[str, Any]:
  c = {**_DEFAULTS, 'width': 768, **part}
  return {
    **_layers(c),
    'num_attention_heads': c['width'] // c['head_width'],
    'image_size': c['image_size'],
    'patch_size': c['patch_size'],
  }


def _text(part: Mapping[str, Any]) -> dict[str, Any]:
  c = {**_DEFAULTS, 'width': 512, **part}
  return {
    **_layers(c),
    'num_attention_heads': c['heads'],
    'vocab_size': c['vocab_size'],
    'max_position_embeddings': c['context_length'],
    'eos_token_id': OLD_EOS_ID,  # The end of a text is its largest id.
  }


def _layers(c: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'hidden_size': c['width'],
    'intermediate_size': int(c['width'] * c['mlp_ratio']),
    'num_hidden_layers': c['layers'],
    'layer_norm_eps': (c.get('norm_kwargs') or {}).get('eps', 1e-5),
  }


def _preprocessor(part: Mapping[str, Any], image_size: int, where: str) -> dict[str, Any]:
  keys.check(part, open_clip_keys.OPEN_CLIP_PREPROCESS, where)
  found: dict[str, Any] = {'image_processor_type': 'CLIPImageProcessor'}
  for ours, theirs in {'image_mean': 'mean', 'image_std': 'std'}.items():
    if part.get(theirs) is not None:
      found[ours] = list(part[theirs])
  found['resample'] = RESAMPLING[part.get('interpolation') or 'bicubic']
  size = part.get('size') or image_size
  size = size[0] if isinstance(size, list) else size
  if part.get('resize_mode') == 'squash':
    found |= {'do_center_crop': False, 'default_to_square': True}
  return {**found, 'size': size, 'crop_size': size}
