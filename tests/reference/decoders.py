"""Tiny decoders of every family as Hugging Face models (which need PyTorch)."""

import numpy as np
import transformers
from optional_torch import torch

SIZES = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'pad_token_id': 0,
}
GEMMA = {**SIZES, 'head_dim': 8, 'query_pre_attn_scalar': 8, 'sliding_window': 3}
MODELS = {
  'mistral': ('Mistral', {**SIZES, 'sliding_window': None}),
  'qwen2': ('Qwen2', SIZES),
  'qwen3': ('Qwen3', {**SIZES, 'head_dim': 8}),
  'gemma2': ('Gemma2', GEMMA),
  'gemma3_text': ('Gemma3Text', {**GEMMA, 'sliding_window_pattern': 2}),
  'opt': (
    'OPT',
    {k: v for k, v in SIZES.items() if k not in ('intermediate_size', 'num_key_value_heads')}
    | {'ffn_dim': 48},
  ),
  'phi3': ('Phi3', {**SIZES, 'original_max_position_embeddings': 64}),
  'smollm3': ('SmolLM3', {**SIZES, 'no_rope_layer_interval': 2}),
}


def make(family, changes=()):
  """A Hugging Face model whose weights are random, those of its norms and biases too."""
  name, fields = MODELS[family]
  config = getattr(transformers, f'{name}Config')(**{**fields, **dict(changes)})
  model = transformers.AutoModel.from_config(config).eval()
  rng = np.random.default_rng(0)
  for path, weight in sorted(model.named_parameters()):
    noise = 0.3 * rng.standard_normal(tuple(weight.shape))
    is_norm = path.endswith('norm.weight') and not family.startswith('gemma')
    weight.data = torch.tensor(noise + is_norm, dtype=torch.float32)
  return model


def hidden_states(model, tokens_bt, mask_bt):
  """Hidden states; the last one of OPT before the matrix that leads to the width of its tokens."""
  mask = torch.tensor(np.asarray(mask_bt)).long()
  ids = torch.tensor(np.asarray(tokens_bt), dtype=torch.long)
  found = []
  out = getattr(model, 'decoder', model)
  hook = out.layers[-1].register_forward_hook(lambda module, args, h: found.append(h))
  with torch.inference_mode():
    result = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
  hook.remove()
  theirs = [h.float().numpy() for h in result.hidden_states]
  if getattr(out, 'project_out', None) is not None:
    with torch.inference_mode():
      np.testing.assert_allclose(out.project_out(found[0]).numpy(), theirs[-1], atol=1e-5)
    theirs[-1] = found[0].numpy()
  return np.stack(theirs)
