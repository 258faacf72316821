"""Hugging Face's tensors of ViT, as transformers 5 names them; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, PATCHES, ROWS, TOKEN, linear, linear_out, norm

LAYER = 'layers.{}'
TENSORS = {
  'embeddings.cls_token': ('class_embedding', TOKEN),
  'embeddings.position_embeddings': ('position_embedding', ROWS),
  'embeddings.patch_embeddings.projection.weight': ('patch_kernel', PATCHES),
  'embeddings.patch_embeddings.projection.bias': ('patch_bias', AS_IS),
  **norm(f'{LAYER}.layernorm_before', 'layers/attention_norm'),
  **linear(f'{LAYER}.attention.q_proj', 'layers/q_proj'),
  **linear(f'{LAYER}.attention.k_proj', 'layers/k_proj'),
  **linear(f'{LAYER}.attention.v_proj', 'layers/v_proj'),
  **linear_out(f'{LAYER}.attention.o_proj', 'layers/o_proj'),
  **norm(f'{LAYER}.layernorm_after', 'layers/mlp_norm'),
  **linear(f'{LAYER}.mlp.fc1', 'layers/up_proj'),
  **linear(f'{LAYER}.mlp.fc2', 'layers/down_proj'),
  **norm('layernorm', 'post_norm'),
}
# The class token after the final norm is pooled; a pooler was for the classes of pretraining.
IGNORED = r'embeddings\.mask_token|(classifier|pooler\.dense|layernorm)\.(weight|bias)|decoder\..*'
PREFIX = r'^vit\.'
# Published files have the names of transformers 4.
RENAMED = {
  r'^encoder\.layer\.': 'layers.',
  r'\.attention\.attention\.query\.': '.attention.q_proj.',
  r'\.attention\.attention\.key\.': '.attention.k_proj.',
  r'\.attention\.attention\.value\.': '.attention.v_proj.',
  r'\.attention\.output\.dense\.': '.attention.o_proj.',
  r'\.intermediate\.dense\.': '.mlp.fc1.',
  r'^(layers\.\d+)\.output\.dense\.': r'\1.mlp.fc2.',
}
# What the published preprocessor_config.json say beside sizes.
PREPROCESSOR = {'image_processor_type': 'ViTImageProcessor'}
