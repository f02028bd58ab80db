"""dpo.py: every loss against TRL's own numbers, central differences and the enumerated optimum; then the stage itself."""
import json
import math
import os
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT

import dpo
import kto
import run
from helpers import jsonl, log_rows, stage
from model import answer_logprobs, answer_values, ARCHS, GPT, GPTConfig
from oracle import World, central_difference, gradient
from tokenizer import get_tokenizer

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
        losses, rewards = kto.kto_loss(logp, ref, label, (kl_logp - kl_ref).mean(), 0.3, 1.5, 0.5)
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
    for fn in (lambda x: dpo.simpo_loss(*x, 2.0, 0.5)[0].sum(), lambda x: dpo.orpo_loss(*x, 0.5)[0].sum(), lambda x: kto.kto_loss(*x, label, 0.1, 0.7, 2.0, 1.0)[0].sum()):
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
    assert kto.kto_loss(one, one, torch.tensor([True]), 0.0, 1.0)[0].item() == 0.5
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


# ---- one forward, each prompt computed once ------------------------------------------------------------------------

def tiny_model(arch='gpt2', seed=0, head='lm'):
    torch.manual_seed(seed)
    kw = dict(n_kv_head=2, n_inner=48, head_size=16, tie=True, **ARCHS['qwen3']) if arch == 'qwen3' else {}
    return GPT(GPTConfig(arch=arch, n_layer=2, n_head=4, n_embd=32, vocab_size=257, block_size=128, bos_token_id=256, eos_token_id=256, **kw), head)


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_shared_prompts_equal_one_row_at_a_time(arch):
    """Log-probs, values and their gradients against plain forwards of each whole sequence; lengths 1 to 60, one to five
    answers a prompt."""
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, 257, (n,), generator=g).tolist()
    groups = [(draw(9), [draw(5), draw(1), draw(17)]), (draw(1), [draw(60)]), (draw(4), [draw(1)]),
              (draw(33), [draw(2), draw(2), draw(40), draw(1), draw(7)])]
    flat = [(p, a) for p, answers in groups for a in answers]
    for head in ('lm', 'scalar'):
        model = tiny_model(arch, head=head)
        if head == 'lm':
            found, entropy, mask = answer_logprobs(model, groups, temperature=0.7)
            assert (entropy[mask] > 0).all()
            alone = [model.logprobs(torch.tensor([p + a]), 0.7)[0, len(p) - 1:] for p, a in flat]
        else:
            found, mask = answer_values(model, groups)
            alone = [model(torch.tensor([p + a]))[0][0, len(p) - 1:-1] for p, a in flat]
        assert mask.sum(1).tolist() == [len(a) for _, a in flat] and (found[~mask] == 0).all()
        weight = torch.randn(found.shape, generator=g)
        (found * weight).sum().backward()
        ours = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        assert all((one - row[:len(one)]).abs().max() < 2e-5 for one, row in zip(alone, found))
        sum((one * w[:len(one)]).sum() for one, w in zip(alone, weight)).backward()
        for n, p in model.named_parameters():
            assert (p.grad - ours[n]).abs().max() < 1e-4 * max(1.0, p.grad.abs().max()), n


# ---- the stage -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with a tiny untrained byte model as an HF directory, pairs where the longer run of one letter wins, and labelled answers."""
    d = tmp_path_factory.mktemp('dpo')
    tiny_model().save_pretrained(d / 'base')
    prompt = lambda i: f'Q: Say {"abcdefgh"[i % 8]} {i % 5}\nA: '
    good, bad = (lambda i: 'abcdefgh'[i % 8] * (2 + i % 5)), (lambda i: 'no.' * (1 + i % 3))
    jsonl(d / 'pref.jsonl', [dict(prompt=prompt(i), chosen=good(i), rejected=bad(i), **({'tie': True} if i % 9 == 0 else {})) for i in range(60)])
    jsonl(d / 'kto.jsonl', [dict(prompt=prompt(i), completion=(good if i % 2 else bad)(i), label=bool(i % 2)) for i in range(60)])
    return d


COMMON = ['--init_from=base', '--tokenizer=byte', '--dataset=pref.jsonl', '--batch_size=8', '--max_iters=6', '--eval_interval=3', '--learning_rate=1e-3',
          '--warmup_iters=0', '--eval_samples=4', '--max_new_tokens=8']


def test_the_command_and_what_it_writes(world):
    r = subprocess.run([sys.executable, os.path.join(ROOT, 'dpo.py'), *COMMON, '--out_dir=out-a', '--device=cpu'], cwd=world, capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-2000:]
    train, evals = log_rows(world / 'out-a'), log_rows(world / 'out-a', 'eval')
    assert [x['step'] for x in train] == list(range(6)) and [x['step'] for x in evals] == [0, 3, 6]
    assert train[0]['loss'] == pytest.approx(math.log(2), abs=1e-6) and evals[0]['accuracy'] == 0.5 and abs(evals[0]['kl']) < 1e-4
    assert evals[-1]['loss'] < 0.6 and evals[-1]['accuracy'] == 1.0 and evals[-1]['margin'] > 0.2 and evals[-1]['kl'] > 0
    assert {'chosen_logp', 'rejected_logp', 'chosen_reward', 'rejected_reward', 'margin', 'grad_norm', 'lr', 'tok_per_s'} <= json.loads(open(world / 'out-a/log.jsonl').readlines()[2]).keys()
    model, tok = run.load_model(str(world / 'out-a'))
    assert tok == 'byte' and not torch.equal(model.wte.weight, run.load_model(str(world / 'base'))[0].wte.weight)
    again = subprocess.run([sys.executable, os.path.join(ROOT, 'dpo.py'), *COMMON, '--out_dir=out-a', '--loss_type=dop'], cwd=world, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and again.stderr.startswith("error: loss_type 'dop' is unknown: one of sigmoid") and again.stderr.count('\n') == 1


@pytest.mark.parametrize('script, extra', [('dpo.py', []), ('dpo.py', ['--lora_r=4', '--precompute_ref=True']), ('kto.py', [])])
def test_a_killed_run_resumes_to_the_bit(world, script, extra):
    stage(script, *COMMON, '--out_dir=out-whole', *extra, cwd=world)
    stage(script, *COMMON, '--out_dir=out-cut', *extra, cwd=world, die_at_save=2)
    assert log_rows(world / 'out-cut')[-1]['step'] == 2
    stage(script, *COMMON[1:], '--out_dir=out-cut', '--init_from=resume', *extra, cwd=world)
    assert log_rows(world / 'out-cut') == log_rows(world / 'out-whole') and log_rows(world / 'out-cut', 'eval') == log_rows(world / 'out-whole', 'eval')
    a, b = (torch.load(world / f'out-{x}/ckpt.pt', weights_only=True)['model'] for x in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_three_ways_to_the_reference_give_the_same_losses(world, monkeypatch):
    """The same adapter run three times: the adapter off, a frozen copy, log-probs from disk."""
    ways = dict(adapter=[], copy=['--ref=base'], disk=['--precompute_ref=True'])
    logs, said = {}, {}
    for name, extra in ways.items():
        said[name] = stage('dpo.py', *COMMON, f'--out_dir=out-{name}', '--lora_r=4', '--learning_rate=1e-2', *extra, cwd=world)
        logs[name] = log_rows(world / f'out-{name}') + log_rows(world / f'out-{name}', 'eval')
    for name, words in (('adapter', 'adapter disabled'), ('copy', 'frozen copy'), ('disk', 'precomputed')):
        assert f'reference: {words}' in said[name]
        for a, b in zip(logs[name], logs['adapter']):
            for key in ('loss', 'margin', 'chosen_reward', 'grad_norm', 'kl'):
                assert a.get(key) == pytest.approx(b.get(key), abs=2e-5), (name, key, a['step'])
    assert os.path.exists(world / 'out-disk/ref_train.safetensors')
    moved = log_rows(world / 'out-adapter', 'eval')
    assert moved[-1]['loss'] < moved[0]['loss'] - 0.01
    c = torch.load(world / 'out-adapter/ckpt.pt', weights_only=True)
    assert all('lora_' in k for k in c['model']) and sum(t.numel() for t in c['model'].values()) == 2 * 4 * (32 + 96)  # the adapter only
    assert '1,024 trained' in said['adapter']
    monkeypatch.chdir(world)  # the checkpoint names its base as the command did: 'base'
    merged = run.load_model('out-adapter')[0]
    assert not any('lora_' in k for k in merged.state_dict())


@pytest.mark.parametrize('loss_type, extra, first', [('robust', ['--label_smoothing=0.1'], math.log(2)), ('sigmoid', ['--label_smoothing=0.1', '--sft_coef=0'], math.log(2)),
                                                     ('ipo', ['--length_norm=True', '--beta=0.5'], 1.0), ('hinge', [], 1.0), ('apo_zero', [], 1.0), ('kto', [], 0.5),
                                                     ('simpo', ['--beta=2.0', '--gamma=0.5'], None), ('orpo', [], None), ('sigmoid', ['--sft_coef=0.5'], None)])
def test_every_loss_trains(world, loss_type, extra, first):
    script = ['kto.py'] if loss_type == 'kto' else ['dpo.py', f'--loss_type={loss_type}']
    stage(*script, *COMMON, '--out_dir=out-loss', '--eval_samples=0', *extra, cwd=world)
    rows = log_rows(world / 'out-loss', 'eval')
    assert first is None or rows[0]['loss'] == pytest.approx(first, abs=1e-5)
    assert rows[-1]['loss'] < rows[0]['loss'] and rows[-1]['accuracy'] > 0.6


def test_micro_batches_do_not_change_the_result(world):
    logs = []
    for tokens in (64, 100_000):
        stage('dpo.py', *COMMON, '--out_dir=out-micro', f'--micro_tokens={tokens}', cwd=world)
        logs.append(log_rows(world / 'out-micro'))
    for a, b in zip(*logs):
        assert a['loss'] == pytest.approx(b['loss'], abs=1e-5) and a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-3)


def test_kto_reads_labels_and_messages(world):
    stage('kto.py', *COMMON, '--dataset=kto.jsonl', '--val_dataset=kto.jsonl', '--out_dir=out-kto', cwd=world)
    row = log_rows(world / 'out-kto', 'eval')[-1]
    assert row['loss'] < 0.5 and row['kto_kl'] >= 0 and row['margin'] > 0
    talk = [[dict(role='user', content=f'Hi {i}'), dict(role='assistant', content='yes' * (1 + i % 2))] for i in range(24)]
    jsonl(world / 'talk.jsonl', [dict(messages=t, label=bool(i % 2)) for i, t in enumerate(talk)])
    stage('kto.py', *COMMON, '--dataset=talk.jsonl', '--out_dir=out-kto', '--max_iters=2', cwd=world)
    assert len(log_rows(world / 'out-kto')) == 2
    items = [([1], [2, 9], True), ([1], [3, 9], True), ([5], [4, 9], False)]
    others = [item[3] for item in kto.WithOtherAnswers(items, 64)]
    assert others == [[4, 9], [4, 9], [2, 9]]  # the KL is estimated on answers to another prompt


def test_kto_labels_are_read_as_they_are_meant(world):
    for value in (True, 1, 1.0, 'true', 'True', '1', ' yes ', 'good'):
        assert kto.label_of(value) is True
    for value in (False, 0, 0.0, 'false', '0', 'No', 'bad'):
        assert kto.label_of(value) is False
    for value in (-1, 2, 0.5, 'maybe', '', [True]):
        with pytest.raises(ValueError, match='expected true or false'):
            kto.label_of(value)
    jsonl(world / 'odd.jsonl', [dict(prompt=f'Q{i}', completion='a', label='maybe' if i == 3 else 'true') for i in range(6)])
    with pytest.raises(ValueError, match="odd.jsonl, row 4: label 'maybe'"):
        stage('kto.py', *COMMON, '--dataset=odd.jsonl', '--val_dataset=kto.jsonl', '--out_dir=out-kto', cwd=world)


def test_kto_means_do_not_depend_on_the_batch(world):
    """Batches of 12 and of 4 (4, 1 and 0 good answers): rewards of each side, and margin is their difference."""
    good = (0, 1, 2, 3, 5)
    jsonl(world / 'uneven.jsonl', [dict(prompt=f'a{i}:', completion='good' if i in good else 'b' * i, label=i in good)
                                   for i in range(12)])
    common = [*COMMON[1:], '--dataset=uneven.jsonl', '--val_dataset=uneven.jsonl', '--eval_samples=0']
    stage('kto.py', *common, '--init_from=base', '--out_dir=out-moved', '--learning_rate=1e-2', cwd=world)
    seen = []
    for size in (12, 4):
        stage('kto.py', *common, '--init_from=out-moved', '--ref=base', f'--batch_size={size}', '--eval_only=True',
              '--out_dir=out-k', cwd=world)
        seen.append(log_rows(world / 'out-k', 'eval')[-1])
    for key in ('chosen_reward', 'rejected_reward', 'margin', 'chosen_logp'):
        assert seen[0][key] == pytest.approx(seen[1][key], abs=1e-5), key
    assert seen[0]['margin'] == pytest.approx(seen[0]['chosen_reward'] - seen[0]['rejected_reward'], abs=1e-6)
    assert abs(seen[0]['margin']) > 0.01


def test_a_kto_checkpoint_of_dpo_resumes_in_kto(world):
    """kto.py was dpo.py --loss_type=kto once, and its checkpoints say so."""
    stage('kto.py', *COMMON, '--out_dir=out-old', '--max_iters=3', cwd=world)
    file = world / 'out-old/ckpt.pt'
    saved = torch.load(file, weights_only=True)
    saved['config'].update(stage='dpo', loss_type='kto')
    for key in ('rows', 'evaluated'):
        del saved[key]
    torch.save(saved, file)
    stage('kto.py', *COMMON[1:], '--init_from=resume', '--out_dir=out-old', '--max_iters=5', cwd=world)
    assert [r['step'] for r in log_rows(world / 'out-old')] == [0, 1, 2, 3, 4]
    torch.save(saved, file)
    with pytest.raises(ValueError, match='is a run of kto.py'):
        stage('dpo.py', *COMMON[1:], '--init_from=resume', '--out_dir=out-old', cwd=world)
    with pytest.raises(ValueError, match='python kto.py'):
        stage('dpo.py', *COMMON, '--loss_type=kto', '--out_dir=out-old', cwd=world)


def test_a_falling_chosen_logprob_is_said(world):
    said = stage('dpo.py', *COMMON, '--learning_rate=3e-2', '--out_dir=out-fall', '--eval_samples=0', cwd=world)
    fell = log_rows(world / 'out-fall', 'eval')[-1]['chosen_logp_change']
    assert ('the chosen log-prob has fallen by' in said) == (fell < -0.05 * abs(log_rows(world / 'out-fall', 'eval')[0]['chosen_logp']))
    assert fell < 0


def test_the_stored_reference_is_not_used_for_other_data(world):
    first = stage('dpo.py', *COMMON, '--precompute_ref=True', '--out_dir=out-store', '--max_iters=1', cwd=world)
    second = stage('dpo.py', *COMMON, '--precompute_ref=True', '--out_dir=out-store', '--max_iters=1', '--max_rows=20', cwd=world)
    assert 'computed again' not in first and 'ref_train.safetensors belongs to other data' in second and 'ref_val.safetensors' not in second


def test_the_stored_reference_is_not_used_for_other_weights(world):
    """The model behind the same name has changed: at step 0 policy and reference are the same again."""
    import shutil
    args = [*COMMON[1:], '--init_from=moving', '--precompute_ref=True', '--out_dir=out-moving', '--eval_samples=0']
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(world / 'moving')
        stage('dpo.py', *args, '--max_iters=1', cwd=world)
        row = log_rows(world / 'out-moving', 'eval')[0]
        assert row['loss'] == pytest.approx(math.log(2), abs=1e-6) and row['margin'] == 0
    shutil.rmtree(world / 'moving')


def test_mistakes_are_named(world, tmp_path):
    def fails(match, *args, rows=None, script='dpo.py'):
        if rows is not None:
            jsonl(world / 'bad.jsonl', rows)
            args = (*args, '--dataset=bad.jsonl')
        with pytest.raises(ValueError, match=match):
            stage(script, *COMMON, '--out_dir=' + str(tmp_path / 'out'), *args, cwd=world)
    ok = dict(prompt='Q', chosen='yes', rejected='no')
    fails(r"bad.jsonl, row 2: .*without 'rejected'", rows=[ok, dict(prompt='Q', chosen='a')] + [ok] * 20, *['--val_dataset=pref.jsonl'])
    fails('row 1: .*equal', '--val_dataset=pref.jsonl', rows=[dict(prompt='Q', chosen='a', rejected='a'), ok])
    fails('row 1: empty completion', '--val_dataset=pref.jsonl', rows=[dict(prompt='Q', chosen='a', rejected='  '), ok])
    fails('row 1: the prompt is empty', '--val_dataset=pref.jsonl', rows=[dict(prompt='', chosen='a', rejected='b'), ok])
    kto = dict(script='kto.py')
    fails('row 1: a row with "label" has "prompt"', '--val_dataset=pref.jsonl', rows=[dict(completion='a', label=True), ok], **kto)
    fails('all rows have the same prompt', '--val_dataset=pref.jsonl', rows=[ok, ok], **kto)
    fails('max_new_tokens 128 leaves no room', '--max_new_tokens=128')
    fails('max_new_tokens 128 leaves no room', '--max_new_tokens=128', **kto)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=257, block_size=64)).save_pretrained(world / 'short')
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=99, block_size=128)).save_pretrained(world / 'few')
    for other, words in (('short', 'reads 64 tokens at most'), ('few', "'byte' has 257 tokens, the model 99")):
        fails(words, f'--ref={other}')
        fails(words, f'--ref={other}', **kto)
    fails('no usable pair|no usable row', '--val_dataset=pref.jsonl', '--block_size=3', rows=[dict(prompt='Q', chosen='aaaa', rejected='b')])
    fails('precompute_ref=True means nothing', '--loss_type=simpo', '--precompute_ref=True')
    fails('label_smoothing 0.1 with .*hinge', '--label_smoothing=0.1', '--loss_type=hinge')
    fails('no such data', '--dataset=nowhere.jsonl')
