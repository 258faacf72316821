"""Hugging Face's tensors of a LLaMA; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, linear, linear_out

TENSORS = {
  'embed_tokens.weight': ('embedding', AS_IS),
  'norm.weight': ('norm/scale', AS_IS),
  'layers.{}.input_layernorm.weight': ('layers/input_norm/scale', AS_IS),
  'layers.{}.post_attention_layernorm.weight': ('layers/mlp_norm/scale', AS_IS),
  **linear('layers.{}.self_attn.q_proj', 'layers/q_proj'),
  **linear('layers.{}.self_attn.k_proj', 'layers/k_proj'),
  **linear('layers.{}.self_attn.v_proj', 'layers/v_proj'),
  **linear_out('layers.{}.self_attn.o_proj', 'layers/o_proj'),
  **linear('layers.{}.mlp.gate_proj', 'layers/gate_proj'),
  **linear('layers.{}.mlp.up_proj', 'layers/up_proj'),
  **linear('layers.{}.mlp.down_proj', 'layers/down_proj'),
}
IGNORED = r'lm_head\.weight|score\.(weight|bias)|.*rotary_emb\.inv_freq'
PREFIX = r'^model\.'
