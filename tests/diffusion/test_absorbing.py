"""The diffusion process, without any network."""

import math

import pytest
import torch

from diffusion.absorbing import (
    AbsorbingDiffusion,
    TrainingNoise,
    codes_from_logits,
    spread_groups,
    spread_order,
)
from models import reference
from parts import LOSSES, REVEAL_ORDERS

K, SIDE = 12, 6
T = SIDE * SIDE


@pytest.fixture
def diffusion():
    return AbsorbingDiffusion(K, T)


def random_codes(samples=4):
    return torch.randint(0, K, (samples, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


def oracle(code):
    """A local denoiser that is certain of `code [h,w]`, and the list of what it was asked: (t, where)."""
    asked = []

    def denoiser(tokens, t, where):
        asked.append((t, where))
        assert (tokens[where] == K).all(), "only masked tokens are asked for"
        assert ((tokens == code) | (tokens == K)).all(), "what was revealed stays"
        return torch.nn.functional.one_hot(code.expand_as(tokens)[where], K) * 1000.0

    return denoiser, asked


def training_noise(diffusion, count, kind="reweighted_elbo", seed=0):
    return diffusion.training_noise(count, (SIDE, SIDE), torch.Generator().manual_seed(seed), kind)


def test_a_fraction_t_over_T_is_masked(diffusion):
    noise = training_noise(diffusion, 60_000)
    assert noise.t.unique().tolist() == list(range(1, T + 1))
    for t in (1, 9, 27, T):
        mask = noise.mask[noise.t == t]
        assert mask.double().mean().item() == pytest.approx(t / T, abs=5 * math.sqrt(0.25 / mask.numel()))
        assert t < T or mask.all()


def test_q_sample_replaces_masked_codes(diffusion):
    codes, mask = random_codes(), training_noise(diffusion, 4).mask
    tokens = diffusion.q_sample(codes, mask)
    assert (tokens[mask] == K).all() and torch.equal(tokens[~mask], codes[~mask]) and 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_share_of_a_batch_is_a_smaller_batch(diffusion, kind):
    """The losses of two halves, each with its part of the noise, average to the loss of the whole batch."""

    def denoiser(tokens, t):
        field = (tokens + t.view(-1, 1, 1)).double()
        return torch.stack([torch.sin(field * (k + 1.0)) for k in range(K)], 1)

    codes, noise = random_codes(8), training_noise(diffusion, 8, kind)
    halves = [slice(0, 4), slice(4, 8)]
    parts = [TrainingNoise(noise.t[half], noise.mask[half]) for half in halves]
    losses = [
        diffusion.loss(denoiser, codes[half], part, kind).item() for half, part in zip(halves, parts, strict=True)
    ]
    assert (
        diffusion.loss(denoiser, codes, noise, kind).item() == pytest.approx(sum(losses) / 2) and losses[0] != losses[1]
    )


def test_loss_weights(diffusion):
    cross_entropy, t = torch.tensor([3.0, 5.0]), torch.tensor([T, T // 4])
    elbo = (3.0 * 1 + 5.0 * 4) / 2 / (math.log(2) * T)
    assert diffusion.weighted_loss(cross_entropy, t, "elbo").item() == pytest.approx(elbo)
    reweighted = (0 + 5.0 * 0.75) / 2 / (math.log(2) * T)
    assert diffusion.weighted_loss(cross_entropy, t, "reweighted_elbo").item() == pytest.approx(reweighted)
    unweighted = (3.0 + 5.0) / 2 / (math.log(2) * T)
    assert diffusion.weighted_loss(cross_entropy, t, "cross_entropy").item() == pytest.approx(unweighted)


def test_loss_of_a_uniform_denoiser(diffusion):
    """Every token costs log2 K bits, so the ELBO's expectation is log2 K bits a token."""
    codes = random_codes(4000)
    noise = training_noise(diffusion, 4000, "elbo")
    loss = diffusion.loss(lambda x, t: torch.zeros(len(x), K, SIDE, SIDE), codes, noise, "elbo")
    assert loss.item() == pytest.approx(math.log2(K), rel=0.03)


def test_loss_repeats_with_its_generator(diffusion):
    def loss(seed):
        logits = torch.linspace(-1, 1, K).view(1, K, 1, 1).expand(4, K, SIDE, SIDE)
        return diffusion.loss(lambda x, t: logits, random_codes(), training_noise(diffusion, 4, seed=seed)).item()

    assert loss(1) == loss(1) != loss(2)


@pytest.mark.parametrize("steps", [None, 1, 5, T])
@pytest.mark.parametrize("order", REVEAL_ORDERS)
def test_sampler_returns_the_codes_of_an_oracle(diffusion, steps, order):
    """In as many calls as there are timesteps, or fewer where random times leave some of them empty."""
    code = random_codes()[0]
    denoiser, asked = oracle(code)
    noise = diffusion.noise(3, range(5), (SIDE, SIDE), steps, order)
    drawn = diffusion.sample(denoiser, noise, temperature=0.7)
    assert torch.equal(drawn, code.expand_as(drawn))
    assert (drawn != diffusion.mask_token).all()
    timesteps = {int(t) for times, _ in asked for t in times}
    assert len(timesteps) == (steps or T) if order == "spread" else len(timesteps) <= (steps or T)


def test_sampler_visits_only_timesteps_that_reveal(diffusion):
    denoiser, asked = oracle(random_codes()[0])
    noise = diffusion.noise(0, [7], (SIDE, SIDE))
    diffusion.sample(denoiser, noise)
    expected = sorted(set(noise.reveal_times.flatten().tolist()), reverse=True)
    assert [int(t) for t, _ in asked] == expected
    assert sum(int(where.sum()) for _, where in asked) == T


def test_no_mask_token_is_ever_drawn(diffusion):
    """A denoiser that knows nothing: codes are spread over all of 0..K-1 and nothing else."""
    noise = diffusion.noise(0, range(300), (SIDE, SIDE))
    drawn = diffusion.sample(lambda x, t, where: torch.zeros(int(where.sum()), K), noise)
    counts = torch.bincount(drawn.flatten(), minlength=K + 1)
    assert counts[K] == 0
    assert counts[:K].double().sub(drawn.numel() / K).abs().max() < 5 * math.sqrt(drawn.numel() / K)


def test_skipping_sampler_equals_every_timestep(diffusion):
    """With a denoiser that depends on tokens and t, so that order and timing matter."""

    def logits(tokens, t):
        field = (tokens.roll(1, 1) + 2 * tokens.roll(1, 2) + t.view(-1, 1, 1)).double()
        return torch.stack([torch.sin(field * (k + 1.0)) for k in range(K)], 1)

    noise = diffusion.noise(5, range(20), (SIDE, SIDE))
    skipping = diffusion.sample(lambda x, t, where: logits(x, t).permute(0, 2, 3, 1)[where], noise, temperature=0.5)
    assert torch.equal(skipping, reference.sample(logits, *noise, K, temperature=0.5))


def test_temperature_changes_while_tokens_are_revealed(diffusion):
    """From 100, where a logit of 30 hardly counts, to one where it decides."""
    logits = torch.zeros(1, K)
    logits[0, 2] = 30
    noise = diffusion.noise(0, range(400), (SIDE, SIDE))
    temperatures = {"temperature": 100.0, "final_temperature": 1e-3}
    drawn = diffusion.sample(lambda x, t, where: logits.expand(int(where.sum()), -1), noise, **temperatures)
    for t in (T, T // 2, 1):
        expected = torch.softmax(logits[0].double() / (1e-3 + (100 - 1e-3) * t / T), 0)[2].item()
        share = (drawn[noise.reveal_times == t] == 2).double().mean().item()
        assert share == pytest.approx(expected, abs=0.08)
    assert expected > 0.99


def test_a_sample_has_its_own_noise(diffusion):
    together = diffusion.noise(1, range(10), (SIDE, SIDE))
    alone = diffusion.noise(1, [7], (SIDE, SIDE))
    assert all(torch.equal(a[7:8], b) for a, b in zip(together, alone, strict=True))
    other_seed = diffusion.noise(2, [7], (SIDE, SIDE))
    assert not torch.equal(alone.uniforms, other_seed.uniforms)
    assert together.reveal_times.min() >= 1 and together.reveal_times.max() <= T


def test_fewer_steps_are_spread_over_all_timesteps(diffusion):
    times = torch.arange(1, T + 1)
    assert diffusion.reveal_schedule(times, 4).unique().tolist() == [9, 18, 27, 36]
    assert torch.equal(diffusion.reveal_schedule(times), times)
    for steps in (1, 5, 12, T):
        slow = diffusion.reveal_schedule(times, steps, exponent=2)
        counts = slow.unique(return_counts=True)[1]  # of the last step first
        assert len(counts) == steps and (slow >= times).all()
        assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert diffusion.reveal_schedule(times, 6, exponent=2).unique(return_counts=True)[1].tolist() == [11, 9, 7, 5, 3, 1]
    with pytest.raises(ValueError, match=r"1\.\.36"):
        diffusion.reveal_schedule(times, T + 1)


@pytest.mark.parametrize("grid", [(SIDE, SIDE), (5, 7), (1, 4), (2, 2)])
def test_spread_order_has_every_cell_once(grid):
    orders = spread_order(torch.rand(3, 2, *grid, generator=torch.Generator().manual_seed(0)))
    assert orders.shape == (3, *grid)
    assert all(sorted(order.flatten().tolist()) == list(range(math.prod(grid))) for order in orders)


def test_masks_in_training_are_those_of_sampling(diffusion):
    """In the spread order: whole fours but for one, the revealed share uniform in its root."""
    t, mask = training_noise(diffusion, 2000, "spread_cross_entropy")
    assert torch.equal(mask.flatten(1).sum(1), t)
    groups = spread_groups(SIDE, SIDE)
    shown = torch.stack([(~mask[:, groups == group]).sum(1) for group in range(T // 4)], 1)  # [N,G]
    assert (((shown > 0) & (shown < 4)).sum(1) <= 1).all()
    assert t.min() == 1 and t.max() == T
    for root in (1 / 6, 1 / 3, 1 / 2, 5 / 6):
        share = (T - t < root**2 * T - 0.5).double().mean().item()
        assert share == pytest.approx(root, abs=5 * math.sqrt(root * (1 - root) / 2000))


def test_spread_cross_entropy_by_hand(diffusion):
    """A denoiser that knows nothing pays ln K nats for each masked token."""
    codes, logits = random_codes(50), torch.zeros(50, K, SIDE, SIDE)
    noise = training_noise(diffusion, 50, "spread_cross_entropy", seed=3)
    loss = diffusion.loss(lambda x, t: logits, codes, noise, "spread_cross_entropy")
    assert loss.item() == pytest.approx(noise.mask.float().mean().item() * math.log2(K))


def test_spread_order_keeps_tokens_of_a_timestep_apart(diffusion):
    """A quarter of the timesteps at an even pace: each reveals four tokens, three cells or more from each other."""
    noise = diffusion.noise(0, range(20), (SIDE, SIDE), reveal_order="spread")
    times = diffusion.reveal_schedule(noise.reveal_times, T // 4)
    for time in times.unique():
        cells = (times == time).nonzero().view(20, 4, 3)[:, :, 1:]
        apart = (cells[:, :, None] - cells[:, None]).abs().amax(-1)
        assert (apart + 9 * torch.eye(4)).min() == SIDE // 2
    assert len({tuple(one.flatten().tolist()) for one in times}) == 20, "each sample has an order of its own"
    alone = diffusion.noise(0, [7], (SIDE, SIDE), reveal_order="spread")
    assert torch.equal(noise.reveal_times[7:8], alone.reveal_times)


@pytest.mark.parametrize("order", REVEAL_ORDERS)
def test_given_tokens_stay_and_the_others_are_drawn(diffusion, order):
    """The oracle of one code grid is asked for masked tokens only, whatever their neighbours' reveal times are."""
    code = random_codes()[0]
    denoiser, asked = oracle(code)
    noise = diffusion.noise(0, range(3), (SIDE, SIDE), reveal_order=order)
    given = code.repeat(3, 1, 1)
    given[:, :, 2:] = K
    drawn = diffusion.sample(denoiser, noise, given=given)
    assert torch.equal(drawn, code.expand_as(drawn))
    assert sum(int(where.sum()) for _, where in asked) == 3 * SIDE * (SIDE - 2)
    assert (given[:, :, 2:] == K).all(), "the argument is not changed"


def test_trajectory_goes_from_all_masked_to_finished(diffusion):
    codes, noise = random_codes(), diffusion.noise(0, range(4), (SIDE, SIDE))
    masked = [int((diffusion.trajectory(codes, noise, t) == K).sum()) for t in range(T + 1, 0, -1)]
    assert masked[0] == codes.numel() and masked[-1] == 0
    assert masked == sorted(masked, reverse=True)


def test_draw_inverts_the_cumulative_sum():
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.51, 0.999999], dtype=torch.float64)
    assert codes_from_logits(logits, uniforms, torch.ones(5)).tolist() == [0, 0, 1, 2, 2]


def test_low_temperature_takes_the_likeliest():
    logits = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(codes_from_logits(logits, uniforms, torch.full((50,), 1e-3)), logits.argmax(1))
