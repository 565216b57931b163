"""Language models of Hugging Face's layout to ours and back, exactly.

One table per kind says which of their tensors is which of ours; reading, writing and checking all
walk it. Their side is the state dict of `OPTForCausalLM` or `LlamaForCausalLM`; ours is the
unrolled tree of `LanguageModel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from gatedfm.convert.tensor_files import LazyTensor, Tensors
from gatedfm.data.types import DataError
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig, llama
from gatedfm.models.speech_config import ConfigError

ACTIVATIONS = {'relu': 'relu', 'silu': 'swish', 'gelu': 'gelu'}


@dataclasses.dataclass(frozen=True)
class Row:
  """One of their tensors, our path to it, and whether it is transposed: (out, in) and (in, out)."""

  theirs: str
  ours: str
  transposed: bool = False

  def laid_out(self, a: np.ndarray) -> np.ndarray:
    """From one layout to the other, which is the same either way."""
    return a.T if self.transposed else a


def _linear(theirs: str, ours: str, bias: bool) -> Iterator[Row]:
  yield Row(f'{theirs}.weight', f'{ours}/kernel', True)
  if bias:
    yield Row(f'{theirs}.bias', f'{ours}/bias')


def _norm(theirs: str, ours: str, bias: bool) -> Iterator[Row]:
  yield Row(f'{theirs}.weight', f'{ours}/scale')
  if bias:
    yield Row(f'{theirs}.bias', f'{ours}/bias')


def _opt(cfg: LmConfig) -> Iterator[Row]:
  before = 'model.decoder.'
  yield Row(f'{before}embed_tokens.weight', 'decoder/embedding')
  yield Row(f'{before}embed_positions.weight', 'decoder/position_embedding')
  if cfg.embed_width:
    for name in ('project_in', 'project_out'):
      yield from _linear(before + name, f'decoder/{name}', False)
  if cfg.final_norm:
    yield from _norm(f'{before}final_layer_norm', 'decoder/final_norm', True)
  norm = '{}/norm' if cfg.pre_norm else '{}_norm'
  for i in range(cfg.layers):
    theirs, ours = f'{before}layers.{i}.', f'decoder/layers/layers_{i}/'
    for t, o in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('out', 'out')):
      yield from _linear(f'{theirs}self_attn.{t}_proj', f'{ours}attention/attention/{o}', True)
    for t, o in (('fc1', 'w_1'), ('fc2', 'w_2')):
      yield from _linear(theirs + t, f'{ours}ffn/ffn/{o}', True)
    for t, o in (('self_attn_layer_norm', 'attention'), ('final_layer_norm', 'ffn')):
      yield from _norm(theirs + t, ours + norm.format(o), True)


def _llama(cfg: LmConfig) -> Iterator[Row]:
  yield Row('model.embed_tokens.weight', 'decoder/embedding')
  yield from _norm('model.norm', 'decoder/final_norm', False)
  for i in range(cfg.layers):
    theirs, ours = f'model.layers.{i}.', f'decoder/layers/layers_{i}/'
    for t, o in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('o', 'out')):
      yield from _linear(f'{theirs}self_attn.{t}_proj', f'{ours}attention/attention/{o}', False)
    for t, o in (('up', 'w_1'), ('gate', 'w_gate'), ('down', 'w_2')):
      yield from _linear(f'{theirs}mlp.{t}_proj', f'{ours}ffn/ffn/{o}', False)
    yield from _norm(f'{theirs}input_layernorm', f'{ours}attention/norm', False)
    yield from _norm(f'{theirs}post_attention_layernorm', f'{ours}ffn/norm', False)


def rows(cfg: LmConfig) -> list[Row]:
  """The table of a model: each of our parameters once."""
  table = _llama if cfg.positions == 'rotary' else _opt
  out = list(table(cfg))
  return out if cfg.tied else [*out, *_linear('lm_head', 'decoder/output', False)]


_NUMBERS = {
  'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
  'head_dim', 'intermediate_size', 'ffn_dim', 'word_embed_proj_dim', 'max_position_embeddings',
}  # fmt: skip


def config(theirs: Mapping[str, Any]) -> LmConfig:
  """Our configuration of their `config.json`.

  Raises:
    ConfigError: another kind of model, or an option that ours has not; it is named.
  """
  if not isinstance(theirs, Mapping):
    raise ConfigError('config.json does not hold named options')
  read = {'opt': _opt_config, 'llama': _llama_config}
  kind = theirs.get('model_type')
  # What is null is as good as missing, but for tokens: there it says that there is none.
  theirs = {k: v for k, v in theirs.items() if v is not None or k.endswith('_token_id')}
  for name in _NUMBERS & set(theirs):
    if type(theirs[name]) is not int or theirs[name] < 1:
      raise ConfigError(f'{name} is {theirs[name]!r}; it must be a whole number above 0')
  if kind not in read:
    raise ConfigError(f'model_type is {kind!r}; ours reads {" and ".join(read)}')
  try:
    cfg = read[kind](theirs)
  except KeyError as e:
    raise ConfigError(f'config.json has no {e}') from None
  cfg.validate()
  return cfg


def _only(theirs: Mapping[str, Any], **values: Any) -> None:
  """Raises ConfigError for an option that is set to what we have not."""
  for name, value in values.items():
    if (given := theirs.get(name, value)) != value:
      raise ConfigError(f'{name} is {given!r}; this reads models with {value!r}')


def _activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise ConfigError(f'activation {name!r} is none of {", ".join(ACTIVATIONS)}')
  return ACTIVATIONS[name]


def _tokens(theirs: Mapping[str, Any], **usual: int) -> dict[str, int]:
  """`bos`, `eos`, `pad`; of several ends the first."""
  out = {}
  for name, value in usual.items():
    given = theirs.get(f'{name}_token_id', value)
    given = next(iter(given), None) if isinstance(given, list) else given
    if given is not None and type(given) is not int:
      raise ConfigError(f'{name}_token_id is {given!r}; it must be a number')
    out[name] = -1 if given is None else given
  return out


def _opt_config(theirs: Mapping[str, Any]) -> LmConfig:
  _only(
    theirs, _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True
  )
  d, pre_norm = theirs['hidden_size'], theirs.get('do_layer_norm_before', True)
  narrow = theirs.get('word_embed_proj_dim') or d
  return LmConfig(
    vocab_size=theirs['vocab_size'],
    d=d,
    layers=theirs['num_hidden_layers'],
    heads=theirs['num_attention_heads'],
    ffn=theirs['ffn_dim'],
    activation=_activation(theirs.get('activation_function', 'relu')),
    pre_norm=pre_norm,
    final_norm=pre_norm,
    embed_width=0 if narrow == d else narrow,
    max_tokens=theirs['max_position_embeddings'],
    tied=theirs.get('tie_word_embeddings', True),
    **_tokens(theirs, bos=2, eos=2, pad=1),
  )


def _llama_config(theirs: Mapping[str, Any]) -> LmConfig:
  _only(theirs, attention_bias=False, mlp_bias=False, rope_scaling=None)
  rotary = theirs.get('rope_parameters') or {}
  _only(rotary, rope_type='default')
  heads, d = theirs['num_attention_heads'], theirs['hidden_size']
  groups, width = theirs.get('num_key_value_heads') or heads, theirs.get('head_dim') or d // heads
  return llama(
    vocab_size=theirs['vocab_size'],
    d=d,
    layers=theirs['num_hidden_layers'],
    heads=heads,
    kv_heads=0 if groups == heads else groups,
    head_width=0 if width * heads == d else width,
    ffn=theirs['intermediate_size'],
    activation=_activation(theirs.get('hidden_act', 'silu')),
    norm_eps=theirs.get('rms_norm_eps', 1e-6),
    theta=float(rotary.get('rope_theta') or theirs.get('rope_theta') or 10_000.0),
    max_tokens=theirs['max_position_embeddings'],
    tied=theirs.get('tie_word_embeddings', False),
    **_tokens(theirs, bos=1, eos=2, pad=-1),
  )


def to_config(cfg: LmConfig) -> dict[str, Any]:
  """The `config.json` of a model of ours.

  Raises:
    ConfigError: what their classes cannot have, such as another number of heads.
  """
  _check_heads(cfg)
  activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[cfg.activation]
  shared = {
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.d,
    'num_hidden_layers': cfg.layers,
    'num_attention_heads': cfg.heads,
    'max_position_embeddings': cfg.max_tokens,
    'tie_word_embeddings': cfg.tied,
  }
  for name in ('bos', 'eos', 'pad'):
    shared[f'{name}_token_id'] = None if getattr(cfg, name) < 0 else getattr(cfg, name)
  if cfg.positions == 'rotary':
    out = shared | {
      'model_type': 'llama',
      'architectures': ['LlamaForCausalLM'],
      'num_key_value_heads': cfg.groups,
      'head_dim': cfg.width,
      'intermediate_size': cfg.ffn,
      'hidden_act': activation,
      'rms_norm_eps': cfg.norm_eps,
      'rope_theta': cfg.theta,
    }
  else:
    out = shared | {
      'model_type': 'opt',
      'architectures': ['OPTForCausalLM'],
      'ffn_dim': cfg.ffn,
      'activation_function': activation,
      'do_layer_norm_before': cfg.pre_norm,
      'word_embed_proj_dim': cfg.embed_width or cfg.d,
      'dropout': 0.0,
    }
  ours, theirs = _architecture(cfg), _architecture(config(out))
  if lost := sorted(name for name in ours if ours[name] != theirs[name]):
    raise ConfigError(f'their classes have no such {", ".join(lost)}: it cannot be exported')
  return out


def _architecture(cfg: LmConfig) -> dict[str, Any]:
  """What the answers depend on, written out."""
  out = dataclasses.asdict(cfg) | {'kv_heads': cfg.groups, 'head_width': cfg.width}
  for name in ('dtype', 'activation_dtype', 'scan_layers', 'remat', 'execution', 'dropout'):
    del out[name]
  unread = ('position_offset',) if cfg.positions == 'rotary' else ('theta',)
  return {k: v for k, v in out.items() if k not in (*unread, 'add_bos')}


def _check_heads(cfg: LmConfig) -> None:
  """Their classes compute widths from the number of heads, or want it to divide all the same."""
  if cfg.positions != 'rotary' and cfg.heads * cfg.width != cfg.d:
    raise ConfigError(
      f"{cfg.heads} heads of {cfg.width} are left of a width of {cfg.d}, and OPT's attention in "
      'transformers has no other number of heads than fills it: prune channels or whole layers '
      'of it for export, or let it stay in our format'
    )
  if cfg.d % cfg.heads:
    fit = [h for h in range(1, cfg.heads) if not cfg.d % h]
    raise ConfigError(
      f'{cfg.heads} heads do not divide a width of {cfg.d}, which LlamaConfig of transformers '
      f'wants: with --shape=uniform, close so many that one of {fit} are left'
    )


def _theirs(tensors: Tensors, cfg: LmConfig) -> dict[str, LazyTensor]:
  """Under the table's names: OPT's oldest files lack `model.`; what is no parameter is gone."""
  out = {}
  for name, tensor in tensors.items():
    name = f'model.{name}' if name.startswith('decoder.') else name
    if name.endswith(('decoder.version', 'rotary_emb.inv_freq')):
      continue
    if name == 'lm_head.weight' and cfg.tied:  # the embeddings once more
      continue
    out[name] = tensor
  return out


def lazy_params(tensors: Tensors, cfg: LmConfig) -> dict[str, LazyTensor]:
  """Our parameters by path, each read, and laid out as ours, when it is asked for.

  Raises:
    DataError: tensors that are missing, extra or of another shape, all of them by name.
  """
  table, shapes, given = rows(cfg), lm.abstract_params(cfg), _theirs(tensors, cfg)
  wrong = [f'{name}: not in the model' for name in sorted(set(given) - {r.theirs for r in table})]
  out = {}
  for row in table:
    want = tuple(shapes[row.ours].shape)[:: -1 if row.transposed else 1]
    if row.theirs not in given:
      wrong.append(f'{row.theirs} {want}: not in the checkpoint')
    elif given[row.theirs].shape != want:
      wrong.append(f'{row.theirs}: model {want}, checkpoint {given[row.theirs].shape}')
    else:
      read = lambda row=row, tensor=given[row.theirs]: row.laid_out(tensor.read())
      out[row.ours] = LazyTensor(tuple(shapes[row.ours].shape), read)
  if wrong:
    raise DataError(f'{len(wrong)} tensors do not fit the model:\n  ' + '\n  '.join(wrong))
  return out


def to_theirs(params: Mapping[str, Any], cfg: LmConfig) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors by name, one at a time, of our unrolled parameters."""
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  for row in rows(cfg):
    yield row.theirs, row.laid_out(np.asarray(flat[row.ours]))
