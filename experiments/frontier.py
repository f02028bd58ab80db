"""Every method on the exact reward-KL frontier of a tiny vocabulary: assets/exp_oracle.png and exp_oracle.md.

    python experiments/frontier.py --assets=assets --seeds=1,2,3
experiments/oracle.py enumerates all sequences of 3 tokens over a vocabulary of 3, so expected reward and KL
of a policy are sums, and the most reward that any policy can have at a given KL is known. The equations are
those of ppo.py, grpo.py and dpo.py, the policies are tables; everything is sampled as in a real run:
    PPO          KL in the reward, token by token, a learned value table, GAE 0.95       GRPO, RLOO, Dr. GRPO
                 KL in the reward, groups of 8
    GRPO, k3     the published form: k3 in the loss, whose gradient pulls another way    DPO
    20,000 pairs of the reference's own samples, best of n    exact, by order statistics
    labelled by Bradley-Terry on the true reward
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import dpo
import grpo
import ppo
from oracle import World

BETAS = (1.0, 0.5, 0.25, 0.12)
STEPS, BATCH = 120, 256


def climb_ppo(world, beta, seed):
    """PPO's functions chained as in its loop. Returns the policy's table (P, V)."""
    g = torch.Generator().manual_seed(seed)
    theta, table = (
        world.ref.clone().requires_grad_(True),
        torch.zeros(world.P, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.Adam([dict(params=[theta], peak=0.05), dict(params=[table], peak=0.1)])
    ref = world.token_logp(world.ref)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group['lr'] = ppo.linear_lr(step, group['peak'], 0, STEPS)
        rows = world.sample(theta, BATCH, g)
        mask = world.mask[rows]
        with torch.no_grad():
            old, values = world.token_logp(theta)[rows], table[world.prefix[rows]]
            advantages, returns = ppo.gae(
                ppo.token_rewards(world.reward[rows], old, ref[rows], mask, beta), values, mask, 1.0, 0.95
            )
            advantages = ppo.whiten(advantages, mask)
        for mb in torch.randperm(BATCH, generator=g).chunk(2):
            loss = ppo.policy_loss(world.token_logp(theta)[rows][mb], old[mb], advantages[mb], mask[mb], 0.2)[
                0
            ]
            loss = (
                loss
                + ppo.value_loss(table[world.prefix[rows]][mb], values[mb], returns[mb], mask[mb], 0.2)[0]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return theta.detach()


def climb_group(kind, loss_type, k3=False):
    """A group method: the KL taken off the reward of a completion, or (k3) as the published penalty of the
    loss."""

    def climb(world, beta, seed):
        g = torch.Generator().manual_seed(seed)
        theta = world.ref.clone().requires_grad_(True)
        optimizer, ref = torch.optim.Adam([theta], lr=0.05), world.token_logp(world.ref)
        for step in range(STEPS):
            optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / STEPS)
            rows = world.sample(theta, BATCH, g)
            old = world.token_logp(theta).detach()[rows]
            spent = (world.logp(theta) - world.logp(world.ref)).detach()[rows]
            adv = grpo.group_advantages(world.reward[rows] - (0 if k3 else beta * spent), 8, kind)
            for _ in range(2):
                extra = dict(ref_logp=ref[rows], beta=beta) if k3 else {}
                loss = grpo.grpo_loss(
                    world.token_logp(theta)[rows],
                    old,
                    adv,
                    world.mask[rows],
                    loss_type=loss_type,
                    max_len=world.R,
                    **extra,
                )[0]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return theta.detach()

    return climb


def climb_dpo(world, beta, seed):
    """DPO on fixed pairs: two samples of the reference each, the label drawn by Bradley-Terry from the true
    reward."""
    g = torch.Generator().manual_seed(seed)
    a, b = world.sample(world.ref, 20000, g), world.sample(world.ref, 20000, g)
    first = torch.rand(20000, generator=g) < torch.sigmoid(world.reward[a] - world.reward[b])
    chosen, rejected = torch.where(first, a, b), torch.where(first, b, a)
    theta, ref = world.ref.clone().requires_grad_(True), world.logp(world.ref)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for step in range(STEPS):
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / STEPS)
        mb = torch.randint(20000, (2 * BATCH,), generator=g)
        p = world.logp(theta)
        loss = dpo.dpo_loss(p[chosen[mb]], p[rejected[mb]], ref[chosen[mb]], ref[rejected[mb]], beta)[
            0
        ].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach()


def best_of_n(world, n):
    """The table of the policy that draws n from the reference and keeps the best: P(best = y) = F(y)^n -
    F(y-)^n, F by rank of the reward."""
    p = world.logp(world.ref).exp()
    order = world.reward.argsort()
    F = torch.cat([torch.zeros(1, dtype=torch.float64), p[order].cumsum(0)])
    best = torch.empty_like(p)
    best[order] = F[1:] ** n - F[:-1] ** n
    return world.table((best + 1e-300).log())


METHODS = {
    'PPO': climb_ppo,
    'GRPO': climb_group('grpo', 'grpo'),
    'RLOO': climb_group('rloo', 'dr_grpo'),
    'Dr. GRPO': climb_group('dr_grpo', 'dr_grpo'),
    'GRPO, k3 in the loss': climb_group('grpo', 'grpo', k3=True),
    'DPO': climb_dpo,
}


def measure(world, seeds, betas=BETAS):
    """{method: {beta or n: [(KL, reward, shortfall) of each seed]}}, all three exact."""
    at = lambda theta: (world.kl(theta).item(), world.expected_reward(theta).item(), world.shortfall(theta))
    found = {
        name: {b: [at(climb(world, b, s)) for s in seeds] for b in betas} for name, climb in METHODS.items()
    }
    return found | {'best of n': {n: [at(best_of_n(world, n))] for n in (2, 4, 16, 64)}}


def draw(world, found, assets):
    import figures as F

    fig, (axis, right) = F.figure(2, height=4.2, width=5.0)
    top = max(x[0] for runs in found.values() for points in runs.values() for x in points)
    kls = np.linspace(1e-4, top * 1.02, 120)
    axis.plot(
        kls, [world.frontier(k) for k in kls], color='black', lw=1.4, label='the frontier: no policy is above'
    )
    lines = []
    for (name, runs), colour, marker in zip(found.items(), F.COLOURS, 'osv^DPX'):
        for i, (b, points) in enumerate(runs.items()):
            kl, reward, short = (np.array(x) for x in zip(*points))
            span = lambda v: (v.min(), float(np.median(v)), v.max())
            F.point(axis, span(kl), span(reward), colour, name if i == 0 else None, marker)
            F.point(right, span(kl), span(np.maximum(short, 1e-5)), colour, None, marker)
            lines.append(
                [
                    name,
                    f'{"n" if name == "best of n" else "beta"} {b}',
                    F.text(span(kl), 3),
                    F.text(span(reward), 3),
                    F.text(span(short), 4),
                ]
            )
    axis.set_xlabel('KL to the reference, nats (exact)')
    axis.set_ylabel('expected reward (exact)')
    axis.legend(frameon=False, fontsize=8, loc='lower right')
    right.set_xlabel('KL to the reference, nats (exact)')
    right.set_title('reward left on the table at the KL spent', fontsize=10)
    right.set_yscale('log')
    fig.tight_layout()
    os.makedirs(assets, exist_ok=True)
    fig.savefig(os.path.join(assets, 'exp_oracle.png'))
    block = '`python experiments/frontier.py`: median (smallest to largest) of the seeds\n\n' + F.table(
        ['method', 'setting', 'KL, nats', 'expected reward', 'below the frontier'], lines
    )
    with open(os.path.join(assets, 'exp_oracle.md'), 'w', encoding='utf-8') as f:
        f.write(block + '\n')
    F.insert(os.path.join(os.path.dirname(os.path.abspath(assets)), 'EXPERIMENTS.md'), 'oracle', block)


def main(seeds, assets):
    torch.set_num_threads(1)
    tiny = World(3, 3)
    draw(tiny, measure(tiny, seeds), assets)
    print(f'{assets}/exp_oracle.png, {assets}/exp_oracle.md')


if __name__ == '__main__':
    given = {'assets': 'assets', 'seeds': '1,2,3'}
    for a in sys.argv[1:]:
        key, _, value = a.lstrip('-').partition('=')
        if key not in given or not value:
            print(
                f'error: unknown option {a!r}; known: ' + ' '.join(f'--{k}={v}' for k, v in given.items()),
                file=sys.stderr,
            )
            raise SystemExit(2)
        given[key] = value
    main(tuple(map(int, given['seeds'].split(','))), given['assets'])
