"""Text encoders of the BERT family: Devlin et al. 2019; RoBERTa: Liu et al. 2019."""

from molt_jax.towers.bert.config import BertConfig
from molt_jax.towers.bert.model import Bert

__all__ = ['Bert', 'BertConfig']
