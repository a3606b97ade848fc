"""What each exercise must do, and what a teacher would say of the usual mistakes.

The solutions are in here: RIGHT, which are the project's own functions. USUAL are mistakes,
{exercise: {what is said of one: a function that makes it}}; tests/test_exercises.py makes them all
and sees that each is named.
"""

from types import SimpleNamespace

import mine
import pytest
import torch

import loss
import papo
from masking import choose_patches, mask_patches

DRAW = torch.Generator().manual_seed(0)
SCORED = torch.arange(5) < torch.tensor([[5, 2, 4], [1, 3, 5]])[..., None]  # (2, 3, 5)
KL = torch.rand(2, 3, 5, generator=DRAW)
TARGETS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def normal(*shape):
    return torch.randn(shape, generator=DRAW)


LOGITS = {"picture": normal(7, 5), "masked picture": normal(7, 5)}
WEIGHT = torch.ones(5, requires_grad=True)  # of the policy
ROWS = SimpleNamespace(pixels="picture", masked_pixels="masked picture", targets=TARGETS[None])
ROWS.scored = torch.ones_like(ROWS.targets, dtype=torch.bool)
TERMS = {k: normal(2, 3, 5) for k in "policy KL_ref KL_prcp H H_mask".split()}
TERMS = SimpleNamespace(**{k: x.masked_fill(~SCORED, float("inf")) for k, x in TERMS.items()})
N = SimpleNamespace(tokens=int(2 * SCORED.sum()), responses=12)  # of a batch twice as large
CFG = SimpleNamespace(beta=0.1, gamma=0.3, eta1=0.2, eta2=0.05, loss_mean="token")
# What each function is given.
GIVEN = {
    "advantages": [torch.tensor([[1, 0.1, 0.1, 0.9], [0.9, 0.9, 0.9, 0.9], [0, 1, 0, 0]])],
    "masked_picture": [normal(24, 6), torch.full((6,), -1.8), 0.6, 4, torch.Generator()],
    "masked_logprobs": [lambda pixels: LOGITS[pixels] * WEIGHT, ROWS],
    "k3": [-normal(2, 9).abs(), -normal(2, 9).abs()],
    "objective": [TERMS, SCORED, N, CFG],
    "entropy_slope": [normal(7, 5)],
    "token_weights": [KL, SCORED],
}


# ------------------------------------------------------------------------------- the solutions


def blacken(pixels, black, ratio, unit, draw):
    return mask_patches(pixels, choose_patches(len(pixels), ratio, draw, unit), black)


def read(logits, rows):
    return loss.token_logprobs(logits, rows.targets[rows.scored])


@torch.enable_grad()
def k3(logp, other):
    x = logp.detach().clone().requires_grad_()
    value = loss.k3(x, other, 0)[0]
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@torch.enable_grad()
def entropy_slope(logits):
    x = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss.exact_entropy(x.log_softmax(-1)).sum(), x)[0]


RIGHT = {
    "advantages": papo.group_advantages,
    "masked_picture": blacken,
    "masked_logprobs": lambda of, rows: read(of(rows.masked_pixels).detach(), rows),
    "k3": k3,
    "objective": papo.objective,
    "entropy_slope": entropy_slope,
    "token_weights": lambda kl, counted: kl / kl[counted].mean(),
}


# -------------------------------------------------------------------------- the usual mistakes


def centred(R):
    return R - R.mean(-1, keepdim=True)


def of_G(R):
    return centred(R) / (R.std(-1, keepdim=True, unbiased=False) + mine.EPS)


def of_all(R):
    return (R - R.mean()) / (R.std() + mine.EPS)


def without_eps(R):
    return centred(R - R[:, :1]) / (R - R[:, :1]).std(-1, keepdim=True)


def zeros(pixels, black, *rest):
    return blacken(pixels, 0 * black, *rest)


def kept(pixels, black, ratio, unit, draw):
    return mask_patches(pixels, ~choose_patches(len(pixels), ratio, draw, unit), black)


def each_row(pixels, black, ratio, unit, draw):
    return blacken(pixels, black, ratio, 1, draw)


def in_place(pixels, *rest):
    return pixels.copy_(blacken(pixels, *rest))


def on_the_picture(of, rows):
    return read(of(rows.pixels).detach(), rows)


def probabilities(of, rows):
    return read(of(rows.masked_pixels).detach(), rows).exp()


def raw_logits(of, rows):
    return of(rows.masked_pixels).detach()[range(len(TARGETS)), TARGETS]


def cross_entropy(of, rows):
    return -read(of(rows.masked_pixels).detach(), rows)


def attached(of, rows):
    return read(of(rows.masked_pixels), rows)


def with_value(f):
    return lambda logp, other: (f(other - logp), k3(logp, other)[1])


def with_slope(f):
    return lambda logp, other: (k3(logp, other)[0], f(other - logp))


def weighed(sign=1, mean=lambda x, scored, N: loss.scored_sum(x, scored) / N.tokens, **factors):
    """The objective with its terms times these factors, or another mean."""
    f = dict(policy=1, beta=1, gamma=1, eta1=1, eta2=1) | factors

    def wrong(terms, scored, N, cfg):
        x = f["policy"] * terms.policy + f["beta"] * cfg.beta * terms.KL_ref
        x = x - f["gamma"] * cfg.gamma * terms.KL_prcp + f["eta1"] * cfg.eta1 * terms.H
        return mean(sign * (x + f["eta2"] * cfg.eta2 * terms.H_mask), scored, N)

    return wrong


def all_places(x, scored, N):
    return x.sum() / N.tokens


def this_part(x, scored, N):
    return loss.scored_sum(x, scored) / scored.sum()


def response_by_response(x, scored, N):
    return loss.scored_sum(x / scored.sum(-1, keepdim=True), scored) / N.responses


CHANGED = "its input was changed, and others still need it: make a new tensor"
ATTACHED = "it has a gradient, and as released this branch has none: detach()"
OTHER_MEAN = "the mean is not 1, which is another learning rate"
NEGATIVE = "a negative weight teaches the opposite of the reward"
ALIKE = "all weights are alike, which is the method without weights"
FALLING = "of two tokens of a response the one with the larger kl has the smaller weight"
USUAL = {
    "advantages": {
        "the deviation divides by G, and the sample's divides by G - 1": of_G,
        "mean and deviation are those of all groups together": of_all,
        "it is not divided by the standard deviation": centred,
        "equal rewards give 0 / 0: EPS belongs under the line": without_eps,
    },
    "masked_picture": {
        "zeros are a grey patch, and `black` is a black one": zeros,
        "`ratio` is the share that becomes black, and here it is the share that stays": kept,
        "each row was drawn by itself, and `unit` rows are one piece": each_row,
        CHANGED: in_place,
    },
    "masked_logprobs": {
        "that is the policy on the picture itself, whose KL to pi_theta is 0": on_the_picture,
        "these are probabilities, and their logarithms are asked for": probabilities,
        "logits are not normalised: take off their logsumexp": raw_logits,
        "that is the cross-entropy: a log-probability is negative": cross_entropy,
        ATTACHED: attached,
    },
    "k3": {
        "the two policies are exchanged": lambda logp, other: k3(other, logp),
        "the two policies are exchanged, in the derivative too": lambda logp, other: (
            k3(other, logp)[0],
            (logp - other).exp() - 1,
        ),
        "the - 1 is missing, so equal policies are not 0 apart": with_value(lambda d: d.exp() - d),
        "that is k1, the log-ratio alone, which can be negative": with_value(lambda d: -d),
        "that is k2, half of the log-ratio's square": with_value(lambda d: d**2 / 2),
        "the derivative has the wrong sign": with_slope(lambda d: d.exp() - 1),
        "the derivative lacks the one of - d": with_slope(lambda d: -d.exp()),
    },
    "objective": {
        "KL_prcp is pushed down, and PAPO pushes it up: its sign": weighed(gamma=-1),
        "entropies are pushed up, and PAPO pushes them down: their sign": weighed(eta1=-1, eta2=-1),
        "KL_ref is pushed up, and it should hold the policy: its sign": weighed(beta=-1),
        "that is J, and an optimizer minimises: all signs": weighed(-1),
        "terms.policy has its sign already, and is not to be turned": weighed(policy=-1),
        "terms.policy has its sign already, and the others are still to be turned": weighed(
            -1, policy=-1
        ),
        "eta1 and eta2 are exchanged": weighed(eta1=0.25, eta2=4),
        "H_mask is missing": weighed(eta2=0),
        "H is missing": weighed(eta1=0),
        "padding is in it": weighed(mean=all_places),
        "it is divided by this part's tokens, and not by the batch's": weighed(mean=this_part),
        "the mean is over each response first: Eq. (1), not Eq. (3)": weighed(
            mean=response_by_response
        ),
    },
    "entropy_slope": {
        "the sign is turned": lambda x: -entropy_slope(x),
        "it does not sum to 0: p moves as well, which brings H in": lambda x: (
            -x.softmax(-1) * x.log_softmax(-1)
        ),
        "it does not sum to 0: that is p_v dH/dp_v, and every p moves": lambda x: (
            -x.softmax(-1) * (1 + x.log_softmax(-1))
        ),
        "a gradient of 0 lowers nothing": torch.zeros_like,
    },
    "token_weights": {
        OTHER_MEAN: lambda kl, counted: kl,
        NEGATIVE: lambda kl, counted: 1 + 9 * (kl - kl[counted].mean()),
        ALIKE: lambda kl, counted: torch.ones_like(kl),
        FALLING: lambda kl, counted: (1 - kl) / (1 - kl)[counted].mean(),
    },
}


# --------------------------------------------------------------------------------- the verdict


def asked(function, name):
    """What a function makes of an exercise's input -> (tensors, was the input changed?)"""
    given = [x.clone() if isinstance(x, torch.Tensor) else x for x in GIVEN[name]]
    for draw in (x for x in given if isinstance(x, torch.Generator)):
        draw.manual_seed(1)  # of whose six numbers three are below 0.6
    found = function(*given)
    pairs = [(a, b) for a, b in zip(given, GIVEN[name]) if isinstance(a, torch.Tensor)]
    changed = not all(torch.equal(a, b) for a, b in pairs)
    return list(found) if isinstance(found, tuple) else [found], changed


def same(got, right):
    near = dict(rtol=1e-4, atol=1e-5, equal_nan=True)
    if [x.shape for x in got] != [x.shape for x in right]:
        return False
    return all(torch.allclose(a.float(), b.float(), **near) for a, b in zip(got, right))


def unfair(w):
    """What is wrong with token weights, in a sentence; "" if nothing is."""
    if w.shape != KL.shape:
        return f"the shape is {tuple(w.shape)}, and one weight a token is asked for"
    if (w[SCORED] < 0).any():
        return NEGATIVE
    if abs(w[SCORED].mean() - 1) > 1e-3:
        return OTHER_MEAN
    pairs = zip(w.flatten(0, 1), KL.flatten(0, 1), SCORED.sum(-1).flatten())
    if w[SCORED].std() < 1e-6:
        return ALIKE
    falls = [(own[:n][kl[:n].argsort()].diff() < -1e-6).any() for own, kl, n in pairs]
    return FALLING if any(falls) else ""


def judge(name, function):
    """What is wrong with a function, in a sentence; "" if nothing is."""
    try:
        got, changed = asked(function, name)
    except NotImplementedError:
        return f"{name} is not written yet: exercises/mine.py"
    right, _ = asked(RIGHT[name], name)
    if other := [x for x in got if not isinstance(x, torch.Tensor)]:
        return f"it returns {other[0]!r}, and a tensor is asked for"
    if changed:
        return CHANGED
    if name == "token_weights":
        return unfair(*got)
    if same(got, right):
        return ATTACHED if name == "masked_logprobs" and got[0].requires_grad else ""
    for said, mistake in USUAL[name].items():
        if same(got, asked(mistake, name)[0]):
            return said
    shapes = [[tuple(x.shape) for x in xs] for xs in (got, right)]
    if shapes[0] != shapes[1]:
        return f"its shape is {shapes[0]}, and {shapes[1]} is asked for"
    k = next(k for k in range(len(right)) if not same(got[k : k + 1], right[k : k + 1]))
    far = (got[k] - right[k]).abs().nan_to_num(float("inf"))
    place = tuple((far == far.max()).nonzero()[0].tolist())
    where = f"at {list(place)} " * bool(place) + f"of result {k + 1} " * (len(right) > 1)
    return f"{where}it is {got[k][place]:.4f}, and {right[k][place]:.4f} is right"


@pytest.mark.parametrize("name", RIGHT)
def test_exercise(name):
    if said := judge(name, getattr(mine, name)):
        pytest.fail(said, pytrace=False)
