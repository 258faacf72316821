"""Tiny random models in Hugging Face's layout, written with NumPy alone.

Tests that need a model's files thus run without PyTorch. Where PyTorch is installed, transformers
reads the same files, and refuses them if a name or a shape were not its own.
"""

import json
import pathlib
import re
import tempfile

import numpy as np
import safetensors.numpy
import transformers
from optional_torch import Absent, torch


class Files(Absent):
  """A model without PyTorch: its configuration and tensors; any other use skips the test."""

  def __init__(self, config, tensors):
    self.config, self.tensors = config, tensors

  def save_pretrained(self, folder):
    write(self.config, self.tensors, pathlib.Path(folder))


def _linear(name, shape_oi, *, bias):
  yield f'{name}.weight', shape_oi
  if bias:
    yield f'{name}.bias', shape_oi[:1]


def _norm(name, width):
  return _linear(name, (width,), bias=True)


def _llama(c):
  d, hidden = c.hidden_size, c.intermediate_size
  heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
  attention = {'q': (heads, d), 'k': (kv_heads, d), 'v': (kv_heads, d), 'o': (d, heads)}
  mlp = {'gate': (hidden, d), 'up': (hidden, d), 'down': (d, hidden)}
  yield 'embed_tokens.weight', (c.vocab_size, d)
  for i in range(c.num_hidden_layers):
    yield f'layers.{i}.input_layernorm.weight', (d,)
    yield f'layers.{i}.post_attention_layernorm.weight', (d,)
    for name, shape in attention.items():
      yield from _linear(f'layers.{i}.self_attn.{name}_proj', shape, bias=c.attention_bias)
    for name, shape in mlp.items():
      yield from _linear(f'layers.{i}.mlp.{name}_proj', shape, bias=c.mlp_bias)
  yield 'norm.weight', (d,)


def _causal_lm(c):
  for name, shape in _llama(c):
    yield f'model.{name}', shape
  if not c.tie_word_embeddings:
    yield 'lm_head.weight', (c.vocab_size, c.hidden_size)


def _clip_layers(c):
  d = c.hidden_size
  for i in range(c.num_hidden_layers):
    layer = f'encoder.layers.{i}'
    yield from _norm(f'{layer}.layer_norm1', d)
    yield from _norm(f'{layer}.layer_norm2', d)
    for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
      yield from _linear(f'{layer}.self_attn.{name}', (d, d), bias=True)
    yield from _linear(f'{layer}.mlp.fc1', (c.intermediate_size, d), bias=True)
    yield from _linear(f'{layer}.mlp.fc2', (d, c.intermediate_size), bias=True)


def _clip_vision(c):
  d, patch = c.hidden_size, c.patch_size
  yield 'embeddings.class_embedding', (d,)
  yield 'embeddings.patch_embedding.weight', (d, 3, patch, patch)
  yield 'embeddings.position_embedding.weight', ((c.image_size // patch) ** 2 + 1, d)
  yield from _norm('pre_layrnorm', d)  # Spelt so in the published files.
  yield from _clip_layers(c)
  yield from _norm('post_layernorm', d)


def _clip_text(c):
  d = c.hidden_size
  yield 'text_model.embeddings.token_embedding.weight', (c.vocab_size, d)
  yield 'text_model.embeddings.position_embedding.weight', (c.max_position_embeddings, d)
  for name, shape in _clip_layers(c):
    yield f'text_model.{name}', shape
  yield from _norm('text_model.final_layer_norm', d)
  yield 'text_projection.weight', (c.projection_dim, d)


def _bert(c):
  d, wide = c.hidden_size, c.intermediate_size
  tables = {'word': c.vocab_size, 'position': c.max_position_embeddings}
  for name, rows in {**tables, 'token_type': c.type_vocab_size}.items():
    yield f'embeddings.{name}_embeddings.weight', (rows, d)
  yield from _norm('embeddings.LayerNorm', d)
  for i in range(c.num_hidden_layers):
    layer = f'encoder.layer.{i}'
    for name in ('self.query', 'self.key', 'self.value', 'output.dense'):
      yield from _linear(f'{layer}.attention.{name}', (d, d), bias=True)
    yield from _linear(f'{layer}.intermediate.dense', (wide, d), bias=True)
    yield from _linear(f'{layer}.output.dense', (d, wide), bias=True)
    for part in ('attention.output', 'output'):
      yield from _norm(f'{layer}.{part}.LayerNorm', d)
  yield from _linear('pooler.dense', (d, d), bias=True)


def _dinov2(c):
  """By the names of the published files."""
  d, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
  yield 'embeddings.cls_token', (1, 1, d)
  yield 'embeddings.mask_token', (1, d)
  if hasattr(c, 'num_register_tokens'):
    yield 'embeddings.register_tokens', (1, c.num_register_tokens, d)
  yield 'embeddings.position_embeddings', (1, (c.image_size // c.patch_size) ** 2 + 1, d)
  patch = (d, 3, c.patch_size, c.patch_size)
  yield from _linear('embeddings.patch_embeddings.projection', patch, bias=True)
  for i in range(c.num_hidden_layers):
    layer = f'encoder.layer.{i}'
    yield from _norm(f'{layer}.norm1', d)
    yield from _norm(f'{layer}.norm2', d)
    for name in ('query', 'key', 'value'):
      yield from _linear(f'{layer}.attention.attention.{name}', (d, d), bias=c.qkv_bias)
    yield from _linear(f'{layer}.attention.output.dense', (d, d), bias=True)
    for k in (1, 2):
      yield f'{layer}.layer_scale{k}.lambda1', (d,)
    if c.use_swiglu_ffn:
      half = (int(hidden * 2 / 3) + 7) // 8 * 8
      yield from _linear(f'{layer}.mlp.weights_in', (2 * half, d), bias=True)
      yield from _linear(f'{layer}.mlp.weights_out', (d, half), bias=True)
    else:
      yield from _linear(f'{layer}.mlp.fc1', (hidden, d), bias=True)
      yield from _linear(f'{layer}.mlp.fc2', (d, hidden), bias=True)
  yield from _norm('layernorm', d)


def _siglip_text(c):
  d = c.hidden_size
  yield 'embeddings.token_embedding.weight', (c.vocab_size, d)
  yield 'embeddings.position_embedding.weight', (c.max_position_embeddings, d)
  yield from _clip_layers(c)
  yield from _norm('final_layer_norm', d)
  yield from _linear('head', (c.projection_size, d), bias=True)


def _siglip_vision(c):
  d, patch = c.hidden_size, c.patch_size
  yield from _linear('embeddings.patch_embedding', (d, 3, patch, patch), bias=True)
  yield 'embeddings.position_embedding.weight', ((c.image_size // patch) ** 2, d)
  yield from _clip_layers(c)
  yield from _norm('post_layernorm', d)
  if c.vision_use_head:
    yield 'head.probe', (1, 1, d)
    yield 'head.attention.in_proj_weight', (3 * d, d)
    yield 'head.attention.in_proj_bias', (3 * d,)
    yield from _linear('head.attention.out_proj', (d, d), bias=True)
    yield from _norm('head.layernorm', d)
    yield from _linear('head.mlp.fc1', (c.intermediate_size, d), bias=True)
    yield from _linear('head.mlp.fc2', (d, c.intermediate_size), bias=True)


def _vit(c):
  """By the names of the published files."""
  d, patch, wide = c.hidden_size, c.patch_size, c.intermediate_size
  yield 'embeddings.cls_token', (1, 1, d)
  yield 'embeddings.position_embeddings', (1, (c.image_size // patch) ** 2 + 1, d)
  yield from _linear('embeddings.patch_embeddings.projection', (d, 3, patch, patch), bias=True)
  for i in range(c.num_hidden_layers):
    layer = f'encoder.layer.{i}'
    yield from _norm(f'{layer}.layernorm_before', d)
    yield from _norm(f'{layer}.layernorm_after', d)
    for name in ('query', 'key', 'value'):
      yield from _linear(f'{layer}.attention.attention.{name}', (d, d), bias=c.qkv_bias)
    yield from _linear(f'{layer}.attention.output.dense', (d, d), bias=True)
    yield from _linear(f'{layer}.intermediate.dense', (wide, d), bias=True)
    yield from _linear(f'{layer}.output.dense', (d, wide), bias=True)
  yield from _norm('layernorm', d)
  yield from _linear('pooler.dense', (d, d), bias=True)


def _dinov3(c):
  """By the names of the published files."""
  d, patch, wide = c.hidden_size, c.patch_size, c.intermediate_size
  for name, shape in {'cls_token': (1, 1, d), 'mask_token': (1, 1, d)}.items():
    yield f'embeddings.{name}', shape
  yield 'embeddings.register_tokens', (1, c.num_register_tokens, d)
  yield from _linear('embeddings.patch_embeddings', (d, 3, patch, patch), bias=True)
  biases = {'q': c.query_bias, 'k': c.key_bias, 'v': c.value_bias, 'o': c.proj_bias}
  for i in range(c.num_hidden_layers):
    layer = f'layer.{i}'
    for k in (1, 2):
      yield from _norm(f'{layer}.norm{k}', d)
      yield f'{layer}.layer_scale{k}.lambda1', (d,)
    for name, bias in biases.items():
      yield from _linear(f'{layer}.attention.{name}_proj', (d, d), bias=bias)
    for name in ('up', 'gate')[: 1 + c.use_gated_mlp]:
      yield from _linear(f'{layer}.mlp.{name}_proj', (wide, d), bias=c.mlp_bias)
    yield from _linear(f'{layer}.mlp.down_proj', (d, wide), bias=c.mlp_bias)
  yield from _norm('norm', d)


ARCHITECTURES = {
  **dict.fromkeys(('BertModel', 'RobertaModel', 'XLMRobertaModel'), _bert),
  'LlamaModel': _llama,
  'LlamaForCausalLM': _causal_lm,
  'CLIPVisionModel': _clip_vision,
  'CLIPTextModelWithProjection': _clip_text,
  'Dinov2Model': _dinov2,
  'Dinov2WithRegistersModel': _dinov2,
  'SiglipTextModel': _siglip_text,
  'SiglipVisionModel': _siglip_vision,
  'ViTModel': _vit,
  'DINOv3ViTModel': _dinov3,
}


def _value(rng, config, name, shape, vector_noise):
  """Embeddings and LLaMA's matrices as wide as the configuration says, others by their inputs."""
  noise = rng.standard_normal(shape)
  if len(shape) == 1 and name != 'embeddings.class_embedding':
    start = 0.0 if name.endswith('bias') else 1.0
    return start + vector_noise * noise
  if re.search(r'encoder\.layer|^layer\.|^head\.', name) and len(shape) == 2:
    return noise * (2 * shape[1]) ** -0.5
  return noise * getattr(config, 'initializer_range', 0.3)  # SigLIP's has none.


def write(config, tensors, folder):
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps({**config.to_dict(), 'dtype': 'float32'}, indent=2)
  (folder / 'config.json').write_text(text)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


def make(architecture, config, *, vector_noise=0.0):
  """A transformers model of random float32 weights, or `Files` of the same where PyTorch is not.

  Args:
    architecture: a name in `ARCHITECTURES`.
    config: a transformers configuration.
    vector_noise: standard deviation that is added to norms and biases, which otherwise are ones
      and zeros and would hide a wrong mapping.
  """
  rng = np.random.default_rng(1)
  config.architectures = [architecture]
  tensors = {}
  for name, shape in ARCHITECTURES[architecture](config):
    value = _value(rng, config, name, shape, vector_noise)
    tensors[name] = np.asarray(value, np.float32)
  if isinstance(torch, Absent):
    return Files(config, tensors)
  with tempfile.TemporaryDirectory() as folder:
    write(config, tensors, pathlib.Path(folder))
    kind = getattr(transformers, architecture)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()
