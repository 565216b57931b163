"""Our modules against ESPnet's own, in float32, every parameter random.

ESPnet's initialisation (norms of one, biases of zero, gate taps near zero) would hide a
misplaced tensor, so weights are drawn at 1/sqrt(fan-in) and norms, biases and taps at 0.2.
Outputs are then of order 1, which `close` checks, and agree to 1e-4 absolutely, as do the
gradients of the whole loss.

Letters: B batch, T frames, S subsampled frames, L tokens, D model, M mels, V vocabulary.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

HOW = 'parity tests need ESPnet: bash tests/parity/install.sh'
torch = pytest.importorskip('torch', reason=HOW)
pytest.importorskip('espnet2', reason=HOW)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from espnet.nets.pytorch_backend.transformer import label_smoothing_loss  # noqa: E402
from espnet2.asr.ctc import CTC  # noqa: E402
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder  # noqa: E402
from espnet2.asr.encoder import e_branchformer_encoder, transformer_encoder  # noqa: E402
from espnet2.layers.global_mvn import GlobalMVN  # noqa: E402
from espnet2.layers.log_mel import LogMel  # noqa: E402
from espnet2.layers.stft import Stft  # noqa: E402
from espnet2.s2t.espnet_model import ESPnetS2TModel  # noqa: E402

from gatedfm.convert import espnet  # noqa: E402
from gatedfm.data import features  # noqa: E402
from gatedfm.models import decoder as decoder_lib  # noqa: E402
from gatedfm.models import encoder as encoder_lib  # noqa: E402
from gatedfm.models import speech  # noqa: E402
from gatedfm.models.speech_config import SpeechConfig  # noqa: E402
from gatedfm.nn import attention, cgmlp, gating, layers, subsampling  # noqa: E402
from gatedfm.trainers import losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning:espnet2')

TOKENS = ['<blank>', '<unk>', '<na>', *'abcdefghijklmnopqrst', '<sos>', '<eos>', '<sop>']
NA, SOS, EOS, SOP = (TOKENS.index(f'<{t}>') for t in ('na', 'sos', 'eos', 'sop'))
D, V, HEADS = 48, len(TOKENS), 4
SMOOTHING, CTC_WEIGHT = 0.1, 0.3
CONTEXT = gating.Context(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32))
FRAMES = [150, 117, 63]
STEPS = [37, 29, 11]


@dataclasses.dataclass(frozen=True)
class Pair:
  """One model on both sides, and our parameters converted from theirs."""

  theirs: Any
  cfg: SpeechConfig
  params: dict

  def layer(self, stack: str, i: int) -> dict:
    return jax.tree.map(lambda a: a[i], self.params[stack]['layers']['scan'])

  def normalise(self, features_BxTxM: np.ndarray) -> np.ndarray:
    stats = espnet.feature_stats(numpy_state(self.theirs))
    return (features_BxTxM - stats.mean) / stats.std

  def run(self, *args, **kwargs) -> Any:
    return apply(speech.SpeechModel(self.cfg), self.params, *args, **kwargs)


def apply(module, params: dict, *args, **kwargs) -> Any:
  """`module.apply`, compiled in one piece, which takes less time than op by op."""
  return jax.jit(lambda p: module.apply({'params': p}, *args, **kwargs))(params)


def numpy_state(module) -> dict[str, np.ndarray]:
  return {k: v.numpy() for k, v in module.state_dict().items()}


def randomise(module, seed: int) -> None:
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      scale = 0.2 if p.dim() == 1 else (p.shape[-1] if p.dim() == 2 else p[0].numel()) ** -0.5
      p.normal_(0, scale, generator=generator)
      if 'norm' in name and name.endswith('weight'):
        p.add_(1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours, theirs) -> None:
  theirs = theirs.detach().numpy()
  assert 0.2 < theirs.std() < 5, f'outputs of order 1 expected, deviation {theirs.std()}'
  np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-4)


def mask_of(lengths: list[int], size: int) -> np.ndarray:
  return np.arange(size) < np.asarray(lengths)[:, None]


@pytest.fixture(scope='module', params=['e_branchformer', 'transformer'])
def pair(request, tmp_path_factory) -> Pair:
  torch.set_num_threads(1)
  common = {'attention_heads': HEADS, 'linear_units': 80, 'num_blocks': 2}
  if request.param == 'transformer':
    encoder = transformer_encoder.TransformerEncoder(80, D, **common)
  else:
    encoder = e_branchformer_encoder.EBranchformerEncoder(
      80,
      D,
      attention_layer_type='selfattn',
      pos_enc_layer_type='abs_pos',
      cgmlp_linear_units=64,
      merge_conv_kernel=31,
      use_ffn=True,
      macaron_ffn=True,
      **common,
    )
  stats = tmp_path_factory.mktemp('stats') / 'feats_stats.npz'
  sums = normal(80, seed=1)
  np.savez(stats, count=10, sum=sums, sum_square=20 + sums**2)
  theirs = ESPnetS2TModel(
    V,
    TOKENS,
    frontend=None,
    specaug=None,
    normalize=GlobalMVN(stats),
    preencoder=None,
    encoder=encoder,
    postencoder=None,
    decoder=TransformerDecoder(V, D, attention_heads=HEADS, linear_units=96, num_blocks=3),
    ctc=CTC(V, D),
    ctc_weight=CTC_WEIGHT,
    lsm_weight=SMOOTHING,
    report_cer=False,
    report_wer=False,
  ).eval()
  randomise(theirs, seed=2)
  state = numpy_state(theirs)
  cfg = espnet.infer_config(state, HEADS)
  params = jax.tree.map(jnp.asarray, espnet.from_espnet(state, cfg))
  return Pair(theirs, cfg, params)


def test_state_dict_comes_back_whole(pair):
  state = numpy_state(pair.theirs)
  back = espnet.to_espnet(pair.params, pair.cfg)
  assert set(state) - set(back) == {'normalize.mean', 'normalize.std'}
  for name, array in back.items():
    np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_attention(pair):
  x = normal(3, 37, D)
  mask = mask_of(STEPS, 37)
  block = pair.theirs.encoder.encoders[1]
  module = block.attn if pair.cfg.encoder == 'e_branchformer' else block.self_attn
  xt = torch.tensor(x)
  params = pair.layer('encoder', 1)['attention']['attention']
  ours = apply(attention.Attention(HEADS, D), params, x, mask[:, None, None])
  close(ours, module(xt, xt, xt, torch.tensor(mask)[:, None]))


def test_layer_norm_of_quiet_input(pair):
  """With so little variance any epsilon larger than ESPnet's 1e-12 would show."""
  x = 1e-3 * normal(3, 37, D)
  params = pair.params['encoder']['after_norm']
  ours = apply(layers.LayerNorm(), params, x)
  close(ours, pair.theirs.encoder.after_norm(torch.tensor(x)))


@pytest.mark.parametrize('pair', ['e_branchformer'], indirect=True)
def test_cgmlp(pair):
  x = normal(3, 37, D)
  params = pair.layer('encoder', 1)['cgmlp']['cgmlp']
  ours = apply(cgmlp.CgMlp(64, 31), params, x)
  close(ours, pair.theirs.encoder.encoders[1].cgmlp(torch.tensor(x), None))


@pytest.mark.parametrize('frames', [7, 30, 61, 64])
def test_subsampling_and_positions(pair, frames):
  x = normal(2, frames, 80)
  mask = mask_of([frames, frames - 2], frames)
  ours = subsampling.add_positions(
    apply(subsampling.Conv2dSubsampling(D, D), pair.params['subsample'], x)
  )
  theirs, their_mask = pair.theirs.encoder.embed(torch.tensor(x), torch.tensor(mask)[:, None])
  assert ours.shape[1] == subsampling.subsampled_length(frames)
  np.testing.assert_array_equal(subsampling.subsampled_mask(mask), their_mask[:, 0])
  # Positions join `x * sqrt(D)`, of order 7 here; the tolerance is for outputs of order 1.
  close(ours / D**0.5, theirs / D**0.5)


def test_encoder_layer(pair):
  x = normal(3, 37, D)
  mask = mask_of(STEPS, 37)
  params = pair.layer('encoder', 1)
  ours, _ = apply(encoder_lib.EncoderLayer(pair.cfg), params, x, {}, mask, CONTEXT, True)
  theirs, _ = pair.theirs.encoder.encoders[1](torch.tensor(x), torch.tensor(mask)[:, None])
  close(ours, theirs)


def test_decoder_layer(pair):
  x, memory = normal(3, 9, D), normal(3, 37, D, seed=1)
  seen = mask_of(STEPS, 37)
  params = pair.layer('decoder', 1)
  ours, _ = apply(decoder_lib.DecoderLayer(pair.cfg), params, x, {}, memory, seen, True)
  causal = torch.ones(3, 9, 9).tril().bool()
  theirs = pair.theirs.decoder.decoders[1](
    torch.tensor(x), causal, torch.tensor(memory), torch.tensor(seen)[:, None]
  )
  close(ours, theirs[0])


@pytest.fixture(scope='module')
def encoded(pair):
  """A padded batch encoded by both: ours, their memory and their lengths."""
  x = normal(3, max(FRAMES), 80)
  ours = pair.run(pair.normalise(x), jnp.asarray(FRAMES), CONTEXT, method='encode')
  return ours, *pair.theirs.encode(torch.tensor(x), torch.tensor(FRAMES))


def test_encoder_with_a_padded_batch(pair, encoded):
  ours, theirs, lengths = encoded
  np.testing.assert_array_equal(ours.mask.sum(1), lengths)
  close(ours.memory, theirs)  # the padding's frames too: the convolutions see them
  close(pair.run(ours, method='ctc_logits'), pair.theirs.ctc.ctc_lo(theirs))


@pytest.fixture(scope='module')
def decoded(pair, encoded):
  """Tokens, which of them count, and ESPnet's teacher-forced logits."""
  _, memory, memory_lengths = encoded
  tokens = np.random.default_rng(3).integers(3, V, (3, 8))
  lengths = [8, 5, 7]
  logits, _ = pair.theirs.decoder(
    memory, memory_lengths, torch.tensor(tokens), torch.tensor(lengths)
  )
  return tokens, mask_of(lengths, 8), logits


def test_decoder_teacher_forced(pair, encoded, decoded):
  tokens, valid, theirs = decoded
  forced = lambda model, encoded: model.decoder(
    tokens, speech.decoder_gates(encoded), encoded.memory, encoded.mask, True
  )
  ours = pair.run(encoded[0], method=forced)
  close(ours[valid], theirs[valid])


def test_decoder_with_cache(pair, encoded, decoded):
  tokens, valid, theirs = decoded
  model, params = speech.for_inference(pair.cfg, pair.params)
  caches = apply(model, params, encoded[0], 12, method='start')
  step = jax.jit(lambda *args: model.apply({'params': params}, *args, encoded[0], method='step'))
  ours = []
  # The first three tokens at once, as a primer is, then one by one.
  for i, n in [(0, 3)] + [(i, i + 1) for i in range(3, tokens.shape[1])]:
    logits, caches = step(tokens[:, i:n], i, caches)
    ours.append(logits)
  close(jnp.concatenate(ours, 1)[valid], theirs[valid])


def test_whole_loss_and_its_gradient(pair):
  """`ESPnetS2TModel.forward` and backward, one utterance without a transcript."""
  x = normal(3, max(FRAMES), 80)
  text = np.array([[5, 6, 7, 8, 9], [10, 11, 12, -1, -1], [13, 14, 14, 15, -1]])
  text_ctc = np.array([[5, 5, 7, 8], [NA, -1, -1, -1], [13, 14, 14, -1]])
  lengths, ctc_lengths = (text >= 0).sum(1), (text_ctc >= 0).sum(1)
  prev = np.full((3, 1), NA)
  pair.theirs.zero_grad()
  loss, stats, _ = pair.theirs(
    *map(torch.tensor, (x, FRAMES, text, lengths, prev, [1] * 3, text_ctc, ctc_lengths))
  )
  loss.backward()

  padded = np.pad(text, ((0, 0), (0, 1)), constant_values=-1)
  targets = np.where(lengths[:, None] == np.arange(6), EOS, padded)
  inputs = np.pad(np.where(text < 0, EOS, text), ((0, 0), (1, 0)), constant_values=SOS)
  heard = text_ctc[:, 0] != NA

  def hybrid(params):
    out = speech.SpeechModel(pair.cfg).apply(
      {'params': params}, pair.normalise(x), jnp.asarray(FRAMES), inputs, CONTEXT
    )
    ctc = losses.ctc_loss(
      out.ctc_logits, out.encoded.mask.sum(1), np.maximum(text_ctc, 0), ctc_lengths * heard
    )
    att = losses.attention_loss(out.logits, targets, SMOOTHING)
    # ESPnet divides CTC by the utterances with a transcript, attention by all of them.
    parts = ctc.sum() / heard.sum(), att.sum() / 3
    return CTC_WEIGHT * parts[0] + (1 - CTC_WEIGHT) * parts[1], parts

  (total, (ctc, att)), slopes = jax.jit(jax.value_and_grad(hybrid, has_aux=True))(pair.params)
  np.testing.assert_allclose(ctc, stats['loss_ctc'], rtol=1e-5)
  np.testing.assert_allclose(att, stats['loss_att'], rtol=1e-5)
  np.testing.assert_allclose(total, loss.item(), rtol=1e-5)
  # A gradient converts as its parameter does.
  ours = espnet.to_espnet(slopes, pair.cfg)
  for name, parameter in pair.theirs.named_parameters():
    np.testing.assert_allclose(ours[name], parameter.grad, rtol=0, atol=1e-4, err_msg=name)


def test_ctc_loss_and_gradient():
  """Repeated labels, padding, an alignment that only just fits and one that cannot."""
  logits = normal(4, 20, V, seed=4)
  frames = np.array([20, 13, 6, 5])
  labels = np.array([[3, 3, 4, 4, 4], [5, 6, 0, 0, 0], [7, 7, 7, 8, 0], [7, 7, 7, 8, 9]])
  counts = np.array([5, 2, 4, 5])
  given = torch.tensor(logits, requires_grad=True)
  flat = torch.tensor(np.concatenate([row[:n] for row, n in zip(labels, counts)]))
  theirs = 4 * CTC(V, D, reduce=False).loss_fn(
    given.transpose(0, 1), flat, torch.tensor(frames), torch.tensor(counts)
  )
  theirs.sum().backward()
  ours = losses.ctc_loss(logits, frames, labels, counts)
  assert theirs[3] == 0
  assert (theirs[:3] > 5).all()
  np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5)
  total = lambda logits: losses.ctc_loss(logits, frames, labels, counts).sum()
  np.testing.assert_allclose(jax.jit(jax.grad(total))(logits), given.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_label_smoothing_loss_and_gradient(smoothing):
  logits = normal(3, 7, V, seed=5)
  targets = np.random.default_rng(6).integers(0, V, (3, 7))
  targets[1, 4:] = -1
  targets[2, :2] = -1
  given = torch.tensor(logits, requires_grad=True)
  theirs = label_smoothing_loss.LabelSmoothingLoss(V, -1, smoothing)(given, torch.tensor(targets))
  theirs.backward()
  total = lambda logits: losses.attention_loss(logits, targets, smoothing).sum() / 3
  np.testing.assert_allclose(total(logits), theirs.item(), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(total)(logits), given.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize('samples', [400, 16_000, 23_457])
def test_features(samples):
  """Tones falling in loudness, noise, and digital silence at the floor."""
  rng = np.random.default_rng(7)
  t = np.arange(samples) / 16_000
  tones = sum(0.2 / k * np.sin(2 * np.pi * 220 * k * t) for k in range(1, 20))
  audio = (8_000 * tones * np.exp(-3 * t) + 30 * rng.normal(size=samples)).astype(np.int16)
  audio[samples // 2 : samples // 2 + 2_000] = 0
  stft, log_mel = Stft(n_fft=512, win_length=400, hop_length=160), LogMel()
  spectrum, _ = stft(torch.tensor(audio / 32_768, dtype=torch.float32)[None])
  # `DefaultFrontend.forward` without enhancement: the power spectrum's mel bands.
  theirs, _ = log_mel(spectrum.square().sum(-1))
  ours = features.log_mel(audio)
  assert len(ours) == theirs.shape[1] == features.num_frames(samples)
  np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=1e-4)


def test_feature_statistics(tmp_path):
  """Mean and deviation as ESPnet's statistics stage and `GlobalMVN` arrive at them."""
  parts = [3 * normal(n, 80, seed=n) - 8 for n in (40, 25)]
  frames = np.concatenate(parts).astype(np.float64)
  np.savez(
    tmp_path / 'feats_stats.npz',
    count=len(frames),
    sum=frames.sum(0),
    sum_square=(frames**2).sum(0),
  )
  theirs, _ = GlobalMVN(tmp_path / 'feats_stats.npz')(torch.tensor(parts[0])[None])
  stats = features.FeatureStats.of(parts)
  close((parts[0] - stats.mean) / stats.std, theirs[0])
