"""DPO and its kin: preferences without a reward model (Rafailov et al. 2023, arXiv 2305.18290)."""
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# the equations. All take log-probs of whole responses, (B,) float; all losses are (B,), rewards are detached
# ---------------------------------------------------------------------------------------------------------------------

PAIRED = ('sigmoid', 'robust', 'ipo', 'hinge', 'apo_zero')  # against a reference
REFERENCE_FREE = ('simpo', 'orpo')  # length-normalised by definition
LOSSES = (*PAIRED, *REFERENCE_FREE, 'kto')


def sequence_logp(logp, mask, average=False):
    """log pi(y|x) = sum of the token log-probs that count, (B, R) float and bool -> (B,); average=True divides by their number.
    [[-1, -2, 9]], mask [[1, 1, 0]] -> -3, average -1.5. A row without a token gives 0."""
    total = torch.where(mask, logp, 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1) if average else total


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type='sigmoid', label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, eq. 7) and its kin. Returns (losses, chosen_rewards, rejected_rewards), rewards = beta log pi/pi_ref (eq. 5).
    With h = chosen reward - rejected reward and e = label_smoothing, the share of swapped labels that is expected:
        sigmoid   -(1 - e) log s(h) - e log s(-h)               e > 0: conservative DPO (Mitchell 2023)
        robust    (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)  unbiased under swapped labels (2403.00409 eq. 9)
        ipo       (h / beta - 1 / (2 beta))^2                   a target margin, no way to infinity (2310.12036 eq. 17)
        hinge     max(0, 1 - h)                                 SLiC (2305.10425)
        apo_zero  1 - s(chosen reward) + s(rejected reward)     chosen up, rejected down (2408.06266 eq. 7)
    ValueError: unknown loss_type; label_smoothing outside [0, 0.5) or where it has no meaning. TRL's 'ipo' is this with averaged log-probs.
    beta=1, all (B,) equal but policy_chosen one nat higher -> h=1, sigmoid loss -log s(1) = 0.3133."""
    if loss_type not in PAIRED:
        raise ValueError(f'loss_type {loss_type!r} is unknown here: one of {", ".join(PAIRED)}')
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ('sigmoid', 'robust')):
        raise ValueError(f"label_smoothing {label_smoothing} with loss_type {loss_type!r}: it is in [0, 0.5), for 'sigmoid' (cDPO) and 'robust' only")
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    h, e = chosen - rejected, label_smoothing
    if loss_type == 'sigmoid':
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    elif loss_type == 'robust':
        losses = (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    elif loss_type == 'ipo':
        losses = (h / beta - 1 / (2 * beta)) ** 2
    elif loss_type == 'hinge':
        losses = F.relu(1 - h)
    else:
        losses = 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
    return losses, chosen.detach(), rejected.detach()


def simpo_loss(policy_chosen, policy_rejected, beta, gamma, label_smoothing=0.0):
    """SimPO (Meng et al. 2024, 2405.14734 eq. 6): no reference, the mean log-prob of a token is the reward, gamma the margin it wants.
    AVERAGED log-probs in; returns (losses, chosen_rewards, rejected_rewards). beta=2, gamma=1, -1 against -2 -> -log s(2 - 1) = 0.3133."""
    h = beta * (policy_chosen - policy_rejected) - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def orpo_loss(policy_chosen, policy_rejected, beta, chosen_nll=None):
    """ORPO (Hong et al. 2024, 2403.07691 eq. 6 and 7): SFT on the chosen answer + beta * -log s(log odds ratio), odds p = p / (1 - p), p the mean
    token probability. AVERAGED log-probs in; chosen_nll (B,) is the SFT term, by default -policy_chosen (the answer only). Returns (losses,
    chosen_rewards, rejected_rewards). p 1/2 against 1/3, beta=1: odds 1 and 1/2, loss 0.6931 - log s(log 2) = 0.6931 + 0.4055."""
    def log_odds(logp):  # log p - log(1 - p), exact for p near 0 and near 1; p = 1 itself has no odds
        logp = logp.clamp(max=-1e-6)
        return logp - torch.log(-torch.expm1(logp))
    nll = -policy_chosen if chosen_nll is None else chosen_nll
    losses = nll - beta * F.logsigmoid(log_odds(policy_chosen) - log_odds(policy_rejected))
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def kto_loss(policy_logp, ref_logp, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (Ethayarajh et al. 2024, 2402.01306 eq. 8), unpaired: each answer is good or bad (desirable (B,) bool), measured against the reference
    point kl = KL(pi || pi_ref) >= 0 (a float or 0-d, no gradient; estimated on mismatched prompt and answer). Returns (losses, rewards).
    beta=1, kl=0, log-ratio 0 -> 1 - s(0) = 0.5, good or bad."""
    rewards = beta * (policy_logp - ref_logp)
    z = beta * torch.as_tensor(kl, dtype=rewards.dtype, device=rewards.device).detach().clamp(min=0)
    losses = torch.where(desirable, desirable_weight * (1 - torch.sigmoid(rewards - z)), undesirable_weight * (1 - torch.sigmoid(z - rewards)))
    return losses, rewards.detach()
