"""Hugging Face's tensors of a BERT; {} is the layer."""

from molt_jax.towers.tensors import AS_IS, linear, linear_out, norm

_LAYER = 'encoder.layer.{}'
TENSORS = {
  'embeddings.word_embeddings.weight': ('token_embedding', AS_IS),
  'embeddings.position_embeddings.weight': ('position_embedding', AS_IS),
  'embeddings.token_type_embeddings.weight': ('type_embedding', AS_IS),
  **norm('embeddings.LayerNorm', 'embedding_norm'),
  **linear(f'{_LAYER}.attention.self.query', 'layers/q_proj'),
  **linear(f'{_LAYER}.attention.self.key', 'layers/k_proj'),
  **linear(f'{_LAYER}.attention.self.value', 'layers/v_proj'),
  **linear_out(f'{_LAYER}.attention.output.dense', 'layers/o_proj'),
  **norm(f'{_LAYER}.attention.output.LayerNorm', 'layers/attention_norm'),
  **linear(f'{_LAYER}.intermediate.dense', 'layers/up_proj'),
  **linear(f'{_LAYER}.output.dense', 'layers/down_proj'),
  **norm(f'{_LAYER}.output.LayerNorm', 'layers/mlp_norm'),
  **linear('pooler.dense', 'pooler'),
}
# Heads of pretraining and of tasks, tables of indices, and the pooler of one that is not asked for.
IGNORED = (
  r'(cls|lm_head|classifier|qa_outputs)\..*|pooler\.dense\.(weight|bias)|'
  r'embeddings\.(position|token_type)_ids'
)
PREFIX = {'bert': r'^bert\.', 'roberta': r'^roberta\.', 'xlm-roberta': r'^roberta\.'}
# Files that were converted from TensorFlow name the two vectors of a norm so.
RENAMED = {r'LayerNorm\.gamma$': 'LayerNorm.weight', r'LayerNorm\.beta$': 'LayerNorm.bias'}
