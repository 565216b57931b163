"""Our models in EleutherAI's lm-evaluation-harness, against its own model `hf`, random weights."""

import json
import sys

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
lm_eval = pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from gatedfm.convert import lm_files  # noqa: E402
from gatedfm.evaluation import harness  # noqa: E402

pytestmark = pytest.mark.parity

LENGTH = 24
VOCAB = [*(f'w{i}' for i in range(40)), '<s>', '</s>']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A tiny Llama with a tokenizer in their layout, and in ours."""
  theirs, ours = tmp_path_factory.mktemp('theirs'), tmp_path_factory.mktemp('ours')
  torch.manual_seed(0)
  cfg = transformers.LlamaConfig(
    vocab_size=len(VOCAB), hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=32, max_position_embeddings=LENGTH + 1,
    bos_token_id=40, eos_token_id=41, initializer_range=0.3, tie_word_embeddings=False,
  )  # fmt: skip
  transformers.LlamaForCausalLM(cfg).save_pretrained(theirs)
  words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token='w0'))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.save(str(theirs / 'tokenizer.json'))
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>'}
  (theirs / 'tokenizer_config.json').write_text(json.dumps(about))
  lm_files.bring('hf', theirs, ours / 'model', 'float32', lambda line: None)
  return theirs, ours / 'model'


@pytest.fixture(scope='module')
def both(folders):
  theirs, ours = folders
  hf = HFLM(str(theirs), device='cpu', dtype='float32', batch_size=2, max_length=LENGTH)
  return hf, harness.register()(ours, batch_size=2)


def asked(kind, *arguments):
  return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_they_begin_alike(both):
  hf, own = both
  assert own.max_length == hf.max_length
  assert (own.eot_token_id, own.prefix_token_id) == (hf.eot_token_id, hf.prefix_token_id)
  assert own.tok_encode('w3 w5') == hf.tok_encode('w3 w5')


def test_exported_tokens(folders, tmp_path):
  lm_files.export(folders[1], tmp_path / 'out', 'float32', lambda line: None)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (40, 41, None)
  assert theirs('w3 w5').input_ids == [3, 5]


def test_likelihoods(both):
  long = ' '.join(f'w{i % 40}' for i in range(30))
  requests = asked(
    'loglikelihood',
    ('w1 w2 w3', ' w4'),
    ('w1 w2 w3', ' w9 w7'),
    ('', 'w5 w6'),
    ('w8 ', 'w1'),
    (long, ' w3 w4'),
    ('w2', ' ' + long[: 23 * 3]),
  )
  want, got = (lm.loglikelihood(requests, disable_tqdm=True) for lm in both)
  for (w, w_greedy), (g, g_greedy) in zip(want, got):
    assert g == pytest.approx(w, abs=1e-3)
    assert g_greedy == w_greedy
  # What they write themselves, they find greedy.
  (text,) = both[0].generate_until(
    asked('generate_until', ('w1 w2 w3', {'max_gen_toks': 3, 'until': []})), disable_tqdm=True
  )
  again = asked('loglikelihood', ('w1 w2 w3', ' ' + text.strip()))
  assert [lm.loglikelihood(again, disable_tqdm=True)[0][1] for lm in both] == [True, True]


def test_rolling(both):
  texts = ['w1 w2 w3', ' '.join(f'w{i * 7 % 40}' for i in range(2 * LENGTH + 5)), 'w9']
  requests = asked('loglikelihood_rolling', *((text,) for text in texts))
  want, got = (lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in both)
  assert got == pytest.approx(want, abs=2e-3)


def test_texts(both):
  prompts = ['w1 w2 w3', 'w30 w31', 'w5', 'w7 w7 w8 w9', ' '.join(f'w{i}' for i in range(30))]
  free = asked('generate_until', *((p, {'max_gen_toks': 8, 'until': []}) for p in prompts))
  want, got = (lm.generate_until(free, disable_tqdm=True) for lm in both)
  assert [text.split() for text in got] == [text.split() for text in want]
  # A word that comes up ends the text before it.
  word = want[0].split()[3]
  until = asked('generate_until', *((p, {'max_gen_toks': 8, 'until': [word]}) for p in prompts))
  want, got = (lm.generate_until(until, disable_tqdm=True) for lm in both)
  assert [text.split() for text in got] == [text.split() for text in want]
  assert len(got[0].split()) <= 3


def test_a_task(both, folders, tmp_path, monkeypatch):
  """A user's own task, by the command line."""
  lines = [
    {'question': f'w{i} w{i + 1}', 'choices': [f'w{i + j}' for j in (2, 5, 9)], 'label': i % 3}
    for i in range(12)
  ]
  (tmp_path / 'data.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  task = {
    'task': 'words',
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(tmp_path / 'data.jsonl')}},
    'test_split': 'test',
    'output_type': 'multiple_choice',
    'doc_to_text': '{{question}}',
    'doc_to_choice': 'choices',
    'doc_to_target': 'label',
    'metric_list': [{'metric': 'acc'}],
  }
  want = lm_eval.simple_evaluate(both[0], tasks=[dict(task)], num_fewshot=0, bootstrap_iters=0)
  (tmp_path / 'tasks').mkdir()
  (tmp_path / 'tasks' / 'words.yaml').write_text(json.dumps(task))
  monkeypatch.setattr(
    sys,
    'argv',
    ['harness', 'run', '--model', 'gatedfm', '--model_args', f'checkpoint={folders[1]}']
    + ['--include_path', str(tmp_path / 'tasks'), '--tasks', 'words', '--batch_size', '4']
    + ['--output_path', str(tmp_path / 'out')],
  )
  harness.command()
  (path,) = (tmp_path / 'out').rglob('results*.json')
  accuracy = json.loads(path.read_text())['results']['words']['acc,none']
  assert accuracy == want['results']['words']['acc,none']
  assert 0 < accuracy < 1
