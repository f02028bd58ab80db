"""The pure functions of sft.py, reward.py and ppo.py against hand-made numbers, autograd in float64, and enumeration."""
import math
import os

import pytest
import torch

import kernels
import ppo
import reward
import sft

SEED = 20261130


@pytest.fixture(autouse=True)
def seeded():
    print('seed', SEED)
    torch.manual_seed(SEED)


def garbage(mask, *tensors):
    """The tensors with wild values at masked positions."""
    return [torch.where(mask, t, torch.randn_like(t) * 1e3) for t in tensors]


def ragged(B=5, R=7):
    lengths = torch.randint(1, R + 1, (B,))
    return torch.arange(R) < lengths[:, None]


def test_importing_a_stage_touches_nothing():
    assert ppo.config['stage'] if 'stage' in ppo.config else True
    assert not any(n in vars(ppo) for n in ('policy', 'engine', 'ckpt'))


def test_sft_loss_by_hand_and_masked():
    logp, mask = torch.tensor([[-1.0, -3.0, -5.0], [-2.0, 0.0, 0.0]]), torch.tensor([[True, True, False], [True, False, False]])
    assert sft.sft_loss(logp, mask).item() == pytest.approx(2.0)
    x = torch.full_like(logp, 1e30).where(~mask, logp).requires_grad_()
    sft.sft_loss(x, mask).backward()
    assert torch.equal(x.grad, torch.where(mask, -1 / 3, 0.0))
    assert sft.sft_loss(logp, torch.zeros_like(mask)).item() == 0


def test_cosine_lr_is_nanogpts():
    def nanogpt(it, lr, lo, warm, total):
        if it < warm:
            return lr * (it + 1) / (warm + 1)
        if it > total:
            return lo
        return lo + 0.5 * (1.0 + math.cos(math.pi * (it - warm) / (total - warm))) * (lr - lo)
    for it in (0, 1, 9, 10, 50, 99, 100, 130):
        assert sft.cosine_lr(it, 1e-3, 1e-4, 10, 100) == pytest.approx(nanogpt(it, 1e-3, 1e-4, 10, 100))
    assert reward.linear_lr(0, 2.0, 0, 10) == 2.0 and reward.linear_lr(10, 2.0, 0, 10) == 0.0 and reward.linear_lr(5, 2.0, 0, 10) == 1.0


def test_bradley_terry_by_hand_margin_and_ties():
    assert reward.bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0])).item() == pytest.approx(math.log(1 + math.exp(-1)))
    c, r = torch.randn(6, dtype=torch.double), torch.randn(6, dtype=torch.double)
    want = sum(math.log(1 + math.exp(-(a - b - 0.5))) for a, b in zip(c.tolist(), r.tolist())) / 6
    assert reward.bradley_terry_loss(c, r, 0.5).item() == pytest.approx(want)
    assert reward.bradley_terry_loss(c, r, torch.full((6,), 0.5)).item() == pytest.approx(want)
    tie = torch.tensor([True, False, True, False, False, False])
    want = sum(math.log(1 + math.exp(-(a - b))) if not t else 0.5 * (math.log(1 + math.exp(b - a)) + math.log(1 + math.exp(a - b)))
               for a, b, t in zip(c.tolist(), r.tolist(), tie.tolist())) / 6
    assert reward.bradley_terry_loss(c, r, tie=tie).item() == pytest.approx(want)
    every = torch.ones(6, dtype=torch.bool)
    assert reward.bradley_terry_loss(c, r, tie=every) == reward.bradley_terry_loss(r, c, tie=every) >= math.log(2)
    assert reward.centring_loss(c, r).item() == pytest.approx(((c + r) ** 2).mean().item())


def test_gain_and_bias_by_arithmetic():
    rewards = torch.randn(500) * 3 + 2
    for old in (0.0, 5.0):  # the rewards of a model that was normalised before hold its bias
        gain, bias = reward.gain_and_bias(rewards + old, old)
        new = gain * rewards + bias
        assert abs(new.mean()) < 1e-4 and abs(new.std(correction=0) - 1) < 1e-4
    for same in (torch.full((8,), 0.7), torch.full((8,), 700.0) + torch.tensor([0.0, 1e-4] * 4)):
        gain, bias = reward.gain_and_bias(same)
        assert gain == 1 and bias == pytest.approx(-same.mean().item())


def test_the_fused_sft_loss_is_the_equation():
    """What the run computes (the head chunk by chunk) against sft_loss on log-probs."""
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=23, block_size=16)).double()
    idx = torch.randint(23, (3, 9))
    mask = torch.rand(3, 8) < 0.6
    targets = torch.where(mask, idx[:, 1:], -1)
    fused = sft.sft_loss(None, mask, fused=lambda: model(idx[:, :-1], targets)[1])
    assert fused.item() == pytest.approx(sft.sft_loss(model.logprobs(idx), mask).item(), abs=1e-12)


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_rewards_with_shared_beginnings_equal_one_sequence_at_a_time(arch):
    """Pairs, a sequence twice, one that is the beginning of the next, branches of branches: rewards and gradients in float64, and fewer rows."""
    from model import GPT, GPTConfig, rewards_of
    model = GPT(GPTConfig.of(arch, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_size=8, vocab_size=5, block_size=32), 'scalar').double()
    model.config.reward_bias = 0.7
    some = lambda lo, hi: torch.randint(5, (int(torch.randint(lo, hi, ())),)).tolist()
    prompt, other = some(3, 9), some(3, 9)
    stem = prompt + some(1, 5)
    sequences = [prompt + [0], prompt + [1] + some(1, 6), stem + [2], stem + [2], stem + [2, 3, 4], stem + [2, 3, 1], other + [4], [4], other + some(1, 5)]
    weight = torch.randn(len(sequences), dtype=torch.float64)
    seen, hidden = [], model.hidden
    model.hidden = lambda ids, *rest: seen.append(len(ids)) or hidden(ids, *rest)
    shared = rewards_of(model, sequences)
    shared.dot(weight).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.stack([model(torch.tensor([s]))[0][0, -1] for s in sequences])
    alone.dot(weight).backward()
    assert torch.allclose(shared, alone, atol=1e-12) and all(torch.allclose(g, p.grad, atol=1e-11) for g, p in zip(grads, model.parameters()))
    rows = sum(max(1, len(b) - len(os.path.commonprefix([a, b]))) for a, b in zip([[], *sequences], sequences))
    assert rows < sum(map(len, sequences)) and seen[0] == rows + kernels.extra_rows(rows)


def test_calibration_wilson_and_correlation():
    import numpy as np
    rng = np.random.default_rng(SEED)
    m = rng.normal(size=20000) * 2
    flips = rng.random(20000) < 1 / (1 + np.exp(np.abs(m)))  # right with exactly the stated confidence
    ece, rows = reward.calibration(np.where(flips, -1, 1) * np.abs(m))
    assert ece < 0.02 and sum(r[2] for r in rows) == 20000
    assert reward.calibration(np.full(100, 1.0))[0] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    lo, hi = reward.wilson(60, 100)
    assert (round(lo, 3), round(hi, 3)) == (0.502, 0.691)
    x = rng.normal(size=50)
    assert reward.correlation(x, 3 * x + 1) == pytest.approx(1) and reward.correlation(x, np.ones(50)) == 0


def test_kl_estimators_are_unbiased_with_the_right_gradient():
    """On a known pair of categorical distributions: E_pi[k1] = E_pi[k3] = KL(pi || ref), k3 >= 0, and the score-function
    gradient of E[k1] (as PPO's reward uses it) and the pathwise one of E[k3] point where the exact KL's does."""
    logits, ref = torch.randn(6, dtype=torch.double, requires_grad=True), torch.randn(6, dtype=torch.double).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp()
    exact = (p * (logp - ref)).sum()
    for kind in ('k1', 'k3'):
        assert (p * ppo.kl_estimate(logp, ref, kind)).sum().item() == pytest.approx(exact.item())
    assert (ppo.kl_estimate(logp, ref, 'k3') >= 0).all() and (ppo.kl_estimate(logp, ref, 'k1') < 0).any()
    g = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    score = (p.detach() * ppo.kl_estimate(logp, ref, 'k1').detach() * logp).sum()  # E[k1 * grad log pi]
    assert torch.allclose(torch.autograd.grad(score, logits, retain_graph=True)[0], g)
    near = (ref + 1e-4 * torch.randn(6, dtype=torch.double)).detach().requires_grad_()  # k2's own gradient is the KL's, to first order
    lp = near.log_softmax(0)
    g2 = torch.autograd.grad((lp.exp().detach() * ppo.kl_estimate(lp, ref, 'k2')).sum(), near, retain_graph=True)[0]
    gx = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), near)[0]
    assert torch.allclose(g2, gx, atol=1e-9)
    with pytest.raises(ValueError, match='k4'):
        ppo.kl_estimate(logp, ref, 'k4')


def test_whiten_by_hand():
    x, mask = torch.tensor([[1.2, 1.6, 2.0], [1.2, 1.6, 99.0]]), torch.tensor([[True] * 3, [True, True, False]])
    mean, var = 7.6 / 5, sum((v - 7.6 / 5) ** 2 for v in (1.2, 1.6, 2.0, 1.2, 1.6)) / 5
    want = torch.tensor([[(v - mean) / math.sqrt(var + 1e-8) for v in (1.2, 1.6, 2.0)], [(v - mean) / math.sqrt(var + 1e-8) for v in (1.2, 1.6)] + [0.0]])
    assert torch.allclose(ppo.whiten(x, mask), want, atol=1e-6)
    assert torch.allclose(ppo.whiten(x, mask, shift_mean=False), torch.where(mask, want + mean, 0.0), atol=1e-6)
    assert ppo.whiten(x, torch.zeros_like(mask)).isfinite().all()
    assert torch.equal(ppo.whiten(*garbage(mask, x), mask), ppo.whiten(x, mask))


def test_gae_against_the_definition():
    """eq. 16 as the double sum over deltas, row by row, in plain Python."""
    mask = ragged()
    rewards, values = torch.randn(2, 5, 7, dtype=torch.double)
    gamma, lam = 0.9, 0.7
    adv, ret = ppo.gae(*garbage(mask, rewards, values), mask, gamma, lam)
    for b in range(5):
        n = int(mask[b].sum())
        r, v = rewards[b, :n].tolist(), values[b, :n].tolist() + [0.0]
        for t in range(n):
            want = sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(n - t))
            assert adv[b, t].item() == pytest.approx(want) and ret[b, t].item() == pytest.approx(want + v[t])
    assert (adv[~mask] == 0).all() and (ret[~mask] == 0).all()
    one = torch.ones(1, 3, dtype=torch.bool)
    assert ppo.gae(torch.tensor([[1.0, 0, 0]]), torch.zeros(1, 3), one, 1, 1)[0].tolist() == [[1, 0, 0]]
    assert ppo.gae(torch.tensor([[0.0, 0, 1]]), torch.zeros(1, 3), one, 1, 1)[0].tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match='row 1'):
        ppo.gae(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]), 1, 1)


def test_policy_loss_value_gradient_and_garbage():
    mask = ragged()
    logp, old, adv = torch.randn(3, 5, 7, dtype=torch.double) * 0.3
    x = logp.clone().requires_grad_()
    loss, stats = ppo.policy_loss(x, old, adv, mask, 0.2)
    total, clipped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        ratio, a = math.exp(logp[b, t] - old[b, t]), adv[b, t].item()
        plain, cut = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
        total, clipped = total + max(plain, cut), clipped + (cut > plain)
    n = int(mask.sum())
    assert loss.item() == pytest.approx(total / n) and stats['clip_frac'].item() == pytest.approx(clipped / n)
    assert torch.autograd.gradcheck(lambda y: ppo.policy_loss(y, old, adv, mask, 0.2)[0], (x,))
    loss.backward()
    wild = logp.masked_fill(~mask, 1e4).requires_grad_()
    again, _ = ppo.policy_loss(wild, *garbage(mask, old, adv), mask, 0.2)
    again.backward()
    assert torch.equal(again, loss) and torch.equal(wild.grad, x.grad) and (x.grad[~mask] == 0).all()
    assert ppo.policy_loss(torch.full((1, 1), math.log(2)), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.2)[0].item() == pytest.approx(-1.2)
    same, st = ppo.policy_loss(old, old, adv, mask, 0.2)
    assert st['ratio_max'] == 0 and st['approx_kl'] == 0 and same.item() == pytest.approx(-adv[mask].mean().item())
    assert ppo.policy_loss(logp, old, adv, torch.zeros_like(mask), 0.2)[0].isfinite()


def test_policy_gradient_at_ratio_one_is_reinforce():
    """At logp = old_logp the gradient of PPO's loss is that of -mean A log pi: the policy-gradient theorem's."""
    mask, adv = ragged(), torch.randn(5, 7, dtype=torch.double)
    x = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    g = torch.autograd.grad(ppo.policy_loss(x, x.detach(), adv, mask, 0.2)[0], x)[0]
    assert torch.allclose(g, torch.autograd.grad(-ppo.masked_mean(adv * x, mask), x)[0])


def test_value_loss_by_hand_and_garbage():
    one = torch.ones(1, 1, dtype=torch.bool)
    assert ppo.value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), one, 0.2)[0].item() == 0.5
    assert ppo.value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), one, 0.2)[0].item() == pytest.approx(0.5 * 0.64)
    assert ppo.value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), one, 0)[0].item() == 0
    mask = ragged()
    v, old, ret = torch.randn(3, 5, 7, dtype=torch.double)
    x = v.clone().requires_grad_()
    loss, stats = ppo.value_loss(x, old, ret, mask, 0.2)
    loss.backward()
    y = v.masked_fill(~mask, -1e9).requires_grad_()
    again, _ = ppo.value_loss(y, *garbage(mask, old, ret), mask, 0.2)
    again.backward()
    assert torch.equal(loss, again) and torch.equal(x.grad, y.grad)
    assert ppo.explained_variance(ppo.value_loss(ret, ret, ret, mask, 0.2)[1]).item() == pytest.approx(1.0)
    want = 1 - (ret - v)[mask].var(correction=0) / ret[mask].var(correction=0)  # of pooled moments, however they were cut
    parts = [ppo.value_loss(*(x[r] for x in (v, old, ret, mask)), 0.2)[1] for r in (slice(0, 2), slice(2, 5))]
    share = [mask[:2].sum() / mask.sum(), mask[2:].sum() / mask.sum()]
    pooled = {k: sum(w * part[k] for w, part in zip(share, parts)) for k in parts[0]}
    assert ppo.explained_variance(pooled).item() == pytest.approx(want.item())


def test_end_rule():
    scores, ended = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    for rule, want in (('score', [2, -1]), ('penalty', [2, 2]), ('none', [2, 3])):
        assert ppo.end_rule(scores, ended, rule, -1.0).tolist() == want


def test_token_rewards_put_the_score_on_the_last_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logp, ref = torch.tensor([[0.0, -1.0, 50.0], [0.0, 0.0, 0.0]]), torch.tensor([[-1.0, -1.0, -50.0], [0.0, 0.0, -2.0]])
    got = ppo.token_rewards(torch.tensor([10.0, 20.0]), logp, ref, mask, 0.1)
    assert torch.allclose(got, torch.tensor([[-0.1, 10.0, 0.0], [0.0, 0.0, 19.8]]))


def test_adaptive_beta():
    assert ppo.adapt_beta(0.15, 12.0, 6.0, 512, 10000) == pytest.approx(0.15 * (1 + 0.2 * 512 / 10000))
    assert ppo.adapt_beta(0.15, 6.0, 6.0, 512, 10000) == 0.15
    assert ppo.adapt_beta(0.15, 0.0, 6.0, 512, 10000) < 0.15


def test_helpers_shared_by_stages_are_equal_to_the_letter():
    import ast
    import collections
    root, seen = os.path.dirname(os.path.abspath(ppo.__file__)), collections.defaultdict(dict)
    for stage in ('sft', 'reward', 'ppo', 'dpo', 'kto', 'grpo'):
        path = os.path.join(root, stage + '.py')
        if os.path.exists(path):
            source = open(path).read()
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef):
                    seen[node.name][stage] = ast.get_source_segment(source, node)
    shared = {n: c for n, c in seen.items() if len(c) > 1}
    assert shared and not [n for n, c in shared.items() if len(set(c.values())) > 1]
