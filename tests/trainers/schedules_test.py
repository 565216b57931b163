"""Cyclical learning rates against loops that compute them step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.trainers import schedules


def released_loop(peak, steps_per_epoch, step_size, decay, power, epochs):
  """The released training loop's rates, step after step, in doubles."""
  high, low, steps, out = peak, peak * decay**power, 0, []
  for epoch in range(epochs):
    if epoch:
      high *= decay
    # Doubles round products of 0.1 differently from its powers.
    if high <= low * (1 + 1e-9):
      high, low = peak, peak * decay**5
    for _ in range(steps_per_epoch):
      steps += 1
      c = steps % (2 * step_size)
      bump = (high - low) / step_size
      out.append(low + c * bump if c < step_size else high - (c - step_size) * bump)
  return np.array(out)


@pytest.mark.parametrize(('power', 'epochs'), [(5, 12), (3, 14)])
@pytest.mark.parametrize('steps_per_epoch', [7, 40])
def test_the_released_loop(power, epochs, steps_per_epoch):
  want = released_loop(1e-3, steps_per_epoch, 15, 0.1, power, epochs)
  schedule = schedules.released_calr_schedule(1e-3, steps_per_epoch, 15, power=power)
  got = jax.jit(jax.vmap(schedule))(jnp.arange(len(want)))
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-12)


def cycle_loop(peak, floor, step_size, decay, decay_every, restart, steps):
  """A maximum that is multiplied each time; closed to the floor it starts anew, or stays."""
  high, out = peak, []
  for step in range(steps):
    if step and step % decay_every == 0:
      high *= decay
      if high <= floor * (1 + 1e-9):
        high = peak if restart else floor
    c = step % (2 * step_size)
    share = c / step_size if c < step_size else 2 - c / step_size
    out.append(floor + (max(high, floor) - floor) * share)
  return np.array(out)


@settings(max_examples=40, deadline=None)
@given(
  st.sampled_from([(1e-3, 1e-6, 0.1), (0.3, 0.01, 0.5), (1.0, 0.2, 0.9), (0.1, 0.1, 0.5)]),
  st.integers(1, 9),
  st.one_of(st.none(), st.integers(1, 30)),
  st.booleans(),
)
def test_calr(rates, step_size, decay_every, restart):
  peak, floor, decay = rates
  every = decay_every or 2 * step_size
  want = cycle_loop(peak, floor, step_size, decay, every, restart, 300)
  schedule = schedules.calr_schedule(peak, floor, step_size, decay, decay_every, restart)
  got = np.asarray(jax.vmap(schedule)(jnp.arange(300)))
  np.testing.assert_allclose(got, want, rtol=3e-6)
  assert got.min() >= np.float32(floor)
  assert got.max() <= np.float32(peak)


def test_calr_without_decay_is_clr():
  steps = jnp.arange(50)
  got = jax.vmap(schedules.calr_schedule(0.1, 0.0, 7, decay=1))(steps)
  np.testing.assert_allclose(got, jax.vmap(schedules.clr_schedule(0.1, 0.0, 7))(steps))


def test_the_default_falls_with_every_cycle():
  """The authors' description: maxima at 10, 1, 0.1 thousandths, then from the start."""
  schedule = schedules.calr_schedule(1e-2, 1e-5, 10)
  np.testing.assert_allclose(
    [schedule(step) for step in (10, 30, 50, 70)], [1e-2, 1e-3, 1e-4, 1e-2], rtol=1e-5
  )
  once = schedules.calr_schedule(1e-2, 1e-5, 10, restart=False)
  np.testing.assert_allclose([once(70), once(10_000)], [1e-5, 1e-5], rtol=1e-5)


def test_clr():
  modes = {mode: schedules.clr_schedule(1.0, 0.2, 4, mode, 0.9) for mode in schedules.CLR_MODES}
  want = {
    'triangular': [0.2, 0.6, 1, 0.6, 1],
    'triangular2': [0.2, 0.6, 1, 0.6, 0.6],
    'exp_range': [0.2, 0.2 + 0.4 * 0.9**2, 0.2 + 0.8 * 0.9**4, 0.2 + 0.4 * 0.9**6]
    + [0.2 + 0.8 * 0.9**12],
  }
  for mode, schedule in modes.items():
    got = [schedule(step) for step in (0, 2, 4, 6, 12)]
    np.testing.assert_allclose(got, want[mode], rtol=1e-6, err_msg=mode)


def test_sgdr():
  schedule = schedules.sgdr_schedule(1.0, 0.1, 10, 65)
  got = [schedule(s) for s in (0, 5, 10, 20, 30, 50)]
  np.testing.assert_allclose(got, [1, 0.55, 1, 0.55, 1, 0.55], rtol=1e-5)


def test_in_an_optimizer():
  """Told by `inject_hyperparams`, in a scan; the program does not grow with what it counts."""
  schedule = schedules.calr_schedule(1e-2, 1e-4, 3)
  optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update({'w': jnp.ones(())}, state)
    return (optax.apply_updates(params, updates), state), state.hyperparams['learning_rate']

  params = {'w': jnp.zeros(())}
  (params, _), rates = jax.lax.scan(step, (params, optimizer.init(params)), length=20)
  want = [float(schedule(s)) for s in range(20)]
  np.testing.assert_allclose(rates, want, rtol=1e-6)
  np.testing.assert_allclose(params['w'], -sum(want), rtol=1e-5)
  size = lambda floor: len(str(jax.make_jaxpr(schedules.calr_schedule(1.0, floor, 3))(0)))
  assert abs(size(1e-30) - size(1e-3)) < 20


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: schedules.calr_schedule(1e-3, 1e-2, 10), 'rates between 0.01 and 0.001'),
    (lambda: schedules.calr_schedule(1e-3, 1e-5, 0), '0 steps'),
    (lambda: schedules.calr_schedule(1e-3, 0, 10), 'floor of 0'),
    (lambda: schedules.calr_schedule(1e-3, 1e-5, 10, decay=1.5), 'decay is 1.5'),
    (lambda: schedules.calr_schedule(1e-3, 1e-5, 10, decay_every=0), 'decay_every is 0'),
    (lambda: schedules.released_calr_schedule(1e-3, 0), 'steps_per_epoch is 0'),
    (lambda: schedules.released_calr_schedule(1e-3, 5, power=0), 'powers 0 and 5'),
    (lambda: schedules.clr_schedule(1e-3, 0, 5, 'square'), "mode is 'square'"),
    (lambda: schedules.clr_schedule(1e-3, 0, 5, 'exp_range', 2), 'gamma is 2'),
    (lambda: schedules.sgdr_schedule(1e-3, 0, 5, 10, 0), 'multiplier is 0'),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ValueError, match=message):
    make()
