"""PAPO: GRPO or DAPO, plus a reason to look at the picture (arXiv 2507.06448).

The objective, maximised; sums run over the G responses o_i to one prompt and their tokens:

    J = 1/N sum_i sum_t { min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i)      Eq. (1), the policy term
                          - beta  KL(pi || pi_ref)                              Eq. (1), GRPO forms only
                          + gamma KL(pi || pi_mask)                             Eq. (2), the implicit perception loss
                          - eta1  H[pi] - eta2 H[pi_mask] }                     Eq. (2), the double entropy loss

The paper prints one objective and its released code optimises another. Both are here: `--objective official` (the default)
and `--objective paper`. "paper" is v5; file and line are those of github.com/MikeWangWZHL/PAPO at commit fb63bf4.

                        --objective official                              --objective paper
 KL(pi || pi_mask)      k3 = 1/r + log r - 1, whose mean is the KL         r - log r - 1, r = pi / pi_mask (section 3.2)
                        (verl/trainer/core_algos.py:597-601, called        (its mean is chi^2 - KL: tests/test_theory.py)
                        at verl/workers/actor/dp_actor.py:329-333)
 a token's KL           at most 10 (core_algos.py:601)                     no bound
 masked branch          once a rollout, no gradient, reused by every       recomputed at each update, differentiable
                        update (dp_actor.py:46, ray_trainer.py:768), so
                        eta2 weighs a constant (dp_actor.py:326)
 1/N                    mean over tokens (core_algos.py:421,               GRPO forms: mean over a response's tokens, then over
                        verl/trainer/config.py:106)                        responses, Eq. (2); DAPO forms: over tokens, Eq. (3)
 dual clip              3 (core_algos.py:448)                              none
 reward                 0.9 accuracy + 0.1 format                          accuracy, 0 or 1
                        (examples/reward_function/math.py)
 sampling               top_p 0.99, scored without it (dp_actor.py:288)    from the policy itself, top_p 1

The same in both, where the paper leaves it open or the code agrees: H is the mean of -log pi over sampled tokens, minimised
(dp_actor.py:289; the paper writes H = log pi); clip 0.2/0.3 (GRPO forms) and 0.2/0.28 (DAPO forms); sample standard deviation
with eps 1e-6 (core_algos.py:168); log-ratios at +-20 (core_algos.py:496); beta's KL is k3 and the reference stays.

What we do differently on purpose, in both:

 1. Denominator.         code: the mean of one micro-batch, then over micro-batches and processes (core_algos.py:421), so that a token
                         in a short micro-batch weighs more.   here: N of the whole optimiser batch, over all processes.
 2. Learning rate.       code: 0 during the whole first rollout step, since a warm-up of 0 steps divides into 0
                         (verl/utils/torch_functional.py:197-198).   here: never 0.
 3. Masks.               code: on the raw picture, before it is resized, from global unseeded numpy state, in Python loops
                         (verl/trainer/papo_utils.py:17-31).   here: on the patches that the vision tower sees, one named generator
                         per (seed, step, prompt); `--mask raw` is the released geometry, seeded.
 4. Dynamic sampling.    code: when no group of a round survives, it keeps them all (ray_trainer.py, _make_batch_data).
                         here: it draws another round, and stops with a sentence after max_rounds.
 5. Metrics.             code: the KL terms of the last micro-batch (dp_actor.py:319, 374-378).   here: means over the step.
 6. Picture formats.     code: masked before conversion to RGB, so that "black" is a palette entry or white (papo_utils.py:17).
                         here: converted first (data.py, rgb).
 7. 7B GRPO.             code: the 7B "GRPO" baseline trains with gamma = 0.01 (examples/papo_grpo/qwen2_5_vl_7b_grpo.sh reads
                         config_grpo_papo.yaml, whose line 34 turns the term on).   here: GRPO has gamma = 0.
"""
from dataclasses import dataclass

import torch

from loss import clipped_surrogate, importance_weight, k3, masked_sum, sampled_entropy

# What an algorithm is. gamma, eta1, eta2 differ by model too: config.py lays the paper's table over these.
ALGORITHMS = {
    "grpo": dict(clip_high=0.30, beta=0.01, gamma=0.0, eta1=0.0, eta2=0.0, dynamic_sampling=False),
    "dapo": dict(clip_high=0.28, beta=0.0, gamma=0.0, eta1=0.0, eta2=0.0, dynamic_sampling=True),
    "papo_g": dict(clip_high=0.30, beta=0.01, gamma=0.02, eta1=0.0, eta2=0.0, dynamic_sampling=False),
    "papo_d": dict(clip_high=0.28, beta=0.0, gamma=0.01, eta1=0.03, eta2=0.03, dynamic_sampling=True),
}
# Without the reference KL nothing else holds the policy, and the paper calls double entropy required (its Table 8, 3B and 7B).
NO_REF_KL = {"papo_g": dict(gamma=0.01, eta1=0.03, eta2=0.03)}
# The table at the top of this file; official is what config.py's fields default to.
OBJECTIVES = {
    "official": {},
    "paper": dict(perception="printed", kl_clamp=0.0, masked_grad=True, loss_mean="sequence", dual_clip=0.0, reward="paper", top_p=1.0),
}
OBJECTIVES_AND_ALGORITHMS = {("paper", a): dict(loss_mean="token") for a in ("dapo", "papo_d")}      # Eq. (3)


@dataclass
class Group:
    """G responses to one prompt with their scores; reward and advantage are two things."""
    position: int                     # place in the stream of training prompts: names the prompt in every random draw
    prompt_tokens: int
    rollout: object                   # rollout.Rollout: tokens, log-probs, finished or cut off
    scores: list                      # G dicts: overall, format, accuracy, overlong_penalty
    counts: list                      # G bools: is the response part of the loss?
    advantages: torch.Tensor | None = None     # (G,)

    def values(self, name):
        return torch.tensor([s[name] for s in self.scores])

    @property
    def rewards(self):                # (G,)
        return self.values("overall") + self.values("overlong_penalty")

    @property
    def packed_tokens(self):          # in the training passes, where the prompt is computed once
        return self.prompt_tokens + sum(map(len, self.rollout.tokens))

    @property
    def lengths(self):                # of the responses that count
        return [len(t) for t, counts in zip(self.rollout.tokens, self.counts) if counts]


def group_advantages(rewards, eps=1e-6):
    """A_i = (R_i - mean R) / (std R + eps) within each group (section 2.1). rewards (..., G) -> (..., G).

    std is the sample one (G - 1), eps as released. A group whose rewards are all equal gets zero: it teaches the policy
    term nothing, and still counts in the other terms and in N. Raises ValueError for a group of one.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of one response has no advantage; use a group size of at least 2")
    rewards = rewards - rewards[..., :1]                # so that equal rewards are exactly 0: the float32 mean of eight 0.1 is not 0.1
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + eps)


def difficulty(accuracy, low, high):
    """Which side of DAPO's bounds a group is on, 0 < #correct < G (Eq. 3). accuracy (G,) -> "informative" strictly between them,
    else "too_hard" or "too_easy"."""
    mean = accuracy.mean().item()
    return "too_hard" if mean <= low else "too_easy" if mean >= high else "informative"


def fill_batch(draw, cfg):
    """The groups of one step; with dynamic sampling only informative ones, drawn in rounds until the batch is full (Eq. 3).

    draw(n): rolls out and scores the next n prompts -> [Group], fewer where a prompt could not be used; those are replaced. -> (groups, {what became of the prompts rolled out: how many}).
    Raises ValueError, saying what the data lacks, when max_rounds rounds do not fill the batch.
    """
    wanted, kept, fate = cfg.prompts_per_step, [], {"generated": 0, "refused": 0, "too_easy": 0, "too_hard": 0}
    for _ in range(cfg.max_rounds):
        n = cfg.prompts_per_round if cfg.dynamic_sampling else wanted - len(kept)
        groups = draw(n)
        fate["generated"] += len(groups)
        fate["refused"] += n - len(groups)
        for group in groups:
            verdict = difficulty(group.values("accuracy"), cfg.filter_low, cfg.filter_high) if cfg.dynamic_sampling else "informative"
            if verdict == "informative":
                kept.append(group)
            else:
                fate[verdict] += 1
        if len(kept) >= wanted:
            return kept[:wanted], {**fate, "surplus": len(kept) - wanted}
    if not cfg.dynamic_sampling or fate["refused"] > fate["generated"]:
        raise ValueError(f"of {fate['generated'] + fate['refused']} prompts {fate['refused']} could not be used; the warnings above say why")
    raise ValueError(f"after {cfg.max_rounds} rounds of {cfg.prompts_per_round} prompts only {len(kept)} of {wanted} groups had an accuracy between "
                     f"{cfg.filter_low} and {cfg.filter_high}; {fate['too_easy']} were above and {fate['too_hard']} below, so the data is too "
                     f"{'easy' if fate['too_easy'] > fate['too_hard'] else 'hard'} for this model: change it, widen the bounds or raise --max_rounds")


def overlong_penalty(lengths, limit, buffer):
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), added to the reward: 0 up to limit - buffer tokens, then falling
    in a straight line to -1 at the limit. lengths (...) -> (...) float; buffer 0 turns it off."""
    over = lengths.float() - (limit - buffer)
    return -(over / buffer).clamp(0, 1) if buffer else torch.zeros_like(over)


def objective(scores, old, ref, sampled, advantage, mask, sees, total_tokens, total_responses, cfg):
    """Minus J, for one micro-batch, and the sums behind its metrics.

    scores (model.Scores): what the current weights say, each (B, G, R) or None: logp; masked, the same tokens on I_mask; and
    the whole-vocabulary terms kl, entropy, masked_entropy, where cfg asks for the exact ones.
    old, ref, sampled (B, G, R) log-probabilities, ref None without a reference, sampled as the sampler reported them; advantage (B, G); mask (B, G, R) bool, true on the
    tokens that count, EOS included; sees (B,) bool, false for a prompt without a picture, which has no perception term.
    total_tokens, total_responses: what counts in the whole optimiser batch, over all processes.

    -> (loss, sums): loss carries the gradient of J into scores.logp and, with cfg.masked_grad, scores.masked and their exact
    counterparts; sums are detached totals over this micro-batch, to be added over micro-batches and processes and
    divided by the tokens (those of PERCEPTION by sums["seen"]).
    """
    logp, masked, exact = scores.logp, scores.masked, cfg.entropy == "exact"
    A = advantage[:, :, None].expand_as(logp)                                   # (B, G, R)
    policy, high, low = clipped_surrogate(logp, old, A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    if cfg.importance_cap:
        policy = policy * importance_weight(old, sampled, cfg.importance_cap)   # (B, G, R)
    entropy = scores.entropy if exact else sampled_entropy(logp)                # (B, G, R)
    per_token = policy + cfg.eta1 * entropy                                     # Eq. (1) policy term; Eq. (2), eta1
    parts = {"policy_loss": policy, "entropy": entropy, "clip_high_fraction": high.float(), "clip_low_fraction": low.float(),
             "sampler_gap": (old - sampled).abs(), "sampler_kl": k3(sampled, old, 0)[0]}           # old: the same weights, scored here
    if ref is not None:
        parts["ref_kl"] = k3(logp, ref, cfg.kl_clamp)[0]
        per_token = per_token + cfg.beta * parts["ref_kl"]                      # Eq. (1), - beta KL_ref
    seen = mask & sees[:, None, None]
    if masked is not None:
        masked = masked if cfg.masked_grad else masked.detach()
        if cfg.perception == "exact":
            kl, clamped = scores.kl                                             # (B, G, R) each
        else:
            kl, clamped = k3(logp, masked, cfg.kl_clamp) if cfg.perception == "k3" else k3(masked, logp, cfg.kl_clamp)
        perception = torch.where(seen, kl, 0.0)
        masked_entropy = torch.where(seen, scores.masked_entropy if exact else sampled_entropy(masked), 0.0)
        per_token = per_token - cfg.gamma * perception + cfg.eta2 * masked_entropy      # Eq. (2), gamma and eta2
        parts |= {"perception_kl": perception, "masked_entropy": masked_entropy, "perception_clamped": (clamped & seen).float()}
    if cfg.loss_mean == "sequence":                                             # 1/|o_i|, then 1/responses: Eq. (1), (2)
        loss = masked_sum(per_token / mask.sum(-1, keepdim=True).clamp(min=1), mask) / total_responses
    else:                                                                       # 1 / sum |o_i|: Eq. (3)
        loss = masked_sum(per_token, mask) / total_tokens
    sums = {name: masked_sum(x.detach(), mask) for name, x in parts.items()}
    sums |= {"seen": seen.sum(), "loss": loss.detach() * total_tokens}
    return loss, sums


PERCEPTION = ("perception_kl", "masked_entropy", "perception_clamped")         # metrics that are means over tokens with a picture
