"""The gate vocabulary: sites, gates, costs, sparsity, patterns.

A *site* is one kind of prunable module in one stack (`encoder/ffn1`), repeated over the
stack's layers; a *gate* says how much of it runs, layer by layer. Where gates come from
(a predictor, a scorer, an SVD) and how they are executed (mask, skip, compact) are two
separate questions; this file holds what both sides speak and depends on neither.

Shape letters: N layers, B batch, U units of a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

UNITS = ('module', 'layer', 'head', 'channel', 'rank')


@dataclasses.dataclass(frozen=True)
class Site:
  """One kind of prunable module, repeated over the layers of a stack.

  Attributes:
    name: `stack/module`, e.g. `decoder/cross_attention`.
    layers: N, how many layers have it.
    unit: what one gate opens: the whole `module` (or `layer`), or one `head`, hidden
      `channel` or embedding `rank` of it.
    units: U, gates per layer; 1 for whole modules and layers.
  """

  name: str
  layers: int
  unit: str = 'module'
  units: int = 1

  def __post_init__(self):
    if self.unit not in UNITS:
      raise ValueError(f'site {self.name}: unit {self.unit!r} is not one of {UNITS}')
    if self.layers < 1 or self.units < 1:
      raise ValueError(f'site {self.name}: needs at least one layer and one unit')
    if self.unit in ('module', 'layer') and self.units != 1:
      raise ValueError(f'site {self.name}: a whole {self.unit} has exactly one unit')

  @property
  def stack(self) -> str:
    return self.name.split('/', 1)[0]

  @property
  def module(self) -> str:
    return self.name.rsplit('/', 1)[-1]

  @property
  def size(self) -> int:
    """Gates of this site: layers times units."""
    return self.layers * self.units


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one open gate of a site costs: parameters, multiply-accumulates, stored bytes."""

  params: float
  macs: float
  bytes: float


@flax.struct.dataclass
class Gates:
  """Gate values by site name: 1 open, 0 closed, anything between in training.

  Each value is a scalar (one gate for the whole site), `[N]` (per layer), `[N, B]` (per
  layer and example) or `[N, B, T]` (and per token, which only multiplies: for scoring); sites with
  several units a layer carry a trailing `[..., U]`. A tuple of N bools is a site whose gates are
  known on the host while a program is made (`Pattern.fixed`).
  """

  values: dict[str, jax.Array | tuple[bool, ...]]

  def __getitem__(self, name: str) -> jax.Array | tuple[bool, ...]:
    return self.values[name]

  def stack(self, stack: str, sites: Sequence[Site]) -> dict[str, jax.Array]:
    """The gates of one stack by module name, each broadcast to a leading layer axis.

    Returns: `{module: [N, ...]}`, what a scan over the stack's layers consumes.
    """
    out = {}
    for site in sites:
      if site.stack == stack:
        if isinstance(self.values[site.name], tuple):
          out[site.module] = self.values[site.name]
          continue
        g = jnp.asarray(self.values[site.name])
        shared = g.ndim == (site.units > 1) or g.ndim == 0
        out[site.module] = jnp.broadcast_to(g, (site.layers, *g.shape)) if shared else g
    return out


def validate(gates: Gates, sites: Sequence[Site]) -> None:
  """Raises ValueError, naming the site, where `gates` do not fit `sites`."""
  names = [s.name for s in sites]
  if missing := sorted(set(names) - set(gates.values)):
    raise ValueError(f'gates are missing for {missing}')
  if unknown := sorted(set(gates.values) - set(names)):
    raise ValueError(f'gates for unknown sites {unknown}; the model has {names}')
  for site in sites:
    shape = given = np.shape(gates[site.name])
    if site.units > 1 and shape:
      if shape[-1] != site.units:
        raise ValueError(f'gates of {site.name}: last axis of {shape} is not {site.units} units')
      shape = shape[:-1]
    if len(shape) > 3 or (shape and shape[0] != site.layers):
      raise ValueError(
        f'gates of {site.name} have shape {given}; expected (), ({site.layers},), '
        f'({site.layers}, batch) or ({site.layers}, batch, tokens) and one axis for several units'
      )


def all_open(sites: Sequence[Site]) -> Gates:
  """Gates with everything open: the dense model."""
  return Gates({s.name: jnp.ones((s.layers, s.units) if s.units > 1 else s.layers) for s in sites})


def completed(gates: Gates, sites: Sequence[Site]) -> Gates:
  """The gates of all `sites`: open where `gates` does not name one.

  Raises:
    ValueError: a site that is none of `sites`, or gates that do not fit; it is named.
  """
  whole = Gates({s.name: np.ones((), np.float32) for s in sites} | dict(gates.values))
  validate(whole, sites)
  return whole


def sparsity(
  gates: Gates, sites: Sequence[Site], costs: Mapping[str, Cost] | None = None
) -> jax.Array:
  """Closed fraction over all sites, averaged over examples: `1 - mean(g)`.

  Args:
    gates: values for every site.
    sites: which sites count.
    costs: None counts modules alike; given, each gate weighs its MACs.

  Returns: scalar, 0 when everything is open and 1 when nothing is; differentiable.
  """
  kept = total = 0.0
  for site in sites:
    weight = site.size * (1.0 if costs is None else costs[site.name].macs)
    kept += weight * jnp.mean(jnp.asarray(gates[site.name]))
    total += weight
  return 1.0 - kept / total


def sparsity_by_site(gates: Gates, sites: Sequence[Site]) -> dict[str, jax.Array]:
  """Closed fraction of each site, averaged over its layers, units and examples."""
  return {s.name: 1.0 - jnp.mean(jnp.asarray(gates[s.name])) for s in sites}


def macs_kept(gates: Gates, sites: Sequence[Site], costs: Mapping[str, Cost]) -> jax.Array:
  """Multiply-accumulates of the open gates; the ungated rest of the model is not counted."""
  return sum(s.size * costs[s.name].macs * jnp.mean(jnp.asarray(gates[s.name])) for s in sites)


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which gates are open, as hashable, printable, host-side data: a key for caches and maps."""

  sites: tuple[tuple[str, tuple[bool, ...]], ...]

  def __str__(self) -> str:
    return ' '.join(f'{n}:{"".join("01"[b] for b in bits)}' for n, bits in self.sites)

  def to_gates(self) -> Gates:
    """The same pattern as `[N]` float arrays."""
    return Gates({n: jnp.asarray(bits, jnp.float32) for n, bits in self.sites})

  def fixed(self) -> Gates:
    """The same pattern as tuples of bools: a program made with them holds what is open alone."""
    return Gates(dict(self.sites))

  def stack(self, stack: str) -> Pattern:
    """The part of one stack."""
    return Pattern(tuple(row for row in self.sites if row[0].split('/', 1)[0] == stack))

  @property
  def open_fraction(self) -> float:
    bits = [b for _, row in self.sites for b in row]
    return sum(bits) / len(bits)


def pattern(
  gates: Gates, sites: Sequence[Site], threshold: float = 0.5, example: int | None = None
) -> Pattern:
  """The pattern of concrete whole-module gates: open where the value exceeds `threshold`.

  Args:
    gates: concrete values, `()`, `[N]` or `[N, B]`.
    sites: order of the pattern's rows.
    threshold: gate value above which a module runs.
    example: which example of a batch; None where all have the same gates.

  Raises:
    ValueError: gates differ by example and `example` is None, or a site has several units.
  """
  rows = []
  for site in sites:
    if site.units > 1:
      raise ValueError(f'patterns hold whole modules; {site.name} has {site.units} units a layer')
    g = np.asarray(gates[site.name])
    if g.ndim == 2:
      if example is None and (g != g[:, :1]).any():
        raise ValueError(
          f'gates of {site.name} differ by example: name one, or take utterances of one pattern'
        )
      g = g[:, example or 0]
    rows.append((site.name, tuple((np.broadcast_to(g, site.layers) > threshold).tolist())))
  return Pattern(tuple(rows))


def parse_pattern(text: str) -> Pattern:
  """Inverse of `str(pattern)`; raises ValueError on anything else."""
  rows = []
  for item in text.split():
    name, _, bits = item.partition(':')
    if not name or not bits or set(bits) - {'0', '1'}:
      raise ValueError(f'not a gate pattern item: {item!r}; expected stack/module:0110')
    rows.append((name, tuple(b == '1' for b in bits)))
  return Pattern(tuple(rows))


def concatenate(parts: Iterable[Gates]) -> Gates:
  """Joins the gates of disjoint sites (an encoder's and a decoder's)."""
  out: dict[str, jax.Array] = {}
  for part in parts:
    if both := sorted(set(out) & set(part.values)):
      raise ValueError(f'gates given twice for {both}')
    out |= part.values
  return Gates(out)
