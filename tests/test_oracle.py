"""The oracle itself, and the estimators and policy gradients of ppo.py and grpo.py held against its exact numbers."""
import itertools
import math

import pytest
import torch

import grpo
import ppo
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


# ---- ppo.py's pure functions ---------------------------------------------------------------------------------------

def exact_values(world, theta, beta):
    """(S, R) value of each prefix under the shaped reward: expected score minus beta times the KL still to come, by summing over what follows."""
    p, gain = world.logp(theta).exp(), world.reward - beta * (world.logp(theta) - world.logp(world.ref))
    mass, total = (torch.zeros(world.P, dtype=torch.float64) for _ in range(2))
    spent = torch.where(world.mask, world.token_logp(theta) - world.token_logp(world.ref), 0.0)
    before = -beta * (spent.cumsum(1) - spent)  # what the prefix has already paid
    for s in range(world.S):
        for t in range(len(world.rows[s])):
            mass[world.prefix[s, t]] += p[s]
            total[world.prefix[s, t]] += p[s] * (gain[s] - before[s, t])
    return (total / mass)[world.prefix]


@pytest.mark.parametrize('kind, exact', [('k1', True), ('k3', True), ('k2', False)])
def test_kl_estimators_in_expectation(world, kind, exact):
    """Enumerated: the mean of k1 and of k3 IS the sequence KL (token by token, prefixes drawn from the policy); k2's is only near it."""
    theta = off_policy(world, size=0.3)
    k = ppo.kl_estimate(world.token_logp(theta), world.token_logp(world.ref), kind)
    mean = (world.logp(theta).exp() * torch.where(world.mask, k, 0.0).sum(1)).sum().item()
    assert (abs(mean - world.kl(theta).item()) < 1e-12) == exact and mean == pytest.approx(world.kl(theta).item(), rel=0.2)
    assert kind == 'k1' or (k[world.mask] >= 0).all()


def ppo_gradient(world, theta, beta, values, lam):
    """Expected gradient of ppo's loss at ratio 1 over all sequences: token_rewards, gae, policy_loss, as ppo.py chains them."""
    old, ref = world.token_logp(theta), world.token_logp(world.ref)
    rewards = ppo.token_rewards(world.reward, old, ref, world.mask, beta)
    advantages, _ = ppo.gae(rewards, values, world.mask, 1.0, lam)
    p, n = world.logp(theta).exp(), world.mask.sum(1)
    rows = [slice(s, s + 1) for s in range(world.S)]
    return gradient(lambda t: sum(p[s] * n[s] * ppo.policy_loss(world.token_logp(t)[r], old[r], advantages[r], world.mask[r], 0.2)[0] for s, r in enumerate(rows)), theta)


def test_ppo_gradient_is_that_of_the_rlhf_objective(world):
    """With exact values any lambda is unbiased; with lambda = 1 any values are (a baseline); with both wrong it is biased."""
    theta, beta = off_policy(world), 0.3
    exact = -gradient(lambda t: world.objective(t, beta), theta)
    right = exact_values(world, theta, beta)
    wrong = right + torch.randn(world.P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[world.prefix]
    for values, lam, unbiased in ((right, 0.5, True), (right, 0.0, True), (right, 1.0, True), (wrong, 1.0, True), (wrong, 0.5, False)):
        off = (ppo_gradient(world, theta, beta, values, lam) - exact).abs().max().item()
        assert (off < 1e-10) == unbiased, (lam, off)


def test_ppo_climbs_the_frontier(world):
    """ppo.py's functions chained as in its loop, sampled, a learned value table, four epochs of two minibatches: within 0.01 of the frontier."""
    beta, g = 0.3, torch.Generator().manual_seed(1)
    theta, table = world.ref.clone().requires_grad_(True), torch.zeros(world.P, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([dict(params=[theta], peak=0.05), dict(params=[table], peak=0.1)])
    steps, ref = 250, world.token_logp(world.ref)
    for step in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = ppo.linear_lr(step, group['peak'], 0, steps)
        rows = world.sample(theta, 512, g)
        mask = world.mask[rows]
        with torch.no_grad():
            old, old_values = world.token_logp(theta)[rows], table[world.prefix[rows]]
            advantages, returns = ppo.gae(ppo.token_rewards(world.reward[rows], old, ref[rows], mask, beta), old_values, mask, 1.0, 0.95)
            advantages = ppo.whiten(advantages, mask)
        for _ in range(2):
            for mb in torch.randperm(512, generator=g).chunk(2):
                loss, stats = ppo.policy_loss(world.token_logp(theta)[rows][mb], old[mb], advantages[mb], mask[mb], 0.2)
                vf, _ = ppo.value_loss(table[world.prefix[rows]][mb], old_values[mb], returns[mb], mask[mb], 0.2)
                optimizer.zero_grad()
                (loss + vf).backward()
                optimizer.step()
    best, start = world.optimum(beta)[1], world.objective(world.ref, beta).item()
    assert world.shortfall(theta.detach()) < 0.01 and world.objective(theta.detach(), beta).item() > start + 0.98 * (best - start)
