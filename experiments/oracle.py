"""An exact oracle: a vocabulary so small that every sequence is enumerated, so expectations are sums and
nothing is estimated.

World(V, R): all sequences over V tokens of at most R, ended by token 0 (the end token, an action) or by R. A
policy is a table of logits, one row a prefix, float64: it can be any distribution over the sequences. With a
reward r(y) and a reference pi_ref:

    J(pi) = E_pi[r] - beta KL(pi || pi_ref)          the RLHF objective
    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z          its optimum;  J(pi*) = beta log Z

World(2, 2): 0 | 1 0 | 1 1, three sequences, prefixes () and (1): theta is (2, 2).
"""

import itertools
import math

import torch


class World:
    def __init__(self, V=3, R=3, seed=0):
        self.V, self.R = V, R
        rows, prefixes = [], {}
        for full in itertools.product(range(V), repeat=R):
            y = full[: full.index(0) + 1] if 0 in full else full
            if y not in rows:
                rows.append(y)
        for y in rows:
            for t in range(len(y)):
                prefixes.setdefault(y[:t], len(prefixes))
        self.S, self.P, self.rows = len(rows), len(prefixes), rows
        self.tokens = torch.tensor(
            [y + (V - 1,) * (R - len(y)) for y in rows]
        )  # garbage behind the end: it must not matter
        self.mask = torch.tensor([[t < len(y) for t in range(R)] for y in rows])
        self.prefix = torch.tensor([[prefixes[y[:t]] if t < len(y) else 0 for t in range(R)] for y in rows])
        g = torch.Generator().manual_seed(seed)
        self.ref = torch.randn(self.P, V, generator=g, dtype=torch.float64)
        self.reward = torch.randn(self.S, generator=g, dtype=torch.float64)

    def token_logp(self, theta):
        """theta (P, V) -> log-probs of every token of every sequence (S, R); what stands where mask is False
        is garbage."""
        return torch.log_softmax(theta, -1)[self.prefix, self.tokens]

    def logp(self, theta):
        """(S,) log-prob of each sequence; their probabilities sum to 1."""
        return torch.where(self.mask, self.token_logp(theta), 0.0).sum(1)

    def expected_reward(self, theta):
        return (self.logp(theta).exp() * self.reward).sum()

    def kl(self, theta, other=None):
        """Exact KL(pi_theta || pi_other) of the sequence distributions, other = the reference by default."""
        p, q = self.logp(theta), self.logp(self.ref if other is None else other)
        return (p.exp() * (p - q)).sum()

    def objective(self, theta, beta):
        return self.expected_reward(theta) - beta * self.kl(theta)

    def optimum(self, beta):
        """(log pi*(y) (S,), J(pi*))."""
        log_z = torch.logsumexp(self.logp(self.ref) + self.reward / beta, 0)
        return self.logp(self.ref) + self.reward / beta - log_z, (beta * log_z).item()

    def table(self, logp):
        """The theta whose sequence distribution is exp(logp): conditionals by summing over what begins with
        each prefix."""
        theta = torch.full((self.P, self.V), -math.inf, dtype=torch.float64)
        for s in range(self.S):
            for t in range(len(self.rows[s])):
                at = self.prefix[s, t], self.tokens[s, t]
                theta[at] = torch.logaddexp(theta[at], logp[s])
        return theta

    def frontier(self, kl):
        """The most reward that any policy has within `kl` nats of the reference: E_{pi*(beta)}[r] at the beta
        where KL(pi*) = kl."""

        def at(log_beta):
            logp, _ = self.optimum(math.exp(log_beta))
            return (logp.exp() * (logp - self.logp(self.ref))).sum().item(), (
                logp.exp() * self.reward
            ).sum().item()

        lo, hi = -8.0, 12.0  # KL falls as beta rises
        for _ in range(80):
            mid = (lo + hi) / 2
            lo, hi = (mid, hi) if at(mid)[0] > kl else (lo, mid)
        return at(hi)[1]

    def shortfall(self, theta):
        """How much reward a policy leaves on the table at the KL it spends: 0 on the frontier, never
        negative."""
        return self.frontier(self.kl(theta).item()) - self.expected_reward(theta).item()

    def sample(self, theta, n, generator=None):
        """(n,) indices of sequences drawn from the policy."""
        return torch.multinomial(self.logp(theta).exp().detach(), n, replacement=True, generator=generator)


def gradient(fn, theta):
    theta = theta.detach().clone().requires_grad_(True)
    return torch.autograd.grad(fn(theta), theta)[0]


def central_difference(fn, x, h=1e-6):
    """d fn / d x by (f(x + h) - f(x - h)) / 2h in float64, entry by entry: the truth that autograd is held
    against."""
    out, flat = torch.zeros_like(x), x.detach().clone().reshape(-1)
    for i in range(flat.numel()):
        up, down = flat.clone(), flat.clone()
        up[i] += h
        down[i] -= h
        out.view(-1)[i] = (fn(up.view_as(x)) - fn(down.view_as(x))) / (2 * h)
    return out
