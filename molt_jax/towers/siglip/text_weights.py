"""Hugging Face's tensors of SigLIP's text transformer; {} is the layer."""

from molt_jax.towers.clip.weights import LAYER
from molt_jax.towers.tensors import AS_IS, linear, norm

TEXT = {
  'embeddings.token_embedding.weight': ('token_embedding', AS_IS),
  'embeddings.position_embedding.weight': ('position_embedding', AS_IS),
  **LAYER,
  **norm('final_layer_norm', 'final_norm'),
  **linear('head', 'projection'),
}
TEXT_IGNORED = r'vision_model\..*|logit_(scale|bias)|.*position_ids|head\.(weight|bias)'
TEXT_PREFIX = r'^text_model\.'
