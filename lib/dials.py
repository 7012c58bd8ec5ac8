"""The dials of the "real" environment: how a service may answer a call otherwise than VisGenEnv.

Sec. 4.3.3 bounds what training in a simulator is worth with real tools. No real service is called
here. What stands for one is VisGenEnv with other dynamics: `1 - rollout.fidelity` of the calls
deviate, each in one part of the MDP, drawn by the weights `rollout.deviations`. One weight above 0
turns one dial alone. The four dials, and the numbers in them, are ours; no torch.

observation   The reply tells it otherwise: a version of the API that names its fields otherwise and
              gives no sizes, and a gateway whose errors say nothing. What was made is the same.
action        Arguments that the simulator takes are refused: an option that this account, region or
              version of the model does not have. The same options are refused again.
transition    Half of these calls fail, as services under load do; the others come back shorter,
              larger or one item less, unannounced. A refusal comes as an internal error.
reward        Other terms: three times the price, a fee for what is free or has failed, and each
              call counts twice against the service's limits. What was made is the same.

A fault that is a rule of the service (the first, second and last) holds for the whole episode; an
accident (the third) is drawn anew at each call. Every part changes the outcome of every call that
it meets, so `fidelity` is 1 minus the total variation between the two services' outcomes.
"""

from typing import Any

from lib.experiment import DEVIATIONS as PARTS
from lib.experiment import RolloutConfig
from lib.text import to_json
from lib.toolbox import chance, load_tools, refuse

DEARER = 3.0
FEE_USD = 0.01
FAILED_SHARE = 0.5
NO_ERROR = {"code": None, "param": None, "message": None, "retryable": False}
# Of a reply: what other versions of an API leave out.
UNTOLD = ("ids", "size", "duration_s", "sound", "warning")


def deviating_part(rollout: RolloutConfig, seed: Any, index: int, call: dict) -> str | None:
    """The part of the MDP in which a call's outcome is not the simulator's; None: in none.

    seed: the episode's; index: the number of the call in it; call: as parse_utpc found it.
    """
    name = call["name"]
    part = drawn_part(rollout.deviations, chance(seed, name, "part"))
    key = name
    if part == "action":
        key = f"{name} {to_json(settings(call))}"
    elif part == "transition":
        key = index
    return part if chance(seed, key, "fidelity") >= rollout.fidelity else None


def drawn_part(weights: dict[str, float], drawn: float) -> str:
    """The part that a number in [0, 1) falls to, by the parts' weights.

    >>> drawn_part({"observation": 1, "reward": 3}, 0.3)
    'reward'
    """
    weighed = [(part, weights[part]) for part in PARTS if weights.get(part)]
    left = drawn * sum(weight for _, weight in weighed)
    for part, weight in weighed:
        if left < weight:
            return part
        left -= weight
    return weighed[-1][0]


def settings(call: dict) -> dict:
    """The options of a call: its arguments that are a number, a switch or one of a list."""
    tool = load_tools().get(call["name"]) if isinstance(call["name"], str) else None
    if not tool or not isinstance(call["arguments"], dict):
        return {}
    properties = tool["parameters"]["properties"]
    chosen = {}
    for param, value in call["arguments"].items():
        schema = properties.get(param, {})
        if "enum" in schema or schema.get("type") in ("number", "integer", "boolean"):
            chosen[param] = value
    return chosen


def refuse_settings(call: dict) -> None:
    """Raise the ToolError of the dial `action`."""
    chosen = settings(call)
    param = next(iter(chosen), None)
    what = f"{param}={to_json(chosen[param]):.40}" if param else "this model"
    message = f"{what} is not available to your account; choose another"
    refuse(param, message, "not_available")


def fail_or_not(drawn: float) -> None:
    """Raise the ToolError of the dial `transition` for a share of the calls that it meets."""
    if drawn < FAILED_SHARE:
        refuse(None, "internal error, try again", "service_error", True)


def told_otherwise(reply: dict) -> dict:
    """The dial `observation`: what a reply says, in another version of the API.

    >>> told_otherwise({"ids": ["img_1"], "size": "1024x1024", "warning": "one was filtered"})
    {'status': 'succeeded', 'media': ['img_1']}
    """
    if "error" in reply:
        message = "The request was not completed."
        return {"error": {**NO_ERROR, "code": "request_failed", "message": message}}
    rest = {name: value for name, value in reply.items() if name not in UNTOLD}
    media = {"media": reply["ids"]} if "ids" in reply else {}
    return {"status": "succeeded", **media, **rest}


def other_price(price_usd: float) -> float:
    """The dial `reward`: what a call costs, in US dollars."""
    return round(price_usd * DEARER, 6) or FEE_USD
