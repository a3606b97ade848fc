"""Six pieces of PAPO for you to write, and a seventh for who wants more. Each says what goes in,
what comes out and where the paper has it; the line that raises is yours to replace.

    pytest exercises                                        # red at first; green when all are right
    pytest exercises -k k3                                  # one of them
    python exercises/train_with_mine.py --algo papo_g       # train the toy with your own functions

Take them in this order, which is the walkthrough's: sections 2 to 6 explain them. B, G and R are
prompts, responses to each, and tokens of the longest response; V is the vocabulary.
"""

import torch
from torch import Tensor

EPS = 1e-6  # of the advantage, as released


def advantages(rewards: Tensor) -> Tensor:
    """How much better is each response than the others to the same prompt?

        A_i = (R_i - mean R) / (std R + EPS)                                    section 2.1

    The mean and the standard deviation are those of the group, the last axis; the deviation is the
    sample's, which divides by G - 1. A group of equal rewards has advantages of 0.
    rewards (..., G) -> (..., G)
    """
    raise NotImplementedError


def masked_picture(
    pixels: Tensor, black: Tensor, ratio: float, unit: int, draw: torch.Generator
) -> Tensor:
    """The masked picture: each piece of it is black with probability `ratio`
    (appendix G).

    A picture is N rows of numbers, one a patch, and `unit` consecutive rows are one piece: they are
    masked together or not at all. Draw one number a piece, torch.rand(N // unit, generator=draw),
    and blacken the pieces whose number is below `ratio`. A black patch is the row `black`, and not
    zeros: pixels are normalised. The input stays as it is, since pi_theta still needs it.
    pixels (N, D), black (D,) -> (N, D)
    """
    raise NotImplementedError


def masked_logprobs(logits_of, rows) -> Tensor:
    """What does the policy say of the same tokens when the picture is masked?

        log pi_theta(o_t | q, I_mask, o_<t)                                      section 3.2

    logits_of(pixels) -> (n, V): for each of the n response tokens the logits that predict it, on
    this picture. `rows` holds both pictures, rows.pixels and rows.masked_pixels, and the tokens:
    rows.targets[rows.scored], (n,) int64, in the same order. As released, nothing is learned
    through this branch, so the result has no gradient. -> (n,) log-probabilities
    """
    raise NotImplementedError


def k3(logp: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """How far is pi from another policy, from the tokens that pi sampled?

        k3 = e^d - d - 1   with   d = other - logp

    It is PAPO's perception term, with other = log pi_mask, and GRPO's KL term, with log pi_ref.
    logp, other: any shape, one log-probability a token -> (k3, its derivative in logp), the same
    shape. Work the derivative out by hand: `other` does not change with logp.
    """
    raise NotImplementedError


def objective(terms, scored: Tensor, N, cfg) -> Tensor:
    """Eq. (2) and (3) as a loss: minus J, averaged over all tokens.

        J = mean { surrogate - beta KL_ref + gamma KL_prcp - eta1 H - eta2 H_mask }

    terms.policy is minus the surrogate, a loss already; terms.KL_ref, terms.KL_prcp, terms.H and
    terms.H_mask are what the formula names, one number a token, (B, G, R) each. cfg.beta,
    cfg.gamma, cfg.eta1 and cfg.eta2 weigh them. scored (B, G, R) bool: tokens that count; padding
    holds anything, infinities too. N.tokens: how many tokens count in the whole batch, of which
    this may be a part. -> a tensor without axes
    """
    raise NotImplementedError


def entropy_slope(logits: Tensor) -> Tensor:
    """The double entropy loss lowers H[pi] and H[pi_mask], so it needs this gradient.

        H = - sum_v p_v log p_v   with   p = softmax(logits);   dH / dlogits_v = ?

    Work it out by hand; it sums to 0 over v, as every gradient through a softmax does.
    logits (..., V) -> (..., V)
    """
    raise NotImplementedError


def token_weights(kl: Tensor, counted: Tensor) -> Tensor:
    """For who wants more. Which tokens should the reward teach? VPPO and PGPO
    (variants/) say: those that depend on the picture. Find weights of your own.

    kl: KL(pi || pi_mask) of each token, counted: bool, tokens that count, (B, G, R) each -> weights
    of the policy term, (B, G, R). A fair contestant's are never negative, have a mean of 1 over the
    tokens that count, and of two tokens of a response give the one with the larger kl no less.
    """
    raise NotImplementedError
