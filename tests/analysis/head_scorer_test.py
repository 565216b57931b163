"""Scores of heads against plain loops in numpy, which attend and judge on their own."""

import dataclasses

import numpy as np
import pytest
import tiny_speech
from flax import traverse_util

from gatedfm.analysis.head_scorer import HeadScorer
from gatedfm.analysis.induction import MEASURES, Induction
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.gates import Gates
from gatedfm.models import lm
from gatedfm.models.lm_config import LmConfig, llama

SIZES = {'vocab_size': 25, 'd': 12, 'layers': 3, 'ffn': 10, 'max_tokens': 24}
KINDS = {
  'opt': LmConfig(**SIZES, heads=3),
  'opt_350m': LmConfig(**SIZES, heads=3, pre_norm=False, final_norm=False, embed_width=8),
  'llama': llama(**SIZES, heads=6, kv_heads=2, head_width=4, tied=False, bos=-1),
}
# Sequences of 3, 4 and 5 tokens, four times over.
SHORT = Induction(sequences=3, shortest=3, step=1, multiple=24, dropped=0.05)


def random_params(kind):
  flat = tiny_speech.random_tree(lm.abstract_params(KINDS[kind]), seed=2, scale=0.6)
  return traverse_util.unflatten_dict(flat, sep='/')


def scores(kind, how, params=None, gates=None, cfg=None):
  """`[Z, N, H]` by measure, sequences in their order."""
  params = random_params(kind) if params is None else params
  found = list(HeadScorer(cfg or KINDS[kind], how).scores(params, gates))
  visited = sorted(range(how.sequences), key=lambda s: min(s, how.sequences - 1 - s))
  order = np.argsort(visited)
  return {m: np.stack([found[i][m] for i in order]) for m in MEASURES}


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


class Oracle:
  """The model in float64, one token, head and layer at a time."""

  def __init__(self, kind):
    self.cfg = KINDS[kind]
    flat = traverse_util.flatten_dict(random_params(kind)['decoder'], sep='/')
    self.p = {k: np.asarray(v, np.float64) for k, v in flat.items()}

  def linear(self, x, name):
    return x @ self.p[f'{name}/kernel'] + self.p.get(f'{name}/bias', 0)

  def norm(self, x, name):
    scale, eps = self.p[f'{name}/scale'], self.cfg.norm_eps
    if self.cfg.norm == 'rms':
      return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * scale + self.p[f'{name}/bias']

  def embed(self, text):
    x = self.p['embedding'][text]
    if self.cfg.embed_width:
      x = self.linear(x, 'project_in')
    if self.cfg.positions == 'learned':
      x = x + self.p['position_embedding'][np.arange(len(text)) + self.cfg.position_offset]
    return x

  def rotated(self, x_K, position):
    if self.cfg.positions != 'rotary':
      return x_K
    half, out = len(x_K) // 2, np.empty_like(x_K)
    for k in range(half):
      angle = position * self.cfg.theta ** (-k / half)
      out[k] = x_K[k] * np.cos(angle) - x_K[half + k] * np.sin(angle)
      out[half + k] = x_K[half + k] * np.cos(angle) + x_K[k] * np.sin(angle)
    return out

  def heads(self, i, x):
    """Attention `[H, T, T]` and values `[H, T, K]`."""
    cfg, name = self.cfg, f'layers/layers_{i}/attention'
    y = self.norm(x, f'{name}/norm') if cfg.pre_norm else x
    q, k, v = (self.linear(y, f'{name}/attention/{w}') for w in ('query', 'key', 'value'))
    weights, values, width = np.zeros((cfg.heads, len(x), len(x))), [], cfg.width
    for h in range(cfg.heads):
      at, own = (h * cfg.groups // cfg.heads) * width, h * width
      for t in range(len(x)):
        query = self.rotated(q[t, own : own + width], t) / np.sqrt(width)
        keys = [self.rotated(k[s, at : at + width], s) for s in range(t + 1)]
        weights[h, t, : t + 1] = softmax(np.array([query @ key for key in keys]))
      values.append(v[:, at : at + width])
    return weights, np.stack(values)

  def write(self, i, mixed_TxHK):
    return self.linear(mixed_TxHK, f'layers/layers_{i}/attention/attention/out')

  def advance(self, i, x):
    cfg, name = self.cfg, f'layers/layers_{i}'
    weights, values = self.heads(i, x)
    x = x + self.write(i, np.concatenate(list(weights @ values), -1))
    x = x if cfg.pre_norm else self.norm(x, f'{name}/attention_norm')
    y = self.norm(x, f'{name}/ffn/norm') if cfg.pre_norm else x
    h = self.linear(y, f'{name}/ffn/ffn/w_1')
    if cfg.gated_ffn:
      gate = self.linear(y, f'{name}/ffn/ffn/w_gate')
      h = h * gate / (1 + np.exp(-gate))
    else:
      h = np.maximum(h, 0)
    x = x + self.linear(h, f'{name}/ffn/ffn/w_2')
    return x if cfg.pre_norm else self.norm(x, f'{name}/ffn_norm')

  def probabilities(self, x_D):
    x = self.linear(x_D, 'project_out') if self.cfg.embed_width else x_D
    return softmax(x @ self.p['embedding'].T if self.cfg.tied else self.linear(x, 'output'))

  def scores(self, measure, how, text, length):
    """`[N, H]` of one text."""
    bos = [self.cfg.bos] if self.cfg.bos >= 0 else []
    text, start = [*bos, *text], len(bos)
    x, out = self.embed(text), np.zeros((self.cfg.layers, self.cfg.heads))
    for i in range(self.cfg.layers):
      weights, values = self.heads(i, x)
      for h in range(self.cfg.heads):
        judge = self.prefix_matching if measure == 'prefix_matching' else self.copying
        out[i, h] = judge(how, text, start, length, i, h, weights[h], values[h])
      x = self.advance(i, x) if how.fed == 'hidden' else x
    return out

  def prefix_matching(self, how, text, start, length, i, h, attention, values):
    total = 0
    for j in range(start + length, len(text)):
      total += sum(attention[j, k + 1] for k in range(start, j) if text[k] == text[j])
      if how.mode == 'released' and (j - start + 1) % length == 0:
        total += attention[j, start]
    return total / ((how.copies - 1) * length)

  def copying(self, how, text, start, length, i, h, attention, values):
    total, width = 0, self.cfg.width
    for j in range(start, len(text)):
      mixed = np.zeros(self.cfg.heads * width)
      head = values[j] if how.mode == 'released' else attention[j] @ values
      mixed[h * width : (h + 1) * width] = head
      out = self.write(i, mixed)
      if not how.output_bias:
        out = out - self.write(i, 0 * mixed)
      p = self.probabilities(out)[text[: j + 1]]
      raised = np.maximum(p - p.mean(), 0)
      if j:
        total += raised[attention[j].argmax()] / raised.sum()
    return total / length


@pytest.mark.parametrize(
  ('kind', 'changes'),
  [
    ('opt', {}),
    ('opt', {'mode': 'released'}),
    ('opt_350m', {'output_bias': False}),
    ('opt_350m', {'mode': 'released'}),
    ('llama', {}),
    ('llama', {'mode': 'released'}),
    ('llama', {'mode': 'released', 'inputs': 'hidden'}),
  ],
)
def test_scores_are_those_of_loops(kind, changes, fast_compilation):
  how = dataclasses.replace(SHORT, **changes)
  got, scorer, oracle = scores(kind, how), HeadScorer(KINDS[kind], how), Oracle(kind)
  for s, length in enumerate(how.lengths()):
    drawn = scorer.draw(s)
    assert len(set(drawn.tolist())) == len(drawn) == 4 * length
    want = oracle.scores('prefix_matching', how, [*drawn[:length]] * 4, length)
    np.testing.assert_allclose(got['prefix_matching'][s], want, rtol=2e-4, atol=1e-5)
    want = oracle.scores('copying', how, drawn, len(drawn))
    np.testing.assert_allclose(got['copying'][s], want, rtol=2e-3, atol=1e-4)
    assert want.std() > 0.02  # heads differ: the comparison says something


def equal(got, want):
  for measure in MEASURES:
    np.testing.assert_allclose(got[measure], want[measure], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['opt', 'llama'])
def test_padding_changes_nothing(kind, fast_compilation):
  how = dataclasses.replace(SHORT, shortest=5, sequences=1)
  equal(scores(kind, dataclasses.replace(how, multiple=1)), scores(kind, how))
  roomy = dataclasses.replace(KINDS[kind], max_tokens=40)
  if kind == 'llama':  # whose parameters do not depend on the number of positions
    equal(scores(kind, dataclasses.replace(how, multiple=40), cfg=roomy), scores(kind, how))


@pytest.mark.parametrize('kind', KINDS)
def test_closed_heads_score_nothing(kind, fast_compilation):
  """Masked or cut out; other heads of their layer score as before, later layers do not."""
  cfg, how = KINDS[kind], dataclasses.replace(SHORT, sequences=1)
  heads = np.ones((3, cfg.heads), np.float32)
  heads[0, [0, cfg.heads - 1]] = heads[1] = 0
  gates = Gates(
    {
      'decoder/attention_heads': heads,
      'decoder/attention': np.array([1, 1, 0], np.float32),
      'decoder/ffn': np.array([1, 0, 1], np.float32),
    }
  )
  dense, masked = scores(kind, how), scores(kind, how, gates=gates)
  small = lm_workdir.compacted(LmCheckpoint(cfg, random_params(kind), None, {}), gates, {})
  equal(scores(kind, how, params=small.params, gates=small.fixed()), masked)
  for measure in MEASURES:
    assert not masked[measure][:, 1:].any()
    assert not masked[measure][:, 0, heads[0] == 0].any()
    kept = heads[0] == 1
    np.testing.assert_allclose(
      masked[measure][:, 0, kept], dense[measure][:, 0, kept], rtol=1e-4, atol=1e-6
    )
  open_last = Gates({'decoder/attention_heads': heads})
  after = scores(kind, how, gates=open_last)['prefix_matching'][:, 2]
  assert np.abs(after - dense['prefix_matching'][:, 2]).max() > 1e-3


def test_gates_of_examples_are_refused():
  scorer = HeadScorer(KINDS['opt'], SHORT)
  with pytest.raises(ValueError, match='differ by example'):
    next(scorer.scores(random_params('opt'), Gates({'decoder/attention': np.ones((3, 2))})))
  with pytest.raises(ValueError, match='unknown sites'):
    next(scorer.scores(random_params('opt'), Gates({'encoder/attention': np.ones(3)})))
