"""Compare the balances with torch.distributions, scipy, recursions and each other."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed.fsdp
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
    TableError,
    make_balance,
)
from poise.diagnosis import diagnose
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics.likelihood import nll_per_image
from poise.metrics.reconstruction import reconstruction
from poise.networks import mlp
from poise.recipes import Stage
from poise.training import new_state
from poise.vae import VAE

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


@pytest.mark.parametrize("name", ["computed", "learned", "optimal", "constrained:target_mse=0.05"])
@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 2.5])
def test_loss_is_reconstruction_plus_weighted_kl(kl_weight, name):
    balance = make_balance(f"{name}{',' if ':' in name else ':'}kl_weight={kl_weight}")
    terms = balance(*make_batch(dtype=torch.float64))
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
    assert [part.requires_grad for part in terms] == [True, False, False, False, False, False]
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


def test_no_step_with_groups_and_masks_waits_for_the_device(unchecked):
    balance = ComputedBalance(groups=3, per="channel").to("meta")
    x, codes = torch.rand(6, 3, 4, device="meta"), torch.rand(6, 5, device="meta")
    drawn, mask = x[:, None].expand(6, 2, 3, 4), torch.ones(6, 1, 4, device="meta")
    assert balance(drawn, x, codes, codes, samples=2, mask=mask).loss.is_meta
    error, nll = torch.rand(2, 6, 3, device="meta")
    for num_dims in (4, [1, 2, 3], torch.ones(6, 1, device="meta")):
        assert balance.combine(error, nll[:, 0], num_dims, nll=nll[:, 1]).loss.is_meta
    with pytest.raises(InputError, match="num_dims is on cpu"):
        balance.combine(error, nll[:, 0], torch.ones(3))
    with pytest.raises(InputError, match="mask is on cpu"):
        balance(x, x, codes, codes, mask=torch.ones(6, 3))


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
    run_forked(COMPILED, "aot_eager", json.dumps([*all_specs, "computed:groups=3,per=channel"]))


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
        (lambda x, t, m, v: (x, t, m[:, 0], v[:, 0]), r"\(n, \.\.\.\), with 6 rows"),
        (lambda x, t, m, v: (x[:, 0, 0, 0], t[:, 0, 0, 0], m, v), r"x\.unsqueeze\(1\)"),
        (lambda x, t, m, v: (x[:0], t[:0], m[:0], v[:0]), "the batch is empty"),
        (lambda x, t, m, v: (x[:, None], t, m, v), "pass samples=K"),
        (lambda x, t, m, v: (x, t[:, :1].expand_as(x), m, v), "repeats each item"),
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
    for step, error in enumerate(errors):
        expected = NUM_DIMS / 2 * (error / average + np.log(2 * np.pi * average))
        assert float(feed(balance, error).reconstruction) == pytest.approx(
            expected, rel=1e-4, abs=1e-2
        )
        counted = min(error, 100 * average) if step > 0 else error
        following = decay * average + (1 - decay) * counted
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
    moment, lowest = 0.0, errors[0]
    for t, error in enumerate(errors, 1):
        expected = float(balance.gamma2) if t > 1 else error
        assert float(feed(balance, error).reconstruction) == pytest.approx(
            NUM_DIMS / 2 * (error / expected + math.log(2 * math.pi * expected)), rel=1e-4, abs=1e-2
        )
        moment = decay * moment + (1 - decay) * min(error, 100 * expected)
        share = (1 - decay) / (1 - decay**t)
        lowest = min(lowest, (1 - share) * lowest + share * min(error, 100 * lowest))
        rounding = 1e-7 * max(errors[:t])  # 1 - share is exact to float32's rounding only
        expected = lowest if monotone else moment / (1 - decay**t)
        assert float(balance.gamma2) == pytest.approx(expected, rel=2e-4, abs=rounding)


def test_the_error_of_a_table_is_for_its_own_columns():
    balance = ComputedBalance().measuring(TableError(2, [3]))
    with pytest.raises(InputError, match=r"rows of 5 columns .* not \(4, 6\) and \(4, 6\)"):
        balance(torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, 1), torch.zeros(4, 1))


def test_one_hot_values_of_a_table_are_not_called_bits(recwarn):
    balance = ComputedBalance().measuring(TableError(0, [2, 2]))
    rows = torch.eye(2).repeat(4, 2)
    balance(torch.zeros(8, 4), rows, torch.zeros(8, 1), torch.zeros(8, 1))
    balance.state_dict()
    assert not [w for w in recwarn if "cross-entropy" in str(w.message)]


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


@pytest.mark.parametrize("floor", [0.2, 2.0])
def test_constrained_lets_gamma2_rise_although_the_floor_is_above_the_target(floor):
    balance = ConstrainedBalance(target_mse=0.1, floor=floor, start=3.0)
    for _ in range(5):
        feed(balance, 0.01)
    assert balance.gamma2 > 3.1


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_constrained_settles_at_its_target(start):
    balance = ConstrainedBalance(target_mse=0.03, rate=0.05, decay=0.9, start=start)
    for _ in range(600):
        gamma2 = float(balance.gamma2)
        terms = feed(balance, 0.01 + 0.05 * gamma2 / (1 + gamma2))
    assert float(terms.mse) == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "kl"), [({"target_kl": 4.0}, 4.0), ({"target_bits": 20.0}, 13.862943611)]
)
def test_controlled_settles_at_its_target(target, kl):
    balance = ControlledBalance(**target, kp=0.01, ki=2e-3)
    weight = 0.0
    for _ in range(400):
        terms = feed(balance, 0.1, kl=20 / (1 + 10 * weight))
        weight = weight_in_use(feed(balance.eval(), 0.1, kl=1.0))
        balance.train()
    assert float(terms.kl) == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize(("kl", "bound"), [(1.0, 0.2), (1e4, 0.7)])
def test_controlled_stays_within_its_bounds_without_wind_up(kl, bound):
    balance = ControlledBalance(target_kl=50.0, ki=0.01, least=0.2, most=0.7)
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
        ("controlled:target_bits=1", ControlledBalance, {"target_kl": math.log(2)}),
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
        ("controlled", "target_bits=.* not neither"),
        ("controlled:target_kl=5,target_bits=5", "target_bits=.* not both"),
        ("controlled:target_bits=0", "target_bits"),
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
        ("scheduled:ramp_steps=9,start=inf", "start"),
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


# Groups, masks, unequal sizes, nats


def of_channels(make, **options) -> Balance:
    return make(groups=3, per="channel", **options)


@pytest.mark.parametrize("make", [ComputedBalance, OptimalBalance, LearnedBalance])
def test_each_group_is_balanced_by_itself(make):
    together, alone = of_channels(make), [make() for _ in range(3)]
    sizes = torch.tensor([1.0, 0.1, 3.0]).view(3, 1, 1)
    for seed in range(4):
        batch = make_batch(seed, dtype=torch.float64)
        batch[:2] = [(value * sizes).detach().requires_grad_() for value in batch[:2]]
        terms, grads = gradients(together, batch)
        parts = [
            gradients(balance, [batch[0][:, [k]], batch[1][:, [k]], *batch[2:]])
            for k, balance in enumerate(alone)
        ]
        nats = torch.stack([part.reconstruction for part, _ in parts])
        torch.testing.assert_close(terms.reconstruction, nats.sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.group_reconstruction, nats, rtol=1e-6, atol=0)
        errors = torch.stack([part.mse for part, _ in parts])
        torch.testing.assert_close(terms.group_mse, errors, rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.mse, errors.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(terms.loss.detach(), nats.sum() + terms.kl, rtol=1e-6, atol=0)
        by_channel = torch.cat([of_part[0] for _, of_part in parts], dim=1)
        torch.testing.assert_close(grads[0], by_channel, rtol=1e-6, atol=1e-12)
        with torch.no_grad():
            for parameter, grad in zip(together.parameters(), grads[4:], strict=True):
                parameter -= 1e-3 * grad
                for balance, (_, of_part) in zip(alone, parts, strict=True):
                    balance.scaled_log_gamma -= 1e-3 * of_part[-1]
        gamma2 = torch.stack([balance.gamma2 for balance in alone])
        torch.testing.assert_close(together.gamma2, gamma2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_a_fixed_variance_of_each_group_may_be_an_array(form):
    torch.testing.assert_close(
        FixedBalance(gamma2=form([0.1, 0.2])).gamma2, torch.tensor([0.1, 0.2])
    )


def test_columns_of_a_table_are_groups_and_forms_of_num_dims_agree():
    rows, columns = torch.randn(2, 7, 3)
    codes = torch.zeros(7, 2)
    expected = ComputedBalance(groups=3, per="channel")(rows, columns, codes, codes)
    error = (rows - columns).square()
    forms = (1, [1, 1, 1], torch.ones(3), torch.ones(7, 1), torch.ones(7, 3).long())
    for num_dims in (*forms, np.int64(1), np.ones(3, int), np.ones((7, 3))):
        terms = ComputedBalance(groups=3).combine(error, torch.zeros(7), num_dims)
        torch.testing.assert_close(list(terms), list(expected))


@pytest.mark.parametrize("make", [ComputedBalance, OptimalBalance])
def test_a_number_of_dimensions_and_a_tensor_of_it_give_the_same_bits(make):
    """Also for errors in double precision: the state is rounded once."""
    balances = make(decay=0.9), make(decay=0.9)
    for seed in range(20):
        error = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for balance, dims in zip(balances, (7, torch.full((6,), 7.0)), strict=True):
            balance.combine(error, torch.zeros(6, dtype=torch.float64), dims)
    one, other = (balance.state_dict() for balance in balances)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [ComputedBalance, OptimalBalance])
def test_sums_and_counts_are_averaged_apart(make):
    """Independent truth: gamma2 = (average of sums of errors) / (average of counts)."""
    random, decay = np.random.default_rng(0), 0.8
    balance = make(decay=decay, groups=2)
    errors, counts = np.zeros(2), np.zeros(2)
    for _ in range(12):
        dims = random.integers(0, 9, (5, 2)) * (random.random(2) < 0.6)
        error = dims * random.lognormal(size=(5, 2)) * [1e-3, 10]
        seen = dims.sum(0) > 0
        unseen = balance.gamma2[~torch.from_numpy(seen)]
        terms = balance.combine(torch.tensor(error), torch.zeros(5), torch.tensor(dims))
        assert torch.equal(balance.gamma2[~torch.from_numpy(seen)], unseen)
        assert np.array_equal(np.isnan(terms.group_mse.numpy()), ~seen) and terms.loss.isfinite()
        first = (counts == 0) & (make is OptimalBalance)
        errors = np.where(
            seen, decay * errors + np.where(first, 1, 1 - decay) * error.sum(0), errors
        )
        counts = np.where(
            seen, decay * counts + np.where(first, 1, 1 - decay) * dims.sum(0), counts
        )
        known = counts > 0
        gamma2 = balance.gamma2.numpy()
        np.testing.assert_allclose(gamma2[known], errors[known] / counts[known], rtol=1e-5)
    assert known.all()


@pytest.mark.parametrize("power", [2, 0.7])
@pytest.mark.parametrize("per", [None, "channel"])
def test_a_mask_of_ones_changes_nothing_and_masked_values_do_not_count(per, power):
    groups = None if per is None else 3

    def one_step(batch, mask=None):
        balance = ComputedBalance(groups=groups, per=per, power=power)
        balance(*batch, mask=mask)
        terms = balance(*batch, mask=mask)
        leaves = [value for value in batch if value.requires_grad]
        return [*terms, *torch.autograd.grad(terms.loss, leaves), *balance.state_dict().values()]

    batch = make_batch()
    for mask in (torch.ones(6, 3, 4, 4), torch.ones(6, 1, dtype=torch.bool)):
        torch.testing.assert_close(one_step(batch, mask), one_step(batch), rtol=0, atol=0)
    # The last column of each image is padding. What it holds does not matter, not even NaN.
    mask = torch.ones(6, 1, 4, 4, dtype=torch.bool)
    mask[..., 3] = False
    cut = [
        value.detach()[..., :3].requires_grad_() if value.dim() == 4 else value for value in batch
    ]
    cut[1] = cut[1].detach()
    batch[1][..., 3] = math.nan
    padded, expected = one_step(batch, mask), one_step(cut)
    assert padded[6][..., 3].eq(0).all()
    padded[6] = padded[6][..., :3]
    torch.testing.assert_close(padded, expected, rtol=1e-6, atol=1e-8)


def test_zeroed_padding_counts_as_data_unless_it_is_masked():
    """Former trap: sequences of 1 to 8 steps, padded to 8 with zeros in data and reconstruction."""
    lengths = torch.arange(1, 9)
    mask = torch.arange(8) < lengths[:, None]
    noise = torch.randn(8, 8, 5) * mask[..., None]
    codes = torch.zeros(8, 2)
    expected = float(noise.square().sum() / (lengths.sum() * 5))
    masked, padded, by_hand = ComputedBalance(), ComputedBalance(), ComputedBalance()
    padded(noise, torch.zeros_like(noise), codes, codes)
    terms = masked(noise, torch.zeros_like(noise), codes, codes, mask=mask)
    assert float(masked.gamma2) == pytest.approx(expected)
    assert float(padded.gamma2) == pytest.approx(expected * 4.5 / 8)
    # Former defect: num_dims of shape (n,) failed in training mode.
    error, kl, num_dims = noise.square().sum((1, 2)), torch.zeros(8), 5 * lengths
    torch.testing.assert_close(by_hand.combine(error, kl, num_dims), terms)
    in_eval = by_hand.eval().combine(error, kl, num_dims)
    torch.testing.assert_close(in_eval.loss, by_hand.train().combine(error, kl, num_dims).loss)


def test_samples_of_a_posterior_are_averaged_and_its_kl_counts_once():
    target, mean, logvar = torch.rand(6, 3, 4), torch.randn(6, 5), torch.randn(6, 5)
    drawn = target[:, None] + torch.randn(6, 7, 3, 4)
    one_by_one = [FixedBalance(gamma2=0.3)(each, target, mean, logvar) for each in drawn.unbind(1)]
    expected = torch.stack([terms.loss for terms in one_by_one]).mean()
    for data in (target, target[:, None].expand_as(drawn)):
        terms = FixedBalance(gamma2=0.3)(drawn, data, mean, logvar, samples=7)
        torch.testing.assert_close(terms.loss, expected)
    balance, mask = of_channels(ComputedBalance), torch.rand(6, 3, 1) < 0.5
    balance(drawn, target, mean, logvar, samples=7, mask=mask)
    errors = (drawn - target[:, None]).square() * mask[:, None]
    observed = (4 * mask).sum((0, 2))
    torch.testing.assert_close(balance.gamma2, errors.mean(1).sum((0, 2)) / observed)
    by_hand = FixedBalance(gamma2=0.3).combine(
        (drawn - target[:, None]).square().sum((2, 3)), terms.kl.expand(6), 12, samples=7
    )
    torch.testing.assert_close(by_hand.loss, expected)


def test_nats_are_added_as_they_are(spec):
    """Former trap: a cross-entropy passed as `error` is divided by itself."""
    balance = make_balance(spec)
    train(balance)
    before = copy.deepcopy(dict(balance.state_dict()))
    nll, kl = 90 + torch.rand(6), torch.rand(6)
    nll.requires_grad_()
    terms = balance.combine(None, kl, nll=nll)
    torch.testing.assert_close(terms.reconstruction, nll.detach().mean())
    torch.testing.assert_close(torch.autograd.grad(terms.loss, nll)[0], torch.full((6,), 1 / 6))
    assert terms.mse.isnan()
    if type(balance) in (ComputedBalance, OptimalBalance, LearnedBalance, ConstrainedBalance):
        torch.testing.assert_close(dict(balance.state_dict()), before, rtol=0, atol=0)
    elif not isinstance(balance, FixedBalance):
        assert any(not torch.equal(v, before[k]) for k, v in balance.state_dict().items())
    error = torch.rand(6)
    both, alone = (balance.eval().combine(error, kl, 5, nll=more) for more in (nll, None))
    torch.testing.assert_close(both.loss, alone.loss + nll.mean())
    torch.testing.assert_close(both.reconstruction, alone.reconstruction + nll.detach().mean())
    hit = make_balance(spec)
    hit.combine(error, kl, 5, nll=nll.detach().index_fill(0, torch.tensor(1), math.nan))
    assert int(hit.nonfinite_batches) == 1


def test_posteriors_may_have_any_shape():
    batch = make_batch()
    maps = [value.reshape(6, 5, 1, 1) for value in batch[2:]]
    torch.testing.assert_close(
        ComputedBalance()(*batch[:2], *maps), ComputedBalance()(*batch), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": (3, 2), "kl": (3,)}, r"error \(3, 2\).* error \(n,\).*samples=K"),
        ({"error": (3,), "kl": (3,), "groups": 2}, r"error \(n, groups\)"),
        ({"error": (3, 4), "kl": (3,), "samples": 2}, r"error \(n, samples,\)"),
        ({"nll": (3, 2), "kl": (3,)}, r"nll \(3, 2\).*nll \(n,\)"),
        ({"kl": (3,)}, "both are None"),
        ({"error": (0,), "kl": (0,)}, "the batch is empty"),
        ({"error": (3,), "kl": (3,), "num_dims": None}, "num_dims must be"),
        ({"error": (3,), "kl": (3,), "num_dims": 0}, "num_dims must be"),
        ({"error": (3,), "kl": (3,), "num_dims": torch.ones(2)}, r"shape \(2,\)"),
        ({"error": (3, 2), "kl": (3,), "groups": 2, "num_dims": [1, 2, 3]}, "2 of them"),
        ({"error": (3, 2), "kl": (3,), "groups": 2, "num_dims": torch.ones(3)}, r"\(n, 1\)"),
        ({"error": (3, 2), "kl": (3,), "groups": 2, "num_dims": np.ones(3)}, r"shape \(3,\)"),
    ],
)
def test_combine_names_what_is_wrong(arguments, message, unchecked):
    shapes = {name: arguments.pop(name, None) for name in ("error", "nll", "kl")}
    tensors = {name: shape and torch.ones(shape) for name, shape in shapes.items()}
    num_dims = arguments.pop("num_dims", None if shapes["error"] is None else NUM_DIMS)
    balance = ComputedBalance(groups=arguments.pop("groups", None))
    with pytest.raises(InputError, match=message):
        balance.combine(tensors["error"], tensors["kl"], num_dims, nll=tensors["nll"], **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "channel"}, "needs groups"),
        ({"per": "pixel", "groups": 3}, "per must be"),
        ({"groups": 0}, "groups must be"),
        ({"process_group": 3}, "process_group must be"),
        ({"groups": 3}, "per=.channel."),
        ({"groups": 2, "per": "channel"}, "must be 2, not 3"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message, unchecked):
    with pytest.raises(InputError, match=message):
        ComputedBalance(**options)(*make_batch())


def test_a_mask_that_does_not_fit_is_refused(unchecked):
    for shape in [(6, 4), (5,), (6, 3, 4, 4, 1), ()]:
        with pytest.raises(InputError, match="mask"):
            ComputedBalance()(*make_batch(), mask=torch.ones(shape))
    for samples, shape in [(2, (6, 3, 4, 4)), (3, (6, 4, 4, 3))]:
        with pytest.raises(InputError, match=f"samples={samples}"):
            x = make_batch()[0]
            ComputedBalance()(x, torch.ones(shape), x[:, 0, 0], x[:, 0, 0], samples=samples)


def test_figures_and_diagnosis_of_a_balance_with_groups():
    vae = VAE(*mlp((3, 4, 4), latent_dim=2, hidden=(4,)))
    images = torch.rand(6, 3, 4, 4)
    grouped, fixed = of_channels(ComputedBalance, start=0.2), FixedBalance(gamma2=0.2)
    found, expected = (reconstruction(vae, balance, images) for balance in (grouped, fixed))
    assert found.elbo_nats == pytest.approx(expected.elbo_nats)
    assert found.quadratic_share == pytest.approx(expected.quadratic_share)
    assert found.gamma2 == pytest.approx(0.2)
    nlls = [nll_per_image(vae, balance, images, samples=4)[0] for balance in (grouped, fixed)]
    torch.testing.assert_close(*nlls)
    with pytest.raises(InputError, match="per="):
        reconstruction(vae, ComputedBalance(groups=3), images)
    with pytest.raises(InputError, match="training logs one gamma2"):
        new_state(vae, grouped, Stage(steps=1), torch.device("cpu"))
    grouped.doubtful_batches[2] = 1
    notes = diagnose(vae, torch.rand(40, 3, 4, 4), loss=grouped).notes
    assert any("no observed value" in note for note in notes)


# State that survives


def test_weight_averaging_takes_the_state_with_it(spec):
    """Former defect: `use_buffers=True`, the default of Lightning, failed at a bool buffer."""
    balance = make_balance(spec)
    averages = [
        torch.optim.swa_utils.AveragedModel(balance, use_buffers=True, multi_avg_fn=how)
        for how in (None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ]
    path = []
    for seed in range(4):
        train(balance, range(seed, seed + 1))
        path.append(float(balance.gamma2))
        for average in averages:
            average.update_parameters(balance)
    for average in averages:
        gamma2 = float(average.module.gamma2)
        assert min(path) * 0.999 <= gamma2 <= max(path) * 1.001
        assert average.module.eval()(*make_batch()).loss.isfinite()


def test_a_state_without_storage_is_reset_to_its_start(spec):
    with torch.device("meta"):
        balance = make_balance(spec)
    balance.to_empty(device="cpu")
    for value in [*balance.buffers(), *balance.parameters()]:
        value.data.fill_(7)
    balance.reset_parameters()
    torch.testing.assert_close(
        dict(balance.state_dict()), dict(make_balance(spec).state_dict()), rtol=0, atol=0
    )


@pytest.mark.parametrize("groups", [None, 2])
def test_buffers_converted_in_place_become_float32_again(groups):
    """Former defect: FSDP1 with buffer_dtype=bfloat16 left gamma2 at 1.5 times the error."""
    balance = ComputedBalance(groups=groups)
    error = torch.full((4,) if groups is None else (4, groups), 0.3 * NUM_DIMS)
    balance.combine(4 * error, torch.zeros(4), NUM_DIMS)
    for buffer in balance.buffers():
        buffer.data = buffer.bfloat16() if buffer.is_floating_point() else buffer
    for _ in range(1000):
        balance.combine(error, torch.zeros(4), NUM_DIMS)
    torch.testing.assert_close(balance.gamma2, torch.full(error.shape[1:], 0.3), rtol=1e-3, atol=0)
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in balance.buffers())


def test_a_process_group_is_shared_by_copies_and_no_parameter_is_a_scalar(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        balance = ComputedBalance(process_group=group)
        copied = copy.deepcopy(nn.Sequential(balance))[0]
        assert copied.process_group is group and copied.gamma2 is not balance.gamma2
        torch.testing.assert_close(train(copied), train(ComputedBalance(process_group=False)))
        # Former defect: fully_shard refused the scalar parameter.
        sharded = torch.distributed.fsdp.fully_shard(
            LearnedBalance(start=0.2),
            mesh=torch.distributed.init_device_mesh("cpu", (1,)),
        )
        assert float(sharded.gamma2) == pytest.approx(0.2)
        expected = LearnedBalance(start=0.2)(*make_batch()).loss
        torch.testing.assert_close(sharded(*make_batch()).loss, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forwards_see_the_state_of_their_step(spec, reentrant):
    """Former defect: gradient checkpointing runs forward twice, and the state moved twice."""
    plain, recomputed = make_balance(spec), make_balance(spec)
    for seeds in ([0, 1], [2], [3, 4, 5]):  # several micro-batches before each backward
        outcome = []
        for balance, how in ((plain, None), (recomputed, reentrant)):
            batches = [make_batch(seed) for seed in seeds]
            loss = torch.zeros(())
            for batch in batches:

                def of_batch(*values, balance=balance):
                    return balance(*(2 * value for value in values)).loss

                loss = loss + (
                    of_batch(*batch)
                    if how is None
                    else torch.utils.checkpoint.checkpoint(of_batch, *batch, use_reentrant=how)
                )
            loss.backward()
            leaves = [v for batch in batches for v in batch] + list(balance.parameters())
            grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
            outcome.append([loss.detach(), *grads, *balance.state_dict().values()])
            for parameter in balance.parameters():
                parameter.data -= 1e-3 * parameter.grad
                parameter.grad = None
        torch.testing.assert_close(outcome[1], outcome[0], rtol=0, atol=0)


# Scale, outliers, faults


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("groups", [None, 2])
def test_the_noise_of_probabilistic_pca_is_the_fixed_point_at_any_scale(scale, groups):
    """Tipping & Bishop 1999: a decoder with two latents, the best one for its gamma2.

    It leaves an error of gamma2 on the two axes that it keeps, and the whole variance of the
    others. Former defect: an absolute floor of 1e-8.
    """
    balance = ComputedBalance(decay=0.9, groups=groups)
    variances = scale**2 * torch.tensor([5.0, 2.0, 0.3, 0.2, 0.1, 0.02])
    gamma2 = variances.mean()
    for _ in range(200):
        error = variances[:2].minimum(gamma2).sum() + variances[2:].sum()
        error = error.expand(1 if groups is None else (1, groups))
        balance.combine(error, torch.zeros(1), len(variances))
        gamma2 = balance.gamma2.reshape(-1)[0]
    torch.testing.assert_close(gamma2, variances[2:].mean(), rtol=1e-4, atol=0)


def test_scaled_data_give_the_same_gradients(spec):
    """A power of two changes no digit, only exponents."""
    if not spec.startswith(("computed", "optimal")):
        pytest.skip("its start, variance or target has the scale of the data")
    balances, scales = [make_balance(spec) for _ in range(3)], [1.0, 2.0**-30, 2.0**30]
    power = balances[0].power
    for seed in range(3):
        outcome = []
        for balance, scale in zip(balances, scales, strict=True):
            x, target, *codes = make_batch(seed)
            values = [(scale * x).detach().requires_grad_(), scale * target, *codes]
            _, (grad, *rest) = gradients(balance, values)
            outcome.append([grad * scale, *rest, balance.gamma2 / scale**power])
        torch.testing.assert_close(outcome[1:], [outcome[0]] * 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-14])
def test_without_error_gamma2_stops_at_a_floor_of_the_datas_scale(size):
    computed, optimal = ComputedBalance(decay=0.5), OptimalBalance(decay=0.5)
    for balance in (computed, optimal):
        feed(balance, 0.0)  # says nothing about the scale
        feed(balance, size)
        assert float(balance.gamma2) == pytest.approx(size)
        for _ in range(60):
            assert feed(balance, 0.0).loss.isfinite()
        assert float(balance.gamma2) == pytest.approx(1e-12 * size)


@pytest.mark.parametrize("floor", [None, 1e-6])
def test_a_learned_gamma_below_its_floor_comes_back(floor):
    """Former defect: clamped values have no gradient, so gamma stayed below its floor for ever."""
    balance = LearnedBalance(start=1e-16, floor=floor)
    feed(balance, 1.0)
    assert float(balance.gamma2) == pytest.approx(floor or 1e-12)
    feed(balance, 2.0 if floor is None else 1.0).loss.backward()
    assert float(balance.scaled_log_gamma.grad) < 0, "descent raises gamma"
    balance.scaled_log_gamma.grad = None
    feed(balance, 0.0).loss.backward()
    assert float(balance.scaled_log_gamma.grad) == 0, "it does not sink further"


@pytest.mark.parametrize("make", [ComputedBalance, OptimalBalance])
def test_one_outlier_about_doubles_the_average(make):
    """Former defect: one of 100 images times 2,550 raised gamma2 a thousandfold."""
    balance = make()
    for _ in range(200):
        feed(balance, 0.05)
    feed(balance, 0.05 + 2550**2 / 100)
    assert 0.05 < float(balance.gamma2) < 0.11
    for _ in range(20):
        feed(balance, 10.0)
    assert float(balance.gamma2) > 1, "a lasting change is followed within a few batches"


def test_faults_of_values_are_counted_on_the_device_and_told(unchecked):
    balance, kl = ComputedBalance(), torch.zeros(2)
    assert balance.faults() == {}
    binary, codes = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2, 2)
    balance(binary + 0.1, binary, codes, codes)
    balance(binary + 0.1, binary + 0.5, codes, codes, mask=torch.zeros(2, 2))
    balance.combine(torch.tensor([1.0, -0.5]), kl, NUM_DIMS)
    balance.combine(torch.ones(2), kl, torch.tensor([3, 0]))
    assert balance.doubtful_batches.tolist() == [1, 1, 1, 1]
    told = " ".join(balance.faults().values())
    for words in ("negative error", "num_dims is 0", "mask", "data of 0 and 1"):
        assert words in told and words in repr(balance)
    with pytest.warns(UserWarning) as warned:
        state = balance.state_dict()
    assert len(warned) == 4
    balance.state_dict()  # each is told once
    ComputedBalance().load_state_dict(state)
