"""Scores from outputs, and gate maps that add up."""

import types

import jax.numpy as jnp
import numpy as np

from gatedfm.evaluation import quality
from gatedfm.gates import Gates


def decoded(**values):
  gates = Gates({k.replace('_', '/', 1): jnp.asarray(v, jnp.float32) for k, v in values.items()})
  return types.SimpleNamespace(gates=gates)


def test_gate_map_counts_valid_utterances_by_context():
  gate_map = quality.GateMap()
  ffn = [[1, 0, 1, 1], [0, 0, 1, 1]]  # two layers, four utterances
  gate_map.add(
    decoded(encoder_ffn=ffn, decoder_ffn=[1.0]),
    np.array([5, 6, 7, -1]),
    ['fra', 'fra', 'rus', 'rus'],
    'asr',
  )
  gate_map.add(
    decoded(encoder_ffn=[[0, 1], [0, 1]], decoder_ffn=[0.0]), np.array([5, 8]), ['fra'] * 2, 'lid'
  )
  contexts = gate_map.contexts()
  assert [(c['language'], c['task'], c['utterances']) for c in contexts] == [
    ('fra', 'asr', 2),
    ('rus', 'asr', 1),
    ('fra', 'lid', 2),
  ]
  assert [c['open']['encoder/ffn'] for c in contexts] == [[0.5, 0], [1, 1], [0.5, 0.5]]
  assert [c['open']['decoder/ffn'] for c in contexts] == [[1], [1], [0]]
  np.testing.assert_allclose(gate_map.mean()['encoder/ffn'], [3 / 5, 2 / 5])
  np.testing.assert_allclose(gate_map.mean()['decoder/ffn'], [3 / 5])


def row(task, language, reference, hypothesis, **more):
  return {
    'id': reference, 'task': task, 'language': language, 'reference': reference,
    'hypothesis': hypothesis,
  } | more  # fmt: skip


def test_counts_choose_metrics_by_task():
  counts = quality.counts(
    [
      row('asr', 'fra', 'un chat', 'un chat', ctc='un cha'),
      row('asr', 'rus', 'кот', 'кит', ctc='кот'),
      row('st_eng', 'fra', 'a cat sleeps here now', 'a cat sleeps here now'),
      row('lid', 'fra', 'fra', 'fra'),
      row('lid', 'rus', 'rus', 'fra'),
    ]
  )
  assert sorted(counts) == ['bleu', 'cer', 'chrf', 'ctc_cer', 'lid', 'wer']
  np.testing.assert_allclose(counts['cer'].scores()['rus'], 1 / 3)
  assert counts['cer'].scores()['fra'] == counts['ctc_cer'].scores()['rus'] == 0
  assert counts['wer'].scores()['mean'] == 0.5
  assert counts['lid'].pooled() == 0.5
  np.testing.assert_allclose(counts['bleu'].scores()['fra-eng'], 100, rtol=1e-6)


def test_tasks_that_were_not_decoded_have_no_metric():
  assert list(quality.counts([row('lid', 'fra', 'fra', 'rus')])) == ['lid']
  assert quality.counts([]) == {}
