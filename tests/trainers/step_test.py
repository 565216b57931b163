"""The train step: one program, the same on any mesh; gates that search and then rest."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech

from gatedfm import partitioning
from gatedfm.data.features import FeatureStats
from gatedfm.models.speech_config import GateConfig
from gatedfm.trainers import optimizer, step
from gatedfm.trainers.config import AugmentConfig, OptimizerConfig, SparsityConfig, TrainConfig

BATCH, FRAMES, TOKENS, LABELS = 8, 40, 6, 3
STATS = FeatureStats(np.full(tiny_speech.MELS, 0.5), np.full(tiny_speech.MELS, 2.0))


def config():
  gates = GateConfig(enabled=True)
  model = tiny_speech.config('transformer', gates, encoder_layers=1, decoder_layers=1)
  return TrainConfig(
    steps=10,
    model=model,
    augment=AugmentConfig(freq_masks=0, time_masks=0),
    optimizer=OptimizerConfig(name='adamw', warmup=1, peak_lr=1e-2, schedule='constant'),
    sparsity=SparsityConfig(target=0.5, ramp=0.0, freeze=0.5),
  )


def batch(seed=0):
  rng = np.random.default_rng(seed)
  v = tiny_speech.VOCABULARY
  target = rng.integers(1, v, (BATCH, TOKENS))
  target[::2, 4:] = -1
  return {
    'features': rng.normal(size=(BATCH, FRAMES, tiny_speech.MELS)).astype(np.float32),
    'frames': rng.integers(25, FRAMES + 1, BATCH),
    'decoder_input': rng.integers(1, v, (BATCH, TOKENS)),
    'decoder_target': target,
    'ctc_labels': rng.integers(1, v, (BATCH, LABELS)),
    'ctc_length': np.array([3, 0, 2, 1, 3, 3, 0, 2]),
    'language': rng.integers(0, 4, BATCH),
    'task': rng.integers(0, 3, BATCH),
    'valid': np.ones(BATCH, bool),
    'weight': np.ones(BATCH, np.float32),
  }


class Trainer:
  """Train steps on a mesh, from the same parameters whatever the mesh."""

  def __init__(self, cfg, **mesh):
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    self.mesh = partitioning.make_mesh(**mesh, devices=devices)
    self.cfg = cfg
    with partitioning.activate(self.mesh):
      init = step.make_init(cfg)
      self.shardings = partitioning.shardings(init, self.mesh, jax.random.key(0))
      self._shapes = jax.eval_shape(step.unboxed(init), jax.random.key(0))
      self._step = step.TrainStep(cfg, STATS, self.shardings)

  def start(self):
    """A state of random parameters, without compiling an initialiser."""
    shapes = self._shapes
    params = tiny_speech.random_tree(shapes.params, scale=0.1)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    state = step.TrainState(zeros(shapes.step), params, zeros(shapes.opt_state))
    return jax.device_put(state, self.shardings)

  def __call__(self, state, rows, at, **now):
    with partitioning.activate(self.mesh):
      scheduled = optimizer.sparsity_schedule(self.cfg.sparsity, self.cfg.steps, at)
      args = (state, partitioning.global_batch(rows, self.mesh), scheduled | now)
      return self._step(*args)


@pytest.fixture(scope='module')
def single(fast_compilation):
  return Trainer(config(), data=1, fsdp=1, model=1)


def host(tree):
  """Leaves by path, on the host: the train step donates its state."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.array(x) for p, x in flat}


def test_sharded_equals_single_device(single):
  sharded = Trainer(config(), data=2, fsdp=2, model=2)
  results = []
  for trainer in (single, sharded):
    state = trainer.start()
    for at in (1, 2):
      state, metrics = trainer(state, batch(at), at)
    results.append((state, jax.device_get(metrics)))
  (one, one_metrics), (many, many_metrics) = results
  kernel = many.params['decoder']['output']['kernel']
  assert len({s.device for s in kernel.addressable_shards}) == 8
  assert kernel.addressable_shards[0].data.size < kernel.size
  for name, value in one_metrics.items():
    np.testing.assert_allclose(many_metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
  start, a, b = host(single.start().params), host(one.params), host(many.params)
  for name, value in a.items():
    np.testing.assert_allclose(b[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
  assert all((value != start[name]).any() for name, value in a.items() if 'kernel' in name)
  assert int(one.step) == int(many.step) == 2


def test_predictor_searches_then_rests_while_the_model_goes_on(single):
  state, _ = single(single.start(), batch(), 1)
  before = host(state.params)
  moved = lambda after: {name: (after[name] != v).any() for name, v in before.items()}
  of_gates = lambda names, yes: [v for k, v in names.items() if ('_gates' in k) is yes]

  state, metrics = single(state, batch(1), 4)
  searching = moved(host(state.params))
  assert all(of_gates(searching, True))
  assert any(of_gates(searching, False))
  assert metrics['sparsity_target'] == 0.5
  cfg, modules = single.cfg, 5
  hybrid = cfg.ctc_weight * metrics['ctc_loss'] + (1 - cfg.ctc_weight) * metrics['attention_loss']
  priced = cfg.sparsity.weight * modules * metrics['penalty']
  np.testing.assert_allclose(metrics['loss'], hybrid + priced, rtol=1e-5)

  before = host(state.params)
  state, _ = single(state, batch(2), 5)  # half of the training: the freeze
  frozen = moved(host(state.params))
  assert not any(of_gates(frozen, True))
  assert any(of_gates(frozen, False))


def test_penalty_pulls_the_sparsity_to_its_target(single):
  """The same batch again and again, with a penalty that leaves nothing else to say."""
  seen = {}
  for target in (0.8, 0.2):
    state = single.start()
    for _ in range(25):
      state, metrics = single(state, batch(), 1, target=np.float32(target), weight=np.float32(1e4))
    seen[target] = float(metrics['sparsity'])
  assert seen[0.8] > 0.6
  assert seen[0.2] < 0.45


@pytest.mark.parametrize('count', ['modules', 'macs'])
@pytest.mark.parametrize('per_stack', [False, True])
def test_penalty_of_given_gates(count, per_stack):
  """All of the encoder open, all of the decoder closed; in a padding row the reverse."""
  cfg = config()
  cfg.sparsity = dataclasses.replace(cfg.sparsity, count=count, per_stack=per_stack)
  objective = step.Objective(cfg, STATS)
  sites = cfg.model.sites()
  of_site = lambda s: jnp.where(jnp.arange(4) < 3, s.stack == 'encoder', s.stack == 'decoder')
  gates = {s.name: jnp.tile(of_site(s).astype(jnp.float32), (s.layers, 1)) for s in sites}
  gates[sites[0].name] = jnp.ones(sites[0].layers)  # the same for all examples
  valid = jnp.array([1.0, 1, 1, 0])
  losses = dict.fromkeys(('weighted_ctc_loss', 'weighted_attention_loss', 'ctc_loss'), 0.0)
  means = losses | dict.fromkeys(('attention_loss', 'token_accuracy'), 0.0)
  means |= objective._sparsities(step.gates_lib.Gates(gates), valid)
  metrics = objective.metrics(means, {'target': jnp.float32(0.25), 'weight': 0.0})
  costs = {s.name: objective.costs[s.name].macs if count == 'macs' else 1 for s in sites}
  weight = lambda *stacks: sum(costs[s.name] * s.layers for s in sites if s.stack in stacks)
  closed = weight('decoder') / weight('encoder', 'decoder')
  np.testing.assert_allclose(metrics['sparsity'], closed, rtol=1e-5)
  of = lambda s: (0.25 - s) ** 2
  expected = (of(0) + of(1)) / 2 if per_stack else of(closed)
  np.testing.assert_allclose(metrics['penalty'], expected, rtol=1e-5)


def evaluating(gated):
  """Configuration, and metrics of batches at random parameters."""
  cfg = config()
  cfg.model.gates.enabled = gated
  params = tiny_speech.random_tree(tiny_speech.shapes(cfg.model), scale=0.1)
  if gated:  # gates that follow language and task
    for stack in ('encoder_gates', 'decoder_gates'):
      embedding = params[stack]['context']
      embedding['language'], embedding['task'] = 30 * embedding['language'], 30 * embedding['task']
  evaluate = step.EvalStep(cfg, STATS)
  now = optimizer.sparsity_schedule(cfg.sparsity, 10, 5)
  return cfg, lambda *rows: evaluate.total([evaluate(params, r, now) for r in rows], now)


@pytest.fixture(scope='module')
def evaluated(fast_compilation):
  return evaluating(gated=False)


@pytest.fixture(scope='module')
def evaluated_gated(fast_compilation):
  return evaluating(gated=True)


def test_loss_is_a_weighted_sum(evaluated):
  cfg, run = evaluated
  values = run(batch())
  both = cfg.ctc_weight * values['ctc_loss'] + (1 - cfg.ctc_weight) * values['attention_loss']
  np.testing.assert_allclose(values['loss'], both, rtol=1e-6)
  assert 'sparsity' not in values


def test_weights_scale_the_losses_of_their_examples_and_no_metric(evaluated):
  _, run = evaluated
  rows = batch()
  plain = run(rows)
  halves = []
  for kept in (np.arange(BATCH) < 3, np.arange(BATCH) >= 3):
    values = run(rows | {'weight': np.where(kept, 1, 0).astype(np.float32)})
    for name in ('ctc_loss', 'attention_loss', 'token_accuracy'):
      np.testing.assert_allclose(values[name], plain[name], rtol=1e-6)
    halves.append(values['loss'])
  np.testing.assert_allclose(sum(halves), plain['loss'], rtol=1e-5)
  weights = np.where(np.arange(BATCH) < 3, 10, 1).astype(np.float32)
  loss = run(rows | {'weight': weights})['loss']
  np.testing.assert_allclose(loss, 10 * halves[0] + halves[1], rtol=1e-5)


@pytest.mark.parametrize('name', ['evaluated', 'evaluated_gated'])
def test_padding_rows_count_nothing(name, request):
  _, run = request.getfixturevalue(name)
  rows, padded = batch(), batch()
  for key, value in padded.items():
    value[4:] = value[:1]
    rows[key][4:] = rows[key][4:] if key == 'features' else value[4:]
  rows['valid'], padded['valid'] = np.arange(8) < 4, np.arange(8) < 4
  a, b = run(rows), run(padded)
  for name, value in a.items():
    np.testing.assert_allclose(b[name], value, rtol=1e-5, err_msg=name)
  full = copy.deepcopy(padded)
  full['valid'] = np.ones(8, bool)
  counted = run(full)
  assert abs(counted['loss'] - a['loss']) > 1e-4
  assert 'sparsity' not in a or abs(counted['sparsity'] - a['sparsity']) > 1e-3


@pytest.mark.parametrize('name', ['evaluated', 'evaluated_gated'])
def test_metrics_do_not_depend_on_how_utterances_are_batched(name, request):
  """Parts that differ in transcripts, tokens, weights and, by language and task, gates."""
  _, run = request.getfixturevalue(name)
  rows = batch() | {'weight': np.linspace(0.5, 2, BATCH, dtype=np.float32)}
  rows['decoder_target'][:3, 2:] = -1
  rows['language'] = np.repeat([0, 1, 2], [3, 3, 2])
  whole = run(rows)
  parts = [{k: v[i:j] for k, v in rows.items()} for i, j in ((0, 3), (3, 8))]
  shares = [rows | {'valid': np.arange(BATCH) // 3 == i} for i in range(3)]
  for batches in (parts, shares):
    for name, value in run(*batches).items():
      np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_ctc_is_averaged_over_those_with_a_transcript(evaluated):
  _, run = evaluated
  rows = batch()
  spoken = rows['ctc_length'] > 0
  alone = copy.deepcopy(rows)
  alone['valid'] = spoken
  np.testing.assert_allclose(run(rows)['ctc_loss'], run(alone)['ctc_loss'], rtol=1e-5)
  none = rows | {'ctc_length': np.zeros(BATCH, int)}
  assert run(none)['ctc_loss'] == 0
