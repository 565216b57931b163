"""The gate vocabulary: shapes, errors, sparsity, patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm import gates as gates_lib
from gatedfm.gates import Cost, Gates, Site

SITES = (Site('encoder/ffn', 3), Site('encoder/attention', 3), Site('decoder/ffn', 2))
COSTS = {
  'encoder/ffn': Cost(10, 100, 40),
  'encoder/attention': Cost(20, 300, 80),
  'decoder/ffn': Cost(5, 50, 20),
}
HEADS = Site('encoder/heads', 3, 'head', 4)


def test_site_names_its_parts():
  site = Site('decoder/cross_attention', 6)
  assert (site.stack, site.module, site.size) == ('decoder', 'cross_attention', 6)
  assert HEADS.size == 12


@pytest.mark.parametrize(
  ('arguments', 'named'),
  [
    (('a/b', 2, 'neuron'), 'neuron'),
    (('a/b', 0), 'a/b'),
    (('a/b', 2, 'head', 0), 'a/b'),
    (('a/b', 2, 'module', 3), 'exactly one unit'),
    (('a/b', 2, 'layer', 3), 'exactly one unit'),
  ],
)
def test_impossible_sites_are_named(arguments, named):
  with pytest.raises(ValueError, match=named):
    Site(*arguments)


def test_stack_gives_each_module_a_layer_axis():
  per_example = jnp.arange(6.0).reshape(3, 2)
  gates = Gates(
    {
      'encoder/ffn': jnp.float32(0.5),
      'encoder/attention': per_example,
      'decoder/ffn': jnp.ones(2),
    }
  )
  stack = gates.stack('encoder', SITES)
  assert set(stack) == {'ffn', 'attention'}
  np.testing.assert_array_equal(stack['ffn'], [0.5] * 3)
  np.testing.assert_array_equal(stack['attention'], per_example)
  np.testing.assert_array_equal(gates.stack('decoder', SITES)['ffn'], [1, 1])


@pytest.mark.parametrize('shape', [(4,), (3, 4), (3, 2, 4)])
def test_stack_gives_units_a_layer_axis(shape):
  g = jnp.arange(float(np.prod(shape))).reshape(shape)
  gates = Gates({HEADS.name: g})
  gates_lib.validate(gates, [HEADS])
  stacked = gates.stack('encoder', [HEADS])['heads']
  assert stacked.shape[0] == 3
  assert stacked.shape[-1] == 4
  np.testing.assert_array_equal(stacked, np.broadcast_to(g, stacked.shape))


@pytest.mark.parametrize(
  ('values', 'named'),
  [
    ({'encoder/ffn': 1.0, 'encoder/attention': 1.0}, r'missing for .*decoder/ffn'),
    ({s.name: 1.0 for s in SITES} | {'encoder/cgmlp': 1.0}, r'unknown sites .*encoder/cgmlp'),
    ({s.name: 1.0 for s in SITES} | {'decoder/ffn': np.ones(3)}, r'decoder/ffn .*\(2,\)'),
    ({s.name: 1.0 for s in SITES} | {'decoder/ffn': np.ones((2, 1, 1, 1))}, 'decoder/ffn'),
  ],
)
def test_validate_names_the_site(values, named):
  with pytest.raises(ValueError, match=named):
    gates_lib.validate(Gates(values), SITES)


@pytest.mark.parametrize('shape', [(), (3,), (3, 7), (3, 7, 5)])
def test_validate_accepts_every_form(shape):
  gates_lib.validate(Gates({'a/b': np.ones(shape)}), [Site('a/b', 3)])


def test_validate_counts_units():
  with pytest.raises(ValueError, match='4 units'):
    gates_lib.validate(Gates({HEADS.name: np.ones((3, 5))}), [HEADS])
  with pytest.raises(ValueError, match='encoder/heads'):
    gates_lib.validate(Gates({HEADS.name: np.ones((2, 4))}), [HEADS])


def test_all_open_fits_and_is_not_sparse():
  sites = (*SITES, HEADS)
  gates = gates_lib.all_open(sites)
  gates_lib.validate(gates, sites)
  assert gates[HEADS.name].shape == (3, 4)
  assert float(gates_lib.sparsity(gates, sites)) == 0


@pytest.mark.parametrize('batch', [None, 2])
def test_sparsity_by_modules_and_by_macs(batch):
  rows = {'encoder/ffn': [1, 0, 1], 'encoder/attention': [0, 0, 0], 'decoder/ffn': [1, 0]}
  make = lambda r: np.array(r, float) if batch is None else np.repeat(r, batch).reshape(-1, batch)
  gates = Gates({k: jnp.asarray(make(r), jnp.float32) for k, r in rows.items()})
  assert float(gates_lib.sparsity(gates, SITES)) == pytest.approx(5 / 8)
  closed = 1 * 100 + 3 * 300 + 1 * 50
  total = 3 * 100 + 3 * 300 + 2 * 50
  assert float(gates_lib.sparsity(gates, SITES, COSTS)) == pytest.approx(closed / total)
  assert float(gates_lib.macs_kept(gates, SITES, COSTS)) == pytest.approx(total - closed)
  by_site = {k: float(v) for k, v in gates_lib.sparsity_by_site(gates, SITES).items()}
  assert by_site == pytest.approx(
    {'encoder/ffn': 1 / 3, 'encoder/attention': 1.0, 'decoder/ffn': 0.5}
  )


def test_sparsity_counts_layers_and_units_not_sites():
  gates = Gates({'encoder/ffn': jnp.zeros(()), HEADS.name: jnp.ones((3, 4))})
  sites = (SITES[0], HEADS)
  assert float(gates_lib.sparsity(gates, sites)) == pytest.approx(3 / 15)


def test_sparsity_averages_examples_and_has_a_gradient():
  gates = Gates({'a/b': jnp.array([[1.0, 0.0], [0.0, 0.0]])})
  sites = [Site('a/b', 2)]
  assert float(gates_lib.sparsity(gates, sites)) == pytest.approx(0.75)
  grad = jax.grad(lambda g: gates_lib.sparsity(g, sites))(gates)
  np.testing.assert_allclose(grad['a/b'], np.full((2, 2), -0.25))


names = st.text('abcdefgh_/', min_size=1, max_size=12)
patterns = st.dictionaries(
  names, st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5
).map(lambda d: gates_lib.Pattern(tuple((k, tuple(v)) for k, v in d.items())))


@settings(max_examples=25, deadline=None)
@given(patterns)
def test_pattern_round_trips(pattern):
  assert gates_lib.parse_pattern(str(pattern)) == pattern
  sites = [Site(name, len(bits)) for name, bits in pattern.sites]
  gates = pattern.to_gates()
  assert gates_lib.pattern(gates, sites) == pattern
  assert hash(pattern) == hash(gates_lib.pattern(gates, sites))
  closed = 1 - sum(s.layers for s in sites) ** -1 * sum(sum(b) for _, b in pattern.sites)
  assert pattern.open_fraction == pytest.approx(1 - closed)
  assert float(gates_lib.sparsity(gates, sites)) == pytest.approx(closed, abs=1e-6)


def test_pattern_thresholds_broadcasts_and_picks_an_example():
  sites = [Site('a/b', 2), Site('a/c', 2)]
  gates = Gates({'a/b': jnp.float32(0.6), 'a/c': jnp.array([[0.2, 0.5], [0.9, 0.5]])})
  assert str(gates_lib.pattern(gates, sites, example=0)) == 'a/b:11 a/c:01'
  assert str(gates_lib.pattern(gates, sites, example=1)) == 'a/b:11 a/c:00'
  assert str(gates_lib.pattern(gates, sites, threshold=0.4, example=1)) == 'a/b:11 a/c:11'


def test_pattern_refuses_what_it_cannot_hold():
  sites = [Site('a/b', 2)]
  with pytest.raises(ValueError, match=r'a/b differ by example'):
    gates_lib.pattern(Gates({'a/b': jnp.array([[1, 1], [1, 0]])}), sites)
  assert str(gates_lib.pattern(Gates({'a/b': jnp.ones((2, 3))}), sites)) == 'a/b:11'
  with pytest.raises(ValueError, match=HEADS.name):
    gates_lib.pattern(gates_lib.all_open([HEADS]), [HEADS])


@pytest.mark.parametrize('text', ['a/b', 'a/b:', ':01', 'a/b:012', 'a/b:01 c', 'a/b:0 1'])
def test_parse_pattern_names_the_item(text):
  with pytest.raises(ValueError, match='not a gate pattern item'):
    gates_lib.parse_pattern(text)


def test_concatenate_joins_disjoint_sites_alone():
  joined = gates_lib.concatenate([Gates({'a/b': jnp.ones(1)}), Gates({'c/d': jnp.zeros(2)})])
  assert set(joined.values) == {'a/b', 'c/d'}
  with pytest.raises(ValueError, match='a/b'):
    gates_lib.concatenate([joined, Gates({'a/b': jnp.ones(1)})])


def test_gates_are_a_pytree():
  gates = gates_lib.all_open(SITES)
  doubled = jax.jit(lambda g: jax.tree.map(lambda x: 2 * x, g))(gates)
  assert isinstance(doubled, Gates)
  np.testing.assert_array_equal(doubled['decoder/ffn'], [2, 2])
