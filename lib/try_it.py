"""bench.py try: one request of your own, played by a policy or by VisionAgent before your eyes.

TaskAgent reads the request (Sec. 3.1). What it does not read, but what stands there in plain words
("a 15 s film about a copper teapot, with music"), is said again in wordings that it knows: all of
this is ours, as is the choice of plain words.
"""

import argparse
import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from env import VisGenEnv, parse_utpc
from lib.experiment import Config, load_config
from lib.expert import vision_agent
from lib.families import attach_media
from lib.pages import cards_of, refresh_index
from lib.reading import facts_of, find_noun, read_request, task_agent
from lib.runs import ROOT, seeded_rng, write_atomic
from lib.scenarios import HAN, load_scenarios, material
from lib.tasks import choose_picture, difficulty_of, dimension_of, word_request
from lib.text import fill_template, to_json
from rewards import explain, headline, ltr_reward, print_explained

EXAMPLE = "A 15 s product film about a copper teapot, three shots, with music"
# Plain words for what Table 8's task types make, in the order in which they are looked for, beside
# the nouns of data/scenarios.yaml.
NOUNS = {
    r"product (?:film|clip|spot|ad|commercial)": "product_marketing_videos",
    r"product (?:picture|photo|shot)": "product_images",
    "music clip": "music_videos",
    "trailer": "game_videos",
    "documentary": "popular_science_documentaries",
    "cartoon|animation": "animated_short_films",
    "poster": "marketing_posters",
    "avatar": "avatar_design",
    "banner": "banner_graphics",
    "photo|photograph": "realistic_photography",
    "film|video|clip": "story_videos",
    "picture|image|drawing": "stylization",
}
SOUND = r"\b(?:with|and|plus)(?: [\w-]+)? (?:{})\b(?! video| clip)"
# Constraint: (pattern, value where the pattern has no group).
FACTS = {
    "duration_s": (r"\b(\d+)[ -]?(?:s|secs?|seconds?)\b", None),
    "shots": (r"\b(\w+)[ -](?:shots?|scenes?)\b(?! concept)", None),
    "aspect_ratio": (r"\b(\d+:\d+)(?= |[.,;]|$)", None),
    "transparent": (r"\btransparent(?: background)?\b", True),
    "music": (SOUND.format("music|soundtrack"), True),
    "narration": (SOUND.format("narration|narrator|voice-?over|speaker"), True),
    "sfx": (SOUND.format("sound effects?|sfx"), True),
    "subtitles": (SOUND.format("subtitles?|captions?"), True),
}
SOUNDS = ("music", "narration", "sfx", "subtitles")
SUBJECT = (
    r"\b(?:about|of|for|showing|featuring|on) (?:an?|the|my|our|this) "
    r"([^,.;!?]+?)(?= (?:with|in [\w -]+ style)\b|[,.;!?]|$)"
)
STYLE = r"\bin (?:an? )?([\w -]+?) style\b"


# ---------------------------------------------------------------------------- the command
def try_it(arguments: list[str], load_policy: Callable) -> None:
    """`bench.py try "REQUEST"`: play it, print all as it comes, its reward, and write a page.

    load_policy: (config, run) -> (policy, tokenizer). SystemExit: a request of which nothing can
    be made, or no policy to play it.
    """
    parser = argparse.ArgumentParser(
        prog="bench.py try",
        description="One request, played before your eyes; then its reward, and a page that shows "
        "what was made.",
    )
    parser.add_argument("request", help=f'what is to be made, such as "{EXAMPLE}"')
    parser.add_argument("--run", type=Path, help="the policy's run (default: the newest finished)")
    parser.add_argument(
        "--agent",
        choices=("policy", "expert"),
        default="policy",
        help="who plays: the run's policy, or the scripted VisionAgent (default: %(default)s)",
    )
    parser.add_argument(
        "--sampled", action="store_true", help="at temperature 1 (default: the likeliest tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and of chance")
    given = parser.parse_args(arguments)
    run = given.run and given.run.resolve()
    if run is None and given.agent == "policy":
        run = newest_run()
    if run and not (run / "config.yaml").is_file():
        raise SystemExit(f"error: {given.run} is no run: config.yaml is missing there")
    config = load_config(run / "config.yaml") if run else Config()

    task = task_of(given.request, given.seed)
    print(f"request  {task['request']}")
    if task["request"] != given.request:
        print("         (yours in words that TaskAgent knows)")
    print(f"read     {facts_of(task['constraints'])}; subject: {task['constraints']['subject']}")
    print(f"         workflow {task['workflow']}, a pool of {len(task['pool'])} tools")
    for line in foreign(task, config):
        print(f"note     {line}")
    if given.agent == "expert":
        trajectory = vision_agent(task, ToldEnv(config.rollout), given.seed)
    else:
        policy, tokenizer = load_policy(config, run)
        temperature = float(given.sampled)
        trajectory = play(policy, tokenizer, task, config, temperature, given.seed)
    reward = ltr_reward(trajectory, config.reward, trajectory.get("pool"), config.llm)
    trajectory["reward"] = reward
    rows = explain(trajectory, reward, config.reward)
    print()
    print_explained({**trajectory, "head": headline(reward, config.reward), "rows": rows})
    target = (run or ROOT / "runs") / "try.html"
    cards = cards_of([trajectory], config)
    write_atomic(target, fill_template("templates/demo.jinja", cards=cards))
    refresh_index(target)
    print(f"{target}: the same as a page, with what was made (stand-ins)")


def newest_run() -> Path:
    """The run under runs/ that was finished last. SystemExit if there is none."""
    finished = sorted((ROOT / "runs").glob("*/vrl/after.json"), key=lambda p: p.stat().st_mtime)
    if not finished:
        raise SystemExit(
            "error: no finished run under runs/; `python train_vrl.py --config configs/quick.yaml` "
            "makes one, --run names one, and --agent expert needs none"
        )
    return finished[-1].parents[1]


def foreign(task: dict, config: Config) -> list[str]:
    """What of a task lies outside the part of the world that a run has practised, in words."""
    c, data = task["constraints"], config.data
    lines = []
    if data.scenarios != ["all"] and task["scenario"] not in data.scenarios:
        known = ", ".join(name.replace("_", " ") for name in data.scenarios)
        lines.append(f"{task['scenario'].replace('_', ' ')} lie outside data.scenarios: {known}")
    if unheard := [kind for kind in c["audio"] if kind not in data.sounds]:
        lines.append(f"data.sounds lacks {', '.join(unheard)}")
    if (c["shots"] or 0) > data.max_shots:
        lines.append(f"{c['shots']} shots are more than data.max_shots, {data.max_shots}")
    if c["images"] > data.max_images:
        lines.append(f"{c['images']} images are more than data.max_images, {data.max_images}")
    if c["family"] and not data.families:
        lines.append(
            f"a wish of the family {c['family'].replace('_', ' ')}, and data.families is 0"
        )
    return [f"this run has not practised it: {line}" for line in lines]


# ---------------------------------------------------------------------------- reading
def task_of(request: str, seed: int) -> dict:
    """The task record of a request. What it needs from the user is attached, drawn by seed.

    SystemExit: it names nothing that can be made, or no subject.
    """
    rng = seeded_rng(seed, "try", request)
    language = "zh" if HAN.search(request) else "en"
    request = " ".join(request.split())
    if language == "en":
        request = in_known_words(request, rng)
    _, name = find_noun(request, language)
    if name is None:
        raise SystemExit(unreadable(language))
    c = read_request(request)
    workflow, pool = task_agent(request)
    inputs = [choose_picture(rng)] if c["input"] else []
    return {
        "id": "try",
        "split": "try",
        "modality": load_scenarios(language)["scenarios"][name]["modality"],
        "scenario": name,
        "dimension": dimension_of(c),
        "request": request,
        "language": language,
        "inputs": attach_media(rng, c, language) if c["family"] else inputs,
        "constraints": c,
        "difficulty": difficulty_of(c),
        "workflow": workflow,
        "pool": pool,
    }


def in_known_words(request: str, rng) -> str:
    """An English request in TaskAgent's wordings: as it is where these say all that is read in it.

    SystemExit as task_of.
    """
    c = read_request(request)
    found, name = find_noun(request, "en")
    whole = found and c["subject"] != request
    if whole and c["family"]:
        return request
    if not found:
        name, number = plain_noun(request)
    scenario = load_scenarios("en")["scenarios"][name]
    of_pictures = scenario["modality"] == "image"
    if not found:
        c["images"], c["videos"] = (number, 0) if of_pictures else (0, number)
    foreign_to_it = ("duration_s", "shots", "audio") if of_pictures else ("transparent",)
    facts = {k: v for k, v in plain_facts(request).items() if k not in foreign_to_it}
    if whole and all(c[key] for key in facts):
        return request
    c.update({key: value for key, value in facts.items() if not c[key]})
    rest = request
    for pattern, _ in FACTS.values():
        rest = re.sub(rf"(?:,|\b(?:in|on|and)(?: an?)?)? ?{pattern}", "", rest, flags=re.I)
    if about := re.search(SUBJECT, rest.strip(), re.I):
        article = "an" if about[1][0].lower() in "aeiou" else "a"
        style = re.search(STYLE, request, re.I)
        c["subject"], c["style"] = f"{article} {about[1].strip()}", style and style[1]
    elif not whole:
        raise SystemExit(unreadable("en"))
    c["storyboard"] = scenario["title"] == "Storyboards"
    # The first wording of each list.
    book, choose = material("visgen", "en"), itemgetter(0)
    words = word_request(rng, c, book["scenarios"][name], book, "try", "en", None, False, choose)
    return " ".join(words.split())


def unreadable(language: str) -> str:
    """The error for a request that names nothing that can be made, with what would be read."""
    nouns = [s["noun"][0] for s in load_scenarios(language)["scenarios"].values()]
    return (
        "error: the request does not say what is to be made and about what; write it like "
        f'"{EXAMPLE}". What can be made: {", ".join(nouns)}. "of" or "about" and an article go '
        "before the subject; seconds, shots, a shape such as 16:9, a transparent background, "
        "music, narration, sound effects and subtitles are read too. Chinese is read in the "
        "wordings of data/scenarios_zh.yaml alone"
    )


def plain_noun(request: str) -> tuple[str, int]:
    """(task type, how many) of what a request wants made, in plain words. SystemExit if none."""
    book = load_scenarios("en")
    nouns = {}
    for name, scenario in book["scenarios"].items():
        nouns |= dict.fromkeys(map(re.escape, scenario["noun"]), name)
    numbers = {word: n for n, word in book["number_words"].items()}
    for noun, name in {**nouns, **NOUNS}.items():
        if found := re.search(rf"\b(?:(\w+) )?(?:{noun})s?\b", request, re.I):
            before = (found[1] or "").lower()
            number = int(before) if before.isdecimal() else numbers.get(before, 1)
            return name, max(1, number)
    raise SystemExit(unreadable("en"))


def plain_facts(request: str) -> dict:
    """The constraints that an English request states in plain words.

    >>> plain_facts(EXAMPLE)
    {'duration_s': 15, 'shots': 3, 'audio': ['music']}
    """
    numbers = {word: n for n, word in load_scenarios("en")["number_words"].items()}
    found = {}
    for name, (pattern, value) in FACTS.items():
        match = re.search(pattern, request, re.I)
        if match and name == "shots":
            number = match[1].lower()
            value = int(number) if number.isdecimal() else numbers.get(number)
        elif match and value is None:
            value = int(match[1]) if match[1].isdecimal() else match[1]
        if match and value:
            found[name] = value
    if audio := [kind for kind in SOUNDS if found.pop(kind, False)]:
        found["audio"] = audio
    return found


# ---------------------------------------------------------------------------- playing
def play(policy, tokenizer, task: dict, config: Config, temperature: float, seed: int) -> dict:
    """The policy's episode on a task, told as it is played; temperature 0 is greedy."""
    import torch

    from lib.rollout import open_rollouts
    from lib.sampler import BatchSampler

    [rollout], _ = open_rollouts(tokenizer, [task], config, seed, 1)
    env = ToldEnv(config.rollout)
    env.reset(task, rollout.seed)
    with torch.inference_mode():
        sampler = BatchSampler(policy, tokenizer, [rollout], [env], config, temperature, seed)
        sampler.read_prompts()
        while sampler.playing():
            sampler.reply(sampler.sample())
            sampler.read()
    ended = rollout.trajectory["ended"]
    if ended == "max_tokens":
        unfinished = tokenizer.decode(rollout.ids[rollout.turn_start :])
        print(f"\nturn {len(env.turns) + 1}, cut off\n  {unfinished}")
    return rollout.trajectory


def tell_turn(number: int, text: str) -> None:
    """Print one turn of the agent: thought, plan, calls, answer, and what is wrong with it."""
    turn = parse_utpc(text)
    print(f"\nturn {number}")
    for thought in turn["think"]:
        print(f"  think   {thought.strip()}")
    for step in turn["plan"] or []:
        after = f" (after {', '.join(map(str, step['after']))})" if step["after"] else ""
        print(f"  plan    {step['id']}. {step['tool']}: {step['goal']}{after}")
    for call in turn["calls"]:
        print(f"  call    {call['name']} {to_json(call['arguments'])}")
    if turn["answer"]:
        handed_over = ", ".join(turn["answer"]["deliverables"]) or "nothing"
        print(f"  answer  {handed_over}: {turn['answer']['summary']}")
    for fault in turn["faults"]:
        print(f"  fault   {fault['code']}: {fault['message']}")


class ToldEnv(VisGenEnv):
    """VisGenEnv that prints every turn and its replies as they come."""

    def step(self, text: str) -> tuple[list[dict], float, bool, bool, dict]:
        """VisGenEnv's, told."""
        tell_turn(len(self.turns) + 1, text)
        result = super().step(text)
        for reply in result[0]:
            print(f"  reply   {reply['content']}", flush=True)
        return result
