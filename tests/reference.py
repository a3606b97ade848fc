"""PAPO's objective once more, slow and obvious: plain Python loops over responses and tokens, one
torch scalar at a time.

It shares no line with loss.py or papo.py, and starts from raw logits and rewards; autograd through
it gives the gradients that the fast version is held against.
"""


def clip(x, low, high):
    return x.clamp(low, high)


def log_probabilities(logits, banned):
    """Softmax of one position, token by token
    -> {token: log-probability} of the tokens that may be sampled."""
    allowed = [v for v in range(len(logits)) if not banned[v]]
    total = sum(logits[v].exp() for v in allowed)
    return {v: (logits[v].exp() / total).log() for v in allowed}


def divergence(ratio, cfg):
    """ratio - log ratio - 1, with the clamps."""
    x = clip(ratio.log(), -20, 20).exp()
    value = x - x.log() - 1
    return clip(value, None, cfg.kl_clamp) if cfg.kl_clamp else value


def token(x, cfg, b, g, t, advantage):
    """One token's share of J, before 1/N."""
    real = log_probabilities(x["logits"][b, g, t] / cfg.temperature, x["banned"])
    hidden = x["masked_logits"][b, g, t] / cfg.temperature
    hidden = hidden if cfg.masked_branch == "grad" else hidden.detach()
    blind = log_probabilities(hidden, x["banned"])
    o = int(x["tokens"][b, g, t])
    rho = clip(real[o] - x["old"][b, g, t], -20, 20).exp()
    share = rho * advantage
    if clip(rho, 1 - cfg.clip_low, 1 + cfg.clip_high) * advantage < share:
        share = clip(rho, 1 - cfg.clip_low, 1 + cfg.clip_high) * advantage
    if cfg.dual_clip and advantage < 0 and share < cfg.dual_clip * advantage:
        share = cfg.dual_clip * advantage + 0 * rho
    if cfg.importance_cap:
        gap = x["old"][b, g, t] - x["sampled"][b, g, t]
        share = share * clip(gap.exp(), None, cfg.importance_cap)
    if x.get("weights") is not None:
        share = share * x["weights"][b, g, t]
    if x["ref"] is not None:
        share = share - cfg.beta * divergence((x["ref"][b, g, t] - real[o]).exp(), cfg)
    if cfg.entropy == "exact":
        share = share - cfg.eta1 * sum(-p.exp() * p for p in real.values())
    else:
        share = share - cfg.eta1 * -real[o]
    if x["pictured"][b]:
        r = (real[o] - blind[o]).exp()  # pi / pi_mask
        if cfg.perception == "k3":
            kl = divergence(1 / r, cfg)
        elif cfg.perception == "printed":
            kl = divergence(r, cfg)
        else:
            kl = sum(real[v].exp() * (real[v] - blind[v]) for v in real)
            kl = clip(kl, None, cfg.kl_clamp) if cfg.kl_clamp else kl
        share = share + cfg.gamma * kl
        if cfg.entropy == "exact":
            share = share - cfg.eta2 * sum(-p.exp() * p for p in blind.values())
        else:
            share = share - cfg.eta2 * -blind[o]
    return share


def J(x, cfg):
    """The objective of one whole optimizer batch: Eq. (1) to (3)."""
    B, G, R = x["tokens"].shape
    responses = []
    for b in range(B):
        rewards = [float(r) for r in x["rewards"][b]]
        mean = sum(rewards) / G
        std = (sum((r - mean) ** 2 for r in rewards) / (G - 1)) ** 0.5
        for g in range(G):
            advantage = (rewards[g] - mean) / (std + 1e-6)
            scored = [t for t in range(R) if x["mask"][b, g, t]]
            shares = [token(x, cfg, b, g, t, advantage) for t in scored]
            if shares:
                responses.append(shares)
    if cfg.loss_mean == "sequence":
        return sum(sum(shares) / len(shares) for shares in responses) / len(responses)
    return sum(sum(shares) for shares in responses) / sum(len(shares) for shares in responses)
