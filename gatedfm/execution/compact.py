"""Models from which closed modules are gone: smaller arrays on disk and in memory."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gatedfm import gates as gates_lib
from gatedfm.gates import Gates, Pattern, Site
from gatedfm.models import stack
from gatedfm.models.gate_predictor import GATE_MODULES
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.models.speech import SpeechModel
from gatedfm.models.speech_config import ConfigError, SpeechConfig
from gatedfm.nn import gating
from gatedfm.nn.layers import Compacted, Factorized


def compact(params: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
  """The parameters without those of closed modules.

  What is left runs with `pattern.fixed()` as gates, in the unrolled layout; biases that a
  closed module would have added with it are gone too, the merge's constant, which is added
  whatever the gates say, stays.

  Args:
    params: unrolled, with the merge's constants folded (`for_inference`).
    pattern: which modules are open.

  Raises:
    ValueError: stacked parameters, or a module that they do not have.
  """
  out = dict(params)
  for name, bits in pattern.sites:
    stack_name, module = name.split('/', 1)
    if stack_name not in out:
      raise ValueError(f'{name}: the parameters have no {stack_name}')
    layers = dict(out[stack_name]['layers'])
    if len(layers) != len(bits) or f'{stack.PREFIX}0' not in layers:
      raise ValueError(f'{name} has {len(bits)} layers; the unrolled parameters hold {len(layers)}')
    for i, is_open in enumerate(bits):
      layer = layers[f'{stack.PREFIX}{i}']
      if module not in layer:
        raise ValueError(f'layer {i} of the {stack_name} has no {module}; it has {sorted(layer)}')
      if not is_open:
        layers[f'{stack.PREFIX}{i}'] = {k: v for k, v in layer.items() if k != module}
    out[stack_name] = out[stack_name] | {'layers': layers}
  return out


# Projections of a module's attention or FFN, and the axis along which its units lie.
_ALONG = {
  'head': {'query': 1, 'key': 1, 'value': 1, 'out': 0},
  'channel': {'w_1': 1, 'w_gate': 1, 'w_2': 0},
}


def compact_units(
  params: dict[str, Any], gates: Gates, cfg: SpeechConfig | LmConfig
) -> dict[str, Any]:
  """The parameters without those of closed heads and hidden channels.

  A layer keeps as many as are open, each its own number. The model runs with them as it is.
  Heads of keys and values stay as long as a query head reads them.

  Args:
    params: unrolled, never compacted by units before; modules that are gone stay so.
    gates: 0 or 1, `[N, U]` (or broadcast), for any of `cfg.unit_sites()` and no other site.
    cfg: of the model.

  Raises:
    ValueError: stacked parameters, an unknown site, another shape, or a gate between open and
      closed.
  """
  sites = {s.name: s for s in cfg.unit_sites()}
  named = [sites[name] for name in gates.values if name in sites]
  gates_lib.validate(gates, named)
  out = dict(params)
  for site in named:
    given, shape = np.asarray(gates[site.name]), (site.layers, site.units)
    if given.ndim > 2:
      raise ValueError(f'gates of {site.name} differ by example: nothing can be cut out of arrays')
    open_NxU = given.reshape(shape) if given.size == site.size else np.broadcast_to(given, shape)
    if ((open_NxU != 0) & (open_NxU != 1)).any():
      raise ValueError(f'gates of {site.name} lie between open and closed: multiply by them')
    if site.unit == 'rank':
      out[site.stack] = out[site.stack] | _with_ranks(out[site.stack], np.flatnonzero(open_NxU))
      continue
    module = site.module.rsplit('_', 1)[0]
    inner = 'attention' if site.unit == 'head' else 'ffn'
    layers = dict(out[site.stack]['layers'])
    if f'{stack.PREFIX}0' not in layers:
      raise ValueError(f"{site.name}: the {site.stack}'s parameters are stacked; unroll them first")
    for i, open_U in enumerate(open_NxU):
      layer = layers[f'{stack.PREFIX}{i}']
      if module in layer:
        kept = {inner: _narrowed(layer[module][inner], site, np.flatnonzero(open_U))}
        layers[f'{stack.PREFIX}{i}'] = layer | {module: layer[module] | kept}
    out[site.stack] = out[site.stack] | {'layers': layers}
  return out


def _with_ranks(stack_params: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
  """The embeddings' factors with those ranks alone."""
  table = stack_params['embedding']
  first, second = jnp.take(table.first, kept, 1), jnp.take(table.second, kept, 0)
  units = tuple(kept.tolist())
  return {'embedding': Factorized(Compacted(first, units), Compacted(second, units))}


def _narrowed(params: dict[str, Any], site: Site, kept: np.ndarray) -> dict[str, Any]:
  """An attention's or FFN's projections with the units that are kept."""
  out, heads = dict(params), site.unit == 'head'
  width = params['query']['kernel'].shape[1] // site.units if heads else 1
  for name, axis in _ALONG[site.unit].items():
    if name not in params:
      continue
    linear, mine = params[name], kept
    if name in ('key', 'value'):
      mine = np.unique(kept // (site.units * width // linear['kernel'].shape[1]))
    columns = (mine[:, None] * width + np.arange(width)).ravel()
    units = tuple(mine.tolist())
    out[name] = linear | {'kernel': _taken(linear['kernel'], columns, axis, units)}
    if axis == 1 and 'bias' in linear:
      out[name]['bias'] = Compacted(linear['bias'][columns], units)
  return out


def _taken(kernel: Any, columns: np.ndarray, axis: int, units: tuple[int, ...]) -> Any:
  """Those rows or columns of a matrix; of factors, of the one that has them."""
  if isinstance(kernel, Factorized):
    factor = ('first', 'second')[axis]
    cut = _taken(getattr(kernel, factor), columns, axis, units)
    return kernel.replace(**{factor: cut})
  return Compacted(jnp.take(kernel, columns, axis), units)


def fold(params: dict[str, Any], cut: Gates, cfg: LmConfig) -> tuple[dict[str, Any], Gates]:
  """A compacted language model without modules of which only a constant is left.

  A module without heads or channels adds the same vector, its output's bias, to every token. Up
  to there nothing reads what the residual stream was given last, so that vector is added to it
  there: to the bias of the module before or, where norms follow each sum, of that norm; in front
  of the first, to the position embeddings. The function stays what it is, dropout aside.

  Args:
    params: unrolled, what compaction has left.
    cut: by which it was compacted: `[N]` per site of modules, `[N, U]` per site of units.
    cfg: of the model.

  Returns: parameters and gates in which those modules are closed. A constant that nothing can
  take stays, and its module with it.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  left = {site.name: np.array(cut[site.name]) for site in cfg.all_sites()}
  outputs = {'attention': 'attention/out/bias', 'ffn': 'ffn/w_2/bias'}
  taker = f'{STACK}/position_embedding'
  for i in range(cfg.layers):
    for site, units in zip(cfg.all_sites(), cfg.unit_sites()):
      path = f'{STACK}/layers/{stack.PREFIX}{i}/{site.module}'
      bias = f'{path}/{outputs[site.module]}'
      empty = left[site.name][i] and not cut[units.name][i].any()
      if empty and (not cfg.use_bias or taker in flat):
        if cfg.use_bias:
          flat[taker] = flat[taker] + flat[bias]
        flat = {k: v for k, v in flat.items() if not k.startswith(f'{path}/')}
        left[site.name][i] = 0
      if not cfg.pre_norm:
        taker = f'{path}_norm/bias'
      elif left[site.name][i]:
        taker = bias
  return traverse_util.unflatten_dict(flat, sep='/'), Gates(cut.values | left)


def without_predictors(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters without those of predictors, whose answer is known."""
  return {k: v for k, v in params.items() if k not in GATE_MODULES}


def fixed_pattern(model: SpeechModel, params: dict[str, Any]) -> Pattern:
  """The pattern of a model whose predictors read nothing: it is the same for all utterances.

  Raises:
    ConfigError: a model whose gates follow the context, or that has none.
  """
  gates = model.cfg.gates
  if not gates.enabled or gates.context or gates.scope == 'layer':
    raise ConfigError(
      'compact execution needs one gate pattern for all utterances, and this model '
      + ('decides by context' if gates.enabled else 'has no gates')
      + ": give a pattern, or use execution='skip'"
    )
  none, x = jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, model.cfg.d))
  context = gating.Context(none, none)
  decide = lambda m: {s: m.decide(s, x, jnp.ones((1, 1), bool), context) for s in gates.stacks}
  decided = nn.apply(decide, model)({'params': params})
  values = {f'{s}/{module}': g for s, own in decided.items() for module, g in own.items()}
  sites = model.cfg.all_sites()
  return gates_lib.pattern(gates_lib.completed(Gates(values), sites), sites)
