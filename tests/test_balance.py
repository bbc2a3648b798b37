"""Compare the balances with torch.distributions, scipy, recursions and each other."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.balance import (
    Balance,
    ComputedBalance,
    ConstrainedBalance,
    ControlledBalance,
    FixedBalance,
    LearnedBalance,
    LossTerms,
    OptimalBalance,
    ScheduledBalance,
    make_balance,
)
from poise.errors import InputError
from poise.latent import DiagonalGaussian

NUM_DIMS = 48


def make_batch(seed: int = 0, n: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return reconstruction, target, mean and logvar; a higher seed gives a smaller error."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype)
    noise = torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)
    mean, logvar = torch.randn(2, n, 5, generator=generator, dtype=dtype)
    values = [target + 0.5 * noise / (1 + seed), target, mean, logvar]
    return [value.requires_grad_(value is not target) for value in values]


def gradients(balance: nn.Module, batch: list[Tensor]) -> tuple[LossTerms, list[Tensor]]:
    """Return the terms of one call and the gradients of its loss.

    The gradients: of reconstruction, mean, logvar and the balance's parameters.
    """
    terms = balance(*batch)
    leaves = [value for value in batch if value.requires_grad] + list(balance.parameters())
    return terms, list(torch.autograd.grad(terms.loss, leaves))


def train(
    balance: nn.Module, seeds: range = range(3), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return terms and gradients of a few steps of gradient descent on the balance's parameters."""
    outcome = []
    for seed in seeds:
        terms, grads = gradients(balance, make_batch(seed, dtype=dtype))
        with torch.no_grad():
            for parameter, grad in zip(balance.parameters(), grads[3:], strict=True):
                parameter -= 1e-3 * grad
        outcome += [*terms, *grads]
    return [value.detach() for value in outcome]


def feed(balance: Balance, error: float, kl: float = 0.0) -> LossTerms:
    """Take a step on two images, with `error` per dimension and `kl` per image."""
    return balance.combine(torch.full((2,), error * NUM_DIMS), torch.full((2,), kl), NUM_DIMS)


def weight_in_use(terms: LossTerms) -> float:
    return float((terms.loss.detach() - terms.reconstruction) / terms.kl)


# Likelihood, KL and loss


@pytest.mark.parametrize("power", [2, 1, 3, 0.7])
def test_reconstruction_is_the_negative_log_likelihood(power):
    gamma2 = 0.3
    batch = make_batch(dtype=torch.float64)
    reconstruction, target = batch[0].detach(), batch[1]
    log_prob = {
        2: torch.distributions.Normal(reconstruction, math.sqrt(gamma2)).log_prob(target),
        1: torch.distributions.Laplace(reconstruction, gamma2).log_prob(target),
    }.get(power)
    if log_prob is None:
        law = scipy.stats.gennorm(
            power, loc=reconstruction.numpy(), scale=(power * gamma2) ** (1 / power)
        )
        log_prob = torch.from_numpy(law.logpdf(target.numpy()))
    terms = FixedBalance(gamma2=gamma2, power=power)(*batch)
    torch.testing.assert_close(
        terms.reconstruction, -log_prob.flatten(1).sum(1).mean(), rtol=1e-6, atol=0
    )


def test_kl_and_mse_are_those_of_torch(spec):
    batch = make_batch(dtype=torch.float64)
    reconstruction, target, mean, logvar = (value.detach() for value in batch)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = (
        torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
        .sum(1)
        .mean()
    )
    balance = make_balance(spec)
    error = nn.functional.l1_loss if balance.power == 1 else nn.functional.mse_loss
    terms = balance(*batch)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.mse, error(reconstruction, target), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 2.5])
def test_loss_is_reconstruction_plus_weighted_kl(kl_weight):
    terms = ComputedBalance(kl_weight=kl_weight)(*make_batch(dtype=torch.float64))
    torch.testing.assert_close(
        terms.loss, terms.reconstruction + kl_weight * terms.kl, rtol=1e-12, atol=0
    )


def test_loss_is_a_mean_of_per_image_sums(spec):
    batch = make_batch(dtype=torch.float64)
    loss = make_balance(spec)(*batch).loss
    duplicated = make_balance(spec)(*(torch.cat([value, value]) for value in batch)).loss
    flat = make_balance(spec)(*(value.flatten(1) for value in batch)).loss
    torch.testing.assert_close([duplicated, flat], [loss, loss], rtol=1e-12, atol=0)


# The contract of all balances


def test_only_the_loss_carries_gradients(spec):
    terms, grads = gradients(make_balance(spec), make_batch())
    assert isinstance(terms, LossTerms)
    assert [part.requires_grad for part in terms] == [True, False, False, False]
    assert all(part.shape == () for part in terms)
    weight = weight_in_use(terms)
    assert grads[0].abs().sum() > 0
    assert all((grad.abs().sum() > 0) == (weight > 0) for grad in grads[1:3]), (
        "KL gradients, unless its weight is 0"
    )


def test_a_saved_balance_continues_identically(spec):
    first, second = make_balance(spec), make_balance(spec)
    train(first)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(
        train(second, range(3, 6)), train(first, range(3, 6)), rtol=0, atol=0
    )


def test_state_changes_in_training_mode_only(spec):
    balance = make_balance(spec)
    before = copy.deepcopy(balance.state_dict())
    balance.eval()(*make_batch())
    torch.testing.assert_close(dict(balance.state_dict()), dict(before), rtol=0, atol=0)
    train(balance.train())
    moved = not all(
        torch.equal(value, before[name]) for name, value in balance.state_dict().items()
    )
    assert moved == (not isinstance(balance, FixedBalance))


def test_a_step_uses_what_earlier_batches_left(spec):
    balance = make_balance(spec)
    train(balance)
    before = gradients(balance.eval(), make_batch(9))
    during = gradients(balance.train(), make_batch(9))
    if isinstance(balance, OptimalBalance):
        assert during[0].loss < before[0].loss, "its own batch's scale is the likeliest"
    else:
        torch.testing.assert_close(during, before, rtol=0, atol=0)


def test_evaluation_does_not_depend_on_neighbours(spec):
    balance = make_balance(spec)
    train(balance)
    balance.eval()
    batch = make_batch(7, dtype=torch.float64)
    alone = [balance(*(value[k : k + 1] for value in batch)).loss for k in range(len(batch[0]))]
    torch.testing.assert_close(balance(*batch).loss, torch.stack(alone).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_batches_are_counted_and_leave_no_trace(spec, place, value):
    healthy, hit = make_balance(spec), make_balance(spec)
    expected = train(healthy)
    spoilt = make_batch()
    spoilt[place] = spoilt[place].detach().index_fill(0, torch.tensor([1]), value)
    hit(*spoilt)
    first = train(hit, range(1))
    hit(*spoilt)
    torch.testing.assert_close(first + train(hit, range(1, 3)), expected, rtol=0, atol=0)
    assert (int(hit.nonfinite_batches), int(healthy.nonfinite_batches)) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_keeps_the_precision_of_the_state(spec, dtype):
    model = nn.Sequential(nn.Linear(2, 2), make_balance(spec))
    train(model[1])
    before = copy.deepcopy(dict(model[1].state_dict()))
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(
        dict(model[1].state_dict()), before, rtol=0, atol=0, check_dtype=False
    )


def test_half_precision_inputs_give_float32_terms(spec):
    batch = make_batch()
    rounded = [value.detach().bfloat16() for value in batch]
    balances = [make_balance(spec) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        terms = balances[0](*rounded)
    assert all(part.dtype == torch.float32 for part in [*terms, balances[0].gamma2])
    torch.testing.assert_close(
        terms, balances[1](*(value.float() for value in rounded)), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(terms, balances[2](*batch), rtol=0.01, atol=0, check_dtype=False)


def test_no_step_waits_for_the_device(spec):
    """Tensors on the meta device have no values: `.item()`, `bool()` or a branch raises."""
    balance = make_balance(spec).to("meta")
    for _ in range(2):
        terms, _ = gradients(
            balance, [value.detach().to("meta").requires_grad_() for value in make_batch()]
        )
    assert terms.loss.is_meta
    with pytest.raises(RuntimeError):
        bool(terms.loss > 0)


COMPILED = """
import copy, json, sys
import torch
from test_balance import make_balance, train
assert "jaxtyping" not in sys.modules
for spec in json.loads(sys.argv[2]):
    torch._dynamo.reset()
    eager = make_balance(spec)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=sys.argv[1])
    named = lambda text: f"{spec}: {text}"
    torch.testing.assert_close(train(compiled), train(eager), rtol=1e-5, atol=1e-6, msg=named)
    state = dict(compiled._orig_mod.state_dict())
    torch.testing.assert_close(state, dict(eager.state_dict()), rtol=1e-5, atol=0, msg=named)
"""


def test_compiled_steps_equal_eager_ones(all_specs, run_forked):
    run_forked(COMPILED, "aot_eager", json.dumps(all_specs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_steps_compiled_to_machine_code_equal_eager_ones(run_forked):
    run_forked(COMPILED, "inductor", json.dumps(["computed"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, m, v: (x[:, :1], t, m, v), "differ in shape"),
        (lambda x, t, m, v: (x, (255 * t).byte(), m, v), "floating point"),
        (lambda x, t, m, v: (x, t, m[:, :1], v), "must agree"),
        (lambda x, t, m, v: (x, t, m[:1], v[:1]), "with 6 rows"),
    ],
)
def test_wrong_inputs_are_refused(change, message, unchecked):
    with pytest.raises(InputError, match=message):
        ComputedBalance()(*change(*make_batch()))


def test_combine_refuses_anything_but_one_value_per_image(unchecked):
    for error_shape, kl_shape in [((3, 1), (3,)), ((3,), (2,)), ((), ())]:
        with pytest.raises(InputError, match="one value per image"):
            ComputedBalance().combine(torch.ones(error_shape), torch.ones(kl_shape), NUM_DIMS)


# Computed


@settings(deadline=None, max_examples=40, database=None)
@given(
    errors=st.lists(st.floats(1e-4, 10.0), min_size=2, max_size=12),
    decay=st.floats(0.0, 0.999),
    start=st.none() | st.floats(1e-3, 10.0),
    monotone=st.booleans(),
)
def test_gamma2_is_the_running_average_of_earlier_errors(errors, decay, start, monotone):
    balance = ComputedBalance(
        decay=decay, start="first-batch" if start is None else start, monotone=monotone
    )
    average = np.float64(errors[0] if start is None else start)
    for error in errors:
        expected = NUM_DIMS / 2 * (error / average + np.log(2 * np.pi * average))
        assert float(feed(balance, error).reconstruction) == pytest.approx(
            expected, rel=1e-4, abs=1e-2
        )
        following = decay * average + (1 - decay) * error
        average = min(average, following) if monotone else following
        assert float(balance.gamma2) == pytest.approx(average, rel=1e-4)


@settings(deadline=None, max_examples=40, database=None)
@given(
    errors=st.lists(st.floats(1e-4, 10.0), min_size=2, max_size=12),
    decay=st.floats(0.0, 0.999),
    monotone=st.booleans(),
)
def test_a_debiased_gamma2_is_adams_estimate_of_earlier_errors(errors, decay, monotone):
    """Kingma & Ba 2015, algorithm 1: a moment that starts at 0, divided by 1 - decay^t."""
    balance = ComputedBalance(decay=decay, monotone=monotone)
    assert balance.debiased
    moment, least = 0.0, math.inf
    for t, error in enumerate(errors, 1):
        expected = float(balance.gamma2) if t > 1 else error
        assert float(feed(balance, error).reconstruction) == pytest.approx(
            NUM_DIMS / 2 * (error / expected + math.log(2 * math.pi * expected)), rel=1e-4, abs=1e-2
        )
        moment = decay * moment + (1 - decay) * error
        least = min(least, moment / (1 - decay**t))
        if not monotone:
            assert float(balance.gamma2) == pytest.approx(moment / (1 - decay**t), rel=2e-4)
        elif t == 1:
            assert float(balance.gamma2) == pytest.approx(error, rel=1e-4)
        else:
            assert float(balance.gamma2) <= expected


def test_a_debiased_gamma2_has_no_start_to_forget():
    """Former defect: the error fell at once, but after 30 batches gamma2 was 4 times as large."""
    plain, debiased = ComputedBalance(start="first-batch"), ComputedBalance()
    for balance in (plain, debiased):
        for error in [0.25] + 29 * [0.05]:
            feed(balance, error)
    assert float(plain.gamma2) == pytest.approx(0.05 + 0.2 * 0.99**29, rel=1e-5)
    assert float(debiased.gamma2) == pytest.approx(
        0.05 + 0.2 * 0.99**29 / sum(0.99**k for k in range(30)), rel=1e-4
    )


@pytest.mark.parametrize("make", [ComputedBalance, OptimalBalance])
def test_states_saved_before_the_average_was_debiased_go_on_as_they_were(make):
    old = {
        "gamma2": torch.tensor(0.3),
        "nonfinite_batches": torch.tensor(2),
        "started": torch.tensor(True),
    }
    balance = make()
    balance.load_state_dict(old)
    assert "started" in old, "the caller's state is left as it was"
    feed(balance, 0.1)
    assert float(balance.gamma2) == pytest.approx(0.99 * 0.3 + 0.01 * 0.1, rel=1e-6)
    unused = make()
    unused.load_state_dict(old | {"started": torch.tensor(False)})
    feed(unused, 0.1)
    assert float(unused.gamma2) == pytest.approx(0.1)


def test_a_learned_gamma_is_the_same_at_another_rate():
    """Another rate changes the speed at which Adam moves gamma, not its value."""
    fast, slow, old = (
        LearnedBalance(rate=100, start=0.2),
        LearnedBalance(),
        LearnedBalance(rate=100),
    )
    slow.load_state_dict(fast.state_dict())
    assert float(slow.gamma2) == pytest.approx(0.2, rel=1e-5)
    assert float(slow.scaled_log_gamma.detach()) == pytest.approx(0.5 * math.log(0.2), rel=1e-5)
    fast.load_state_dict(slow.state_dict())
    assert float(fast.gamma2) == pytest.approx(0.2, rel=1e-5) and fast.rate == 100
    without = {name: value for name, value in fast.state_dict().items() if name != "saved_rate"}
    old.load_state_dict(without)
    assert float(old.gamma2) == float(fast.gamma2), "an older state counts as of this rate"
    parts = nn.ModuleDict({"balance": LearnedBalance()})
    parts.load_state_dict(nn.ModuleDict({"balance": fast}).state_dict())
    assert float(parts["balance"].gamma2) == pytest.approx(0.2, rel=1e-5)


def test_computed_and_optimal_do_not_take_each_others_state():
    computed, optimal = ComputedBalance(), OptimalBalance()
    for balance in (computed, optimal):
        feed(balance, 0.1)
    with pytest.raises(RuntimeError, match="weight"):
        computed.load_state_dict(optimal.state_dict())
    with pytest.raises(RuntimeError, match="followed"):
        optimal.load_state_dict(computed.state_dict())


def test_the_first_batch_starts_the_average_and_is_its_own_scale():
    balance = ComputedBalance(decay=0.5)
    assert float(feed(balance, 0.25).reconstruction) == pytest.approx(
        NUM_DIMS / 2 * (1 + math.log(2 * math.pi * 0.25))
    )
    assert float(balance.gamma2) == 0.25


@pytest.mark.parametrize(("monotone", "grows"), [(True, False), (False, True)])
def test_a_monotone_average_never_grows(monotone, grows):
    balance = ComputedBalance(start=0.125, monotone=monotone)
    feed(balance, 10.0)
    assert (float(balance.gamma2) > 0.125) == grows


@pytest.mark.parametrize(
    ("image_size", "latent_dim", "weight"), [(64, 64, 4), (32, 64, 1), (32, 16, 16)]
)
def test_released_starts_at_one_and_weighs_kl_by_size(image_size, latent_dim, weight):
    balance = ComputedBalance.released(image_size, latent_dim)
    assert float(balance.gamma2) == 1
    assert weight_in_use(feed(balance, 0.2, kl=3.0)) == pytest.approx(weight)
    assert float(balance.gamma2) == pytest.approx(min(1, 0.99 + 0.01 * 0.2))
    feed(balance, 5.0)
    assert float(balance.gamma2) == pytest.approx(0.992)


def test_no_gradient_passes_through_a_scale_taken_from_the_batch():
    batch = make_batch(dtype=torch.float64)
    mse = float(nn.functional.mse_loss(batch[0].detach(), batch[1]))
    _, computed = gradients(ComputedBalance(), batch)
    _, fixed = gradients(FixedBalance(gamma2=mse), batch)
    torch.testing.assert_close(computed, fixed, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "balance", [ComputedBalance(decay=0.0, floor=1e-3), OptimalBalance(floor=1e-3)]
)
def test_a_perfect_reconstruction_stops_at_the_floor(balance):
    for _ in range(3):
        terms = feed(balance, 0.0)
        assert float(terms.loss) == pytest.approx(NUM_DIMS / 2 * math.log(2 * math.pi * 1e-3))
        assert float(balance.gamma2) == pytest.approx(1e-3)


# Optimal and learned


def test_the_gradient_of_optimal_is_that_of_log_mse():
    batch = make_batch(dtype=torch.float64)
    reconstruction, target, mean, logvar = batch
    _, grads = gradients(OptimalBalance(), batch)
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(1).mean()
    loss = NUM_DIMS / 2 * nn.functional.mse_loss(reconstruction, target).log() + kl
    expected = torch.autograd.grad(loss, [reconstruction, mean, logvar])
    torch.testing.assert_close(grads, list(expected), rtol=1e-5, atol=0)


def test_optimal_evaluates_with_a_running_average():
    balance = OptimalBalance(decay=0.5)
    for error in (0.4, 0.2, 0.9):
        feed(balance, error)
    average = ((0.4 + 0.2) / 2 + 0.9) / 2
    expected = NUM_DIMS / 2 * (0.1 / average + math.log(2 * math.pi * average))
    assert float(feed(balance.eval(), 0.1).loss) == pytest.approx(expected)


def test_learned_and_computed_share_their_fixed_point():
    errors = np.random.default_rng(0).lognormal(math.log(0.02), 0.2, 20)
    computed, learned = ComputedBalance(start=1.0), LearnedBalance(rate=100.0)
    optimizer = torch.optim.Adam(learned.parameters())
    steps = 60 * len(errors)
    for step, error in enumerate(np.tile(errors, 60)):
        feed(computed, error)
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - step / steps)
        optimizer.zero_grad()
        feed(learned, error).loss.backward()
        optimizer.step()
    assert float(learned.gamma2) == pytest.approx(errors.mean(), rel=0.01)
    assert float(computed.gamma2) == pytest.approx(errors.mean(), rel=0.02)


@pytest.mark.parametrize("start", [1.0, 0.3])
def test_rate_multiplies_the_step_of_log_gamma(start):
    def first_step(rate: float) -> float:
        balance = LearnedBalance(start=start, rate=rate)
        assert float(balance.gamma2) == pytest.approx(start)
        optimizer = torch.optim.Adam(balance.parameters(), lr=1e-3)
        feed(balance, 0.02).loss.backward()
        optimizer.step()
        return 0.5 * math.log(float(balance.gamma2) / start)

    assert first_step(1.0) == pytest.approx(-1e-3, rel=1e-3)
    assert first_step(100.0) == pytest.approx(-1e-1, rel=1e-3)


# Fixed, scheduled, constrained, controlled


@pytest.mark.parametrize("beta", [0.25, 8.0])
def test_beta_is_gamma2_with_the_loss_scaled(beta):
    batch = make_batch(dtype=torch.float64)
    _, by_beta = gradients(FixedBalance(beta=beta), batch)
    _, by_gamma2 = gradients(FixedBalance(gamma2=beta), batch)
    torch.testing.assert_close(by_beta, [beta * grad for grad in by_gamma2], rtol=1e-12, atol=0)


def test_fixed_takes_gamma2_or_beta_not_both():
    with pytest.raises(InputError, match=r"gamma2=.* or beta="):
        FixedBalance(gamma2=1.0, beta=1.0)
    assert float(FixedBalance().gamma2) == 1


@pytest.mark.parametrize("period", [None, 6])
def test_the_scheduled_weight_ramps_and_begins_anew(period):
    balance = ScheduledBalance(4, period, start=0.5, kl_weight=2.0)
    weights = []
    for _ in range(14):
        weights.append(weight_in_use(feed(balance, 0.1, kl=1.0)))
        balance.eval()
        feed(balance, 0.1, kl=1.0)  # in eval mode the schedule takes no step
        balance.train()
    expected = np.resize(np.interp(np.arange(period or 14), [0, 4], [0.5, 2.0]), 14)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize(("error", "direction"), [(9.0, -1), (0.15, -1), (0.05, 1)])
def test_constrained_moves_gamma2_against_the_error(error, direction):
    balance = ConstrainedBalance(target_mse=0.1)
    path = [0.0]
    for _ in range(5):
        feed(balance, error)
        path.append(math.log(float(balance.gamma2)))
    steps = direction * np.diff(path)
    assert (steps > 0).all() and (steps < 0.0101).all(), "at most `rate` a step"


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_constrained_settles_at_its_target(start):
    balance = ConstrainedBalance(target_mse=0.03, rate=0.05, decay=0.9, start=start)
    for _ in range(600):
        gamma2 = float(balance.gamma2)
        terms = feed(balance, 0.01 + 0.05 * gamma2 / (1 + gamma2))
    assert float(terms.mse) == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize("target_kl", [4.0, 15.0])
def test_controlled_settles_at_its_target(target_kl):
    balance = ControlledBalance(target_kl, kp=0.01, ki=2e-3)
    weight = 0.0
    for _ in range(400):
        terms = feed(balance, 0.1, kl=20 / (1 + 10 * weight))
        weight = weight_in_use(feed(balance.eval(), 0.1, kl=1.0))
        balance.train()
    assert float(terms.kl) == pytest.approx(target_kl, rel=1e-2)


@pytest.mark.parametrize(("kl", "bound"), [(1.0, 0.2), (1e4, 0.7)])
def test_controlled_stays_within_its_bounds_without_wind_up(kl, bound):
    balance = ControlledBalance(50.0, ki=0.01, least=0.2, most=0.7)
    for _ in range(100):
        feed(balance, 0.1, kl)
    assert weight_in_use(feed(balance.eval(), 0.1, kl)) == pytest.approx(bound, rel=1e-3)
    balance.train()
    for _ in range(3):
        feed(balance, 0.1, kl=100.0 - kl if kl < 50 else 0.0)
    assert abs(weight_in_use(feed(balance.eval(), 0.1, 1.0)) - bound) > 0.1, (
        "it leaves the bound at once"
    )


# By name


@pytest.mark.parametrize(
    ("text", "kind", "attributes"),
    [
        (
            "computed",
            ComputedBalance,
            {"decay": 0.99, "monotone": False, "kl_weight": 1.0, "power": 2},
        ),
        ("computed:", ComputedBalance, {"decay": 0.99}),
        (
            "computed:decay=0.9,start=0.5,power=1",
            ComputedBalance,
            {"decay": 0.9, "gamma2": 0.5, "power": 1},
        ),
        ("computed:monotone=true", ComputedBalance, {"monotone": True}),
        (
            "computed:start=first-batch,monotone=false",
            ComputedBalance,
            {"monotone": False, "debiased": False},
        ),
        ("computed:start=debiased", ComputedBalance, {"debiased": True}),
        (
            "released:image_size=64,latent_dim=64",
            ComputedBalance,
            {"monotone": True, "kl_weight": 4.0},
        ),
        ("learned:rate=1e2", LearnedBalance, {"rate": 100}),
        ("optimal:decay=0.5", OptimalBalance, {"decay": 0.5}),
        ("fixed", FixedBalance, {"gamma2": 1.0, "kl_weight": 1.0}),
        ("fixed:gamma2=0.5", FixedBalance, {"gamma2": 0.5, "kl_weight": 1.0}),
        ("fixed:beta=4", FixedBalance, {"gamma2": 1.0, "kl_weight": 4}),
        (
            "scheduled:ramp_steps=100,period_steps=400",
            ScheduledBalance,
            {"ramp_steps": 100, "period_steps": 400},
        ),
        ("constrained:target_mse=0.01", ConstrainedBalance, {"target_mse": 0.01}),
        ("controlled:target_kl=20,most=2", ControlledBalance, {"target_kl": 20, "most": 2}),
    ],
)
def test_a_text_names_a_balance(text, kind, attributes):
    balance = make_balance(text)
    assert type(balance) is kind
    assert {name: getattr(balance, name) for name in attributes} == attributes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("comptued", "comptued"),
        ("computed:decya=0.9", "decya"),
        ("fixed:start=1", "start"),
        ("released", "image_size, latent_dim"),
        ("released:image_size=64", "latent_dim"),
        ("scheduled", "ramp_steps"),
        ("constrained", "target_mse"),
        ("controlled", "target_kl"),
        ("computed:decay=fast", "decay='fast'"),
        ("computed:decay", "decay=''"),
        ("computed:decay=first-batch", "decay='first-batch'"),
        ("computed:decay=false", "decay='false'"),
        ("computed:monotone=2", "monotone='2'"),
        ("fixed:gamma2=true", "gamma2='true'"),
        ("computed:decay=1", "decay"),
        ("computed:start=0", "start"),
        ("computed:kl_weight=nan", "kl_weight"),
        ("computed:power=0", "power"),
        ("computed:floor=-1", "floor"),
        ("learned:rate=0", "rate"),
        ("released:image_size=64,latent_dim=0", "latent_dim"),
        ("fixed:gamma2=1,beta=1", "beta"),
        ("fixed:gamma2=inf", "gamma2"),
        ("scheduled:ramp_steps=0.5", "ramp_steps"),
        ("scheduled:ramp_steps=9,period_steps=5", "period_steps"),
        ("scheduled:ramp_steps=9,period_steps=nan", "period_steps"),
        ("scheduled:ramp_steps=9,start=-1", "start"),
        ("constrained:target_mse=0", "target_mse"),
        ("controlled:target_kl=5,least=2", "least"),
        ("controlled:target_kl=5,ki=-1", "ki"),
    ],
)
def test_a_wrong_text_is_refused_by_name(text, named, unchecked):
    with pytest.raises(InputError, match=named):
        make_balance(text)


def test_the_ways_to_a_kl_that_the_readme_names_are_those_of_the_balance():
    reconstruction, target, mean, logvar = make_batch(dtype=torch.float64)
    absolute = (reconstruction - target).abs().flatten(1).sum(1)
    of_poise = DiagonalGaussian(mean, logvar).kl()
    normal = torch.distributions.Normal
    pair = normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))
    of_torch = torch.distributions.kl_divergence(*pair).flatten(1).sum(1)
    expected = ComputedBalance(power=1)(reconstruction, target, mean, logvar)
    for kl in (of_poise, of_torch):
        terms = ComputedBalance(power=1).combine(absolute, kl, NUM_DIMS)
        torch.testing.assert_close(list(terms), list(expected), rtol=1e-12, atol=0)
