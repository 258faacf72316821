"""Hugging Face's tensors of DINOv2, as transformers 5 names them; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, PATCHES, ROWS, TOKEN, linear, linear_out, norm

LAYER = 'encoder.layer.{}'
TENSORS = {
  'embeddings.cls_token': ('class_embedding', TOKEN),
  'embeddings.register_tokens': ('registers', ROWS),
  'embeddings.position_embeddings': ('position_embedding', ROWS),
  'embeddings.patch_embeddings.projection.weight': ('patch_kernel', PATCHES),
  'embeddings.patch_embeddings.projection.bias': ('patch_bias', AS_IS),
  **norm(f'{LAYER}.norm1', 'layers/attention_norm'),
  **linear(f'{LAYER}.attention.q_proj', 'layers/q_proj'),
  **linear(f'{LAYER}.attention.k_proj', 'layers/k_proj'),
  **linear(f'{LAYER}.attention.v_proj', 'layers/v_proj'),
  **linear_out(f'{LAYER}.attention.o_proj', 'layers/o_proj'),
  f'{LAYER}.layer_scale1.lambda1': ('layers/attention_scale', AS_IS),
  **norm(f'{LAYER}.norm2', 'layers/mlp_norm'),
  **linear(f'{LAYER}.mlp.gate_proj', 'layers/gate_proj'),
  **linear(f'{LAYER}.mlp.fc1', 'layers/up_proj'),
  **linear(f'{LAYER}.mlp.fc2', 'layers/down_proj'),
  f'{LAYER}.layer_scale2.lambda1': ('layers/mlp_scale', AS_IS),
  **norm('layernorm', 'post_norm'),
}
IGNORED = r'embeddings\.mask_token|classifier\.(weight|bias)|layernorm\.(weight|bias)'
PREFIX = r'^(dinov2|dinov2_with_registers)\.'
# Published files have the names of transformers 4.
RENAMED = {
  r'\.attention\.attention\.query\.': '.attention.q_proj.',
  r'\.attention\.attention\.key\.': '.attention.k_proj.',
  r'\.attention\.attention\.value\.': '.attention.v_proj.',
  r'\.attention\.output\.dense\.': '.attention.o_proj.',
  r'\.mlp\.up_proj\.': '.mlp.fc1.',
  r'\.mlp\.(down_proj|weights_out)\.': '.mlp.fc2.',
}
# Gate and input of SwiGLU side by side.
SPLIT = ((r'(.*\.mlp)\.weights_in\.(weight|bias)', (r'\1.gate_proj.\2', r'\1.fc1.\2')),)
# What the published preprocessor_config.json say.
PREPROCESSOR = {
  'image_processor_type': 'BitImageProcessor',
  'size': {'shortest_edge': 256},
  'crop_size': {'height': 224, 'width': 224},
  'image_mean': [0.485, 0.456, 0.406],
  'image_std': [0.229, 0.224, 0.225],
}
