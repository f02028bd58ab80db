"""dpo.py: every loss against TRL's own numbers, central differences and the enumerated optimum; then the stage itself."""
import math
import types
from unittest import mock

import pytest
import torch

import dpo
from oracle import World, central_difference, gradient

D = torch.float64


def four(B=6, seed=0, low=-20.0):
    g = torch.Generator().manual_seed(seed)
    return [low * torch.rand(B, generator=g, dtype=D) - 1 for _ in range(4)]


def trl_dpo(pc, pr, rc, rr, lengths, **args):
    """TRL's DPOTrainer._compute_loss on a fake model that returns log-probs of one token a sequence (and `lengths` tokens counted)."""
    trainer = pytest.importorskip('trl.trainer.dpo_trainer').DPOTrainer
    B, T = len(pc), int(max(lengths)) + 1
    mask = torch.zeros(2 * B, T, dtype=torch.long)
    for i, n in enumerate(lengths):
        mask[i, 1:n + 1] = 1
    per_token = torch.zeros(2 * B, T - 1, dtype=D)
    per_token[:, 0] = torch.cat([pc, pr])
    fake = mock.MagicMock(loss_weights=[1.0], aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl',
                          use_weighting=False, **args)
    fake.accelerator.device = 'cpu'
    fake.accelerator.gather_for_metrics = fake.accelerator.gather = lambda x: x
    like = torch.zeros(2 * B, T - 1)
    out = types.SimpleNamespace(log_probs=per_token, entropy=like, mean_logits=like, is_top1=like.bool())
    ids = dict(input_ids=torch.zeros(2 * B, T, dtype=torch.long), attention_mask=torch.ones(2 * B, T))
    return trainer._compute_loss(fake, lambda **kw: out, dict(completion_mask=mask, ref_chosen_logps=rc, ref_rejected_logps=rr, **ids), False)


@pytest.mark.parametrize('loss_type, smoothing', [('sigmoid', 0.0), ('robust', 0.1), ('hinge', 0.0), ('apo_zero', 0.0), ('ipo', 0.0)])
@pytest.mark.parametrize('beta', [0.05, 0.5])
def test_dpo_losses_are_trls(loss_type, smoothing, beta):
    pc, pr, rc, rr = four()
    lengths = torch.tensor([3, 5, 2, 7, 1, 4, 6, 2, 9, 3, 5, 1])
    n = lengths if loss_type == 'ipo' else torch.ones(12)  # TRL averages for IPO, and only there
    theirs = trl_dpo(pc, pr, rc, rr, lengths.tolist(), loss_types=[loss_type], beta=beta, label_smoothing=smoothing)
    ours = dpo.dpo_loss(pc / n[:6], pr / n[6:], rc / n[:6], rr / n[6:], beta, loss_type, smoothing)[0]
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=1e-10)


def test_length_normalised_dpo_is_trls_sigmoid_norm():
    pc, pr, rc, rr = four()
    lengths = torch.tensor([3, 5, 2, 7, 1, 4, 6, 2, 9, 3, 5, 1])
    theirs = trl_dpo(pc, pr, rc, rr, lengths.tolist(), loss_types=['sigmoid_norm'], beta=0.5, label_smoothing=0.0)
    ours = dpo.dpo_loss(pc / lengths[:6], pr / lengths[6:], rc / lengths[:6], rr / lengths[6:], 0.5)[0]
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=1e-10)


def test_simpo_and_orpo_are_trls():
    cpo, orpo = pytest.importorskip('trl.experimental.cpo'), pytest.importorskip('trl.experimental.orpo')
    pc, pr, _, _ = four(low=-3.0)
    fake = mock.MagicMock(alpha=0.0, loss_type='simpo', simpo_gamma=0.7, beta=2.0, label_smoothing=0.1)
    fake.accelerator.device = 'cpu'
    theirs = cpo.CPOTrainer.cpo_loss(fake, pc, pr)
    for a, b in zip(dpo.simpo_loss(pc, pr, 2.0, 0.7, 0.1), theirs):
        assert torch.allclose(a, b, atol=1e-10)
    theirs = orpo.ORPOTrainer.odds_ratio_loss(fake, pc, pr)[0]  # beta * log sigmoid, float32 there
    assert torch.allclose(dpo.orpo_loss(pc, pr, 2.0, chosen_nll=torch.zeros(6, dtype=D))[0].float(), -theirs, atol=1e-5)


def test_kto_is_trls():
    trainer = pytest.importorskip('trl.trainer.kto_trainer').KTOTrainer
    logp, ref, kl_logp, kl_ref = four()
    label = torch.tensor([True, False, True, True, False, False])
    fake = mock.MagicMock(aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, loss_type='kto', beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    fake.accelerator.device = 'cpu'
    fake.accelerator.gather_for_metrics = fake.accelerator.gather = lambda x: x
    fake._compute_kl_logps = lambda *a: kl_logp
    like = torch.zeros(6, 1)
    out = types.SimpleNamespace(log_probs=logp[:, None], entropy=like, mean_logits=like, is_top1=like.bool())
    batch = dict(label=label, completion_mask=torch.ones(6, 2), input_ids=torch.zeros(6, 2, dtype=torch.long), attention_mask=torch.ones(6, 2),
                 ref_logps=ref, ref_KL_logps=kl_ref)
    theirs = trainer._compute_loss(fake, lambda **kw: out, batch, False)
    for shift in (0.0, 40.0):  # with a positive and with a negative (clamped) estimate of the KL
        kl_ref -= shift
        theirs = trainer._compute_loss(fake, lambda **kw: out, batch, False)
        losses, rewards = dpo.kto_loss(logp, ref, label, (kl_logp - kl_ref).mean(), 0.3, 1.5, 0.5)
        assert losses.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
        assert torch.allclose(rewards, 0.3 * (logp - ref))


CASES = [(t, 0.0) for t in dpo.PAIRED] + [('sigmoid', 0.2), ('robust', 0.2)]


@pytest.mark.parametrize('loss_type, smoothing', CASES)
def test_gradients_by_central_differences(loss_type, smoothing):
    x = torch.stack(four(low=-4.0))
    fn = lambda x: dpo.dpo_loss(*x, 0.7, loss_type, smoothing)[0].sum()
    assert (gradient(fn, x) - central_difference(fn, x)).abs().max() < 1e-7


def test_gradients_of_the_reference_free_ones():
    x = torch.stack(four(low=-2.0)[:2])
    label = torch.tensor([True, False, True, True, False, False])
    for fn in (lambda x: dpo.simpo_loss(*x, 2.0, 0.5)[0].sum(), lambda x: dpo.orpo_loss(*x, 0.5)[0].sum(), lambda x: dpo.kto_loss(*x, label, 0.1, 0.7, 2.0, 1.0)[0].sum()):
        assert (gradient(fn, x) - central_difference(fn, x)).abs().max() < 1e-7
    near_one = torch.tensor([-1e-5, -1e-8, 0.0], dtype=D).requires_grad_(True)  # a model sure of its answer
    losses = dpo.orpo_loss(near_one, torch.full((3,), -2.0, dtype=D), 0.5)[0]
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(near_one.grad).all()


def test_worked_numbers():
    one, two = torch.tensor([-1.0]), torch.tensor([-2.0])
    assert dpo.dpo_loss(one, two, two, two, 1.0)[0].item() == pytest.approx(0.3133, abs=1e-4)
    assert dpo.dpo_loss(one, two, two, two, 0.5)[1].item() == 0.5  # the implicit reward
    assert dpo.simpo_loss(one, two, 2.0, 1.0)[0].item() == pytest.approx(0.3133, abs=1e-4)
    half, third = torch.tensor([math.log(1 / 2)]), torch.tensor([math.log(1 / 3)])
    assert dpo.orpo_loss(half, third, 1.0)[0].item() == pytest.approx(0.6931 + 0.4055, abs=1e-4)
    assert dpo.kto_loss(one, one, torch.tensor([True]), 0.0, 1.0)[0].item() == 0.5
    logp, mask = torch.tensor([[-1.0, -2.0, 9.0], [5.0, 5.0, 5.0]]), torch.tensor([[True, True, False], [False] * 3])
    assert dpo.sequence_logp(logp, mask).tolist() == [-3, 0] and dpo.sequence_logp(logp, mask, True).tolist() == [-1.5, 0]


def test_bad_input_is_named():
    x = four(2)
    with pytest.raises(ValueError, match='sigmoid, robust, ipo'):
        dpo.dpo_loss(*x, 0.1, 'simpo2')
    with pytest.raises(ValueError, match='label_smoothing 0.5'):
        dpo.dpo_loss(*x, 0.1, 'sigmoid', 0.5)
    with pytest.raises(ValueError, match="'hinge'"):
        dpo.dpo_loss(*x, 0.1, 'hinge', 0.1)


# ---- the enumerated optimum: exact preferences over all pairs of all sequences -------------------------------------

def fit(world, loss, beta, steps=60):
    """Minimise `loss(theta)` over all distributions, to machine precision, by LBFGS."""
    theta = world.ref.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], lr=1.0, max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=30, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value
    for _ in range(12):
        optimizer.step(closure)
    return theta.detach()


def all_pairs(world):
    i, j = torch.meshgrid(torch.arange(world.S), torch.arange(world.S), indexing='ij')
    keep = i != j
    i, j = i[keep], j[keep]
    p = torch.sigmoid(world.reward[i] - world.reward[j])  # Bradley-Terry, the true preference
    return i, j, p / p.sum(), p


@pytest.mark.parametrize('beta', [0.3, 1.0])
def test_dpo_finds_the_rlhf_optimum_exactly(beta):
    """Rafailov et al.'s theorem: the minimiser of the expected DPO loss under Bradley-Terry preferences is pi_ref exp(r / beta) / Z."""
    world = World(3, 2)
    i, j, weight, _ = all_pairs(world)
    ref = world.logp(world.ref)

    def loss(theta):
        logp = world.logp(theta)
        return (weight * dpo.dpo_loss(logp[i], logp[j], ref[i], ref[j], beta)[0]).sum()
    theta = fit(world, loss, beta)
    best, value = world.optimum(beta)
    assert (world.logp(theta).exp() - best.exp()).abs().sum() < 1e-5
    assert world.objective(theta, beta).item() == pytest.approx(value, abs=1e-6) and abs(world.shortfall(theta)) < 1e-5


@pytest.mark.parametrize('loss_type, found', [('robust', True), ('sigmoid', False)])
def test_swapped_labels_robust_undoes_them_plain_dpo_does_not(loss_type, found):
    """20 % of the labels swapped: the robust loss is unbiased (its minimiser is still the optimum); plain DPO shrinks towards the reference."""
    world, beta, e = World(3, 2), 0.5, 0.2
    i, j, _, p = all_pairs(world)
    seen = (1 - e) * p + e * (1 - p)
    ref = world.logp(world.ref)

    def loss(theta):
        logp = world.logp(theta)
        return (seen * dpo.dpo_loss(logp[i], logp[j], ref[i], ref[j], beta, loss_type, e if found else 0.0)[0]).mean()
    theta = fit(world, loss, beta)
    off = (world.logp(theta).exp() - world.optimum(beta)[0].exp()).abs().sum().item()
    assert (off < 1e-4) == found and (found or world.kl(theta) < world.kl(world.table(world.optimum(beta)[0])))


def test_conservative_dpo_is_dpo_on_softened_labels():
    """cDPO with smoothing e on clean labels equals plain DPO on labels that are swapped with chance e."""
    x = four(50)
    e = 0.15
    both = (1 - e) * dpo.dpo_loss(*x, 0.3)[0] + e * dpo.dpo_loss(x[1], x[0], x[3], x[2], 0.3)[0]
    assert torch.allclose(dpo.dpo_loss(*x, 0.3, 'sigmoid', e)[0], both, atol=1e-12)


def test_ipo_stops_at_its_margin_where_dpo_runs_away():
    """Two answers, one always preferred: IPO's minimiser has log-ratio margin 1 / (2 beta) exactly; DPO's has none."""
    world, beta = World(2, 1), 0.25
    ref = world.logp(world.ref)
    loss = lambda kind: lambda theta: dpo.dpo_loss(world.logp(theta)[:1], world.logp(theta)[1:], ref[:1], ref[1:], beta, kind)[0].sum()
    margin = lambda theta: ((world.logp(theta)[0] - ref[0]) - (world.logp(theta)[1] - ref[1])).item()
    assert margin(fit(world, loss('ipo'), beta)) == pytest.approx(1 / (2 * beta), abs=1e-5)
    assert margin(fit(world, loss('sigmoid'), beta)) > 20
