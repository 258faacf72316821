"""Hugging Face's tensors of SigLIP's vision transformer; {} is the layer."""

from molt_jax.towers.clip.weights import LAYER
from molt_jax.towers.tensors import AS_IS, PATCHES, TOKEN, linear, linear_out, norm

VISION = {
  'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
  'embeddings.patch_embedding.weight': ('patch_kernel', PATCHES),
  'embeddings.patch_embedding.bias': ('patch_bias', AS_IS),
  **LAYER,
  **norm('post_layernorm', 'post_norm'),
  'head.probe': ('attention_pool/query', TOKEN),
  **linear('head.attention.q_proj', 'attention_pool/q_proj'),
  **linear('head.attention.k_proj', 'attention_pool/k_proj'),
  **linear('head.attention.v_proj', 'attention_pool/v_proj'),
  **linear_out('head.attention.out_proj', 'attention_pool/o_proj'),
  **norm('head.layernorm', 'attention_pool/norm'),
  **linear('head.mlp.fc1', 'attention_pool/up_proj'),
  **linear('head.mlp.fc2', 'attention_pool/down_proj'),
}
# PyTorch's multi-head attention has queries, keys and values side by side.
VISION_SPLIT = (
  (
    r'(head\.attention)\.in_proj_(weight|bias)',
    (r'\1.q_proj.\2', r'\1.k_proj.\2', r'\1.v_proj.\2'),
  ),
)
VISION_IGNORED = (
  r'text_model\..*|logit_(scale|bias)|.*position_ids|head\..*|'
  r'(classifier|post_layernorm)\.(weight|bias)'
)
VISION_PREFIX = r'^vision_model\.'
# What the published preprocessor_config.json say beside sizes.
PREPROCESSOR = {'image_processor_type': 'SiglipImageProcessor'}
