"""Hugging Face's tensors of DINOv3's vision transformer; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, PATCHES, ROWS, TOKEN, linear, linear_out, norm

LAYER = 'layer.{}'
TENSORS = {
  'embeddings.cls_token': ('class_embedding', TOKEN),
  'embeddings.register_tokens': ('registers', ROWS),
  'embeddings.patch_embeddings.weight': ('patch_kernel', PATCHES),
  'embeddings.patch_embeddings.bias': ('patch_bias', AS_IS),
  **norm(f'{LAYER}.norm1', 'layers/attention_norm'),
  **linear(f'{LAYER}.attention.q_proj', 'layers/q_proj'),
  **linear(f'{LAYER}.attention.k_proj', 'layers/k_proj'),
  **linear(f'{LAYER}.attention.v_proj', 'layers/v_proj'),
  **linear_out(f'{LAYER}.attention.o_proj', 'layers/o_proj'),
  f'{LAYER}.layer_scale1.lambda1': ('layers/attention_scale', AS_IS),
  **norm(f'{LAYER}.norm2', 'layers/mlp_norm'),
  **linear(f'{LAYER}.mlp.gate_proj', 'layers/gate_proj'),
  **linear(f'{LAYER}.mlp.up_proj', 'layers/up_proj'),
  **linear(f'{LAYER}.mlp.down_proj', 'layers/down_proj'),
  f'{LAYER}.layer_scale2.lambda1': ('layers/mlp_scale', AS_IS),
  **norm('norm', 'post_norm'),
}
IGNORED = r'embeddings\.mask_token|norm\.(weight|bias)'
PREFIX = r'^model\.(?=layer\.)'  # Of the layers in transformers 5.
# What the published preprocessor_config.json say.
PREPROCESSOR = {
  'image_processor_type': 'DINOv3ViTImageProcessorFast',
  'size': {'height': 224, 'width': 224},
}
