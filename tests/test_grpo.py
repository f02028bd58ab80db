"""grpo.py: every loss against TRL's own numbers and central differences, the advantages by hand; then the stage itself."""
import itertools
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT

import grpo
from tokenizer import get_tokenizer
import run
from model import GPT
from oracle import central_difference, gradient
from test_dpo import jsonl, log_rows, stage, tiny_model

D = torch.float64
TOLD = dict(grpo='grpo', dr_grpo='dr_grpo', dapo='dapo', gspo='grpo', cispo='cispo')  # our name -> TRL's loss_type


def batch(B=6, R=5, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, R, generator=g, dtype=D)
    old, ref = (logp + spread * torch.randn(B, R, generator=g, dtype=D) for _ in range(2))
    mask = torch.arange(R) < torch.tensor([5, 3, 1, 4, 2, 5])[:B, None]
    return logp, old, ref, torch.randn(B, generator=g, dtype=D), mask


def trl_grpo(logp, old, advantages, mask, ref, beta, low, high, loss_type, max_len, weights=None):
    """TRL's GRPOTrainer._compute_loss with our log-probs in the place of a model's."""
    trainer = pytest.importorskip('trl.trainer.grpo_trainer').GRPOTrainer
    fake = mock.MagicMock(top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, epsilon_low=low, epsilon_high=high, use_vllm=weights is not None,
                          importance_sampling_level='sequence' if loss_type == 'gspo' else 'token', loss_type=TOLD[loss_type], _entropy_bonus_enabled=False,
                          aux_loss_enabled=False, max_completion_length=max_len, current_gradient_accumulation_steps=1)
    fake.args.delta, fake.args.use_bias_correction_kl, fake.args.steps_per_generation = None, False, 1
    fake.accelerator.num_processes = 1
    fake.accelerator.gather = fake.accelerator.gather_for_metrics = lambda x: x
    fake.accelerator.reduce = lambda x, reduction: x
    fake._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask.long(), advantages=advantages, old_per_token_logps=old,
                  ref_per_token_logps=ref, num_items_in_batch=mask.sum(), importance_sampling_ratio=weights)
    return trainer._compute_loss(fake, None, inputs)


@pytest.mark.parametrize('loss_type, beta, tis', list(itertools.product(grpo.LOSSES, [0.0, 0.1], [False, True])))
def test_losses_are_trls(loss_type, beta, tis):
    logp, old, ref, adv, mask = batch()
    weights = (logp - ref).exp().clamp(max=2.0) if tis else None
    low, high = (1.0, 0.28) if loss_type == 'cispo' else (0.2, 0.28)  # TRL's CISPO cuts above only, and takes the bound itself
    x = logp.clone().requires_grad_(True)
    theirs = trl_grpo(x, old, adv, mask, ref, beta, low, 1 + high if loss_type == 'cispo' else high, loss_type, 8, weights)
    theirs_grad, = torch.autograd.grad(theirs, x)
    garbage = torch.where(mask, 0.0, 1e6)  # what stands in padding may be anything
    y = (logp + garbage).requires_grad_(True)
    ours, stats = grpo.grpo_loss(y, old - garbage, adv, mask, ref + 2 * garbage, beta, low, high, loss_type, max_len=8, weights=weights)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    assert (y.grad - theirs_grad).abs().max() < 1e-10 and (y.grad[~mask] == 0).all()
    assert 0 < stats['clip_frac'] < 1 and stats['kl'] > 0


@pytest.mark.parametrize('loss_type', grpo.LOSSES)
def test_gradients_by_central_differences(loss_type):
    logp, old, ref, adv, mask = batch()
    if loss_type == 'cispo':  # its weight is held constant: differentiate the surrogate with the weight frozen at logp
        w = (logp - old).exp().clamp(0.8, 1.28)
        fn = lambda x: torch.where(mask, -w * adv[:, None] * x, 0.0).sum() / mask.sum() + 0.1 * torch.where(mask, torch.exp(ref - x) - 1 - (ref - x), 0.0).sum() / mask.sum()
    else:
        fn = lambda x: grpo.grpo_loss(x, old, adv, mask, ref, 0.1, 0.2, 0.28, loss_type, max_len=8)[0]
    got = gradient(lambda x: grpo.grpo_loss(x, old, adv, mask, ref, 0.1, 0.2, 0.28, loss_type, max_len=8)[0], logp)
    assert (got - central_difference(fn, logp)).abs().max() < 1e-8


@pytest.mark.parametrize('loss_type', grpo.LOSSES)
def test_micro_batches_add_up(loss_type):
    logp, old, ref, adv, mask = batch()
    kw = dict(beta=0.1, loss_type=loss_type, max_len=8)
    whole = grpo.grpo_loss(logp, old, adv, mask, ref, **kw)[0]
    denom = mask.sum() if loss_type in ('dapo', 'cispo') else len(mask)
    parts = sum(grpo.grpo_loss(logp[s], old[s], adv[s], mask[s], ref[s], denom=denom, **kw)[0] for s in (slice(0, 1), slice(1, 4), slice(4, 6)))
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize('loss_type', grpo.LOSSES)
def test_empty_rows_are_finite_and_count_nothing(loss_type):
    logp, old, ref, adv, mask = batch()
    mask = mask.clone()
    mask[2] = False
    x = logp.clone().requires_grad_(True)
    loss, stats = grpo.grpo_loss(x, old, adv, mask, ref, 0.1, loss_type=loss_type, max_len=8)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and (x.grad[2] == 0).all() and all(math.isfinite(v) for v in stats.values())
    none = grpo.grpo_loss(logp, old, adv, torch.zeros_like(mask), ref, 0.1, loss_type=loss_type, max_len=8)[0]
    assert none == 0


def test_first_step_the_loss_is_zero_and_the_gradient_is_not():
    """"GRPO's loss is 0": with advantages that sum to zero it is, at ratio 1; what trains is the gradient."""
    logp, _, _, _, mask = batch(4)
    adv = grpo.group_advantages(torch.tensor([1.0, 0, 0, 1], dtype=D), 4)
    x = logp.clone().requires_grad_(True)
    loss, stats = grpo.grpo_loss(x, logp, adv, mask)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and x.grad.abs().max() > 0.01 and stats['clip_frac'] == 0 and stats['approx_kl'] == 0


def test_advantages_by_hand():
    r = torch.tensor([1.0, 0.0, 3.0, 2.0, 2.0, 2.0, 0.0, 1.0, 5.0], dtype=D)
    for kind in ('grpo', 'dr_grpo', 'rloo'):
        want = []
        for g in range(3):
            x = [v.item() for v in r[3 * g:3 * g + 3]]
            mean = sum(x) / 3
            std = math.sqrt(sum((v - mean) ** 2 for v in x) / 2)
            want += [dict(grpo=(v - mean) / (std + 1e-4), dr_grpo=v - mean, rloo=v - (sum(x) - v) / 2)[kind] for v in x]
        assert torch.allclose(grpo.group_advantages(r, 3, kind), torch.tensor(want, dtype=D), atol=1e-12), kind
    std = math.sqrt(((r - r.mean()) ** 2).sum().item() / 8)
    assert torch.allclose(grpo.group_advantages(r, 3, 'reinforce++'), (r - r.mean()) / (std + 1e-4), atol=1e-12)
    assert grpo.group_advantages(torch.tensor([1.0, 0.0]), 2).tolist() == pytest.approx([0.7070, -0.7070], abs=1e-4)


@pytest.mark.parametrize('kind', grpo.ADVANTAGES)
def test_dead_groups_and_groups_of_one_are_finite(kind):
    assert (grpo.group_advantages(torch.full((8,), 0.3), 4, kind).abs() < 1e-3).all()
    assert torch.isfinite(grpo.group_advantages(torch.tensor([1.0, 2.0, 4.0]), 1, kind)).all()
    assert torch.isfinite(grpo.group_advantages(torch.tensor([1.0]), 1, kind)).all()
    with pytest.raises(ValueError, match='groups of 3'):
        grpo.group_advantages(torch.ones(4), 3, kind)


def test_bad_names_are_listed():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match='grpo, dr_grpo, dapo, gspo, cispo'):
        grpo.grpo_loss(x, x, x[:, 0], x == 0, loss_type='ppo')
    with pytest.raises(ValueError, match='max_len'):
        grpo.grpo_loss(x, x, x[:, 0], x == 0, loss_type='dr_grpo')
    with pytest.raises(ValueError, match='rloo'):
        grpo.group_advantages(x[0], 2, 'gae')


def test_advantages_of_steps_by_hand():
    """Two prompts, two answers each, R = 4. First group: steps paid [1, 0] (ends 1 and 3) and [0] (end 2), nothing besides; second: [2] with 1 for the whole, [3]."""
    nan = math.nan
    paid = torch.tensor([[nan, 1, nan, 0], [nan, nan, 0, nan], [2, nan, nan, nan], [nan, 3, nan, nan]], dtype=D)
    scores = torch.tensor([1.0, 0, 3, 3], dtype=D)
    got = grpo.step_advantages(scores, paid, 2, 'dr_grpo')
    a = 1 / 3  # the first step has 1 - 1/3 and then 0 - 1/3, the second 0 - 1/3
    assert torch.allclose(got, torch.tensor([[a, a, -a, -a], [-a, -a, -a, 0], [0] * 4, [0] * 4], dtype=D))
    std = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    assert torch.allclose(grpo.step_advantages(scores, paid, 2)[:2], got[:2] / (std + 1e-4)) and not grpo.step_advantages(scores, paid, 2)[2:].any()
    whole = grpo.step_advantages(scores, paid, 2, 'reinforce++')  # against all five steps, 1 0 0 3 3
    assert torch.allclose(whole[3, :2], torch.full((2,), (3 - 1.4) / (torch.tensor([1.0, 0, 0, 3, 3]).std().item() + 1e-4), dtype=D)) and not whole[3, 2:].any()
    # one step an answer: GRPO itself; and one token of the loss has its own advantage
    one = torch.full((4, 3), nan, dtype=D)
    one[:, 2] = scores
    for kind in ('grpo', 'dr_grpo', 'reinforce++'):
        want = grpo.group_advantages(scores, 2, kind)
        assert torch.allclose(grpo.step_advantages(scores, one, 2, kind), want[:, None].expand(4, 3))
    logp = torch.zeros(4, 4, dtype=D, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4, [True] * 2 + [False] * 2])
    loss, _ = grpo.grpo_loss(logp, logp.detach(), got, mask, loss_type='dr_grpo', max_len=4)
    assert torch.allclose(torch.autograd.grad(loss, logp)[0], -torch.where(mask, got, 0.0) / 16)
    with pytest.raises(ValueError, match='rloo with a reward file that pays for steps'):
        grpo.step_advantages(scores, paid, 2, 'rloo')



def test_tis_weights_and_mismatch():
    logp, sampler = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[-math.log(3), 0.1, 0.0]])
    mask = torch.tensor([[True, True, False]])
    w, stats = grpo.tis_weights(logp, sampler, mask, 2.0)
    assert w.tolist()[0] == pytest.approx([2.0, math.exp(-0.1), 1.0])
    assert stats['mismatch_max'].item() == pytest.approx(math.log(3)) and stats['mismatch'].item() == pytest.approx((math.log(3) + 0.1) / 2) and stats['tis_frac'] == 0.5


@pytest.mark.parametrize('mode, rule, want', [('token', 'mask', [0, 0.5, 1]), ('sequence', 'truncate', [1.5, 1.5, 1]),
                                              ('token', 'truncate', [2, 0.5, 1])])
def test_the_rules_of_tis(mode, rule, want):
    """Ratios 3 and 1/2 of two tokens: each for itself, or their product for both; over the cap of 2 it is cut or 0."""
    logp, mask = torch.tensor([[math.log(3), -math.log(2), 5.0]]), torch.tensor([[True, True, False]])
    weights, stats = grpo.tis_weights(logp, torch.zeros(1, 3), mask, 2.0, mode, rule)
    assert weights[0].tolist() == pytest.approx(want)
    assert stats['tis_frac'].item() == (0.5 if mode == 'token' else 0)
    masked = grpo.tis_weights(logp, torch.zeros(1, 3), mask, 1.4, 'sequence', 'mask')[0]
    assert masked[0].tolist() == [0, 0, 1]  # the whole answer goes


def test_tis_by_sequence_makes_the_gradient_of_two_tokens_right():
    """All answers of two tokens from a two-token vocabulary, sampled by mu: the expected gradient of weighted
    answers is that of the policy's own expected reward; with a weight a token it is not."""
    g = torch.Generator().manual_seed(1)
    theta, mu = torch.randn(3, 2, generator=g, dtype=D), torch.randn(3, 2, generator=g, dtype=D)
    answers = list(itertools.product((0, 1), (0, 1)))
    reward = dict(zip(answers, (1.0, 0.0, -2.0, 3.0)))

    def tokens(t, answer):  # the second token's distribution depends on the first
        table = torch.log_softmax(t, -1)
        return torch.stack([table[0, answer[0]], table[1 + answer[0], answer[1]]])[None]
    mask = torch.ones(1, 2, dtype=torch.bool)

    def loss(t, mode):
        total = 0.0
        for answer in answers:
            logp, sampler = tokens(t, answer), tokens(mu, answer)
            weights = grpo.tis_weights(logp.detach(), sampler, mask, 0, mode)[0]
            A = torch.tensor([reward[answer]], dtype=D)
            total = total + sampler.sum().exp() * grpo.grpo_loss(logp, logp.detach(), A, mask, weights=weights)[0]
        return total
    exact = gradient(lambda t: -sum(tokens(t, a).sum().exp() * reward[a] for a in answers) / 2, theta)  # / 2: a mean
    assert (gradient(lambda t: loss(t, 'sequence'), theta) - exact).abs().max() < 1e-12
    assert (gradient(lambda t: loss(t, 'token'), theta) - exact).abs().max() > 0.01


@pytest.mark.parametrize('loss_type', grpo.LOSSES)
def test_entropy_bonus(loss_type):
    """On a two-token policy: the loss less entropy_coef H, H's gradient with it; a masked token counts for nothing."""
    theta, mask = torch.tensor([0.3, -0.4], dtype=D), torch.tensor([[True, False]])

    def loss(t, coef):
        logp = torch.log_softmax(t, 0)
        H = -(logp.exp() * logp).sum()
        entropy = torch.stack([H, 7 * H])[None]
        return grpo.grpo_loss(logp[None], logp.detach()[None], torch.zeros(1, dtype=D), mask, loss_type=loss_type,
                              max_len=1, entropy=entropy, entropy_coef=coef)[0]

    def exact(t):
        return 0.1 * (torch.softmax(t, 0) * torch.log_softmax(t, 0)).sum()
    assert (gradient(lambda t: loss(t, 0.1), theta) - gradient(exact, theta)).abs().max() < 1e-15
    assert gradient(lambda t: loss(t, 0.0) + 0 * t.sum(), theta).abs().max() == 0


def test_a_teachers_advantage_is_the_gradient_of_the_reverse_kl():
    """Expected over the policy's own samples (all of them, enumerated): minus the gradient of KL(policy || teacher)."""
    g = torch.Generator().manual_seed(2)
    theta, teacher = (torch.randn(6, generator=g, dtype=D) for _ in range(2))
    theirs, mask = torch.log_softmax(teacher, 0), torch.ones(1, 1, dtype=torch.bool)

    def loss(t):
        logp = torch.log_softmax(t, 0)
        total = 0.0
        for s in range(6):
            own = logp[s].view(1, 1)
            A = grpo.teacher_advantages(own.detach(), theirs[s].view(1, 1), mask)
            total = total + logp[s].detach().exp() * grpo.grpo_loss(own, own.detach(), A, mask)[0]
        return total
    exact = gradient(lambda t: (torch.softmax(t, 0) * (torch.log_softmax(t, 0) - theirs)).sum(), theta)
    assert (gradient(loss, theta) - exact).abs().max() < 1e-12
    garbage = grpo.teacher_advantages(torch.tensor([[0.5, 9e9]]), torch.tensor([[1.0, -9e9]]), torch.tensor([[True, False]]))
    assert garbage.tolist() == [[0.5, 0.0]]


def test_tis_makes_a_foreign_samplers_gradient_right():
    """Samples from mu, trained as if from pi: with weight pi / mu (uncut) the expected gradient is pi's; without, it is not."""
    g = torch.Generator().manual_seed(0)
    theta, mu, r = (torch.randn(5, generator=g, dtype=D) for _ in range(3))
    p = torch.softmax(mu, 0)
    mask = torch.ones(5, 1, dtype=torch.bool)

    def loss(t, correct):
        logp = torch.log_softmax(t, 0)[:, None]
        w = grpo.tis_weights(logp, torch.log_softmax(mu, 0)[:, None], mask, 1e9)[0] if correct else None
        return sum(p[s] * grpo.grpo_loss(logp[s:s + 1], logp[s:s + 1].detach(), r[s:s + 1], mask[s:s + 1], weights=None if w is None else w[s:s + 1])[0] for s in range(5))
    exact = gradient(lambda t: -(torch.softmax(t, 0) * r).sum(), theta)
    assert (gradient(lambda t: loss(t, True), theta) - exact).abs().max() < 1e-12
    assert (gradient(lambda t: loss(t, False), theta) - exact).abs().max() > 0.01


def test_overlong_penalty():
    assert grpo.overlong_penalty(torch.tensor([10, 80, 90, 100, 120]), 100, 20).tolist() == [0, 0, -0.5, -1, -1]


def test_pass_at_k_against_enumeration():
    correct = torch.tensor([True, False, False, False, True, True, False, True, False, False, False, False])
    for k in (1, 2, 4):
        exact = [sum(any(c) for c in itertools.combinations(group.tolist(), k)) / math.comb(4, k) for group in correct.view(3, 4)]
        assert grpo.pass_at_k(correct, 4, k) == pytest.approx(sum(exact) / 3)


# ---- the stage -----------------------------------------------------------------------------------------------------

REWARDS = {'letters.py': 'def reward(prompt, completion, row):\n    return sum(c <= row["letter"] for c in completion) / max(1, len(completion))\n',
           'short.py': 'def reward(prompt, completion, row):\n    return -len(completion) / 10\n',
           'same.py': 'def reward(prompt, completion, row):\n    return 1.0\n',
           'some.py': 'def reward(prompt, completion, row):\n    return float(row["number"] % 2 and completion.count("a") > completion.count("b"))\n',
           'raises.py': 'def reward(prompt, completion, row):\n    return 1 / (row["number"] - 3)\n',
           'nan.py': 'def reward(prompt, completion, row):\n    return float("nan") if row["number"] == 3 else 0.0\n',
           'none.py': 'def reward(prompt, completion, row):\n    return None\n'}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A tiny untrained byte model and prompts whose reward is dense: the share of characters up to a letter."""
    d = tmp_path_factory.mktemp('grpo')
    tiny_model().save_pretrained(d / 'base')
    jsonl(d / 'prompts.jsonl', [dict(prompt=f'Q: Say {"abcd"[i % 4]} {i}\nA: ', letter='abcd'[i % 4], number=i % 5) for i in range(40)])
    for name, text in REWARDS.items():
        (d / name).write_text(text)
    return d


COMMON = ['--init_from=base', '--tokenizer=byte', '--dataset=prompts.jsonl', '--val_dataset=prompts.jsonl', '--reward=letters.py', '--batch_size=16', '--group_size=4',
          '--minibatch_size=16', '--max_iters=4', '--eval_interval=2', '--eval_iters=4', '--eval_k=2', '--learning_rate=3e-3', '--max_new_tokens=12']


def test_the_command_and_what_it_writes(world):
    r = subprocess.run([sys.executable, os.path.join(ROOT, 'grpo.py'), *COMMON, '--out_dir=out-a', '--device=cpu'], cwd=world, capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-2000:]
    train, evals = log_rows(world / 'out-a'), log_rows(world / 'out-a', 'eval')
    assert [x['step'] for x in train] == [0, 1, 2, 3] and [x['step'] for x in evals] == [0, 2, 4]
    assert {'score', 'dead', 'pg', 'clip_frac', 'len', 'ended', 'mismatch', 'mismatch_max', 'grad_norm', 'entropy'} <= train[0].keys()
    assert {'score', 'pass@1', 'pass@2', 'kl', 'len'} <= evals[0].keys() and abs(evals[0]['kl']) < 1e-5 and evals[-1]['kl'] > 0
    assert abs(train[0]['pg']) < 1e-6 and train[0]['grad_norm'] > 0 and 'a loss of 0 is right' in r.stdout
    assert all(x['mismatch_max'] < 1e-4 for x in train)  # engine and trainer, float32
    assert len(open(world / 'out-a/samples.jsonl').readlines()) == 3 * 4 * 2
    model, tok = run.load_model(str(world / 'out-a'))
    assert tok == 'byte' and not torch.equal(model.wte.weight, run.load_model(str(world / 'base'))[0].wte.weight)


@pytest.mark.parametrize('extra, left', [([], 0.1), (['--minibatch_size=8'], 0.1), (['--lora_r=4', '--lora_targets=all-linear'], 0.9)])
def test_a_teacher_is_approached(world, extra, left):
    """No reward trains: answers of the policy's own, each token against the teacher. One answer a prompt is enough."""
    teacher = tiny_model()
    words = teacher.wte.weight.data[[ord(c) for c in 'abcd']]
    teacher.ln_f.bias.data += 5 * torch.linalg.pinv(words).sum(1)  # 5 nats more for four letters than for the rest
    teacher.save_pretrained(world / 'teacher')
    args = ['--teacher=teacher', '--group_size=1', '--max_iters=30', '--batch_size=32', '--minibatch_size=32', '--learning_rate=1e-2',
            '--reward=same.py', '--eval_interval=100', '--entropy_coef=0.001', '--tis_mode=sequence', '--overwrite=True']
    stage('grpo.py', *COMMON, *args, '--out_dir=out-distilled', *extra, cwd=world)
    kl = [row['teacher_kl'] for row in log_rows(world / 'out-distilled')]
    assert len(kl) == 30 and kl[0] > 10 and sum(kl[-5:]) / 5 < left * kl[0]  # adapters leave the head as it is
    with pytest.raises(ValueError, match='dynamic_sampling 1 replaces'):
        stage('grpo.py', *COMMON, *args, '--dynamic_sampling=1', '--out_dir=out-no', cwd=world)


def test_it_learns(world):
    stage('grpo.py', *COMMON, '--out_dir=out-learn', '--max_iters=25', '--batch_size=32', '--minibatch_size=32', '--eval_interval=25', '--eval_iters=20', '--learning_rate=1e-2', cwd=world)
    evals = log_rows(world / 'out-learn', 'eval')
    assert 0.3 < evals[0]['score'] < 0.7 and evals[-1]['score'] > evals[0]['score'] + 0.2


@pytest.mark.parametrize('extra', [[], ['--lora_r=4', '--grpo_epochs=2', '--minibatch_size=8', '--beta=0.05']], ids=['full', 'lora'])
def test_a_killed_run_resumes_to_the_bit(world, extra):
    stage('grpo.py', *COMMON, '--out_dir=out-whole', *extra, cwd=world)
    stage('grpo.py', *COMMON, '--out_dir=out-cut', *extra, cwd=world, die_at_save=2)
    assert log_rows(world / 'out-cut')[-1]['step'] == 1
    stage('grpo.py', *COMMON[1:], '--out_dir=out-cut', '--init_from=resume', *extra, cwd=world)
    assert log_rows(world / 'out-cut') == log_rows(world / 'out-whole') and log_rows(world / 'out-cut', 'eval') == log_rows(world / 'out-whole', 'eval')
    a, b = (torch.load(world / f'out-{x}/ckpt.pt', weights_only=True)['model'] for x in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


VARIANTS = [['--loss_type=dapo', '--clip_high=0.28', '--dynamic_sampling=2', '--overlong=shape', '--overlong_cache=4'], ['--loss_type=dr_grpo', '--advantage=dr_grpo'],
            ['--advantage=rloo', '--beta=0.1'], ['--advantage=reinforce++', '--loss_type=dapo', '--group_size=1'], ['--loss_type=gspo', '--clip_low=3e-4', '--clip_high=4e-4'],
            ['--loss_type=cispo', '--tis_cap=0'], ['--loss_type=dapo', '--track_kl=False']]


@pytest.mark.parametrize('extra', VARIANTS, ids=' '.join)
def test_variants(world, extra):
    """Two passes in two minibatches: the ratio leaves 1, clipping bites somewhere, all numbers are finite, the weights move."""
    stage('grpo.py', *COMMON, '--out_dir=out-v', '--grpo_epochs=2', '--minibatch_size=8', '--max_iters=2', *extra, cwd=world)
    train = log_rows(world / 'out-v')
    assert len(train) == 2 and all(x['steps'] == 4 and x['ratio_max'] > 0 and x['grad_norm'] > 0 and x['mismatch_max'] < 1e-4 for x in train)
    assert ('kl' in train[0]) == ('--beta=0.1' in extra) and ('kl' in log_rows(world / 'out-v', 'eval')[0]) == ('--track_kl=False' not in extra)


def test_cut_off_answers_can_be_left_out(world):
    """An untrained model hardly ever ends: with overlong='mask' next to nothing is trained on, in one token per answer (none ends) nothing at all."""
    stage('grpo.py', *COMMON, '--out_dir=out-mask', '--overlong=mask', '--max_new_tokens=2', '--max_iters=1', cwd=world)
    row = log_rows(world / 'out-mask')[0]
    assert row['ended'] == 0 and row['steps'] == 0 and row['dead'] < 1
    assert all(torch.equal(p, q) for p, q in zip(run.load_model(str(world / 'out-mask'))[0].parameters(), run.load_model(str(world / 'base'))[0].parameters()))


def test_micro_batches_do_not_change_the_result(world):
    logs = []
    for tokens in (40, 100_000):  # 40: groups are cut in two and three
        stage('grpo.py', *COMMON, '--out_dir=out-micro', f'--micro_tokens={tokens}', '--loss_type=dapo', '--beta=0.1', '--max_iters=2', cwd=world)
        logs.append(log_rows(world / 'out-micro'))
    for a, b in zip(*logs):
        for key in ('score', 'pg', 'k3', 'entropy'):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-2)


def test_several_rewards_with_weights(world):
    stage('grpo.py', *COMMON, '--out_dir=out-two', '--reward=letters.py,short.py', '--reward_weights=1,0.5', '--max_iters=1', cwd=world)
    row = log_rows(world / 'out-two')[0]
    assert row['score'] == pytest.approx(row['score/letters.py'] + 0.5 * row['score/short.py'], abs=1e-6)


def test_dead_groups_are_counted_and_replaced(world):
    said = stage('grpo.py', *COMMON, '--out_dir=out-dead', '--reward=same.py', '--max_iters=2', cwd=world)
    train = log_rows(world / 'out-dead')
    assert all(x['dead'] == 1.0 and x['steps'] == 0 for x in train) and 'no group alive, no step' in said
    assert all(torch.equal(p, q) for p, q in zip(run.load_model(str(world / 'out-dead'))[0].parameters(), run.load_model(str(world / 'base'))[0].parameters()))
    stage('grpo.py', *COMMON, '--out_dir=out-some', '--reward=some.py', '--max_iters=2', '--group_size=8', '--dynamic_sampling=4', cwd=world)
    rounds = [x['rounds'] for x in log_rows(world / 'out-some')]
    assert max(rounds) > 1 and max(rounds) <= 5


def test_rows_that_are_not_computed_change_nothing(world):
    """A dead group is left out of the forward; its place in the mean stays: the step equals the one that computes everything (beta = 1e-12)."""
    logs = []
    for beta in (0.0, 1e-12):
        stage('grpo.py', *COMMON, '--out_dir=out-skip', '--reward=some.py', '--group_size=8', '--max_iters=2', f'--beta={beta}', cwd=world)
        logs.append(torch.load(world / 'out-skip/ckpt.pt', weights_only=True)['model'])
    assert 0 < max(x['dead'] for x in log_rows(world / 'out-skip'))
    assert all((logs[0][k] - logs[1][k]).abs().max() < 1e-4 for k in logs[0])


def test_reward_models_score_too(world):
    torch.manual_seed(3)
    scalar = GPT(tiny_model().config, 'scalar')
    scalar.save_pretrained(world / 'rm')
    get_tokenizer('byte').save(str(world / 'rm'))
    stage('grpo.py', *COMMON, '--out_dir=out-rm', '--reward=rm,short.py', '--max_iters=1', cwd=world)
    row, seen = log_rows(world / 'out-rm')[0], log_rows(world / 'out-rm', 'eval')[0]
    assert row['score'] == pytest.approx(row['score/rm'] + row['score/short.py'], abs=1e-5) and 'pass@1' not in seen


def test_mistakes_are_named(world):
    def fails(match, *args):
        with pytest.raises(ValueError, match=match):
            stage('grpo.py', *COMMON, '--out_dir=out-bad', *args, cwd=world)
    fails(r'raises.py raised ZeroDivisionError: .*row \{.*number', '--reward=raises.py')
    fails(r"nan.py returned nan .*row \{.*'number': 3", '--reward=nan.py')
    fails('none.py raised TypeError', '--reward=none.py')
    fails('group of one has no baseline', '--group_size=1')
    fails('one weight each', '--reward_weights=1,2')
    fails('numbers, separated', '--reward_weights=a')
    fails('each must divide', '--minibatch_size=6')
    fails('each must divide', '--batch_size=18')
    fails('leaves no room', '--max_new_tokens=128')
    fails('prompt of 14 tokens', '--max_new_tokens=115')
    fails('no such data', '--dataset=nowhere.jsonl')
