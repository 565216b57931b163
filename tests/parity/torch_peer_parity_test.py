"""What is timed of torch computes what ours does, gates and gradients included."""

import dataclasses

import numpy as np
import pytest

HOW = 'parity tests need ESPnet: bash tests/parity/install.sh'
torch = pytest.importorskip('torch', reason=HOW)
pytest.importorskip('espnet2', reason=HOW)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from gatedfm.benchmarks import stacks, torch_peer, ways  # noqa: E402
from gatedfm.convert import espnet  # noqa: E402
from gatedfm.gates import Pattern  # noqa: E402
from gatedfm.models.speech import SpeechModel  # noqa: E402
from gatedfm.nn import gating  # noqa: E402
from gatedfm.trainers import step  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning:espnet2')

MODEL = dataclasses.replace(stacks.model('3x16', 'float32', 11), heads=2)
B, S, L = 2, 9, 5
CASE = stacks.Case('encoder', MODEL, B, S, L)
CASES = {s: dataclasses.replace(CASE, suite=s) for s in ('encoder', 'decoder')}


def random_patterns(stack: str) -> list[Pattern]:
  """All open, all closed, and every module closed somewhere: each branch with and without."""
  rng, sites = np.random.default_rng(0), CASES[stack].sites
  closed = [round(p * sum(s.layers for s in sites)) for p in (0, 1, 0.3, 0.5, 0.7)]
  return [stacks.random_pattern(sites, n, rng) for n in closed]


@pytest.fixture(scope='module')
def params():
  """Norms, biases and taps random too: initialisation would hide what is misplaced."""
  shapes = jax.eval_shape(lambda key: step.init_params(MODEL, key), jax.random.key(0))
  rng = np.random.default_rng(1)
  draw = lambda a: jnp.asarray(0.25 * rng.normal(size=a.shape), jnp.float32)
  return jax.tree.map(draw, step.nn.unbox(shapes))


@pytest.fixture(scope='module')
def x_BxSxD():
  return jax.random.normal(jax.random.key(2), (B, S, MODEL.d))


@pytest.fixture(scope='module')
def encode():
  """The memory of the scanned model for gates."""
  model, none = SpeechModel(MODEL), jnp.zeros(B, int)

  def run(params, x, gates):
    mask, context = jnp.ones((B, S), bool), gating.Context(none, none)
    call = lambda m: m.encoder(x, gates, mask, context, True)[0]
    return stacks.nn.apply(call, model)({'params': params})

  return jax.jit(run)


def own_gates(stack: str, pattern: Pattern) -> dict:
  return pattern.to_gates().stack(stack, CASES[stack].sites)


@pytest.mark.parametrize('pattern', random_patterns('encoder'), ids=str)
def test_encoder(params, x_BxSxD, encode, pattern):
  peers = torch_peer.calls('encoder', MODEL, params, x_BxSxD, L)
  assert list(peers) == ['torch', 'torch_fast']
  want = encode(params, x_BxSxD, own_gates('encoder', pattern))
  differences = torch_peer.check({way: p(pattern) for way, p in peers.items()}, want)
  assert max(differences.values()) < 2e-5


@pytest.mark.parametrize('pattern', random_patterns('decoder'), ids=str)
def test_decoder(params, x_BxSxD, pattern):
  """Against the teacher-forced model, which has no cache."""
  peers = torch_peer.calls('decoder', MODEL, params, x_BxSxD, L)
  assert list(peers) == ['torch', 'torch_fast']
  tokens = jnp.tile(7 * jnp.arange(L) % 11, (B, 1))
  forced = lambda model: model.decoder(
    tokens, own_gates('decoder', pattern), x_BxSxD, jnp.ones((B, S), bool), True
  )
  logits_BxLxV = jax.jit(stacks.nn.apply(forced, SpeechModel(MODEL)))({'params': params})
  want = jax.nn.log_softmax(logits_BxLxV[:, -1])
  differences = torch_peer.check({way: p(pattern) for way, p in peers.items()}, want)
  assert max(differences.values()) < 2e-5


@pytest.mark.parametrize('pattern', random_patterns('encoder'), ids=str)
def test_gradients(params, x_BxSxD, encode, pattern):
  slope = jax.random.normal(jax.random.key(3), x_BxSxD.shape)
  gates = own_gates('encoder', pattern)
  loss = lambda params: jnp.sum(encode(params, x_BxSxD, gates) * slope)
  want, slopes = jax.value_and_grad(loss)(params)
  slopes = {k: a for k, a in espnet.to_espnet(slopes, MODEL).items() if k.startswith('encoder.')}
  for prepare in torch_peer.gradients(MODEL, params, x_BxSxD, slope, 0.1).values():
    got, theirs = prepare(pattern)()
    np.testing.assert_allclose(got.item(), want, rtol=1e-4)
    assert theirs.keys() == {k for k in slopes if '.embed.' not in k}
    for name, gradient in theirs.items():
      gradient = 0 if gradient is None else gradient.numpy()
      np.testing.assert_allclose(slopes[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name)


def test_closed_modules_are_not_run(params, x_BxSxD):
  """Their matrices may be anything, but for the merge's, which makes its constant."""

  def ruin(path, a):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    ruined = name.endswith('kernel') and 'merge' not in name and 'output' not in name
    return a * np.nan if ruined else a

  ruined = jax.tree_util.tree_map_with_path(ruin, params)
  for stack in CASES:
    everything, nothing, *_ = random_patterns(stack)
    for prepare in torch_peer.calls(stack, MODEL, ruined, x_BxSxD, L).values():
      assert np.isfinite(prepare(nothing)().numpy()).all()
      assert np.isnan(prepare(everything)().numpy()).all()


def test_both_forms_are_different_operations(params, x_BxSxD):
  everything = random_patterns('encoder')[0]
  operations = {}
  for way, prepare in torch_peer.calls('encoder', MODEL, params, x_BxSxD, L).items():
    with torch.profiler.profile() as profile:
      prepare(everything)()
    operations[way] = {event.key for event in profile.key_averages()}
  assert 'aten::conv1d' in operations['torch']
  assert 'aten::conv1d' not in operations['torch_fast']
  assert 'aten::conv2d' in operations['torch_fast']


def test_other_numbers_are_an_error(params, x_BxSxD, encode):
  prepare = torch_peer.calls('encoder', MODEL, params, x_BxSxD, L)['torch']
  everything = random_patterns('encoder')[0]
  want = encode(params, x_BxSxD, own_gates('encoder', everything))
  with pytest.raises(RuntimeError, match=r'torch and ours differ by 1\.\de-03, more than 1e-04'):
    torch_peer.check({'torch': prepare(everything)}, want + 1.05e-3)
  with pytest.raises(RuntimeError, match='differ by nan'):
    torch_peer.check({'torch': prepare(everything)}, want * np.nan)


@pytest.mark.parametrize('suite', ['encoder', 'decoder', 'train'])
def test_rows_side_by_side(fast_compilation, monkeypatch, suite):
  make = ways.make
  few = lambda *case: {k: way for k, way in make(*case).items() if k in ('dense', 'mask', 'skip')}
  monkeypatch.setattr(ways, 'make', few)  # others take a minute to compile
  case = dataclasses.replace(
    CASE, suite=suite, pruned=(0.5,), masks=1, rounds=2, against='torch', tokens=3
  )
  lines = []
  rows = [r for r in stacks.run(case, lines.append) if r['way'].startswith('torch')]
  assert [r['way'] for r in rows] == ['torch', 'torch_fast']
  for row in rows:
    assert 0 < row['difference'] < 1e-4
    assert row['pruned'] == pytest.approx(0.5, abs=0.06)
    assert row['times']['dense'] == row['ratio']
    assert row['times'].keys() >= {'dense', 'mask', 'skip'}
    assert f'{torch.get_num_threads()} threads' in row['peer']
    assert row['peer'].endswith(torch_peer.WAYS[suite][row['way']])
  assert sum('times as long as our' in line for line in lines) == 2
