"""Hugging Face's tensors of CLIP's towers; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, DENSE, PATCHES, linear, linear_out, norm

LAYER = {
  **norm('encoder.layers.{}.layer_norm1', 'layers/attention_norm'),
  **norm('encoder.layers.{}.layer_norm2', 'layers/mlp_norm'),
  **linear('encoder.layers.{}.self_attn.q_proj', 'layers/q_proj'),
  **linear('encoder.layers.{}.self_attn.k_proj', 'layers/k_proj'),
  **linear('encoder.layers.{}.self_attn.v_proj', 'layers/v_proj'),
  **linear_out('encoder.layers.{}.self_attn.out_proj', 'layers/o_proj'),
  **linear('encoder.layers.{}.mlp.fc1', 'layers/up_proj'),
  **linear('encoder.layers.{}.mlp.fc2', 'layers/down_proj'),
}
VISION = {
  'embeddings.class_embedding': ('class_embedding', AS_IS),
  'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
  'embeddings.patch_embedding.weight': ('patch_kernel', PATCHES),
  **norm('pre_layrnorm', 'pre_norm'),
  **LAYER,
  **norm('post_layernorm', 'post_norm'),
  'visual_projection.weight': ('projection', DENSE),
}
TEXT = {
  'embeddings.token_embedding.weight': ('token_embedding', AS_IS),
  'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
  **LAYER,
  **norm('final_layer_norm', 'final_norm'),
  'text_projection.weight': ('projection', DENSE),
}
# Tensors that a tower has no use for.
VISION_IGNORED = (
  r'text_model\..*|(visual|text)_projection\.weight|logit_scale|.*position_ids|'
  r'(classifier|post_layernorm)\.(weight|bias)'
)
TEXT_IGNORED = r'vision_model\..*|(visual|text)_projection\.weight|logit_scale|.*position_ids'
VISION_PREFIX, TEXT_PREFIX = r'^vision_model\.', r'^text_model\.'
