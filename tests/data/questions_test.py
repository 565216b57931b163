"""Tasks: StaICC's format, one's own files, splits that never mix, prompts."""

import json
import pickle

import pytest

from gatedfm.data import questions
from gatedfm.data.questions import Question, Task
from gatedfm.data.types import DataError


def write(folder, name, rows):
  (folder / 'few_shot').mkdir(exist_ok=True)
  (folder / 'few_shot' / f'{name}.dataset').write_bytes(pickle.dumps(rows))


def texts(number):
  return [([f'Text number {i} is here .'], i % 2) for i in range(number)]


def test_a_set_is_split_by_text_alone(tmp_path):
  write(tmp_path, 'rotten_tomatoes', texts(300) + texts(3) + [(['word ' * 61], 0)])
  write(tmp_path, 'subjective', texts(300))
  task, other = (questions.load(n, tmp_path) for n in ('rotten_tomatoes', 'subjective'))
  sizes = {split: len(questions) for split, questions in task.questions.items()}
  assert sum(sizes.values()) == 300  # twins and long texts are left out
  assert 120 < sizes['train'] < 180
  assert 40 < sizes['validation'] < 85
  for split, own in task.questions.items():
    mine = {q.context.split('\n')[0].removeprefix('Review: ') for q in own}
    theirs = {q.context.split('\n')[0].removeprefix('Text: ') for q in other.questions[split]}
    assert mine == theirs


def test_prompts(tmp_path):
  write(tmp_path, 'sst5', [(['Good .'], 3), (['Awful .'], 0)])
  task = questions.load('sst5', tmp_path)
  good, awful = sorted((q for s in task.questions.values() for q in s), key=lambda q: -q.answer)
  assert good.choices[good.answer] == 'good'
  want = 'Review: Awful .\nSentiment: terrible\n\nReview: Good .\nSentiment:'
  assert task.prompt(good, [awful]) == want
  assert task.prompt(task.blank, []) == 'Review: N/A\nSentiment:'


class Hostile:
  def __reduce__(self):
    return print, ('harm',)


def test_hostile_and_damaged_sets(tmp_path, capsys):
  write(tmp_path, 'trec', [Hostile()])
  with pytest.raises(DataError, match=r'it asks for builtins\.print; delete it'):
    questions.load('trec', tmp_path)
  write(tmp_path, 'trec', [1, 2])
  with pytest.raises(DataError, match='is damaged'):
    questions.load('trec', tmp_path)
  assert 'harm' not in capsys.readouterr().out


def test_ones_own_files(tmp_path):
  rows = [
    {'context': 'One and one are', 'choices': ['two', 'three'], 'answer': 'two', 'split': 'test'},
    {'context': 'Two and one are ', 'choices': ['two', 'three'], 'answer': 1, 'split': 'train'},
  ]
  path = tmp_path / 'sums.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  task = questions.load(str(path))
  assert task.name == 'sums'
  assert task.questions['test'] == [Question('One and one are', ('two', 'three'), 0)]
  assert task.questions['train'] == [Question('Two and one are', ('two', 'three'), 1)]
  table = tmp_path / 'sums.csv'
  table.write_text(
    'context,choices,answer,split\nOne and one are,two|three,two,test\n'
    'Two and one are ,two|three,1,train\n'
  )
  assert questions.load(str(table)).questions == task.questions


def test_texts_of_several_lines(tmp_path):
  """As Excel writes them; and what JSON leaves unescaped that Python would end a line at."""
  table = tmp_path / 'a.csv'
  head, fine = '\ufeffcontext,choices,answer,split\n', '"line one\nline two",x|y,x,test\n'
  table.write_bytes(f'{head}{fine}"no end,x|y,z,test\n'.encode())
  with pytest.raises(DataError, match='line 4: '):
    questions.load(str(table))
  table.write_bytes(f'{head}{fine}'.encode())
  [question] = questions.load(str(table)).questions['test']
  assert question.context == 'line one\nline two'
  lines = tmp_path / 'a.jsonl'
  row = {'context': 'one\u2028two', 'choices': ['x', 'y'], 'answer': 0, 'split': 'test'}
  lines.write_text(json.dumps(row, ensure_ascii=False) + '\n')
  assert questions.load(str(lines)).questions['test'][0].context == 'one\u2028two'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"context": "a", "choices": "yes", "answer": 0}', 'choices are a list .in CSV'),
    ('{"context": "a", "choices": ["b", "c"], "answer": 0.9}', 'the answer is one or'),
    ('{"context": "a", "choices": ["b", "c"]}', "line 1: has no 'answer'"),
    ('{"context": "a", "choices": ["b"], "answer": 0}', 'fewer than two choices'),
    ('{"context": " ", "choices": ["b", "c"], "answer": 0}', 'an empty context'),
    ('{"context": "a", "choices": ["b", "c"], "answer": 2}', 'answer 2 is none'),
    ('{"context": "a", "choices": ["b", "c"], "answer": "d"}', 'line 1'),
    ('{"context": "a", "choices": ["b", "c"], "answer": 0, "split": "dev"}', "split 'dev'"),
    ('nonsense', 'line 1'),
    ('', 'holds no examples'),
  ],
)
def test_bad_lines_are_named(tmp_path, line, message):
  path = tmp_path / 'own.jsonl'
  path.write_text(line + '\n')
  with pytest.raises(DataError, match=message):
    questions.load(str(path))


def test_unknown_tasks_and_missing_files(tmp_path):
  with pytest.raises(DataError, match=r"no task 'sst': give a \.jsonl or \.csv file, or one of"):
    questions.load('sst')
  with pytest.raises(DataError, match='cannot be read'):
    questions.load(str(tmp_path / 'none.jsonl'))


def question(i):
  return Question(f'question {i}', ('a', 'b'), i % 2)


def test_shots_are_of_training_and_never_the_question():
  task = Task('t', {'train': [question(i) for i in range(6)], 'validation': [], 'test': []})
  for seed in range(20):
    drawn = questions.sample(task, 'train', 4, 5, seed)
    assert len({id(q) for q, _ in drawn}) == 4
    for q, shots in drawn:
      assert len(shots) == len({id(s) for s in shots}) == 5
      assert all(s is not q for s in shots)
  assert questions.sample(task, 'train', 4, 2, 1) == questions.sample(task, 'train', 4, 2, 1)
  assert questions.sample(task, 'train', 4, 2, 1) != questions.sample(task, 'train', 4, 2, 2)
  with pytest.raises(DataError, match='6 shots need as many other .*; there are 5'):
    questions.sample(task, 'train', 4, 6, 0)
  with pytest.raises(DataError, match='no questions for test'):
    questions.sample(task, 'test', 4, 0, 0)


def test_seeds_ask_other_questions():
  task = Task('t', {'train': [], 'validation': [], 'test': [question(i) for i in range(10)]})
  drawn = [{q.context for q, _ in questions.sample(task, 'test', 3, 0, s)} for s in range(4)]
  assert all(len(contexts) == 3 for contexts in drawn)
  assert len(set.union(*drawn[:3])) == 9
  assert len(set.union(*drawn)) == 10
  assert len(questions.sample(task, 'test', 30, 0, 2)) == 10


def test_tables_that_csv_cannot_read(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('context,choices,answer\n' + 'x' * 200_000 + ',a|b,a\n')
  with pytest.raises(DataError, match=r'a\.csv, behind line 1: field larger than'):
    questions.load(str(path))
