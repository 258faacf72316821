"""Named architectures as Hugging Face config.json dicts, for random weights (`random:NAME`) and for
tracing full-size models.
"""


def _llama(
  hidden_size,
  intermediate_size,
  num_hidden_layers,
  num_attention_heads,
  num_key_value_heads,
  **overrides,
):
  return {
    'model_type': 'llama',
    'vocab_size': 32000,
    'hidden_size': hidden_size,
    'intermediate_size': intermediate_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'num_key_value_heads': num_key_value_heads,
    'hidden_act': 'silu',
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    **overrides,
  }


def _clip(
  hidden_size, num_hidden_layers, num_attention_heads, image_size, patch_size, projection_dim=512
):
  return {
    'model_type': 'clip_vision_model',
    'hidden_size': hidden_size,
    'intermediate_size': 4 * hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'num_channels': 3,
    'image_size': image_size,
    'patch_size': patch_size,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'projection_dim': projection_dim,
  }


def _dinov2(hidden_size, num_hidden_layers, num_attention_heads, **overrides):
  return {
    'model_type': 'dinov2',
    'hidden_size': hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'mlp_ratio': 4,
    'num_channels': 3,
    'image_size': 224,
    'patch_size': 14,
    'hidden_act': 'gelu',
    'layer_norm_eps': 1e-6,
    **overrides,
  }


def _vit(model_type, hidden_size, num_hidden_layers, num_attention_heads, **overrides):
  return {
    'model_type': model_type,
    'hidden_size': hidden_size,
    'intermediate_size': 4 * hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'image_size': 224,
    'patch_size': 16,
    **overrides,
  }


def _registers(*sizes, **overrides):
  registers = {'model_type': 'dinov2_with_registers', 'num_register_tokens': 4}
  return _dinov2(*sizes, **registers, **overrides)


def _clip_text(hidden_size, num_hidden_layers, num_attention_heads, **overrides):
  return {
    'model_type': 'clip_text_model',
    'vocab_size': 49408,
    'hidden_size': hidden_size,
    'intermediate_size': 4 * hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'max_position_embeddings': 77,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'projection_dim': hidden_size,
    **overrides,
    'eos_token_id': 2,  # The end of a text is its largest id: that of random towers' tokenizer.
  }


def _bert(hidden_size, num_hidden_layers, num_attention_heads, model_type='bert', **overrides):
  return {
    'model_type': model_type,
    'vocab_size': 30522,
    'hidden_size': hidden_size,
    'intermediate_size': 4 * hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'max_position_embeddings': 512,
    'type_vocab_size': 2,
    'hidden_act': 'gelu',
    'layer_norm_eps': 1e-12,
    **overrides,
  }


def _roberta(hidden_size, num_hidden_layers, num_attention_heads, **overrides):
  sizes = (hidden_size, num_hidden_layers, num_attention_heads)
  ours = {'max_position_embeddings': 514, 'type_vocab_size': 1, 'layer_norm_eps': 1e-5}
  return _bert(*sizes, **{'model_type': 'roberta', **ours, 'pad_token_id': 1, **overrides})


def _siglip_text(hidden_size, num_hidden_layers, num_attention_heads, **overrides):
  return {
    'model_type': 'siglip_text_model',
    'vocab_size': 32000,
    'hidden_size': hidden_size,
    'intermediate_size': 4 * hidden_size,
    'num_hidden_layers': num_hidden_layers,
    'num_attention_heads': num_attention_heads,
    'max_position_embeddings': 64,
    **overrides,
  }


def _tiny(model_type, **fields):
  """A decoder of four narrow layers, for trying a family out."""
  llama = _llama(64, 192, 4, 4, 2, vocab_size=512, max_position_embeddings=2048)
  return {**llama, 'model_type': model_type, **fields}


LLAMA = {
  'llama-7b': _llama(
    4096, 11008, 32, 32, 32, max_position_embeddings=2048, rms_norm_eps=1e-6
  ),  # LLaMA 1, the paper's text tower.
  'llama-13b': _llama(5120, 13824, 40, 40, 40, max_position_embeddings=2048, rms_norm_eps=1e-6),
  'llama-70b': _llama(8192, 28672, 80, 64, 8),  # LLaMA 2.
  'smollm2-135m': _llama(
    576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0
  ),
  'llama-tiny': _tiny('llama'),
}
_GEMMA_TINY = {'hidden_act': None, 'head_dim': 16, 'query_pre_attn_scalar': 16}
_OPT_TINY = {
  'model_type': 'opt',
  'vocab_size': 512,
  'hidden_size': 64,
  'ffn_dim': 192,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'max_position_embeddings': 2048,
}
DECODERS = {
  'llama': LLAMA,
  'mistral': {'mistral-tiny': _tiny('mistral', sliding_window=32)},
  'qwen2': {'qwen2-tiny': _tiny('qwen2')},
  'qwen3': {'qwen3-tiny': _tiny('qwen3', head_dim=16)},
  'gemma2': {'gemma2-tiny': _tiny('gemma2', **_GEMMA_TINY, sliding_window=32)},
  'gemma3_text': {
    'gemma3-tiny': _tiny('gemma3_text', **_GEMMA_TINY, sliding_window=32, sliding_window_pattern=2)
  },
  'phi3': {'phi3-tiny': _tiny('phi3')},
  'smollm3': {'smollm3-tiny': _tiny('smollm3')},
  'opt': {'opt-tiny': _OPT_TINY},
}
BERT = {
  'bert-base': _bert(768, 12, 12),
  'bert-large': _bert(1024, 24, 16),
  'minilm-l6': _bert(384, 6, 12),
  'bert-tiny': _bert(64, 4, 4, vocab_size=512),
}
ROBERTA = {
  'roberta-base': _roberta(768, 12, 12, vocab_size=50265),
  'roberta-large': _roberta(1024, 24, 16, vocab_size=50265),
  # The byte tokenizer of random towers pads with the id 257.
  'roberta-tiny': _roberta(
    64, 4, 4, vocab_size=512, max_position_embeddings=1024, pad_token_id=257
  ),
}
XLM_ROBERTA = {
  'xlm-roberta-base': _roberta(768, 12, 12, model_type='xlm-roberta', vocab_size=250002),
}
CLIP_TEXT = {
  'clip-text-b': _clip_text(512, 12, 8),
  'clip-text-l': _clip_text(768, 12, 12),
  'clip-text-tiny': _clip_text(128, 4, 2, vocab_size=259),
}
CLIP_VISION = {
  'clip-vit-b-32': _clip(768, 12, 12, 224, 32),
  'clip-vit-b-16': _clip(768, 12, 12, 224, 16),
  'clip-vit-l-14': _clip(1024, 24, 16, 224, 14, 768),
  'clip-vit-l-14-336': _clip(1024, 24, 16, 336, 14, 768),
  'clip-vit-tiny': _clip(192, 6, 3, 64, 8, 128),
}
# Published DINOv2 have positions for 518 pixels, and are given 224.
DINOV2 = {
  'dinov2-small': _dinov2(384, 12, 6),
  'dinov2-base': _dinov2(768, 12, 12),
  'dinov2-large': _dinov2(1024, 24, 16),
  'dinov2-giant': _dinov2(1536, 40, 24, use_swiglu_ffn=True),
  'dinov2-tiny': _dinov2(192, 6, 3, image_size=56),
}
DINOV2_WITH_REGISTERS = {
  'dinov2-with-registers-small': _registers(384, 12, 6),
  'dinov2-with-registers-base': _registers(768, 12, 12),
  'dinov2-with-registers-tiny': _registers(192, 6, 3, image_size=56),
}
_SO400M = {'intermediate_size': 4304, 'patch_size': 14, 'image_size': 384}
SIGLIP_VISION = {
  'siglip-base-patch16-224': _vit('siglip_vision_model', 768, 12, 12),
  'siglip-so400m-patch14-384': _vit('siglip_vision_model', 1152, 27, 16, **_SO400M),
  'siglip-tiny': _vit('siglip_vision_model', 192, 6, 3, image_size=64),
}
SIGLIP_TEXT = {
  'siglip-text-base': _siglip_text(768, 12, 12),
  'siglip-text-so400m': _siglip_text(1152, 27, 16, intermediate_size=4304),
  'siglip-text-tiny': _siglip_text(128, 4, 2, vocab_size=259, max_position_embeddings=16),
}
VIT = {
  'vit-base-patch16-224': _vit('vit', 768, 12, 12),
  'vit-large-patch16-224': _vit('vit', 1024, 24, 16),
  'vit-tiny': _vit('vit', 192, 6, 3, image_size=64),
}
DINOV3 = {
  'dinov3-vits16': _vit('dinov3_vit', 384, 12, 6, num_register_tokens=4),
  'dinov3-vitb16': _vit('dinov3_vit', 768, 12, 12, num_register_tokens=4),
  'dinov3-vitl16': _vit('dinov3_vit', 1024, 24, 16, num_register_tokens=4),
  'dinov3-tiny': _vit('dinov3_vit', 192, 6, 3, num_register_tokens=4, image_size=64),
}
