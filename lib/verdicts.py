"""What the transfer study says: both sides of each theorem (Sec. 4.3.3) from the points that
lib/transfer.py played, as a dict for transfer.json, as lines of text and as a picture.

Intervals are 95 % ones, by bootstrap over seeds (runs), then over held-out tasks inside each.
"""

import statistics
from collections import Counter
from pathlib import Path

from lib.runs import seeded_rng
from lib.tables import interval
from lib.theorems import (
    anchoring,
    bound,
    fit_constants,
    improvement_bound,
    plan_sufficiency,
    resampled_means,
    slope,
    terms,
    with_interval,
)

# What a return may sum: the stand-in for the paper's R_vision, or R_vrt in both environments.
RETURNS = {"vision": "R_vision's stand-in", "ltr": "R_vrt in both environments"}
# R_vrt that counts as near-optimal in Corollary 4.3: the paper's "exceeding 95%".
NEAR_OPTIMAL = 0.95
VIRTUAL = "1"
ROUNDING = 1e-9


# ------------------------------------------------------------------------------- the points' values
def mean_of(rows: list[dict], name: str) -> float:
    """The mean of a value over episodes."""
    return statistics.mean(row[name] for row in rows)


def task_means(record: dict, name: str) -> list[float]:
    """A value of a point's episodes, its mean a task, in the tasks' order."""
    by_task = {}
    for row in record["episodes"]:
        by_task.setdefault(row["task"], []).append(row[name])
    return [statistics.mean(values) for values in by_task.values()]


class Study:
    """The records of all runs' points, found by run, policy and environment."""

    def __init__(self, records: list[dict], c_tools: dict[str, float]):
        self.at = {}
        for r in records:
            self.at[r["run"], r["policy"], r["real"]] = r
        self.runs = list(dict.fromkeys(r["run"] for r in records))
        self.c_tools = c_tools
        self.phi = {run: self.phi_of(run) for run in self.runs}

    def values(self, run: str, policy: str, real: str, name: str):
        """A value's means a task, as an array."""
        import numpy

        return numpy.array(task_means(self.at[run, policy, real], name))

    def phi_of(self, run: str) -> float:
        """Phi_plan of a run: over all episodes of PST and VRL in the simulator."""
        rows = [row for p in ("pst", "vrl") for row in self.at[run, p, VIRTUAL]["episodes"]]
        return plan_sufficiency([r["plan"] for r in rows], [r["vision"] for r in rows])

    def mixed(self) -> list[str]:
        """The environments in which all dials are mixed, from the lowest fidelity."""
        names = {r[2] for r in self.at if r[1] == "pst" and r[2] in self.c_tools}
        return sorted((n for n in names if " " not in n), key=float)

    def differences(self, one: str, other: str, reals: list[str], name: str) -> list:
        """One policy's value less another's, (environments, tasks) a run that has both."""
        import numpy

        found = []
        for run in self.runs:
            if all((run, p, real) in self.at for p in (one, other) for real in reals):
                rows = [
                    self.values(run, one, real, name) - self.values(run, other, real, name)
                    for real in reals
                ]
                found.append(numpy.array(rows))
        return found


def make_points(study: Study) -> list[dict]:
    """Both sides' parts of Theorem 4.1 for every policy and environment, but for policies that were
    not trained in the simulator. `gap_low`: the least that the gap's 95 % interval holds."""
    points = []
    for (run, policy, real), record in study.at.items():
        if policy.startswith("random"):
            continue
        virtual = study.at[run, policy, VIRTUAL]
        result = mean_of(virtual["episodes"], "result")
        point = {
            "run": run,
            "policy": policy,
            "real": real,
            "fidelity": record["fidelity"],
            "c_tool": study.c_tools[real],
            "kl": virtual["kl"]["episode"],
            "kl_token": virtual["kl"]["token"],
            "phi": study.phi[run],
            "result": result,
            "j_vrt": mean_of(virtual["episodes"], "ltr"),
        }
        point["terms"] = terms(point["c_tool"], point["kl"], point["phi"], result)
        for name in RETURNS:
            here = study.values(run, policy, real, name)
            there = study.values(run, policy, VIRTUAL, "ltr")
            middle, low, high = interval([here - there], resamples=1000)
            point[name] = {
                "j_real": float(here.mean()),
                "gap": abs(middle),
                "gap_low": max(0.0, low, -high),
            }
        points.append(point)
    return points


def theorem_41(points: list[dict], name: str) -> dict:
    """Theorem 4.1 for one of RETURNS: constants fitted on one half of the (C_tool, run) pairs, the
    bound tested on the other, both ways round; and on the dials turned alone.

    Beside it stands the bound without any term: the largest gap of the fitted half. `within_noise`:
    whether the gap's own 95 % interval reaches down to the bound.
    """
    mixed = [p for p in points if " " not in p["real"]]
    alone = [p for p in points if " " in p["real"]]
    pairs = sorted({(p["fidelity"], p["run"]) for p in mixed})
    seeded_rng("transfer halves").shuffle(pairs)
    halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    constants, tested, tested_alone = [], [], []
    for fitted in halves:
        inside = [p for p in mixed if (p["fidelity"], p["run"]) in fitted]
        outside = [p for p in mixed if (p["fidelity"], p["run"]) not in fitted]
        gaps = [p[name]["gap"] for p in inside]
        found = fit_constants([p["terms"] for p in inside], gaps) if inside else None
        constants.append(found)
        if found is None:
            continue
        tested += [against_bound(p, name, found, max(gaps)) for p in outside]
        tested_alone += [against_bound(p, name, found, max(gaps)) for p in alone]
    return {
        "constants": constants,
        "tested": tested,
        "mixed": held(tested),
        "alone": held(tested_alone),
    }


def against_bound(point: dict, name: str, constants: tuple, flat: float) -> dict:
    """One point against the bound: what it was, and whether it held."""
    right = bound(constants, point["terms"])
    gap = point[name]
    return {
        **{k: point[k] for k in ("run", "policy", "real", "c_tool")},
        "gap": gap["gap"],
        "bound": right,
        "holds": gap["gap"] <= right + ROUNDING,
        "within_noise": gap["gap_low"] <= right + ROUNDING,
        "flat_holds": gap["gap"] <= flat + ROUNDING,
        "flat": flat,
    }


def held(tested: list[dict]) -> dict | None:
    """How often and how loosely the bound held over tested points; None for no points."""
    if not tested:
        return None
    by_run = {}
    for t in tested:
        by_run.setdefault(t["run"], []).append(t)

    def over(value):
        return interval([[float(value(t)) for t in some] for some in by_run.values()], 2000)

    return {
        "n": len(tested),
        "holds": over(lambda t: t["holds"]),
        "within_noise": over(lambda t: t["within_noise"]),
        "slack": over(lambda t: t["bound"] - t["gap"]),
        "worst": max(t["gap"] - t["bound"] for t in tested),
        "gap": over(lambda t: t["gap"]),
        "above_1": over(lambda t: t["bound"] >= 1),
        "flat_holds": over(lambda t: t["flat_holds"]),
        "flat_slack": over(lambda t: t["flat"] - t["gap"]),
    }


def theorem_42(study: Study, points: list[dict], name: str) -> dict:
    """Theorem 4.2 for one of RETURNS: the real gain of VRL over PST beside the right side, a row an
    environment, from the lowest C_tool, and the counts over all runs."""
    reals = study.mixed()
    gains = study.differences("vrl", "pst", reals, name)
    spread = resampled_means(gains)
    rows, counts = [], Counter()
    for i, real in enumerate(reals):
        sides = []
        for run, gain in zip(study.runs, gains):
            at = {p["policy"]: p for p in points if (p["run"], p["real"]) == (run, real)}
            vrl = at["vrl"]
            virtual_gain = vrl["j_vrt"] - at["pst"]["j_vrt"]
            kappa = anchoring(vrl["kl_token"])
            error = vrl[name]["gap"]
            right = improvement_bound(vrl["c_tool"], vrl["phi"], kappa, virtual_gain, error)
            sides.append(right)
            own = float(gain[i].mean())
            counts["points"] += 1
            counts["holds"] += own >= right
            counts["positive"] += right > 0
            counts["positive_and_gain"] += right > 0 and own > 0
        rows.append(
            {
                "real": real,
                "c_tool": study.c_tools[real],
                "gain": three(spread[:, i], [g[i].mean() for g in gains]),
                "right": statistics.mean(sides),
            }
        )
    return {"rows": rows, **counts}


def three(drawn, values: list) -> list[float]:
    """[mean, low, high] of values, with the 95 % interval of their bootstrap."""
    import numpy

    return [float(numpy.mean(values)), *(float(x) for x in numpy.quantile(drawn, (0.025, 0.975)))]


def corollary_43(study: Study, name: str) -> dict:
    """Corollary 4.3 for one of RETURNS: the slope of the real gain over C_tool, and the largest
    fall from one C_tool to the next, whose intervals together are wrong in 5 % of cases."""
    reals = study.mixed()
    gains = study.differences("vrl", "pst", reals, name)
    c_tools = [study.c_tools[real] for real in reals]
    steepness = with_interval(gains, lambda means: slope(c_tools, means))
    level = 1 - 0.05 / max(1, len(reals) - 1)
    steps = []
    for i in range(len(reals) - 1):
        step = with_interval(gains, lambda means, i=i: means[i + 1] - means[i], level)
        steps.append({"from": reals[i], "to": reals[i + 1], "step": step})
    falls = [s for s in steps if s["step"][2] < -ROUNDING]
    verdict = "not decided: the interval of the slope holds 0"
    if falls or steepness[2] < -ROUNDING:
        verdict = "refuted: the gain falls as C_tool grows"
    elif steepness[1] > ROUNDING:
        verdict = "agrees: the gain grows with C_tool, and no step falls beyond noise"
    reward = [mean_of(study.at[run, "vrl", VIRTUAL]["episodes"], "ltr") for run in study.runs]
    return {
        "slope": steepness,
        "steps": steps,
        "said": verdict,
        "virtual_reward": statistics.mean(reward),
        "near_optimal": statistics.mean(reward) >= NEAR_OPTIMAL,
    }


def kappa_rows(study: Study, points: list[dict], coefs: dict[str, float], name: str) -> dict:
    """VRL by its kl_coef: KL, kappa, the virtual gain over PST, and the real gain over the real
    environments that all were played in. `loss` is what of the virtual gain the real one lacks.

    coefs: {policy: its kl_coef}. `difference`: the loss of the largest coefficient less that of the
    smallest; below 0, anchoring helps transfer.
    """
    everywhere = {real for _, policy, real in study.at if policy in coefs and real != VIRTUAL}
    reals = [r for r in study.mixed() if r in everywhere]
    reals = [r for r in reals if all((run, p, r) in study.at for run in study.runs for p in coefs)]
    rows, losses = [], {}
    for policy, coef in sorted(coefs.items(), key=lambda item: item[1]):
        virtual = study.differences(policy, "pst", [VIRTUAL], "ltr")
        gains = study.differences(policy, "pst", reals, name)
        if not reals or not gains:
            continue
        real_gain = [g.mean(axis=0, keepdims=True) for g in gains]
        losses[policy] = [v - g for v, g in zip(virtual, real_gain)]
        token = statistics.mean(
            p["kl_token"] for p in points if (p["policy"], p["real"]) == (policy, VIRTUAL)
        )
        rows.append(
            {
                "policy": policy,
                "kl_coef": coef,
                "kl_token": token,
                "kappa": anchoring(token),
                "virtual_gain": with_interval(virtual, first),
                "real_gain": with_interval(real_gain, first),
                "loss": with_interval(losses[policy], first),
            }
        )
    difference = None
    if len(rows) > 1:
        least, most = losses[rows[0]["policy"]], losses[rows[-1]["policy"]]
        difference = with_interval([m - x for m, x in zip(most, least)], first)
    return {"reals": reals, "rows": rows, "difference": difference}


def first(means) -> float:
    """Of one row's mean: it."""
    return float(means[0])


def randomised(study: Study, policy: str, plain: str, name: str) -> list[dict]:
    """Return of the policy trained with the dials turned less that of its twin trained without, at
    the same environments; none where either is missing."""
    rows = []
    for real in study.mixed():
        gained = study.differences(policy, plain, [real], name)
        if gained:
            difference = with_interval(gained, first)
            rows.append({"real": real, "c_tool": study.c_tools[real], "difference": difference})
    return rows


def analyse(study: Study, coefs: dict[str, float], random_policy: str, plain: str) -> dict:
    """All that the study says, for transfer.json."""
    points = make_points(study)
    result = {"c_tool": study.c_tools, "phi": study.phi, "runs": study.runs, "points": points}
    for name in RETURNS:
        result[name] = {
            "theorem_41": theorem_41(points, name),
            "theorem_42": theorem_42(study, points, name),
            "corollary_43": corollary_43(study, name),
            "kappa": kappa_rows(study, points, coefs, name),
            "randomised": randomised(study, random_policy, plain, name),
        }
    return result


# -------------------------------------------------------------------------------- in words, as text
def said(three_numbers: list | tuple, sign: str = "") -> str:
    """A value with its interval."""
    middle, low, high = three_numbers
    return f"{middle:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def transfer_lines(result: dict) -> list[str]:
    """The study's tables and its verdict on each theorem, as lines of text."""
    settings = result["settings"]
    phi = ", ".join(f"{run} {value:.3f}" for run, value in result["phi"].items())
    lines = [
        f"Transfer from VisGenEnv to its dials (lib/dials.py): {len(result['runs'])} run(s), "
        f"{settings['tasks']} held-out tasks x {settings['rollouts']} episodes a point at "
        f"temperature 1; judge: {settings['judge']}; 95 % intervals over runs and tasks",
        f"Phi_plan: {phi}",
    ]
    if not any(p["j_vrt"] for p in result["points"]):
        lines.append("R_vrt is 0 throughout: these runs are too short to say anything")
    for name, title in RETURNS.items():
        found = result[name]
        lines += ["", f"=== the real return sums {title}", *policy_lines(result, name)]
        lines += [*lines_41(found["theorem_41"]), *lines_42(found["theorem_42"])]
        lines += lines_43(found["corollary_43"])
        lines += [*kappa_lines(found["kappa"]), *randomised_lines(found["randomised"])]
    return lines


def policy_lines(result: dict, name: str) -> list[str]:
    """A line an environment: C_tool, then PST's and VRL's real return and gap, over the runs."""
    lines = [f"{'environment':16}{'C_tool':>7}" + f"{'J_real':>10}{'gap':>8}" * 2 + "   (pst, vrl)"]
    for real, c_tool in result["c_tool"].items():
        cells = ""
        for policy in ("pst", "vrl"):
            some = [p for p in result["points"] if (p["policy"], p["real"]) == (policy, real)]
            j_real = statistics.mean(p[name]["j_real"] for p in some)
            gap = statistics.mean(p[name]["gap"] for p in some)
            cells += f"{j_real:10.3f}{gap:8.3f}"
        lines.append(f"{real:16}{c_tool:7.3f}{cells}")
    for policy in ("pst", "vrl"):
        some = [p for p in result["points"] if (p["policy"], p["real"]) == (policy, VIRTUAL)]
        means = {k: statistics.mean(p[k] for p in some) for k in ("j_vrt", "kl", "result")}
        lines.append(
            f"{policy}: J_vrt {means['j_vrt']:.3f}, R_result {means['result']:.3f}, "
            f"KL to PST {means['kl']:.3f} nats an episode"
        )
    return lines


def lines_41(found: dict) -> list[str]:
    """Theorem 4.1 in words."""
    lines = [""]
    for half, constants in zip(("first", "second"), found["constants"]):
        text = "none do: a gap is above 0 where all three terms are 0"
        if constants:
            text = "delta {:.3f}, alpha {:.4f}, beta {:.3f}".format(*constants)
        lines.append(f"  constants fitted on the {half} half: {text}")
    for where, title in (("mixed", "on the other half"), ("alone", "on the dials turned alone")):
        h = found[where]
        if h is None:
            lines.append(f"Theorem 4.1 {title}: nothing to test")
            continue
        lines.append(
            f"Theorem 4.1 {title} ({h['n']} tests): the bound holds on {said(h['holds'])} of the "
            f"points, within the gaps' noise on {said(h['within_noise'])}; it is loose by "
            f"{said(h['slack'])} where the gap is {said(h['gap'])}; at worst the gap is "
            f"{h['worst']:+.3f} above it"
        )
        lines.append(
            f"  a bound without terms (the largest gap fitted) holds on {said(h['flat_holds'])}, "
            f"loose by {said(h['flat_slack'])}; the bound is 1 or more, and so says nothing, on "
            f"{said(h['above_1'])}"
        )
    return lines


def lines_42(found: dict) -> list[str]:
    """Theorem 4.2 in words."""
    lines = ["", f"  {'environment':14}{'C_tool':>7}  {'real gain of VRL':26}right side, mean"]
    for row in found["rows"]:
        lines.append(
            f"  {row['real']:14}{row['c_tool']:7.3f}  {said(row['gain'], '+'):26}"
            f"{row['right']:+.3f}"
        )
    lines.append(
        f"Theorem 4.2: the gain is at least the right side at {found['holds']} of "
        f"{found['points']} points; the right side is positive at {found['positive']}, and the "
        f"gain at {found['positive_and_gain']} of those; at the simulator's own C_tool the gain is "
        f"{said(found['rows'][-1]['gain'], '+')}"
    )
    return lines


def lines_43(found: dict) -> list[str]:
    """Corollary 4.3 in words."""
    premise = "near its optimum" if found["near_optimal"] else "not near its optimum"
    lines = [
        "",
        f"Corollary 4.3: {found['said']}; slope of the gain over C_tool "
        f"{said(found['slope'], '+')}; R_vrt after VRL is {found['virtual_reward']:.3f}, {premise}",
    ]
    if found["steps"]:
        least = min(found["steps"], key=lambda s: s["step"][0])
        lines.append(
            f"  the least step, from fidelity {least['from']} to {least['to']}: "
            f"{said(least['step'], '+')}"
        )
    return lines


def kappa_lines(found: dict) -> list[str]:
    """VRL by its kl_coef in words."""
    if not found["rows"]:
        return ["", "kappa: no run beside it was trained"]
    where = ", ".join(found["reals"])
    lines = [
        "",
        f"  kappa, over the environments {where} (loss = virtual gain - real gain)",
        f"  {'kl_coef':>8}{'KL/token':>10}{'kappa':>8}  {'virtual gain':26}{'real gain':26}loss",
    ]
    for row in found["rows"]:
        lines.append(
            f"  {row['kl_coef']:8g}{row['kl_token']:10.2g}{row['kappa']:8.4f}  "
            f"{said(row['virtual_gain'], '+'):26}{said(row['real_gain'], '+'):26}"
            f"{said(row['loss'], '+')}"
        )
    if found["difference"]:
        low, high = found["difference"][1:]
        verdict = "not decided"
        if high < 0:
            verdict = "anchoring helps transfer"
        elif low > 0:
            verdict = "anchoring harms transfer"
        lines.append(
            f"kappa: {verdict}; loss at the largest kl_coef less that at the smallest "
            f"{said(found['difference'], '+')}"
        )
    return lines


def randomised_lines(rows: list[dict]) -> list[str]:
    """Domain randomisation in words."""
    if not rows:
        return ["", "domain randomisation: no run of it, or no twin without it, was trained"]
    lines = ["", "domain randomisation: real return less that of its twin without, by environment"]
    for row in rows:
        lines.append(
            f"  {row['real']:14}C_tool {row['c_tool']:.3f}  {said(row['difference'], '+')}"
        )
    return lines


# ------------------------------------------------------------------------------------- as a picture
def plot_transfer(result: dict, path: Path) -> None:
    """Two pictures a return: the gap over C_tool with the bound of the other half, and the real
    gain of VRL over C_tool with the right side of Theorem 4.2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (11, 4 * len(RETURNS))
    figure, axes = plt.subplots(len(RETURNS), 2, figsize=size, constrained_layout=True)
    for (left, right), (name, title) in zip(axes, RETURNS.items()):
        plot_gaps(left, result[name]["theorem_41"]["tested"], title)
        plot_gains(right, result[name]["theorem_42"]["rows"], title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_gaps(axis, tested: list[dict], title: str) -> None:
    """Theorem 4.1: each tested point's gap, and the bound fitted without it, by policy."""
    policies = sorted({t["policy"] for t in tested})
    for policy, colour in zip(policies, ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8")):
        own = sorted((t for t in tested if t["policy"] == policy), key=lambda t: t["c_tool"])
        x = [t["c_tool"] for t in own]
        axis.plot(x, [t["gap"] for t in own], "o", color=colour, label=policy)
        axis.plot(x, [t["bound"] for t in own], "_", color=colour, markersize=12)
    axis.set(
        xlabel="C_tool, measured",
        ylabel="|J_real - J_vrt|",
        title=f"dots: gap, dashes: bound fitted without it ({title})",
    )
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    if policies:
        axis.legend(fontsize=7)


def plot_gains(axis, rows: list[dict], title: str) -> None:
    """Theorem 4.2 and Corollary 4.3: the gain with its interval, and the theorem's right side."""
    x = [row["c_tool"] for row in rows]
    middle = [row["gain"][0] for row in rows]
    axis.plot(x, middle, "o-", color="C0", label="real gain of VRL over PST")
    for at, row in zip(x, rows):
        axis.plot([at, at], row["gain"][1:], color="C0", alpha=0.5)
    axis.plot(x, [row["right"] for row in rows], "s--", color="C3", label="Gamma E[dR_vrt] - E")
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(xlabel="C_tool, measured", ylabel="J_real(VRL) - J_real(PST)", title=title)
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
