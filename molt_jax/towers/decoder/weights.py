"""Hugging Face's tensors of decoders; {} is the layer."""

from collections.abc import Mapping

from molt_jax.towers.decoder.config import DecoderConfig
from molt_jax.towers.tensors import AS_IS, DENSE, linear, linear_out, norm

_LAYER = {
  'layers.{}.input_layernorm.weight': ('layers/input_norm/scale', AS_IS),
  **linear('layers.{}.self_attn.q_proj', 'layers/q_proj'),
  **linear('layers.{}.self_attn.k_proj', 'layers/k_proj'),
  **linear('layers.{}.self_attn.v_proj', 'layers/v_proj'),
  **linear_out('layers.{}.self_attn.o_proj', 'layers/o_proj'),
  **linear('layers.{}.mlp.gate_proj', 'layers/gate_proj'),
  **linear('layers.{}.mlp.up_proj', 'layers/up_proj'),
  **linear('layers.{}.mlp.down_proj', 'layers/down_proj'),
  'layers.{}.self_attn.q_norm.weight': ('layers/q_norm/scale', AS_IS),
  'layers.{}.self_attn.k_norm.weight': ('layers/k_norm/scale', AS_IS),
}
_ENDS = {
  'embed_tokens.weight': ('embedding', AS_IS),
  'norm.weight': ('norm/scale', AS_IS),
}
TENSORS = {
  **_ENDS,
  **_LAYER,
  'layers.{}.post_attention_layernorm.weight': ('layers/mlp_norm/scale', AS_IS),
}
GEMMA = {
  **_ENDS,
  **_LAYER,
  'layers.{}.post_attention_layernorm.weight': ('layers/attention_post_norm/scale', AS_IS),
  'layers.{}.pre_feedforward_layernorm.weight': ('layers/mlp_norm/scale', AS_IS),
  'layers.{}.post_feedforward_layernorm.weight': ('layers/mlp_post_norm/scale', AS_IS),
}
OPT = {
  'embed_tokens.weight': ('embedding', AS_IS),
  'embed_positions.weight': ('position_embedding', AS_IS),
  'project_in.weight': ('project_in', DENSE),
  **norm('final_layer_norm', 'norm'),
  **norm('layers.{}.self_attn_layer_norm', 'layers/input_norm'),
  **norm('layers.{}.final_layer_norm', 'layers/mlp_norm'),
  **linear('layers.{}.self_attn.q_proj', 'layers/q_proj'),
  **linear('layers.{}.self_attn.k_proj', 'layers/k_proj'),
  **linear('layers.{}.self_attn.v_proj', 'layers/v_proj'),
  **linear_out('layers.{}.self_attn.out_proj', 'layers/o_proj'),
  **linear('layers.{}.fc1', 'layers/up_proj'),
  **linear('layers.{}.fc2', 'layers/down_proj'),
}
# Tensors that a tower has no use for. OPT's project_out belongs to its head: it leads back to the
# width of the token embeddings.
IGNORED = r'lm_head\.weight|score\.(weight|bias)|.*rotary_emb\.inv_freq'
OPT_IGNORED = rf'{IGNORED}|project_out\.weight'
GEMMA3_IGNORED = rf'{IGNORED}|vision_tower\..*|multi_modal_projector\..*'
PREFIX = r'^model\.'
OPT_PREFIX = r'^(model\.)?decoder\.'
GEMMA3_PREFIX = r'^(language_model\.model\.|model\.language_model\.|language_model\.|model\.)'


def phi3_rows(config: DecoderConfig) -> Mapping[str, Mapping[str, int]]:
  """Phi-3's tensors that are several in one: name -> the names of its parts and their rows, in this
  order.
  """
  kv_rows = config.num_kv_heads * config.head_dim
  return {
    'layers.{}.self_attn.qkv_proj.weight': {
      'layers.{}.self_attn.q_proj.weight': config.num_heads * config.head_dim,
      'layers.{}.self_attn.k_proj.weight': kv_rows,
      'layers.{}.self_attn.v_proj.weight': kv_rows,
    },
    'layers.{}.mlp.gate_up_proj.weight': {
      'layers.{}.mlp.gate_proj.weight': config.intermediate_size,
      'layers.{}.mlp.up_proj.weight': config.intermediate_size,
    },
  }
