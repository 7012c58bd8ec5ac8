"""The client of the LLM judge: many questions at once to an OpenAI-compatible endpoint, for each a verdict in a JSON schema, or None.

rewards.py decides what is asked (the vPlanJudger and R_traj's evaluator of Sec. 4.3.2) and data/prompts/*_judge.jinja hold the words. A failed
judgement is missing, never 0; all retries are made here, none inside the client; a request that was answered once is never sent again.
"""

import asyncio
import hashlib
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from env import PAGES, ROOT, ToolError, check, key, page, read_json, to_json

# What others wrote is shown as JSON: on one line, so that it closes no delimiter, and without the angle brackets of our tags and of chat templates.
PAGES.filters["untrusted"] = lambda value: to_json(value).translate({ord("<"): "\uff1c", ord(">"): "\uff1e"})
ASKED = Counter()      # verdicts, failures and tokens of this process, for the caps on both
SCORE = {"type": "object", "properties": {"reason": {"type": "string"}, "score": {"type": "number", "minimum": 0, "maximum": 1}},
         "required": ["reason", "score"], "additionalProperties": False}


@dataclass(frozen=True)
class JudgeConfig:
    """The LLM of `reward.judge: openai`. The paper names no model and no limits; every number below is ours."""

    url: str = key("http://127.0.0.1:8000/v1", "any OpenAI-compatible endpoint; this is where vLLM serves by default")
    model: str = key("judge", "the model's name there")
    key_env: str = key("JUDGE_API_KEY", "environment variable with the API key; a local server needs none")
    timeout_s: float = key(120.0, "for a whole request, from its start to the last byte")
    tries: int = key(5, "requests for one verdict: the next one after a timeout, 408, 409, 429, 5xx or an unreadable verdict")
    backoff_s: float = key(1.0, "wait before the second try, doubled before each later one; a longer Retry-After of the server's is kept to")
    concurrency: int = key(96, "requests at once: the paper's 24 x 4 rollouts")
    max_tokens: int = key(2048, "of one verdict, the thoughts of a reasoning model included")
    max_run_tokens: int = key(100_000_000, "cap on cost: tokens, in and out, of one process; above it no request is sent and the run stops. "
                                           "About 4,100 go into a trajectory that was told of all 36 tools: some 50 million in all of tiny.yaml")
    max_failures: float = key(0.05, "share of verdicts that may fail; above it the run stops, once 20 were asked for")
    neighbours: int = key(3, "expert plans that the plan judge is shown")
    cache: str = key("runs/.verdicts", "folder of verdicts, a file a request: what was asked before costs nothing (no run can have this name)")

    def __post_init__(self):
        for name in ("tries", "concurrency", "max_tokens", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.llm.{name} is {getattr(self, name)}; it must be at least 1")


class Stop(Exception):
    """The run must end; it becomes a SystemExit outside the event loop, which that would tear down."""


def digest(*parts):
    """32 hexadecimal digits that depend on the parts alone."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def make_request(llm, template, names, values, attempt):
    """Arguments of a chat completion that asks for {name: {reason, score}}, greedy and with a fixed seed.

    The nonce of the prompt's delimiters follows from the content, so that the same question is the same request and no content can hold its own
    nonce; another attempt gets another one, since a greedy model repeats itself.
    """
    schema = {"type": "object", "properties": dict.fromkeys(names, SCORE), "required": list(names), "additionalProperties": False}
    return {"model": llm.model, "messages": [{"role": "user", "content": page(template, nonce=digest(values, attempt), **values)}],
            "temperature": 0, "seed": 0, "max_tokens": llm.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}}


def read_verdict(reply, schema):
    """The verdict in a chat completion. ValueError, or env.check's ToolError, says what is wrong with it."""
    choices = getattr(reply, "choices", None)      # what a gateway in trouble sends may have none, or anything there
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "message", None), "content", None)
    cut = getattr(choice, "finish_reason", None) == "length"
    if cut or not text or not isinstance(text, str):
        raise ValueError(f"the verdict is {'cut off at max_tokens' if cut else 'no text'}: {str(text or reply):.200}")
    verdict = read_json(text)
    check(verdict, schema, "verdict")
    return verdict


def keep(path, verdict):
    """Write a verdict so that it is there whole or not at all, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}.tmp")
    draft.write_text(to_json(verdict), encoding="utf-8")
    os.replace(draft, path)


async def ask(client, slots, llm, template, names, values):
    """One verdict, from the cache or within `llm.tries` requests; None if none could be read. Stop above a cap, with the counts."""
    import openai

    wait, path = 0.0, None
    for attempt in range(llm.tries):
        await asyncio.sleep(wait)
        async with slots:
            request = make_request(llm, template, names, values, attempt)
            path = path or ROOT / llm.cache / f"{digest(llm.url, request)}.json"
            if path.is_file():
                return json.loads(path.read_text(encoding="utf-8"))
            if ASKED["tokens"] >= llm.max_run_tokens:
                raise Stop(f"error: the judge has used {ASKED['tokens']} tokens for {ASKED['verdicts']} verdicts; config key "
                           f"`reward.llm.max_run_tokens` allows {llm.max_run_tokens}. The verdicts so far stand in {llm.cache}")
            used = len(str(request)) // 3 + llm.max_tokens      # a guess from above where the server does not say, as after a timeout
            try:
                # A deadline for the whole: the client's own timeouts begin anew with every byte that drips in.
                reply = await asyncio.wait_for(client.chat.completions.create(**request), llm.timeout_s)
                said = getattr(getattr(reply, "usage", None), "total_tokens", None)
                used = said if type(said) is int else used
                verdict = read_verdict(reply, request["response_format"]["json_schema"]["schema"])
            except (openai.APIError, asyncio.TimeoutError, ValueError, ToolError) as e:
                error = e
            else:
                ASKED.update(verdicts=1, tokens=used)
                keep(path, verdict)
                return verdict
        status, headers = getattr(error, "status_code", 500), getattr(getattr(error, "response", None), "headers", {})
        ASKED["tokens"] += 0 if isinstance(error, openai.APIError) else used
        if status < 500 and status not in (408, 409, 429):
            break
        asked_for = headers.get("retry-after", "")
        wait = max(llm.backoff_s * 2 ** attempt, min(float(asked_for), llm.timeout_s) if asked_for.isdecimal() else 0.0)
    ASKED.update(verdicts=1, failed=1)
    if ASKED["verdicts"] >= 20 and ASKED["failed"] > llm.max_failures * ASKED["verdicts"]:
        raise Stop(f"error: the judge at {llm.url} failed on {ASKED['failed']} of {ASKED['verdicts']} verdicts; config key "
                   f"`reward.llm.max_failures` allows {llm.max_failures:.0%}. The last error: {type(error).__name__} {' '.join(str(error).split()):.400}")
    return None


def ask_all(llm, questions):
    """Verdicts {name: {reason, score}} on questions (template, names, values), in order, `llm.concurrency` requests at once; None where one failed.

    SystemExit, with the counts, above a cap of the config.
    """
    async def gather():
        import openai      # half a second, which the rules judge does without
        from tqdm.asyncio import tqdm

        slots = asyncio.Semaphore(llm.concurrency)
        async with openai.AsyncOpenAI(base_url=llm.url, api_key=os.environ.get(llm.key_env) or "none", max_retries=0, timeout=None) as client:
            return await tqdm.gather(*(ask(client, slots, llm, *question) for question in questions), desc="LLM judge", unit="verdict", leave=False,
                                     mininterval=1, disable=len(questions) < 500)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run = asyncio.run
    else:                                     # a notebook's thread runs a loop already
        run = lambda work: ThreadPoolExecutor(1).submit(asyncio.run, work).result()      # noqa: E731
    try:
        return run(gather())
    except Stop as e:
        raise SystemExit(str(e)) from e
