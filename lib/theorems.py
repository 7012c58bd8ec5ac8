"""The symbols of Sec. 4.3.3 and the appendix, each computed from its definition by one function.

Theorem 4.1   |J_real(pi) - J_vrt(pi)| <= delta (1 - C_tool) + alpha KL(pi || pi_pst)
                                          + beta (1 - Phi_plan R_result)
Theorem 4.2   J_real(pi_VRL) - J_real(pi_pst) >= Gamma E[dR_vrt] - E(pi_VRL),
              Gamma = C_tool Phi_plan kappa(pi_pst)

The paper defines C_tool, KL and R_result, and says of Phi_plan and kappa only what they stand for:
how those two are measured here is ours, and said at their functions. lib/transfer.py plays the
episodes; docs/transfer.md explains the study. Numbers and arrays alone; `token_kl` takes tensors.
"""

import itertools
import math
from collections.abc import Callable, Sequence

RESAMPLES = 2000


# ------------------------------------------------------------------------------ the four variables
def total_variation(p: dict, q: dict) -> float:
    """Total variation of two distributions {outcome: probability}; half of A.1's L1 norm.

    >>> total_variation({"made": 1.0}, {"made": 0.75, "failed": 0.25})
    0.25
    """
    return sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {*p, *q}) / 2


def token_kl(logprobs, reference):
    """KL(pi || pi_pst) at each state, in nats: (N, V) log-probabilities each -> (N,).

    Exact over the whole vocabulary; no sampled estimate.
    """
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def plan_sufficiency(plan: Sequence[float], vision: Sequence[float]) -> float:
    """Phi_plan: how well R_plan predicts R_vision over episodes (ours: their correlation, at
    least 0).

    0 where one of the two never varies: such episodes show no link.

    >>> plan_sufficiency([0, 0, 1, 1], [0, 0, 1, 1]), plan_sufficiency([1, 1], [0, 1])
    (1.0, 0.0)
    """
    import numpy

    plan, vision = numpy.asarray(plan, float), numpy.asarray(vision, float)
    if len(plan) < 2 or not plan.std() or not vision.std():
        return 0.0
    return max(0.0, round(float(numpy.corrcoef(plan, vision)[0, 1]), 6))


def anchoring(kl_a_token: float) -> float:
    """kappa(pi_pst) in (0, 1]: exp(-KL a token), 1 for a policy that has not moved (ours).

    The paper calls it the degree to which the policy stays where the prior is, and gives no form.
    """
    return math.exp(-kl_a_token)


# ------------------------------------------------------------------------------------- Theorem 4.1
def terms(c_tool: float, kl: float, phi: float, result: float) -> tuple[float, float, float]:
    """The three terms without their constants: dynamics gap, action bias, goal alignment error."""
    return 1 - c_tool, kl, 1 - phi * result


def bound(constants: Sequence[float], of_point: Sequence[float]) -> float:
    """The right side of Theorem 4.1 for (delta, alpha, beta) and a point's terms."""
    return sum(c * t for c, t in zip(constants, of_point))


def fit_constants(
    of_points: Sequence[Sequence[float]], gaps: Sequence[float]
) -> tuple[float, float, float] | None:
    """The least (delta, alpha, beta) >= 0 under which the bound holds on all points.

    The theorem says that such constants exist, not which: these make the bound's mean over the
    points as small as it can be, so that nothing looser than needed is tested. None: no constants
    do, since a gap is above 0 where all three terms are 0. It is a linear programme of three
    variables, whose solution lies where three constraints hold exactly: all such corners are tried.
    """
    import numpy

    rows, gaps = numpy.asarray(of_points, float), numpy.asarray(gaps, float)
    # Constraints a x >= b: the points' own, then x >= 0.
    left = numpy.vstack([rows, numpy.eye(3)])
    right = numpy.concatenate([gaps, numpy.zeros(3)])
    # What another point demands as well needs no corner.
    keep = [i for i in range(len(left)) if not implied(i, left, right)]
    corners = numpy.array(list(itertools.combinations(keep, 3)))
    solvable = abs(numpy.linalg.det(left[corners])) > 1e-12
    corners = corners[solvable]
    found = numpy.linalg.solve(left[corners], right[corners][..., None])[..., 0]  # (n, 3)
    fits = (found @ left.T >= right - 1e-9).all(axis=1)
    if not fits.any():
        return None
    found = found[fits]
    best = found[(found @ rows.mean(axis=0)).argmin()]
    return tuple(float(max(0.0, x)) for x in best)


def implied(i: int, left, right) -> bool:
    """Whether a point's constraint follows from another point's, with terms no larger and a gap no
    smaller. Of equal ones the first stays."""
    n = len(left) - 3
    if i >= n:
        return False
    stronger = (left[:n] <= left[i]).all(axis=1) & (right[:n] >= right[i])
    equal = (left[:n] == left[i]).all(axis=1) & (right[:n] == right[i])
    return bool((stronger & ~equal).any() or equal[:i].any())


# ------------------------------------------------------------------------------------- Theorem 4.2
def improvement_bound(
    c_tool: float, phi: float, kappa: float, virtual_gain: float, error: float
) -> float:
    """The right side of Theorem 4.2: Gamma E[dR_vrt] - E(pi_VRL)."""
    return c_tool * phi * kappa * virtual_gain - error


# -------------------------------------------------------------------------------- with what spread
def resampled_means(by_seed: Sequence, resamples: int = RESAMPLES):
    """Bootstrap of means: (resamples, rows) from one array (rows, tasks) a seed.

    Seeds are resampled, then tasks inside each, the same tasks for all rows, so that rows can be
    set against one another; of one seed tasks alone. NaN, a failed judge's, is left out.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    by_seed = [numpy.asarray(values, float) for values in by_seed]
    means = []
    for _ in range(resamples):
        drawn = []
        for s in rng.integers(len(by_seed), size=len(by_seed)):
            values = by_seed[s]
            tasks = rng.integers(values.shape[1], size=values.shape[1])
            drawn.append(numpy.nanmean(values[:, tasks], axis=1))
        means.append(numpy.mean(drawn, axis=0))
    return numpy.array(means)


def with_interval(
    by_seed: Sequence, statistic: Callable, level: float = 0.95
) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of row means, with its bootstrap interval.

    by_seed: one array (rows, tasks) a seed. statistic: takes the rows' means (rows,).
    """
    import numpy

    plain = numpy.mean([numpy.nanmean(numpy.asarray(v, float), axis=1) for v in by_seed], axis=0)
    drawn = [statistic(means) for means in resampled_means(by_seed)]
    low, high = numpy.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return float(statistic(plain)), float(low), float(high)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line of y over x; 0 where x never varies."""
    import numpy

    x, y = numpy.asarray(x, float), numpy.asarray(y, float)
    x = x - x.mean()
    return float(x @ y / (x @ x)) if x.any() else 0.0
