"""Gate maps: how often each module opens in each context, and what decides it.

A context is a pair of language and task; a module is one layer of one site, for example
layer 3 of 'encoder/ffn1'. Array letters: C contexts, M modules, N layers of one site.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Closed, up to a quarter, half, three quarters, always open.
BLOCKS = '·░▒▓█'


@dataclasses.dataclass(frozen=True)
class GateMap:
  """Open fractions of all modules in all contexts, contexts sorted by task.

  Attributes:
    languages: C language codes.
    tasks: C task names.
    utterances_C: how many utterances each context was measured on.
    sites: name and number of layers of each site, in the order of the columns.
    open_CxM: the fraction of the utterances of a context in which a module was open.
  """

  languages: tuple[str, ...]
  tasks: tuple[str, ...]
  utterances_C: np.ndarray
  sites: tuple[tuple[str, int], ...]
  open_CxM: np.ndarray


@dataclasses.dataclass(frozen=True)
class Decomposition:
  """Shares of the variance with which modules open and close; see `decompose`.

  Attributes:
    variance: what is divided: the variance of a 0/1 gate over utterances, mean over
      modules; at most 0.25, and 0 where no module ever changes.
    task: share that only the task explains.
    language: share that only the language explains.
    shared: share that either explains, as the tasks have different languages; 0 in a
      balanced map, and below 0 where the two hide each other.
    interaction: what is left between contexts: a language that acts otherwise in one task.
    utterance: within contexts, so due to the speech itself.
    fixed: not one of these five, which add up to 1: of the variance of all gates, the
      share that lies between modules. A mask that ignores the context would give 1.
  """

  variance: float
  task: float
  language: float
  shared: float
  interaction: float
  utterance: float
  fixed: float


@dataclasses.dataclass(frozen=True)
class Contrast:
  """Mean distances over pairs of contexts; None where there is no such pair."""

  between_tasks: float | None  # two tasks, same language
  between_languages: float | None  # two languages, same task


def parse(gate_map: Mapping[str, Any]) -> GateMap:
  """Reads the 'gate_map' of a point of summary.json.

  Args:
    gate_map: {'contexts': [{'language', 'task', 'utterances', 'open': {site: [N]}}]}.

  Raises:
    ValueError: no contexts, a context twice or without utterances, sites or layers that
      differ between contexts, or a value outside of [0, 1].
  """
  contexts = gate_map['contexts']
  if not contexts:
    raise ValueError('the gate map has no contexts')
  tasks = list(dict.fromkeys(context['task'] for context in contexts))
  contexts = sorted(contexts, key=lambda context: tasks.index(context['task']))
  sites = tuple((site, len(layers)) for site, layers in contexts[0]['open'].items())
  seen = set()
  for context in contexts:
    name = context['language'], context['task']
    if name in seen or context['utterances'] < 1:
      raise ValueError(f'context {name} stands twice or has no utterances')
    seen.add(name)
    if {site: len(layers) for site, layers in context['open'].items()} != dict(sites):
      raise ValueError(f'context {name} has other sites or layers than {sites}')
  open_CxM = np.asarray(
    [np.concatenate([context['open'][site] for site, _ in sites]) for context in contexts]
  )
  if not ((open_CxM >= 0) & (open_CxM <= 1)).all():
    raise ValueError('open fractions must lie between 0 and 1')
  return GateMap(
    languages=tuple(context['language'] for context in contexts),
    tasks=tuple(context['task'] for context in contexts),
    utterances_C=np.asarray([context['utterances'] for context in contexts]),
    sites=sites,
    open_CxM=open_CxM,
  )


def distances(gate_map: GateMap) -> np.ndarray:
  """Mean absolute difference of the open fractions of each pair of contexts: [C, C]."""
  open_CxM = gate_map.open_CxM
  return np.abs(open_CxM[:, None] - open_CxM[None]).mean(axis=-1)


def contrast(gate_map: GateMap) -> Contrast:
  """How far apart tasks are within a language, and languages within a task."""
  distance_CxC = distances(gate_map)
  tasks, languages = np.asarray(gate_map.tasks), np.asarray(gate_map.languages)
  same_task_CxC = tasks[:, None] == tasks
  same_language_CxC = languages[:, None] == languages
  mean = lambda pairs: float(distance_CxC[pairs].mean()) if pairs.any() else None
  return Contrast(
    between_tasks=mean(same_language_CxC & ~same_task_CxC),
    between_languages=mean(same_task_CxC & ~same_language_CxC),
  )


def decompose(gate_map: GateMap) -> Decomposition:
  """Says what decides whether a module opens: task, language or the utterance itself.

  A two-way analysis of variance with main effects of task and language, for each module,
  added up over modules. The unit is the utterance: a context weighs as many utterances as
  it has. Gates are 0 or 1, so the open fraction p gives the variance within a context
  too, p(1 - p). Cells are unbalanced, hence the shares of task and language are what each
  adds to the other (sums of squares of type II), and what they explain alike stands apart.

  All shares are 0 where no module ever changes.
  """
  open_CxM = gate_map.open_CxM
  weight_Cx1 = gate_map.utterances_C[:, None] / gate_map.utterances_C.sum()
  mean_M = (weight_Cx1 * open_CxM).sum(axis=0)
  task_CxA, language_CxA = _one_hot(gate_map.tasks), _one_hot(gate_map.languages)

  def explained(*factors):
    design = np.sqrt(weight_Cx1) * np.concatenate(factors, axis=1)
    effects = np.linalg.lstsq(design, np.sqrt(weight_Cx1) * open_CxM)[0]
    fitted_CxM = np.concatenate(factors, axis=1) @ effects
    return (weight_Cx1 * (fitted_CxM - mean_M) ** 2).sum()

  by_task, by_language = explained(task_CxA), explained(language_CxA)
  by_both = explained(task_CxA, language_CxA)
  between = (weight_Cx1 * (open_CxM - mean_M) ** 2).sum()
  total = (mean_M * (1 - mean_M)).sum()
  grand = mean_M.mean()
  all_gates = grand * (1 - grand) * mean_M.size
  # Rounding errors neither make a variance nor a share below zero.
  share = lambda value, of: round(float(value / of), 9) + 0.0 if of > 1e-9 else 0.0
  return Decomposition(
    variance=share(total, mean_M.size),
    task=share(by_both - by_language, total),
    language=share(by_both - by_task, total),
    shared=share(by_task + by_language - by_both, total),
    interaction=share(between - by_both, total),
    utterance=share(total - between, total),
    fixed=share(((mean_M - grand) ** 2).sum(), all_gates),
  )


def describe(gate_map: GateMap) -> str:
  """What the map says, in two or three sentences with its numbers."""
  shares = decompose(gate_map)
  effects = {
    'the task': shares.task,
    'the language': shares.language,
    'the single utterance': shares.utterance,
  }
  if not shares.variance:
    return 'Every module is always open or always closed, whatever the context.'
  ranked = sorted(effects, key=effects.get, reverse=True)
  others = [f'{name} for {effects[name]:.0%}' for name in ranked[1:]]
  others.append(f'the interaction of task and language for {shares.interaction:.0%}')
  if abs(shares.shared) >= 0.005:
    others.append(f'task and language inseparably for {shares.shared:.0%}')
  sentences = [
    f'What changes from one utterance to the next is decided above all by {ranked[0]}, '
    f'which accounts for {effects[ranked[0]]:.0%} of the variance of the openings; '
    f'{", ".join(others[:-1])} and {others[-1]}.',
    f'{shares.fixed:.0%} of the variance of all gates lies between modules, where a fixed '
    'mask would have it too.',
  ]
  apart = contrast(gate_map)
  if apart.between_tasks is not None and apart.between_languages is not None:
    sentences.append(
      f'Two tasks of one language differ by {apart.between_tasks:.3f} in the open fraction '
      f'of a module, two languages of one task by {apart.between_languages:.3f}.'
    )
  return ' '.join(sentences)


def by_task(gate_map: GateMap) -> dict[str, dict[str, np.ndarray]]:
  """Open fractions of each task, over its utterances: {task: {site: [N]}}."""
  result = {}
  for task in dict.fromkeys(gate_map.tasks):
    rows = np.asarray(gate_map.tasks) == task
    open_M = np.average(gate_map.open_CxM[rows], axis=0, weights=gate_map.utterances_C[rows])
    result[task] = split_sites(open_M, gate_map.sites)
  return result


def split_sites(open_M: np.ndarray, sites: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
  """Cuts a row of modules into its sites: {site: [N]}."""
  ends = np.cumsum([layers for _, layers in sites])[:-1]
  return {site: part for (site, _), part in zip(sites, np.split(open_M, ends))}


def to_text(maps: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
  """Draws gates for a terminal: a row for each site, a character for each layer.

  Args:
    maps: {title: {site: [N] open fractions}}, drawn side by side; all have the same
      sites. `by_task` makes one, and `{'fra asr': context['open']}` is one.

  Returns:
    Lines without a final newline. '·' is closed, '█' open, and ░▒▓ stand between.
  """
  sites = list(next(iter(maps.values())))
  name_width = max(map(len, sites))
  columns = []
  for title, gates in maps.items():
    drawn = [''.join(map(_block, gates[site])) for site in sites]
    width = max(len(title), *map(len, drawn))
    columns.append([text.ljust(width) for text in (title, *drawn)])
  names = [' ' * name_width, *(site.ljust(name_width) for site in sites)]
  return '\n'.join('  '.join(row).rstrip() for row in zip(names, *columns))


def _block(fraction):
  return BLOCKS[round(float(fraction) * (len(BLOCKS) - 1))]


def _one_hot(names):
  values, index_C = np.unique(names, return_inverse=True)
  return np.eye(len(values))[index_C]
