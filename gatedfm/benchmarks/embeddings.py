"""Embedding tables beside the dense one: bytes, looking words up, a training step.

Tables are random; words are drawn as texts have them, by Zipf's law. Letters: V rows, D features,
B texts, L words, H units of what reads them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from safetensors import flax as safetensors

from gatedfm import clock
from gatedfm.models import tables
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig

SUITES = ('tables',)
CLASSES = 6
# Times over dense: of looking up, of a training step.
BOUNDS = {'lookup': 1.1, 'step': 0.5}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    rows, features: V and D.
    compression: share of parameters that factors remove.
    batch, length: B and L.
    units: H of the layer that reads the words.
    rounds: side by side.
    seed: of tables and words.
  """

  rows: int = 400_000
  features: int = 300
  compression: float = 0.9
  batch: int = 50
  length: int = 40
  units: int = 600
  rounds: int = 15
  seed: int = 0

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for what cannot be timed."""
    for name in ('rows', 'features', 'batch', 'length', 'units', 'rounds'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
    if self.seed < 0:
      raise ConfigError('seed is not negative')
    tables.resolved(TableConfig('factorized', self.compression), self.rows, self.features)


@dataclasses.dataclass(frozen=True)
class Way:
  """A table and the layer that reads it, `[features, H]`."""

  module: nn.Module
  variables: Mapping[str, Any]
  reader: jax.Array


def _ways(case: Case) -> dict[str, Way]:
  factors = tables.resolved(TableConfig('factorized', case.compression), case.rows, case.features)
  rank = factors.rank
  configs = {
    'dense': TableConfig(),
    'factorized': factors,
    'int8': TableConfig('quantized'),
    'int8 factors': TableConfig('quantized_factors', rank=rank),
    'folded': TableConfig(),
  }
  rng, out = np.random.default_rng(case.seed), {}
  for name, cfg in configs.items():
    # The second factor is in what reads the words.
    features = rank if name == 'folded' else case.features
    module = tables.make(cfg, case.rows, features)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, jnp.int32)))
    variables = jax.tree.map(lambda x: jnp.asarray(_drawn(rng, x)), shapes)
    reader = 0.02 * rng.standard_normal((features, case.units), np.float32)
    out[name] = Way(module, variables, jnp.asarray(reader))
  return out


def _drawn(rng: np.random.Generator, like: jax.ShapeDtypeStruct) -> np.ndarray:
  if np.issubdtype(like.dtype, np.integer):
    return rng.integers(-127, 128, like.shape, np.int8).astype(like.dtype)
  return (0.02 * rng.standard_normal(like.shape, np.float32)).astype(like.dtype)


def run(case: Case, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """Times a case; one row for each way.

  Returns: rows with `way`, `parameters`, `bytes` (of the table, at rest), `disk_bytes` (as
    safetensors), `training_bytes` (with gradient and Adam's moments); for `lookup` (words as
    vectors of D, `folded` of R), `read` (and the product behind it) and `step` (of training; codes
    are not trained) seconds and ratios over dense, quartiles.
  """
  case.validate()
  rng, ways = np.random.default_rng(case.seed), _ways(case)
  share = 1 / np.arange(1, case.rows + 1)
  shape = case.batch, case.length
  ids = jnp.asarray(rng.choice(case.rows, shape, p=share / share.sum()), jnp.int32)
  labels = jnp.asarray(rng.integers(0, CLASSES, case.batch))
  times = {}
  for kind, made in (('lookup', _lookup), ('read', _read), ('step', _step)):
    say(f'{kind}: {len(ways)} ways compile, then take turns')
    calls = {name: made(case, way, ids, labels) for name, way in ways.items()}
    times[kind] = clock.laps(calls, case.rounds)
  rows = []
  for name, way in ways.items():
    leaves = jax.tree.leaves(dict(way.variables))
    trained = sum(x.nbytes for x in jax.tree.leaves(way.variables.get('params', {})))
    row = {
      'way': name,
      'parameters': sum(x.size for x in leaves),
      'bytes': sum(x.nbytes for x in leaves),
      'disk_bytes': _disk(way.variables),
      'training_bytes': sum(x.nbytes for x in leaves) + 3 * trained,
    }
    for kind, seconds in times.items():
      row[kind] = {
        'seconds': clock.quartiles(seconds[name]),
        'over_dense': clock.quartiles(seconds[name] / seconds['dense']),
      }
    rows.append(row)
    say(_describe(row, rows[0]))
  return rows


def _lookup(case: Case, way: Way, ids: jax.Array, labels: jax.Array) -> Callable[[], Any]:
  call = jax.jit(way.module.apply)
  return lambda: call(way.variables, ids)


def _read(case: Case, way: Way, ids: jax.Array, labels: jax.Array) -> Callable[[], Any]:
  call = jax.jit(lambda variables, reader, ids: way.module.apply(variables, ids) @ reader)
  return lambda: call(way.variables, way.reader, ids)


def _step(case: Case, way: Way, ids: jax.Array, labels: jax.Array) -> Callable[[], Any]:
  """A step of Adam on the mean of what is read; state is handed on."""
  tx = optax.adam(1e-3)
  fixed = {k: v for k, v in way.variables.items() if k != 'params'}
  out = 0.1 * np.random.default_rng(case.seed).standard_normal((case.units, CLASSES), np.float32)
  copy = lambda x: jnp.array(x, copy=True)
  params = jax.tree.map(copy, (way.variables.get('params', {}), way.reader, jnp.asarray(out)))
  state = [params, tx.init(params)]

  def loss(params: Any, fixed: Any) -> jax.Array:
    table, reader, out = params
    x = way.module.apply({'params': table, **fixed}, ids) @ reader
    logits = jnp.mean(jnp.tanh(x), 1) @ out
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  def step(params: Any, opt_state: Any, fixed: Any) -> tuple[Any, Any]:
    updates, opt_state = tx.update(jax.grad(loss)(params, fixed), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  step = jax.jit(step, donate_argnums=(0, 1))

  def call() -> Any:
    state[:] = step(*state, fixed)
    return state

  return call


def _disk(variables: Mapping[str, Any]) -> int:
  """Bytes of the file that holds them."""
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'table.safetensors'
    safetensors.save_file(flat, path)
    return path.stat().st_size


def _describe(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
  part = lambda name: f'{row[name] / 1e6:.1f} MB ({row[name] / dense[name]:.3f})'
  ratio = lambda kind: row[kind]['over_dense']['median']
  times = ', '.join(
    f'{kind} {1e3 * row[kind]["seconds"]["median"]:.2f} ms ({ratio(kind):.2f}'
    + (f', goal {BOUNDS[kind]})' if kind in BOUNDS and row['way'] == 'factorized' else ')')
    for kind in ('lookup', 'read', 'step')
  )
  return f'{row["way"]:13} memory {part("bytes")}, disk {part("disk_bytes")} | {times}'
