"""The oracle itself, and the estimators and policy gradients of ppo.py and grpo.py held against its exact numbers."""
import itertools
import math

import pytest
import torch

import grpo
from oracle import World, central_difference, gradient


@pytest.fixture(scope='module')
def world():
    return World(3, 3)


def test_worlds_are_whole():
    w = World(2, 2)
    assert w.rows == [(0,), (1, 0), (1, 1)] and (w.S, w.P) == (3, 2)
    for V, R in [(2, 4), (3, 3), (4, 2)]:
        w = World(V, R, seed=V)
        assert w.S == sum((V - 1) ** t for t in range(R)) + (V - 1) ** R
        assert w.logp(w.ref).exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert torch.allclose(w.logp(w.table(w.logp(w.ref))), w.logp(w.ref), atol=1e-12)


@pytest.mark.parametrize('beta', [0.1, 0.5, 2.0])
def test_the_optimum_is_one(world, beta):
    logp, value = world.optimum(beta)
    theta = world.table(logp)
    assert torch.allclose(world.logp(theta), logp, atol=1e-10)
    assert world.objective(theta, beta).item() == pytest.approx(value, abs=1e-10)
    assert gradient(lambda t: world.objective(t, beta), theta).abs().max() < 1e-10
    g = torch.Generator().manual_seed(0)
    for _ in range(50):  # nothing beats it
        assert world.objective(theta + 0.3 * torch.randn(theta.shape, generator=g, dtype=torch.float64), beta).item() < value
    assert abs(world.shortfall(theta)) < 1e-8 and world.shortfall(world.ref + 1.0 * torch.randn(theta.shape, generator=g, dtype=torch.float64)) > 1e-3


def test_gradients_by_central_differences(world):
    fn = lambda t: world.objective(t, 0.3)
    assert (gradient(fn, world.ref) - central_difference(fn, world.ref)).abs().max() < 1e-8


def off_policy(world, seed=5, size=0.5):
    return world.ref + size * torch.randn(world.ref.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(world, theta, G):
    """All groups of G sequences with their probability: (S^G, G) indices, (S^G,) probabilities."""
    index = torch.tensor(list(itertools.product(range(world.S), repeat=G)))
    return index, world.logp(theta).exp()[index].prod(1).detach()


def expected_loss(world, theta, index, prob, kind, loss_type, **kw):
    """sum over all groups of p(group) * loss(group), differentiable; sampled at theta itself, so ratio = 1."""
    G = index.shape[1]
    old, new = world.token_logp(theta).detach(), world.token_logp(theta)
    flat = index.reshape(-1)
    adv = grpo.group_advantages(world.reward[flat], G, kind)
    total = 0.0
    for i, p in enumerate(prob):
        rows = index[i]
        total = total + p * grpo.grpo_loss(new[rows], old[rows], adv[i * G:(i + 1) * G], world.mask[rows], loss_type=loss_type, **kw)[0]
    return total


@pytest.mark.parametrize('kind, factor', [('rloo', 1.0), ('dr_grpo', 0.5)])
def test_expected_gradient_is_the_exact_policy_gradient(kind, factor):
    """E over ALL groups of two: RLOO is unbiased, Dr. GRPO is (G - 1) / G of it. Enumerated, so to 1e-12, not within an error bar."""
    world = World(3, 2)
    theta = off_policy(world)
    index, prob = groups_of(world, theta, 2)
    assert prob.sum().item() == pytest.approx(1, abs=1e-12)
    got = gradient(lambda t: expected_loss(world, t, index, prob, kind, 'dr_grpo', max_len=1), theta)
    exact = gradient(world.expected_reward, theta)
    assert (got + factor * exact).abs().max() < 1e-12


def test_expected_gradient_of_grpo_against_the_formula_by_hand():
    """No loss function involved: sum over groups p(g) 1/G sum_i (r_i - mean) / (std + 1e-4) / |y_i| grad log pi(y_i)."""
    world = World(3, 2)
    theta = off_policy(world)
    index, prob = groups_of(world, theta, 3)
    r = world.reward[index]
    adv = (r - r.mean(1, keepdim=True)) / (((r - r.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / 2).sqrt().add(1e-4)
    per_row = torch.zeros(world.S, dtype=torch.float64).index_add(0, index.reshape(-1), (prob[:, None] * adv / 3).reshape(-1)) / world.mask.sum(1)
    exact = gradient(lambda t: (per_row * world.logp(t)).sum(), theta)
    got = gradient(lambda t: expected_loss(world, t, index, prob, 'grpo', 'grpo'), theta)
    assert (got + exact).abs().max() < 1e-12
    up = gradient(world.expected_reward, theta)
    assert (up * exact).sum() > 0.5 * up.norm() * exact.norm()  # biased, but uphill


@pytest.mark.parametrize('kind, loss_type', [('rloo', 'dr_grpo'), ('dr_grpo', 'dr_grpo')])
def test_monte_carlo_gradient_agrees_with_the_exact_one(world, kind, loss_type):
    theta, G, n = off_policy(world), 4, 200_000
    rows = world.sample(theta, n, torch.Generator().manual_seed(0))
    adv = grpo.group_advantages(world.reward[rows], G, kind)
    got = gradient(lambda t: grpo.grpo_loss(world.token_logp(t)[rows], world.token_logp(theta)[rows], adv, world.mask[rows], loss_type=loss_type, max_len=1)[0], theta)
    exact = -(1.0 if kind == 'rloo' else (G - 1) / G) * gradient(world.expected_reward, theta)
    assert (got - exact).norm() < 0.02 * exact.norm()


def test_off_policy_importance_ratio_is_unbiased(world):
    """Unclipped, the surrogate's value at theta is E_old[ratio A]: single-token world, where the token ratio is the sequence ratio."""
    world = World(4, 1)
    old, theta = world.ref, off_policy(world)
    p = world.logp(old).exp()
    loss = lambda t: sum(p[s] * grpo.grpo_loss(world.token_logp(t)[s:s + 1], world.token_logp(old)[s:s + 1], world.reward[s:s + 1], world.mask[s:s + 1],
                                               clip_low=1.0, clip_high=1e9)[0] for s in range(world.S))
    assert loss(theta).item() == pytest.approx(-world.expected_reward(theta).item(), abs=1e-12)
    assert (gradient(loss, theta) + gradient(world.expected_reward, theta)).abs().max() < 1e-12


def test_k3_gradient_is_that_of_the_forward_kl(world):
    """On policy, E[grad k3] = grad KL(pi_ref || pi), token by token: the penalty of GRPO pulls, but it is not the reverse KL that k1 in the
    reward optimises. (A published subtlety; this is why the frontier test below takes the KL in the reward.)"""
    world = World(4, 1)
    theta = off_policy(world)
    p = world.logp(theta).exp().detach()
    zero = torch.zeros(world.S, dtype=torch.float64)
    loss = lambda t: sum(p[s] * grpo.grpo_loss(world.token_logp(t)[s:s + 1], world.token_logp(theta)[s:s + 1], zero[s:s + 1], world.mask[s:s + 1],
                                               ref_logp=world.token_logp(world.ref)[s:s + 1], beta=1.0)[0] for s in range(world.S))
    assert loss(theta).item() == pytest.approx(world.kl(theta).item(), abs=1e-12)  # the value is the reverse KL, exactly
    assert (gradient(loss, theta) - gradient(lambda t: world.kl(world.ref, t), theta)).abs().max() < 1e-12


@pytest.mark.parametrize('kind, loss_type', [('rloo', 'dr_grpo'), ('dr_grpo', 'dr_grpo'), ('grpo', 'grpo'), ('grpo', 'dapo'), ('reinforce++', 'dapo'),
                                             ('grpo', 'gspo'), ('dr_grpo', 'cispo')])
def test_group_methods_climb_the_frontier(world, kind, loss_type):
    """Sampled, two inner epochs, Adam: with beta * log(pi / pi_ref) taken off the reward, every method ends within 0.01 of the reward-KL
    frontier (reward left on the table at the KL spent; rewards span 3.5) and has climbed 99 % of the way from pi_ref to the optimum J."""
    beta, G, g = 0.3, 8, torch.Generator().manual_seed(1)
    theta = world.ref.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    steps = 250
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / steps)
        rows = world.sample(theta, 512, g)
        old = world.token_logp(theta).detach()[rows]
        shaped = world.reward[rows] - beta * (world.logp(theta) - world.logp(world.ref)).detach()[rows]
        adv = grpo.group_advantages(shaped, G, kind)
        for _ in range(2):
            loss, stats = grpo.grpo_loss(world.token_logp(theta)[rows], old, adv, world.mask[rows], loss_type=loss_type, max_len=world.R)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    best = world.optimum(beta)[1]
    start = world.objective(world.ref, beta).item()
    assert world.shortfall(theta.detach()) < 0.01
    assert world.objective(theta.detach(), beta).item() > start + 0.99 * (best - start)
