"""What the config.json of a BERT, RoBERTa or XLM-RoBERTa says."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from molt_jax.errors import UserError
from molt_jax.towers import keys
from molt_jax.towers.keys import (
  COMMON,
  EPSILON,
  ID,
  LAYERS,
  MOST_WIDTH,
  WIDTH,
  Table,
  models,
  neutral,
  only,
  whole,
)

BERT_TASKS = (
  'Model',
  'ForMaskedLM',
  'ForPreTraining',
  'ForNextSentencePrediction',
  'ForSequenceClassification',
  'ForTokenClassification',
  'ForQuestionAnswering',
  'ForMultipleChoice',
)
BERT: Table = {
  'model_type': only('bert'),
  **COMMON,
  'architectures': models(*(f'Bert{task}' for task in BERT_TASKS)),
  'vocab_size': WIDTH,
  'hidden_size': WIDTH,
  'intermediate_size': WIDTH,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': WIDTH,
  'max_position_embeddings': whole(1, MOST_WIDTH),
  'type_vocab_size': whole(1, MOST_WIDTH),
  'hidden_act': only('gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu', 'silu', 'swish'),
  'layer_norm_eps': EPSILON,
  # A decoder's tokens read what is before them alone.
  'is_decoder': only(False, None),
  'position_embedding_type': only('absolute', None),
  'embedding_size': only(None),
  **neutral(
    'attention_probs_dropout_prob',
    'hidden_dropout_prob',
    'classifier_dropout',
    'output_past',
    # Of BERT's multilingual files: a pooler that is not in them.
    'directionality',
    'pooler_fc_size',
    'pooler_num_attention_heads',
    'pooler_num_fc_layers',
    'pooler_size_per_head',
    'pooler_type',
  ),
}
ROBERTA: Table = {
  **BERT,
  'model_type': only('roberta'),
  'architectures': models(*(f'Roberta{task}' for task in BERT_TASKS)),
  'pad_token_id': ID,  # Positions are counted from it on.
}
XLM_ROBERTA: Table = {
  **ROBERTA,
  'model_type': only('xlm-roberta'),
  'architectures': models(*(f'XLMRoberta{task}' for task in BERT_TASKS)),
}

# What transformers reads where a file is silent.
DEFAULTS = {
  'vocab_size': 30522,
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'max_position_embeddings': 512,
  'type_vocab_size': 2,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-12,
}
# Of those whose positions depend on the padding token.
ROBERTA_DEFAULTS = {**DEFAULTS, 'vocab_size': 50265, 'pad_token_id': 1}
TABLES = {'bert': BERT, 'roberta': ROBERTA, 'xlm-roberta': XLM_ROBERTA}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Architecture of a BERT.

  Attributes:
    num_positions: rows of the table of positions.
    padding_id: RoBERTa numbers its tokens from `padding_id` + 1, and gives that of padding itself
      the position `padding_id`. None: tokens are numbered from 0, as in BERT.
    pooling: what makes one vector of a text, of `model.POOLINGS`.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_positions: int
  type_vocab_size: int
  hidden_act: str
  layer_norm_eps: float
  padding_id: int | None = None
  pooling: str = 'first'
  ends_texts: ClassVar[bool] = True  # There is an end token beside the begin token.

  @property
  def max_positions(self) -> int:
    """Tokens of the longest text."""
    return self.num_positions - (0 if self.padding_id is None else self.padding_id + 1)

  @classmethod
  def from_hf(cls, config: Mapping[str, Any], where: str = 'the BERT config') -> 'BertConfig':
    """Reads the dict of a Hugging Face config.json.

    Args:
      config: the dict.
      where: names it in errors.

    Raises:
      UserError: a key is unknown, or a value is not implemented.
    """
    kind = config.get('model_type')
    kind = kind if isinstance(kind, str) else 'bert'  # What is no name, its table refuses.
    keys.check(config, TABLES.get(kind, BERT), where)
    defaults = DEFAULTS if kind == 'bert' else ROBERTA_DEFAULTS
    c = {**defaults, **{k: v for k, v in config.items() if v is not None}}
    if c['hidden_size'] % c['num_attention_heads']:
      raise UserError(
        f'{where} has num_attention_heads = {c["num_attention_heads"]}, which must divide '
        f'hidden_size = {c["hidden_size"]}'
      )
    made = cls(
      vocab_size=c['vocab_size'],
      hidden_size=c['hidden_size'],
      intermediate_size=c['intermediate_size'],
      num_layers=c['num_hidden_layers'],
      num_heads=c['num_attention_heads'],
      num_positions=c['max_position_embeddings'],
      type_vocab_size=c['type_vocab_size'],
      hidden_act=c['hidden_act'],
      layer_norm_eps=c['layer_norm_eps'],
      padding_id=None if kind == 'bert' else c['pad_token_id'],
    )
    if made.max_positions < 1:
      raise UserError(
        f'{where} has max_position_embeddings = {made.num_positions} and pad_token_id = '
        f'{made.padding_id}, behind which positions begin: none is left'
      )
    return made
