"""Closed lists of the keys of files that describe a tower: how files are held against them, rules
of values, and what all configurations of transformers may have. The lists themselves are beside
what reads them: a family's in its folder, others in modules whose names end in `_keys`.

A key is used, known to change nothing, known to change nothing with some values, or unknown. Values
of used keys have a type and a range. What is unknown, or has another value, is refused by name: it
may change what the model computes, and we would compute something else without a word.

The lists hold what transformers 4 and 5 write, what the published LLaMA and CLIP models have beside
that, and what llama.cpp's converters write.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from molt_jax.config.fields import Rule
from molt_jax.errors import UserError
from molt_jax.runtime.files import listed, shown

Table = Mapping[str, Rule]

# Wider, deeper or longer than any tower; such a number is a slip or damage, and costs memory.
MOST_WIDTH = 1 << 20
MOST_LAYERS = 1 << 14
MOST_HEAD_DIM = 1 << 14
MOST_POSITIONS = 1 << 30
MOST_PIXELS = 1 << 11
MOST_TOKENS = 1 << 26


def check(content: Any, table: Table, where: str) -> None:
  """Compares an object with its closed list.

  Args:
    content: what was read.
    table: key -> rule of its values; a key that ends in * stands for all that begin so.
    where: names the object in errors.

  Raises:
    UserError: it is no object, a value is not what the rule says, or a key is not in the table.
  """
  if not isinstance(content, Mapping):
    raise UserError(f'{where} is {shown(content)}, expected an object {{"key": value, ...}}')
  for key, rule in table.items():  # In the table's order: what kind of file it is comes first.
    if key in content and not rule.holds(content[key]):
      raise UserError(
        f'{where} has {key} = {shown(content[key])}, which is not implemented; '
        f'implemented: {rule.text}'
      )
  prefixes = tuple(key.removesuffix('*') for key in table if key.endswith('*'))
  unknown = [k for k in content if k not in table and not (prefixes and k.startswith(prefixes))]
  if unknown:
    raise UserError(
      f'{where} has {listed(map(shown, unknown))}, unknown here: it may change what the model '
      f'computes; where you know that it does not, take it out of the file'
    )


# Hugging Face's names of what most architectures have -> ours.
_OURS = {
  'num_hidden_layers': 'num_layers',
  'num_attention_heads': 'num_heads',
  'max_position_embeddings': 'max_positions',
}


def architecture(kind: Any, content: Mapping[str, Any], **more: Any) -> Any:
  """Returns a dataclass of an architecture, whose fields are the keys of a configuration, under our
  names, and others.

  Args:
    kind: the dataclass.
    content: the configuration, checked, with its defaults.
    more: fields that are not keys, or have another value.
  """
  fields = {_OURS.get(key, key): value for key, value in content.items()}
  known = [field.name for field in dataclasses.fields(kind)]
  return kind(**{name: fields[name] for name in known if name in fields} | more)


# ---- Rules ---------------------------------------------------------------------------------------


def is_whole(value: Any) -> bool:
  """Whether it is a whole number; true and false are none."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
  """Whether it is a finite number; JSON can spell whole numbers that no float can hold."""
  if isinstance(value, float):
    return math.isfinite(value)
  return is_whole(value) and abs(value) < 1 << 63


def is_text(value: Any) -> bool:
  """Whether a string can be written as UTF-8: JSON can spell lone surrogates, which cannot."""
  return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value)


def whole(low: int, high: int) -> Rule:
  """A whole number in [low, high]."""
  return Rule(f'a whole number from {low} to {high}', lambda v: is_whole(v) and low <= v <= high)


def number(low: float, high: float) -> Rule:
  """A finite number > low and <= high."""
  text = f'a number greater than {low:g} and at most {high:g}'
  return Rule(text, lambda v: is_number(v) and low < v <= high)


def only(*values: Any) -> Rule:
  """These values, with which the key changes nothing; 1 is not true, and 0 not false."""

  def holds(value):
    if value is not None and type(value) not in (bool, int, float, str, list, dict):
      return False  # An array of a GGUF file.
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)

  return Rule(' or '.join(map(_as_json, values)), holds)


def _as_json(value: Any) -> str:
  return {'None': 'null', 'True': 'true', 'False': 'false'}.get(repr(value), repr(value))


def or_null(rule: Rule) -> Rule:
  """The rule's values, or null, which stands for the default."""
  return Rule(f'{rule.text}, or null', lambda v: v is None or rule.holds(v))


def list_of(rule: Rule, text: str) -> Rule:
  """A list whose items keep a rule."""
  return Rule(text, lambda v: isinstance(v, list) and all(map(rule.holds, v)))


def neutral(*keys: str) -> dict[str, Rule]:
  """Keys that change nothing, whatever they hold."""
  return dict.fromkeys(keys, ANYTHING)


def models(*names: str) -> Rule:
  """A list of these classes of transformers, or null."""
  return or_null(list_of(only(*names), f'a list of {", ".join(names)}'))


ANYTHING = Rule('anything', lambda v: True)
FLAG = Rule('true or false', lambda v: isinstance(v, bool))
TEXT = Rule('a string', is_text)
NAME = Rule('a string that is not empty', lambda v: is_text(v) and v != '')
OBJECT = Rule('an object', lambda v: isinstance(v, dict))
ID = whole(0, MOST_TOKENS)
WIDTH = whole(1, MOST_WIDTH)
LAYERS = whole(1, MOST_LAYERS)
POSITIONS = whole(1, MOST_POSITIONS)
PIXELS = whole(1, MOST_PIXELS)
POSITIVE = number(0, 1e30)
EPSILON = number(0, 1)

# ---- config.json ---------------------------------------------------------------------------------

# What every configuration of transformers may hold: training, generation, labels of other heads,
# what is returned, where it came from. `torch_dtype` is how weights lie on disk; ours is a setting.
COMMON = {
  **neutral(
    '_name_or_path',
    'name_or_path',
    '_commit_hash',
    'transformers_version',
    'torch_dtype',
    'dtype',
    'id2label',
    'label2id',
    'num_labels',
    'problem_type',
    'finetuning_task',
    'task_specific_params',
    'tokenizer_class',
    'use_cache',
    'return_dict',
    'use_return_dict',
    'output_hidden_states',
    'output_attentions',
    'output_scores',
    'output_logits',
    'output_router_logits',
    'return_dict_in_generate',
    'torchscript',
    'tie_word_embeddings',
    'tie_encoder_decoder',
    'chunk_size_feed_forward',
    'gradient_checkpointing',
    'gradient_checkpointing_use_reentrant',
    'is_decoder',
    'tf_legacy_loss',
    'use_bfloat16',
    'prefix',
    'attn_implementation',
    '_attn_implementation',
    '_attn_implementation_autoset',
    '_attn_implementation_internal',
    '_experts_implementation',
    'experts_implementation',
    '_flash_attn_2_enabled',
    '_use_flash_attention_2',
    '_use_sdpa',
    'auto_map',
    'custom_pipelines',
    'transformers.js_config',
    'unsloth_fixed',
    'unsloth_version',
    'neftune_noise_alpha',
    'attention_dropout',
    'dropout',
    'hidden_dropout',
    'initializer_range',
    'initializer_factor',
    'pad_token_id',
    'bos_token_id',
    'eos_token_id',
    'sep_token_id',
    'decoder_start_token_id',
  ),
  # Of generation.
  **neutral(
    'max_length',
    'min_length',
    'max_new_tokens',
    'min_new_tokens',
    'do_sample',
    'early_stopping',
    'num_beams',
    'num_beam_groups',
    'diversity_penalty',
    'temperature',
    'top_k',
    'top_p',
    'min_p',
    'top_h',
    'typical_p',
    'repetition_penalty',
    'length_penalty',
    'no_repeat_ngram_size',
    'encoder_no_repeat_ngram_size',
    'encoder_repetition_penalty',
    'bad_words_ids',
    'force_words_ids',
    'num_return_sequences',
    'forced_bos_token_id',
    'forced_eos_token_id',
    'remove_invalid_values',
    'exponential_decay_length_penalty',
    'suppress_tokens',
    'begin_suppress_tokens',
    'renormalize_logits',
    'epsilon_cutoff',
    'eta_cutoff',
    'guidance_scale',
    'assistant_confidence_threshold',
    'assistant_early_exit',
    'assistant_ensemble_weight',
    'assistant_lookbehind',
    'num_assistant_tokens',
    'num_assistant_tokens_schedule',
    'target_lookbehind',
    'cache_implementation',
    'generation_config',
    'penalty_alpha',
    'stop_strings',
    'max_time',
    'sequence_bias',
  ),
  'is_encoder_decoder': only(False, None),
  'add_cross_attention': only(False, None),
  'cross_attention_hidden_size': only(None),
  'pruned_heads': only({}, None),
  'quantization_config': only(None),
  'compression_config': only(None),
  'per_layer_config': only({}, None),
  'tie_last_hidden_states': only(True, None),
  'transformers_weights': only(None),
}
