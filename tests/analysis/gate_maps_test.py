import copy
import dataclasses

import numpy as np
import pytest

from gatedfm.analysis import gate_maps


def _map(cells, utterances=None):
  """A map of {(language, task): [open fractions of one site]}."""
  return gate_maps.parse(
    {
      'contexts': [
        {
          'language': language,
          'task': task,
          'utterances': (utterances or {}).get((language, task), 10),
          'open': {'encoder/ffn1': fractions},
        }
        for (language, task), fractions in cells.items()
      ]
    }
  )


def _shares(gates):
  shares = dataclasses.asdict(gate_maps.decompose(gates))
  shares.pop('fixed'), shares.pop('variance')
  return shares


def test_parse_keeps_numbers_and_sorts_by_task(summary):
  contexts = summary['points']['gated_0.5']['gate_map']['contexts']
  gates = gate_maps.parse({'contexts': contexts[::-1]})
  assert gates.tasks == ('st_eng',) * 9 + ('lid',) * 9 + ('asr',) * 9
  assert gates.open_CxM.shape == (27, 33)
  row = next(n for n in range(27) if (gates.languages[n], gates.tasks[n]) == ('fra', 'lid'))
  context = next(c for c in contexts if (c['language'], c['task']) == ('fra', 'lid'))
  assert gates.utterances_C[row] == context['utterances']
  sites = gate_maps.split_sites(gates.open_CxM[row], gates.sites)
  assert {site: list(part) for site, part in sites.items()} == context['open']


def test_parse_names_what_is_wrong(summary):
  good = summary['points']['gated_0.5']['gate_map']

  def broken(change):
    bad = copy.deepcopy(good)
    change(bad['contexts'])
    return bad

  cases = {
    'no contexts': lambda c: c.clear(),
    'stands twice': lambda c: c.append(c[0]),
    'other sites or layers': lambda c: c[3]['open']['decoder/ffn'].pop(),
    'between 0 and 1': lambda c: c[3]['open'].update({'decoder/ffn': [0, 0, 1.5]}),
    'has no utterances': lambda c: c[3].update(utterances=0),
  }
  for message, change in cases.items():
    with pytest.raises(ValueError, match=message):
      gate_maps.parse(broken(change))


def test_distances_are_mean_absolute_differences():
  gates = _map(
    {
      ('fra', 'asr'): [0.0, 1.0],
      ('spa', 'asr'): [0.2, 1.0],
      ('fra', 'lid'): [1.0, 0.0],
    }
  )
  expected = [[0, 0.1, 1], [0.1, 0, 0.9], [1, 0.9, 0]]
  np.testing.assert_allclose(gate_maps.distances(gates), expected)
  apart = gate_maps.contrast(gates)
  assert apart.between_tasks == pytest.approx(1)
  assert apart.between_languages == pytest.approx(0.1)
  assert gate_maps.contrast(_map({('fra', 'asr'): [1.0]})).between_tasks is None


@pytest.mark.parametrize('factor', ['task', 'language'])
def test_one_factor_alone_explains_all(factor):
  pick = lambda language, task: {'task': task == 'asr', 'language': language == 'fra'}[factor]
  gates = _map(
    {
      (language, task): [float(pick(language, task)), 1.0]
      for language in ('fra', 'spa')
      for task in ('asr', 'lid')
    }
  )
  shares = _shares(gates)
  assert shares.pop(factor) == pytest.approx(1)
  assert list(shares.values()) == pytest.approx([0] * 4)
  assert f'above all by the {factor}' in gate_maps.describe(gates)


def test_an_exclusive_or_is_interaction():
  gates = _map(
    {
      ('fra', 'asr'): [1.0],
      ('spa', 'asr'): [0.0],
      ('fra', 'lid'): [0.0],
      ('spa', 'lid'): [1.0],
    }
  )
  assert _shares(gates)['interaction'] == pytest.approx(1)


def test_additive_effects_by_hand():
  # Task moves by 0.4, language by 0.2, about a mean of 0.5: total variance 0.25.
  gates = _map(
    {
      ('fra', 'asr'): [0.8],
      ('spa', 'asr'): [0.6],
      ('fra', 'lid'): [0.4],
      ('spa', 'lid'): [0.2],
    }
  )
  decomposition = gate_maps.decompose(gates)
  assert decomposition.variance == pytest.approx(0.25)
  shares = _shares(gates)
  assert shares['task'] == pytest.approx(0.04 / 0.25)
  assert shares['language'] == pytest.approx(0.01 / 0.25)
  assert shares['utterance'] == pytest.approx(1 - 0.05 / 0.25)
  assert shares['interaction'] == pytest.approx(0, abs=1e-8)


def test_shares_are_those_of_single_utterances(summary):
  """Sums of squares over explicit 0/1 gates, unbalanced, against an independent fit."""
  rng = np.random.default_rng(0)
  languages = rng.choice(['fra', 'spa', 'rus'], 400, p=[0.6, 0.3, 0.1])
  tasks = np.where(rng.random(400) < np.where(languages == 'fra', 0.8, 0.3), 'asr', 'lid')
  gate = (rng.random(400) < 0.2 + 0.5 * (tasks == 'asr') + 0.2 * (languages == 'rus')) * 1.0
  cells, utterances = {}, {}
  for name in sorted(set(zip(languages.tolist(), tasks.tolist()))):
    members = (languages == name[0]) & (tasks == name[1])
    cells[name], utterances[name] = [gate[members].mean()], int(members.sum())
  shares = _shares(_map(cells, utterances))

  def residual(*factors):
    design = np.concatenate(
      [np.ones((400, 1)), *(f[:, None] == np.unique(f)[1:] for f in factors)], axis=1
    )
    return ((gate - design @ np.linalg.pinv(design) @ gate) ** 2).sum()

  total = residual()
  assert shares['task'] == pytest.approx((residual(languages) - residual(languages, tasks)) / total)
  assert shares['language'] == pytest.approx((residual(tasks) - residual(languages, tasks)) / total)
  assert sum(shares.values()) == pytest.approx(1)
  assert abs(shares['shared']) > 0.01


def test_a_fixed_mask_is_called_one():
  gates = _map({('fra', 'asr'): [1.0, 0.0], ('spa', 'lid'): [1.0, 0.0]}, {('fra', 'asr'): 7})
  assert set(_shares(gates).values()) == {0.0}
  assert gate_maps.decompose(gates).fixed == pytest.approx(1)
  assert 'always open or always closed' in gate_maps.describe(gates)


def test_describe_has_the_numbers(summary):
  gates = gate_maps.parse(summary['points']['gated_0.5']['gate_map'])
  text, shares = gate_maps.describe(gates), gate_maps.decompose(gates)
  assert 'above all by the task' in text
  assert f'{shares.task:.0%} of the variance' in text
  assert f'{gate_maps.contrast(gates).between_languages:.3f}' in text


def test_by_task_weighs_utterances():
  cells = {('fra', 'asr'): [1.0], ('spa', 'asr'): [0.0], ('spa', 'lid'): [0.5]}
  means = gate_maps.by_task(_map(cells, {('fra', 'asr'): 30}))
  assert means['asr']['encoder/ffn1'] == pytest.approx([0.75])
  assert means['lid']['encoder/ffn1'] == pytest.approx([0.5])


def test_to_text():
  maps = {
    'fra asr': {'encoder/ffn1': [0.0, 0.25, 0.5, 0.75, 1.0], 'decoder/ffn': [1.0]},
    'lid': {'encoder/ffn1': [1.0] * 5, 'decoder/ffn': [0.0]},
  }
  assert gate_maps.to_text(maps).splitlines() == [
    '              fra asr  lid',
    'encoder/ffn1  ·░▒▓█    █████',
    'decoder/ffn   █        ·',
  ]
