"""The methods that `config.method` may name, and the fields that are theirs alone.

To add a method, write its module (`molt_jax/methods/`) and give it a row here.
"""

from typing import Any, NamedTuple

from molt_jax.config.fields import (
  ANY_STRING,
  FLAG,
  Field,
  Rule,
  at_least,
  below,
  between,
  more_than,
  one_of,
)
from molt_jax.config.layers import LAYERS


class Row(NamedTuple):
  """A method: its module, which has `build(config, towers, num_classes)`, what it is, its fields.

  Attributes:
    module: dotted name.
    meaning: for `--help`.
    fields: of its own section of the config; {}: none.
    trains_towers: whether it heeds `backbones.MODALITY.trainable`.
    names: whether it 'can' or 'must' read the classes' names through the text tower of a pair that
      shares a space; '': it never does.
    revision: raised where what an older run has learned would be read in another way; such runs are
      refused.
  """

  module: str
  meaning: str
  fields: dict[str, Any]
  trains_towers: bool = False
  names: str = ''
  revision: int = 1


MOLT = {
  'layers': Field(
    '-4:',
    LAYERS,
    "Hidden states of each tower that are read, numbered as Hugging Face's output_hidden_states: "
    "'-4:', '0,3,6', 'all', 'spread:4' (at equal distances, the last among them), or "
    "'image=0,6;text=-2:'; pair k is the k-th of each.",
  ),
  'cells': Field(
    0,
    between(0, 64),
    'Cells along a side of a picture whose means are read in the place of all patches: they keep '
    'the layout, and the store is smaller; 0: every patch.',
  ),
  'width': Field(1024, at_least(1), 'd_c: width of the common space.'),
  'num_heads': Field(
    1, at_least(1), 'Attention heads in the common space; must divide molt.width.'
  ),
  'input_norm': Field(
    'standardize',
    one_of('none', 'rms', 'standardize'),
    'Normalises the hidden states; standardize: by training statistics.',
  ),
  'cross_attention': Field(True, FLAG, 'Eq. 2; off: H is zero (first ablation of Table 2).'),
  'bilinear': Field(
    0,
    between(0, 64),
    'Factors of a bilinear pooling of both modalities that is added to H_l of eq. 5 (as in the '
    "method's second version): for answers that hang on both together. 0: none.",
  ),
  'layer_weights': Field(True, FLAG, 'Learn M of eq. 5; off: the plain mean over layers.'),
}
TEMPLATE = Field(
  'a photo of a {}.',
  Rule('a sentence with one {}', lambda text: text.count('{}') == 1),
  'Sentence that a class name is put into.',
)
MMRL = {
  'first_layer': Field(
    0.42,
    between(0, 1),
    'Where tokens are inserted, as a share of the layers of each tower (0.42: before the sixth of '
    'twelve); layers below run once and may be stored.',
  ),
  'num_tokens': Field(5, at_least(0), 'K: representation tokens inserted in each layer.'),
  'width': Field(512, at_least(1), 'Width of the space that their tokens are mapped from.'),
  'alpha': Field(
    0.7, between(0, 1), "Weight of the class token's features, against the representation tokens'."
  ),
  'regularizer': Field(
    0.5, at_least(0), "Weight of the cosine distance of features from the untouched towers'."
  ),
  'classes': Field(
    'auto',
    one_of('auto', 'names', 'head'),
    'names: class names through the text tower (a CLIP pair); head: learned class vectors; auto: '
    'names where both towers have a projection and an example has one label.',
  ),
  'template': TEMPLATE,
  'answer': Field(
    'both',
    one_of('both', 'class'),
    "Features that answer: both, weighed by alpha; class: the class token's alone, as for classes "
    'that were not trained on.',
  ),
}
MMRLPP = MMRL | {
  'aligner_rank': Field(
    4, at_least(1), "Rank of what a layer's map of tokens adds to the one that all layers share."
  ),
  'projection_rank': Field(
    64, at_least(1), "Rank of what the map of features adds to the tower's own projection."
  ),
  'share': Field(
    0.9,
    between(0, 1),
    'beta: share of the learned tokens in what enters a layer; the rest is what the layer below '
    'made of them.',
  ),
}
MAPLE = {
  'num_layers': Field(
    9,
    at_least(1),
    'J: lower layers of each tower that have prompts; all of the shallower one where it has fewer.',
  ),
  'num_tokens': Field(2, at_least(0), 'Prompts of each of these layers.'),
  'rank': Field(
    0,
    at_least(0),
    'Rank of the maps of text prompts into the image tower, where towers are wide; 0: full.',
  ),
  'classes': Field(
    'auto',
    one_of('auto', 'names', 'head'),
    'names: class names through the text tower (a CLIP pair); head: a linear map of both features; '
    'auto: names where both towers have a projection and an example has one label.',
  ),
  'template': TEMPLATE,
}
COOP = {
  'num_tokens': Field(16, at_least(0), 'M: learned vectors beside a class name.'),
  'words': Field(
    '', ANY_STRING, "Words that the vectors begin as, e.g. 'a photo of a'; empty: small noise."
  ),
  'name_position': Field(
    'end',
    one_of('end', 'middle', 'front'),
    'Where the class name stands, seen from the vectors.',
  ),
  'per_class': Field(False, FLAG, 'Vectors of its own for each class.'),
}
COCOOP = {
  'num_tokens': Field(4, at_least(0), COOP['num_tokens'].meaning),
  'words': Field('a photo of a', ANY_STRING, COOP['words'].meaning),
  'name_position': COOP['name_position'],
}
PMF = {
  'num_layers': Field(2, at_least(1), 'M: last layers of each tower that fuse.'),
  'num_tokens': Field(4, at_least(1), 'Prompts of each kind, layer and modality.'),
  'hidden': Field(
    0, at_least(0), 'Hidden width of the maps between towers; 0: half the width of the wider one.'
  ),
}
PROTOTYPES = {
  'width': Field(
    512, at_least(1), "Width that each modality's mean token is mapped to (method=prototypes)."
  ),
  'scale': Field(32.0, more_than(0), 'What cosines with prototypes are multiplied by.'),
  'margin': Field(
    0.1,
    between(0, 1),
    "Angle that training adds to a complete example's own classes, in radians.",
  ),
  'margin_missing': Field(
    0.15, between(0, 1), 'The same for an example without one of its modalities.'
  ),
  'supcon': Field(
    0.9,
    at_least(0),
    'Weight of the contrast that draws together the prototypes of a class (method=prototypes, and '
    'molt with classifier.kind=prototypes).',
  ),
}
# What is read of a text tower that pictures run through as words.
READOUT = 'mean: of the tokens of image and text; token: the one that reads all of them'
PROMPT_FUSE = {
  'placement': Field(
    'behind',
    one_of('behind', 'front'),
    'behind: prompts read image and text, and are read (PromptFuse); front: they read neither, and '
    'both read them (BlindPrompt).',
  ),
  'num_tokens': Field(20, at_least(1), 'Prompts.'),
  'cells': Field(
    0,
    between(0, 64),
    'Cells along a side of a picture whose means are words beside its first token; 0: that alone.',
  ),
  'readout': Field(
    'auto',
    one_of('auto', 'mean', 'token', 'prompt'),
    f'{READOUT}; prompt: the last prompt; auto: prompt where they stand behind, else mean.',
  ),
}
MMBT = {
  'cells': Field(
    3,
    between(1, 64),
    'Cells along a side of a picture whose means are words beside its first token.',
  ),
  'readout': Field('mean', one_of('mean', 'token'), f'{READOUT}.'),
}
FIRST_LAYERS = Field(
  0,
  at_least(0),
  'First layers of each tower that have prompts; 0: six, or as many as the shallower one has.',
)
MAP = {
  'placement': Field(
    'input',
    one_of('input', 'attention'),
    'input: prompts in front of the sequence, new ones before each layer; attention: keys and '
    'values that every token reads beside its own.',
  ),
  'num_layers': FIRST_LAYERS,
  'num_tokens': Field(
    16, at_least(1), 'Prompts of each layer and case; attention: half are keys, half are values.'
  ),
}
DCP = {
  'num_layers': FIRST_LAYERS,
  'num_tokens': Field(12, at_least(1), 'Prompts of each kind: correlated, common, dynamic.'),
  'train_dynamic': Field(
    True,
    FLAG,
    'Train the queries of dynamic prompts; off: they stay as they were drawn, as in the published '
    'code.',
  ),
}
MORA = {
  'kind': Field(
    'mora', one_of('mora', 'lora'), 'mora: with factors that the towers share; lora: without.'
  ),
  'num_layers': Field(2, at_least(1), 'Last layers of each tower that get new weights.'),
  'rank': Field(4, at_least(1), 'r: rank of the updates.'),
  'targets': Field(
    'qv', one_of('q', 'k', 'v', 'qk', 'qv', 'kv', 'qkv'), 'Projections that get new weights.'
  ),
  'scale': Field(0.1, more_than(0), 's: what updates are multiplied by.'),
  'start': Field(
    'pretrained',
    one_of('pretrained', 'published'),
    'What training begins with (mora): the pretrained towers, or, as in the published code, what '
    'the formula makes of random factors.',
  ),
}
METHODS = {
  'molt': Row('molt_jax.methods.molt', 'MoLT (Sun and Song 2024)', MOLT, trains_towers=True),
  'late_fusion': Row(
    'molt_jax.methods.late_fusion',
    'pooled last states, concatenated, MLP (the baseline without MoLT)',
    {},
    trains_towers=True,
  ),
  'mmrl': Row(
    'molt_jax.methods.mmrl',
    'representation tokens in the upper layers (Guo and Gu 2025)',
    MMRL,
    names='can',
  ),
  'mmrlpp': Row(
    'molt_jax.methods.mmrl', 'MMRL++: shared maps, progressive tokens', MMRLPP, names='can'
  ),
  'maple': Row(
    'molt_jax.methods.maple',
    'coupled prompts in the lower layers of both towers (Khattak et al. 2023)',
    MAPLE,
    names='can',
  ),
  'coop': Row(
    'molt_jax.methods.coop',
    'learned context beside the class names of a CLIP pair (Zhou et al. 2022)',
    COOP,
    names='must',
  ),
  'cocoop': Row(
    'molt_jax.methods.coop',
    'the same with a context for each example, few classes (Zhou et al. 2022)',
    COCOOP,
    names='must',
  ),
  'pmf': Row(
    'molt_jax.methods.pmf',
    'prompts exchanged between the last layers (Li et al. 2023)',
    PMF,
    revision=2,  # Prompts stand in front of a text that begins with no token of its own.
  ),
  'prompt_fuse': Row(
    'molt_jax.methods.prompt_fuse',
    'the image and prompts as words of the text tower: PromptFuse, BlindPrompt (Liang et al. 2022)',
    PROMPT_FUSE,
  ),
  'mmbt': Row(
    'molt_jax.methods.mmbt',
    "a picture's cells as words of the text tower (Kiela et al. 2019)",
    MMBT,
    trains_towers=True,
  ),
  'map': Row(
    'molt_jax.methods.map', 'prompts that say what is missing (MAP, Lee et al. 2023)', MAP
  ),
  'dcp': Row(
    'molt_jax.methods.dcp', 'correlated, common and dynamic prompts (Hu et al. 2024)', DCP
  ),
  'mora': Row(
    'molt_jax.methods.mora',
    'low-rank updates of the last layers: LoRA, MoRA (Zhao et al. 2025)',
    MORA,
  ),
}
KNN = {
  'examples': Field(
    4096,
    between(1, 8192),
    'Most training examples that are compared with, drawn at random where there are more.',
  ),
}
PROBE = {
  'kernel': Field(
    'linear', one_of('linear', 'rbf'), 'Of the ridge regression; rbf: radial, on all of its inputs.'
  ),
  'layers': Field(
    '-1:', LAYERS, 'Hidden states of each tower that are read, written as molt.layers is.'
  ),
  'cells': Field(
    0,
    between(0, 64),
    'Cells along a side of a picture that may be compared beside the means; 0: none.',
  ),
  'landmarks': Field(
    4096,
    between(10, 8192),
    'Most training examples that kernels compare with; all are fitted to, up to 8192.',
  ),
}
HUSE = {
  'width': Field(512, at_least(1), 'Width of the hidden layers and of the common space.'),
  'image_layers': Field(5, at_least(1), 'Hidden layers over images.'),
  'text_layers': Field(2, at_least(1), 'Hidden layers over texts.'),
  'dropout': Field(0.15, below(0, 1), 'Dropout rate behind each of them.'),
  'gap': Field(1.0, at_least(0), "Weight of the cosine distance of an example's two embeddings."),
  'semantic': Field(
    1.0,
    at_least(0),
    "Weight of the loss that puts examples as far apart as their classes' names are.",
  ),
  'margin': Field(0.5, between(0, 2), 'Distance beyond which that loss leaves pairs alone.'),
}
ALBEF = {
  'num_layers': Field(2, at_least(1), 'Fusion blocks.'),
  'width': Field(256, at_least(1), 'Width of the fusion blocks.'),
  'num_heads': Field(4, at_least(1), 'Their attention heads; must divide albef.width.'),
  'dropout': Field(0.1, below(0, 1), 'Dropout rate in the fusion blocks.'),
  'space': Field(128, at_least(1), 'Width of the embeddings that are contrasted.'),
  'queue': Field(
    4096, at_least(0), "Pairs that images and texts are contrasted with; 0: the batch's alone."
  ),
  'momentum': Field(
    0.995, between(0, 1), 'What the moving average of the parameters keeps in a step.'
  ),
  'alpha': Field(
    0.4,
    between(0, 1),
    'Weight of soft targets by the moving average: of the classifier, and of contrast.',
  ),
  'itc': Field(1.0, at_least(0), 'Weight of image-text contrast.'),
  'itm': Field(1.0, at_least(0), 'Weight of image-text matching against hard negatives.'),
  'separation': Field(0.0, at_least(0), 'Weight of deep feature separation (Jiang et al. 2023).'),
  'bridge': Field(0.0, at_least(0), 'Weight of the Brownian bridge (the same).'),
  'geometry': Field(0.0, at_least(0), 'Weight of geometric consistency (the same).'),
}
METHODS |= {
  'prototypes': Row(
    'molt_jax.methods.prototypes',
    'cosines with prototypes of each class, modality and missing pattern (DPL)',
    PROTOTYPES,
    trains_towers=True,
  ),
  'knn': Row('molt_jax.methods.knn', 'nearest neighbours on pooled hidden states', KNN),
  'huse': Row(
    'molt_jax.methods.huse',
    'one space and one classifier for both modalities (Narayana et al. 2019)',
    HUSE,
    trains_towers=True,
  ),
  'albef': Row(
    'molt_jax.methods.albef',
    'align, then fuse by cross-attention (Li et al. 2021), with latent structures',
    ALBEF,
  ),
  'probe': Row('molt_jax.methods.probe', 'ridge regression on pooled hidden states', PROBE),
}
METHOD = Field(
  'molt',
  one_of(*METHODS),
  '; '.join(f'{name}: {row.meaning}' for name, row in METHODS.items()) + '.',
)
SECTIONS = {name: row.fields for name, row in METHODS.items() if row.fields}
