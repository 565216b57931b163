"""Our beam search against ESPnet's own, at the same random weights.

Both read one encoder output; ESPnet's `BatchBeamSearch` scores with its `TransformerDecoder`,
`CTCPrefixScorer` and `LengthBonus`. A `maxlenratio` is given, which turns ESPnet's heuristic end
detection off: ours ends only where the best text is known.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HOW = 'parity tests need ESPnet: bash tests/parity/install.sh'
torch = pytest.importorskip('torch', reason=HOW)
pytest.importorskip('espnet2', reason=HOW)

from espnet.nets.batch_beam_search import BatchBeamSearch  # noqa: E402
from espnet.nets.beam_search import BeamSearch  # noqa: E402
from espnet.nets.scorer_interface import BatchScorerInterface  # noqa: E402
from espnet.nets.scorers.ctc import CTCPrefixScorer  # noqa: E402
from espnet.nets.scorers.length_bonus import LengthBonus  # noqa: E402
from espnet2.asr.ctc import CTC  # noqa: E402
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder  # noqa: E402
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder  # noqa: E402
from espnet2.s2t.espnet_model import ESPnetS2TModel  # noqa: E402

from gatedfm.convert import espnet  # noqa: E402
from gatedfm.execution import beam, ctc_prefix, decoding  # noqa: E402
from gatedfm.gates import Gates  # noqa: E402
from gatedfm.models import speech  # noqa: E402

TOKENS = ['<blank>', '<unk>', '<na>', *'abcdefghijklmnopqrst', '<sos>', '<eos>', '<sop>']
SOS, EOS, V = TOKENS.index('<sos>'), TOKENS.index('<eos>'), len(TOKENS)
D, HEADS, LENGTHS = 48, 4, (24, 17, 9)
PRIMER = [SOS, TOKENS.index('a'), TOKENS.index('b')]


@pytest.fixture(scope='module')
def theirs():
  torch.set_num_threads(1)
  common = {'attention_heads': HEADS, 'linear_units': 64, 'num_blocks': 2}
  model = ESPnetS2TModel(
    V,
    TOKENS,
    frontend=None,
    specaug=None,
    normalize=None,
    preencoder=None,
    encoder=TransformerEncoder(80, D, **common),
    postencoder=None,
    decoder=TransformerDecoder(V, D, **common),
    ctc=CTC(V, D),
    report_cer=False,
    report_wer=False,
  ).eval()
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = 0.2 if p.dim() == 1 else 1.5 * p[0].numel() ** -0.5
      p.normal_(0, scale, generator=generator)
      if 'norm' in name and name.endswith('weight'):
        p.add_(1)
    model.ctc.ctc_lo.bias[0] += 2  # blanks, as after training: texts end within their frames
    model.decoder.output_layer.bias[EOS] += 2
  return model


@pytest.fixture(scope='module')
def ours(theirs):
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  cfg = espnet.infer_config(state, HEADS)
  return speech.for_inference(cfg, jax.tree.map(jnp.asarray, espnet.from_espnet(state, cfg)))


class Primed(BatchScorerInterface):
  """ESPnet's decoder, for which `<sos>` stands for the whole primer.

  With `set_hyp_primer` its CTC scorers take the primer's tokens for written ones: they let no
  text start before as many frames.
  """

  def __init__(self, decoder):
    self._decoder = decoder

  def _full(self, y):
    return torch.cat([torch.tensor(PRIMER).expand(*y.shape[:-1], -1), y[..., 1:]], -1)

  def score(self, y, state, x):
    return self._decoder.score(self._full(y), state, x)

  def batch_score(self, ys, states, xs):
    return self._decoder.batch_score(self._full(ys), states, xs)


def memory():
  return np.random.default_rng(0).normal(0, 1, (len(LENGTHS), max(LENGTHS), D)).astype(np.float32)


def their_best(model, search, weight, b, kind):
  """N-best of one utterance: texts without `eos`, and scores."""
  find = kind(
    beam_size=search.beam,
    weights={'decoder': 1 - weight, 'ctc': weight, 'length_bonus': search.length_penalty},
    scorers={
      'decoder': Primed(model.decoder),
      'ctc': CTCPrefixScorer(model.ctc, EOS),
      'length_bonus': LengthBonus(V),
    },
    sos=SOS,
    eos=EOS,
    vocab_size=V,
    token_list=TOKENS,
    pre_beam_score_key=None,
  )
  heard = torch.tensor(memory()[b, : LENGTHS[b]])
  with torch.no_grad():
    found = find(heard, search.maxlenratio, search.minlenratio)
  text = lambda ids: tuple(i for i in ids[1:].tolist() if i != EOS)
  return [(text(h.yseq), float(h.score)) for h in found]


@pytest.mark.parametrize(
  ('kind', 'options', 'weight'),
  [
    (BatchBeamSearch, {'beam': 5, 'maxlenratio': 1.0}, 0.3),
    (BatchBeamSearch, {'beam': 3, 'maxlenratio': 0.6, 'length_penalty': 0.8}, 0.5),
    (BatchBeamSearch, {'beam': 1, 'maxlenratio': 1.0}, 0.3),
    (BeamSearch, {'beam': 10, 'maxlenratio': -6, 'length_penalty': -0.5}, 0.3),
    (BeamSearch, {'beam': 5, 'maxlenratio': 1.0}, 0.0),
  ],
  ids=str,
)
def test_beam_search(theirs, ours, kind, options, weight):
  model, params = ours
  search = decoding.Search(**options)
  mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  length = search.lengths(max(LENGTHS))[1]
  primer = np.tile(np.array(PRIMER, np.int32), (len(LENGTHS), 1))
  x = decoding.Request(
    None, None, None, None, primer, np.int32(length), np.float32(weight), None, length, search
  )
  vocabulary = decoding.Vocabulary(EOS, np.ones(V, bool), np.array([0]))

  @jax.jit
  def run(params, x):
    encoded = speech.Encoded(jnp.asarray(memory()), mask, Gates({}))
    logits = model.apply({'params': params}, encoded, method='ctc_logits')
    return beam.jointly(model, params, encoded, ctc_prefix.frames(logits, mask), x, vocabulary)

  found = run(params, x)
  texts = set()
  for b in range(len(LENGTHS)):
    rows = zip(np.asarray(found.hypotheses[b]).tolist(), np.asarray(found.scores[b]))
    mine = [(tuple(i for i in row if i != EOS), s) for row, s in rows if s > -np.inf]
    expected = their_best(theirs, search, weight, b, kind)
    assert mine[0][0] == expected[0][0]
    np.testing.assert_allclose(mine[0][1], expected[0][1], atol=2e-3)
    # Theirs go on; those that ended before ours knew the best have the same scores.
    scores = dict(expected)
    for text, score in mine:
      np.testing.assert_allclose(score, scores[text], atol=2e-3)
    texts.add(mine[0][0])
  assert len(texts) > 1
