"""The client of any OpenAI-compatible endpoint: many jobs at once, each a chat of requests.

Its users are the LLM judge (lib/judge.py), VisionAgent (lib/llm_agent.py) and the VLM-Grader
(lib/grader.py). It keeps one deadline a request, makes all retries itself, has caps on tokens and
failures, and a cache: what was answered once is never sent again. The limits are ours, and stand in
section `llm` of a config (lib/experiment.py).
"""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.experiment import LlmConfig
from lib.runs import ROOT, digest, write_atomic
from lib.text import TEMPLATES, clean, fill_template, read_json, to_json
from lib.toolbox import ToolError, check_schema

# HTTP answers below 500 that another try may mend: timeout, conflict, too many requests.
PASSING = (408, 409, 429)
# Characters that a picture of 768 x 768 counts as; it is up to about 1,500 tokens, however long
# its data URI is.
PICTURE_CHARS = 6000
# The cap on failures holds from this many verdicts or tasks on.
MIN_ASKED = 20


class Stop(Exception):
    """The run must end. Outside the event loop, which a SystemExit would tear down, it is one."""


class Failed(Exception):
    """No readable reply to one request within its tries; says what the last one was."""


@dataclass
class Endpoint:
    """An LLM as one user of it sees it."""

    llm: LlmConfig
    # Who asks, in messages, and what is asked for: verdicts, tasks, replies.
    who: str
    unit: str
    # Counts: requests, tokens (in and out), tokens_out, failed, and what was asked for, by `unit`.
    asked: Counter
    client: Any = None


# ---------------------------------------------------------------------------- a request
def show_untrusted(value: Any) -> str:
    """What others wrote, for a prompt: JSON, without the angle brackets of tags and templates.

    It stands on one line, so that it cannot close a delimiter.
    """
    return to_json(value).translate({ord("<"): "\uff1c", ord(">"): "\uff1e"})


TEMPLATES.filters["untrusted"] = show_untrusted


def make_request(
    llm: LlmConfig,
    template: str,
    properties: dict[str, dict],
    values: dict,
    attempt: int,
    pictures: list[tuple[str, str]] | tuple = (),
) -> dict:
    """Arguments of a chat completion that asks for a JSON object, with a fixed seed.

    `properties`: {name: its JSON Schema}, all required. `values`: what fills the template.
    `pictures`: (label, data URI), shown after the prompt in their order, each behind its label.

    The nonce of the prompt's delimiters follows from the content, so that the same question is the
    same request and no content can hold its own nonce; another attempt gets another one, since a
    greedy model repeats itself.
    """
    content = fill_template(template, nonce=digest(values, attempt), **values)
    if pictures:
        content = [{"type": "text", "text": content}]
        for label, uri in pictures:
            content.append({"type": "text", "text": f"{label}:"})
            content.append({"type": "image_url", "image_url": {"url": uri}})
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "model": llm.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": llm.temperature,
        "seed": 0,
        "max_tokens": llm.max_tokens,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": schema},
        },
    }


# ---------------------------------------------------------------------------- a reply
def read_text(reply: Any) -> tuple[str, bool]:
    """(text, whether it was cut off at max_tokens) of a completion. ValueError without text."""
    # What a gateway in trouble sends may have no choices, or anything in their place.
    choices = getattr(reply, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "message", None), "content", None)
    is_cut = getattr(choice, "finish_reason", None) == "length"
    if not isinstance(text, str) or not text.strip():
        cut = ", cut off at max_tokens" if is_cut else ""
        raise ValueError(f"the reply has no text{cut}: {str(text or reply):.200}")
    return clean(text), is_cut


def read_object(reply: Any, request: dict) -> dict:
    """The JSON object that a request of make_request got.

    ValueError, or check_schema's ToolError, says what is wrong with it.
    """
    text, is_cut = read_text(reply)
    if is_cut:
        raise ValueError(f"the reply is cut off at max_tokens: {text:.200}")
    value = read_json(text)
    check_schema(value, request["response_format"]["json_schema"]["schema"], "reply")
    return value


def tokens_of(reply: Any, request: dict) -> tuple[int, int]:
    """(read, written) tokens of a request; a guess from above where the server does not say.

    It does not after a timeout (`reply` is None), and some never do.
    """
    usage = getattr(reply, "usage", None)
    read = getattr(usage, "prompt_tokens", None)
    written = getattr(usage, "completion_tokens", None)
    if type(read) is int and type(written) is int:
        return read, written
    text = re.sub(r"data:image[^']*", "x" * PICTURE_CHARS, str(request))
    return len(text) // 3, request["max_tokens"]


# ---------------------------------------------------------------------------- the bill and the caps
def cost(endpoint: Endpoint) -> float | None:
    """US$ for the tokens so far; None where the config names no price."""
    llm, asked = endpoint.llm, endpoint.asked
    if not (llm.price_in or llm.price_out):
        return None
    tokens_in = asked["tokens"] - asked["tokens_out"]
    return (tokens_in * llm.price_in + asked["tokens_out"] * llm.price_out) / 1e6


def bill(endpoint: Endpoint) -> str:
    """What was used so far, in words."""
    asked = endpoint.asked
    usd = cost(endpoint)
    price = "US$ not known: `llm.price_in` and `price_out` are 0"
    if usd is not None:
        price = f"US$ {usd:.2f}"
    return (
        f"{asked['requests']} requests, {asked['tokens'] - asked['tokens_out']} tokens in, "
        f"{asked['tokens_out']} out, {price}"
    )


def check_budget(endpoint: Endpoint) -> None:
    """Stop, with the counts, if `max_run_tokens` are used up."""
    llm, asked = endpoint.llm, endpoint.asked
    if asked["tokens"] >= llm.max_run_tokens:
        raise Stop(
            f"error: {endpoint.who} has used {asked['tokens']} tokens for "
            f"{asked[endpoint.unit]} {endpoint.unit} ({bill(endpoint)}); config key "
            f"`llm.max_run_tokens` allows {llm.max_run_tokens}. What was answered so far stands in "
            f"{llm.cache}"
        )


def check_failures(endpoint: Endpoint, failed: int, of: int, unit: str, error: Exception) -> None:
    """Stop, with the counts, if more than `max_failures` of `of` have failed, once those are 20."""
    llm = endpoint.llm
    if of >= MIN_ASKED and failed > llm.max_failures * of:
        raise Stop(
            f"error: {endpoint.who} at {llm.url} failed on {failed} of {of} {unit}; config key "
            f"`llm.max_failures` allows {llm.max_failures:.0%}. The last error: {error}"
        )


# ---------------------------------------------------------------------------- asking
async def send(
    endpoint: Endpoint, request: dict, read: Callable[[Any, dict], Any]
) -> tuple[Any, Exception | None]:
    """Send one request: (what `read` made of the reply, None), or (None, what went wrong).

    Counts the request and its tokens.
    """
    import openai  # late, see gather_jobs

    endpoint.asked["requests"] += 1
    reply = value = error = None
    try:
        # A deadline for the whole: the client's own begin anew with every byte that drips in.
        reply = await asyncio.wait_for(
            endpoint.client.chat.completions.create(**request), endpoint.llm.timeout_s
        )
        value = read(reply, request)
    except (openai.APIError, TimeoutError, ValueError, ToolError) as e:
        error = e
    if not isinstance(error, openai.APIError):
        n_read, n_written = tokens_of(reply, request)
        endpoint.asked.update(tokens=n_read + n_written, tokens_out=n_written)
    return value, error


def pause_after(error: Exception, attempt: int, llm: LlmConfig) -> float | None:
    """Seconds to wait after a failed attempt (from 0); None where another try mends nothing.

    The wait doubles with each attempt. A longer Retry-After of the server's is kept to, but not
    beyond the time that a request may take.
    """
    status = getattr(error, "status_code", 500)
    if status < 500 and status not in PASSING:
        return None
    headers = getattr(getattr(error, "response", None), "headers", {})
    retry_after = headers.get("retry-after", "")
    wished = min(float(retry_after), llm.timeout_s) if retry_after.isdecimal() else 0.0
    return max(llm.backoff_s * 2**attempt, wished)


def cache_file(llm: LlmConfig, request: dict) -> Path:
    """Where the answer to a request is kept; another server's or model's is another one."""
    return ROOT / llm.cache / f"{digest(llm.url, request)}.json"


async def chat(
    endpoint: Endpoint, make: Callable[[int], dict], read: Callable[[Any, dict], Any]
) -> Any:
    """read(reply, request) of a reply to the request make(attempt), from the cache if it is there.

    `read` returns JSON, and says by ValueError or ToolError that it could not read a reply; then,
    and after errors that pass, the next of `tries` attempts is made. Failed if none was read. Stop
    above the cap on tokens.
    """
    llm, asked = endpoint.llm, endpoint.asked
    path = None
    pause = 0.0
    for attempt in range(llm.tries):
        await asyncio.sleep(pause)
        request = make(attempt)
        # The first attempt's request stands for them all.
        path = path or cache_file(llm, request)
        # Looked for before each attempt: another job or run may have asked the same meanwhile.
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        check_budget(endpoint)
        value, error = await send(endpoint, request, read)
        if error is None:
            asked[endpoint.unit] += 1
            write_atomic(path, to_json(value))
            return value
        pause = pause_after(error, attempt, llm)
        if pause is None:
            break
    asked.update({endpoint.unit: 1, "failed": 1})
    raise Failed(f"{type(error).__name__} {' '.join(str(error).split()):.400}") from error


async def ask(
    endpoint: Endpoint,
    template: str,
    properties: dict[str, dict],
    values: dict,
    pictures: list[tuple[str, str]] | tuple = (),
    again: int = 0,
) -> dict | None:
    """The JSON object {name: value} that a prompt asks for; None if none could be had.

    Another `again` asks the same anew, with other nonces. Stop above the cap on failures.
    """
    llm, asked = endpoint.llm, endpoint.asked
    first = again * llm.tries

    def make(attempt):
        return make_request(llm, template, properties, values, first + attempt, pictures)

    try:
        return await chat(endpoint, make, read_object)
    except Failed as e:
        check_failures(endpoint, asked["failed"], asked[endpoint.unit], endpoint.unit, e)
        return None


# ---------------------------------------------------------------------------- many at once
async def gather_jobs(
    endpoint: Endpoint, job: Callable[[Any], Awaitable], items: list, title: str
) -> list:
    """[await job(item) for item in items], `concurrency` at once; the client lives that long."""
    # Half a second, which the offline judge and agent do without.
    import openai

    # First come, first served: in the items' order.
    slots = asyncio.Semaphore(endpoint.llm.concurrency)

    async def one(item):
        async with slots:
            found = await job(item)
        bar.update()
        return found

    bar = tqdm(total=len(items), desc=title, leave=False, mininterval=1, disable=not title)
    client = openai.AsyncOpenAI(
        base_url=endpoint.llm.url,
        api_key=os.environ.get(endpoint.llm.key_env) or "none",
        max_retries=0,
        timeout=None,
    )
    with bar:
        async with client as endpoint.client:
            return await asyncio.gather(*map(one, items))


def run_to_end(work: Coroutine) -> Any:
    """The result of a coroutine, also from a notebook, whose thread runs an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return ThreadPoolExecutor(1).submit(asyncio.run, work).result()


def run_jobs(
    endpoint: Endpoint, job: Callable[[Any], Awaitable], items: list, title: str = ""
) -> list:
    """[await job(item) for item in items], `concurrency` at once; a title gets a progress bar.

    SystemExit with the counts above a cap.
    """
    try:
        return run_to_end(gather_jobs(endpoint, job, items, title))
    except Stop as e:
        raise SystemExit(str(e)) from e
