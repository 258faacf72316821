"""MoLT as the paper prints it, the way one would write it in PyTorch: what `tools/bench_train.py`
measures molt_jax against.

Transformers towers under no_grad with SDPA, texts padded to the longest of the batch, a head of
plain modules layer by layer, bfloat16 autocast on a GPU and float32 on a CPU, CCA as public DCCA
code has it (eigh of d x d covariances, differentiated by autograd), Adam. Nothing here is slow on
purpose, and nothing is tuned.
"""

import dataclasses
import math

import torch
import transformers
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the head and the loss depend on: d_c, L_s, K, alpha, beta, the CCA ridge relative to trace
  / d, the learning rate.
  """

  width: int
  num_layers: int
  num_classes: int
  cca_weight: float = 0.1
  ce_weight: float = 0.9
  ridge: float = 1e-3
  learning_rate: float = 4e-4


class TranslationLayer(nn.Module):
  """Eq. 1 to 3 for one pair of hidden states, and the mean over tokens."""

  def __init__(self, image_width, text_width, width):
    super().__init__()
    self.project = nn.ModuleDict(
      {'image': nn.Linear(image_width, width), 'text': nn.Linear(text_width, width)}
    )
    self.query, self.key, self.value = (
      nn.ModuleDict({m: nn.Linear(width, width) for m in self.project}) for _ in range(3)
    )
    self.norm = nn.ModuleDict({m: nn.LayerNorm(width) for m in self.project})

  def forward(self, image_bid, text_btd, text_mask_bt):
    x = {'image': self.project['image'](image_bid), 'text': self.project['text'](text_btd)}
    pooled = []
    for own, other, keys_bs in (('image', 'text', text_mask_bt), ('text', 'image', None)):
      h_btc = attend(
        self.query[own](x[own]), self.key[other](x[other]), self.value[other](x[other]), keys_bs
      )
      h_btc = self.norm[own](h_btc + x[own])
      if own == 'text':
        valid_bt1 = text_mask_bt[:, :, None].to(h_btc.dtype)
        pooled.append((h_btc * valid_bt1).sum(1) / valid_bt1.sum(1))
      else:
        pooled.append(h_btc.mean(1))
    return pooled


def attend(query_btc, key_bsc, value_bsc, mask_bs):
  """SoftMax(Q K' / sqrt(C)) V with one head."""
  mask_bts = None if mask_bs is None else mask_bs[:, None, :]
  return F.scaled_dot_product_attention(
    query_btc, key_bsc, value_bsc, attn_mask=mask_bts, scale=1 / math.sqrt(query_btc.shape[-1])
  )


class Head(nn.Module):
  """Eq. 1 to 7 and a linear classifier: hidden states -> (logits, h_i and h_t of each layer)."""

  def __init__(self, image_width, text_width, settings):
    super().__init__()
    c = settings.width
    self.layers = nn.ModuleList(
      TranslationLayer(image_width, text_width, c) for _ in range(settings.num_layers)
    )
    self.layer_weights = nn.Parameter(torch.ones(settings.num_layers))
    self.query = nn.Linear(c, c)
    self.key, self.value = (
      nn.ModuleDict({'image': nn.Linear(image_width, c), 'text': nn.Linear(text_width, c)})
      for _ in range(2)
    )
    self.classifier = nn.Linear(c, settings.num_classes)

  def forward(self, image_states, text_states, text_mask_bt):
    pooled = [
      layer(image, text, text_mask_bt)
      for layer, image, text in zip(self.layers, image_states, text_states, strict=True)
    ]
    joint_bc = sum(
      m * (h_i + h_t) / 2 for m, (h_i, h_t) in zip(self.layer_weights, pooled, strict=True)
    ) / len(pooled)
    query_b1c = self.query(joint_bc)[:, None]
    answers = [
      attend(query_b1c, self.key[m](states), self.value[m](states), mask_bs)[:, 0]
      for m, states, mask_bs in (
        ('image', image_states[-1], None),
        ('text', text_states[-1], text_mask_bt),
      )
    ]
    return self.classifier((answers[0] + answers[1]) / 2), pooled


def cca_loss(x_bd, y_bd, ridge):
  """Minus the sum of canonical correlations, over their number. The gradient that autograd takes
  through eigh is not finite for repeated eigenvalues, so for every batch that is no larger than d;
  it is then taken for zero, or training would end at the first step.
  """
  for h_bd in (x_bd, y_bd):
    if h_bd.requires_grad:
      h_bd.register_hook(lambda g: torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0))
  n, d = x_bd.shape
  x_bd, y_bd = x_bd - x_bd.mean(0), y_bd - y_bd.mean(0)
  t_dd = (
    inverse_root(x_bd.T @ x_bd / (n - 1), ridge)
    @ (x_bd.T @ y_bd / (n - 1))
    @ inverse_root(y_bd.T @ y_bd / (n - 1), ridge)
  )
  squares_d = torch.linalg.eigvalsh(t_dd.T @ t_dd)
  return -squares_d.clamp(min=1e-12).sqrt().sum() / min(n - 1, d)


def inverse_root(s_dd, ridge):
  """(S + r)^(-1/2), r relative to the mean eigenvalue."""
  d = s_dd.shape[0]
  e_d, v_dd = torch.linalg.eigh(s_dd + ridge * s_dd.trace() / d * torch.eye(d, device=s_dd.device))
  return (v_dd * e_d.clamp(min=1e-12).rsqrt()) @ v_dd.T


class Baseline:
  """Towers, head and optimiser on one device.

  Args:
    text, image: dicts of Hugging Face configurations (`backbones.architectures.ARCHITECTURES`).
    settings: of head and loss.
    device: 'cpu' or 'cuda'.
    compiled: torch.compile the towers and the head (not CCA, whose eigh is a library call either
      way).
  """

  def __init__(self, text, image, settings, *, device='cpu', compiled=False, towers=None):
    self.settings, self.device = settings, device
    self.text, self.image = towers or make_towers(text, image, device)
    self.head = Head(image['hidden_size'], text['hidden_size'], settings).to(device)
    self.optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.learning_rate)
    self._states, self._head = (
      torch.compile(f) if compiled else f for f in (self.states, self.head)
    )

  def states(self, image_bchw, tokens_bt, mask_bt):
    """The last hidden states of both towers, as lists."""
    last = -self.settings.num_layers
    with torch.no_grad():
      dtype = next(self.image.parameters()).dtype
      image = self.image(
        pixel_values=image_bchw.to(dtype), output_hidden_states=True
      ).hidden_states[last:]
      text = self.text(
        input_ids=tokens_bt,
        attention_mask=mask_bt.long(),
        output_hidden_states=True,
        use_cache=False,
      ).hidden_states[last:]
    return image, text

  def loss(self, batch):
    """batch: image [B, 3, H, W], tokens [B, T], mask bool[B, T], label [B]. Returns (loss,
    cross-entropy, CCA).
    """
    image, text = self._states(batch['image'], batch['tokens'], batch['mask'])
    with torch.autocast(self.device, torch.bfloat16, enabled=self.device == 'cuda'):
      logits_bk, pooled = self._head(image, text, batch['mask'])
    ce = F.cross_entropy(logits_bk.float(), batch['label'])
    cca = sum(cca_loss(h_i.float(), h_t.float(), self.settings.ridge) for h_i, h_t in pooled) / len(
      pooled
    )
    return self.settings.cca_weight * cca + self.settings.ce_weight * ce, ce, cca

  def step(self, batch):
    """One update; returns the loss as a number, which waits for the device."""
    self.optimizer.zero_grad(set_to_none=True)
    loss, _, _ = self.loss(batch)
    loss.backward()
    self.optimizer.step()
    return loss.item()


def make_towers(text, image, device):
  """(LlamaModel, CLIPVisionModel) with random weights, bfloat16 on a GPU."""
  text, image = ({k: v for k, v in c.items() if k != 'model_type'} for c in (text, image))
  text_config = transformers.LlamaConfig(
    **text, rope_parameters={'rope_type': 'default', 'rope_theta': text.get('rope_theta', 10000.0)}
  )
  image_config = transformers.CLIPVisionConfig(**image)
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.bfloat16 if device == 'cuda' else torch.float32)
  try:
    with torch.device(device):
      towers = transformers.LlamaModel(text_config), transformers.CLIPVisionModel(image_config)
  finally:
    torch.set_default_dtype(before)
  return tuple(tower.eval().requires_grad_(False) for tower in towers)


def make_batch(batch, device='cpu'):
  """The dict of NumPy arrays that molt_jax trains on -> the baseline's tensors."""
  longest = batch['token_mask'].sum(axis=1).max()
  tensors = {
    'image': torch.tensor(batch['image']).permute(0, 3, 1, 2).contiguous(),
    'tokens': torch.tensor(batch['tokens'][:, :longest], dtype=torch.long),
    'mask': torch.tensor(batch['token_mask'][:, :longest]),
    'label': torch.tensor(batch['label'], dtype=torch.long),
  }
  return {name: tensor.to(device) for name, tensor in tensors.items()}
