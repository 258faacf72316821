"""MMBT: the means of a picture's cells as words in front of the text (Kiela et al. 2019); see
`prompt_fuse`, which it shares everything with. With `backbones.MODALITY.trainable` and `train_from`
it is the tuned bitransformer, without them the frozen one.
"""

import dataclasses

from molt_jax.methods import prompt_fuse


def build(config, towers, *, num_classes, class_names=()) -> prompt_fuse.PromptFuse:
  """See `base.make_method`.

  Raises:
    UserError: no text tower.
  """
  del class_names
  c = config.mmbt
  method = prompt_fuse.make(config, towers, num_classes, num_prompts=0, num_cells=c.cells)
  return dataclasses.replace(method, readout=c.readout)
