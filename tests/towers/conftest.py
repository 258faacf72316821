"""Tiny random Hugging Face models, made offline, as oracles."""

import jax
import numpy as np
import pytest
import tiny_models
import tokenizers
import transformers
from optional_torch import torch

from molt_jax.towers import loading

TINY_LLAMA = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'initializer_range': 0.3,
  'tie_word_embeddings': False,
}
TINY_CLIP = {
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'image_size': 20,
  'patch_size': 8,
  'initializer_range': 0.3,
}


class HuggingFace:
  """Makes models, reads their hidden states (which needs PyTorch)."""

  def llama(self, head=False, **overrides):
    config = transformers.LlamaConfig(**{**TINY_LLAMA, **overrides})
    architecture = 'LlamaForCausalLM' if head else 'LlamaModel'
    return tiny_models.make(architecture, config, vector_noise=0.3)

  def clip(self, **overrides):
    config = transformers.CLIPVisionConfig(**{**TINY_CLIP, **overrides})
    return tiny_models.make('CLIPVisionModel', config, vector_noise=0.3)

  def vision(self, name, **overrides):
    """A vision transformer, by the name of its transformers model."""
    kind = getattr(transformers, name.removesuffix('Model') + 'Config')
    config = kind(**{k: v for k, v in TINY_CLIP.items() if hasattr(kind(), k)} | overrides)
    return tiny_models.make(name, config, vector_noise=0.3)

  def clip_text(self, **overrides):
    config = transformers.CLIPTextConfig(**overrides)
    return tiny_models.make('CLIPTextModelWithProjection', config, vector_noise=0.3)

  def save(self, model, path, **options):
    """Writes the model as users have it, with a tokenizer of a few words."""
    model.save_pretrained(path, **options)
    words = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({'<unk>': 0, 'red': 1, 'apple': 2}, unk_token='<unk>')
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path / 'tokenizer.json'))
    return str(path)

  def text_states(self, model, tokens_bt, mask_bt):
    with torch.inference_mode():
      out = model(
        input_ids=torch.tensor(np.asarray(tokens_bt), dtype=torch.long),
        attention_mask=torch.tensor(np.asarray(mask_bt)).long(),
        output_hidden_states=True,
      )
    return np.stack([h.float().numpy() for h in out.hidden_states])

  def image_states(self, model, image_bhwc, **how):
    return np.stack([h.float().numpy() for h in self.see(model, image_bhwc, **how).hidden_states])

  def see(self, model, image_bhwc, **how):
    """What a vision model returns."""
    pixels = torch.tensor(np.asarray(image_bhwc)).permute(0, 3, 1, 2).to(model.dtype)
    with torch.inference_mode():
      return model(pixel_values=pixels, output_hidden_states=True, **how)


@pytest.fixture(scope='session')
def hf():
  return HuggingFace()


@pytest.fixture(scope='session')
def tower_of(hf, tmp_path_factory):
  """Saves a Hugging Face model and loads it as our tower."""

  def load(model, dtype='float32'):
    kind = 'image' if hasattr(model.config, 'patch_size') else 'text'
    return loading.load_tower(
      hf.save(model, tmp_path_factory.mktemp(kind)), modality=kind, dtype=dtype, attention='xla'
    )

  return load


@pytest.fixture(scope='session')
def relative_error():
  """Largest error of each layer, relative to the largest entry of the layer (over valid tokens)."""

  def measure(ours, theirs, mask_bt=None):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    valid = np.ones(theirs.shape[1:3], bool) if mask_bt is None else np.asarray(mask_bt)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    return np.array(
      [
        np.abs(a[valid] - b[valid]).max() / np.abs(b[valid]).max()
        for a, b in zip(ours, theirs, strict=True)
      ]
    )

  return measure


@pytest.fixture(scope='session')
def batch():
  """(tokens [4, 11], right-padded mask with lengths 11, 6, 1, 0)."""
  rng = np.random.default_rng(1)
  mask_bt = np.arange(11)[None] < np.array([11, 6, 1, 0])[:, None]
  return rng.integers(0, TINY_LLAMA['vocab_size'], (4, 11)).astype(np.int32), mask_bt


@pytest.fixture(scope='session')
def states_of():
  """All hidden states of a loaded tower."""

  def run(tower, *inputs, module=None):
    module = module or tower.module
    return jax.jit(
      lambda p, *x: module.apply({'params': p}, *x, states=range(-tower.config.num_layers - 1, 0))
    )(tower.params, *inputs)

  return run
