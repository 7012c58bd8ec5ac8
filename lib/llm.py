"""The client of any OpenAI-compatible endpoint, for the LLM judge (rewards.py) and VisionAgent (make_data.py): many jobs at once, one deadline a
request, all retries here and none inside the client, caps on tokens and failures, and a cache: what was answered once is never sent again."""

import asyncio
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lib.experiment import LlmConfig
from lib.runs import ROOT, digest, write_atomic
from lib.text import TEMPLATES, clean, fill_template, read_json, to_json
from lib.toolbox import ToolError, check_schema

# What others wrote is shown as JSON: on one line, so that it closes no delimiter, and without the angle brackets of our tags and of chat templates.
TEMPLATES.filters["untrusted"] = lambda value: to_json(value).translate(
    {ord("<"): "\uff1c", ord(">"): "\uff1e"}
)


class Stop(Exception):
    """The run must end; it becomes a SystemExit outside the event loop, which that would tear down."""


class Failed(Exception):
    """No readable reply to one request within its tries; says what the last one was."""


@dataclass
class Endpoint:
    """An LLM as one user of it sees it. `asked` counts requests, tokens, tokens_out, what was asked for (as `unit` names it) and failed."""

    llm: LlmConfig
    who: str
    unit: str
    asked: Counter
    client: Any = None


def make_request(llm, template, properties, values, attempt, pictures=()):
    """Arguments of a chat completion that asks for a JSON object, with a fixed seed. `properties`: {name: its JSON Schema}, all required.
    `pictures`: (label, data URI), shown after the prompt in their order, each behind its label.

    The nonce of the prompt's delimiters follows from the content, so that the same question is the same request and no content can hold its own
    nonce; another attempt gets another one, since a greedy model repeats itself.
    """
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    content = fill_template(template, nonce=digest(values, attempt), **values)
    if pictures:
        content = [{"type": "text", "text": content}] + [
            part
            for label, uri in pictures
            for part in (
                {"type": "text", "text": f"{label}:"},
                {"type": "image_url", "image_url": {"url": uri}},
            )
        ]
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


def read_text(reply):
    """(text, whether it was cut off at max_tokens) of a chat completion. ValueError if it has none."""
    choices = getattr(
        reply, "choices", None
    )  # what a gateway in trouble sends may have none, or anything there
    choice = choices[0] if isinstance(choices, list) and choices else None
    text, cut = (
        getattr(getattr(choice, "message", None), "content", None),
        getattr(choice, "finish_reason", None) == "length",
    )
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"the reply has no text{', cut off at max_tokens' if cut else ''}: {str(text or reply):.200}"
        )
    return clean(text), cut


def read_object(reply, request):
    """The JSON object that a request of make_request got. ValueError, or env.check's ToolError, says what is wrong with it."""
    text, cut = read_text(reply)
    if cut:
        raise ValueError(f"the reply is cut off at max_tokens: {text:.200}")
    value = read_json(text)
    check_schema(value, request["response_format"]["json_schema"]["schema"], "reply")
    return value


def tokens_of(reply, request):
    """(read, written) tokens; a guess from above where the server does not say, as after a timeout."""
    usage = getattr(reply, "usage", None)
    said = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    # A picture of 768 x 768 is up to about 1,500 tokens, however long its data URI is.
    return (
        said
        if all(type(n) is int for n in said)
        else (len(re.sub(r"data:image[^']*", "x" * 6000, str(request))) // 3, request["max_tokens"])
    )


def cost(endpoint):
    """US$ for the tokens so far; None where the config names no price."""
    llm, asked = endpoint.llm, endpoint.asked
    usd = (
        (asked["tokens"] - asked["tokens_out"]) * llm.price_in + asked["tokens_out"] * llm.price_out
    ) / 1e6
    return usd if llm.price_in or llm.price_out else None


def bill(endpoint):
    """What was used so far, in words."""
    asked, usd = endpoint.asked, cost(endpoint)
    price = (
        f"US$ {usd:.2f}"
        if usd is not None
        else f"US$ not known: `llm.price_in` and `price_out` are 0"
    )
    return f"{asked['requests']} requests, {asked['tokens'] - asked['tokens_out']} tokens in, {asked['tokens_out']} out, {price}"


async def chat(endpoint, make, read):
    """read(reply, request) of a reply to the request make(attempt), from the cache or within `tries` requests. What it returns is JSON.

    Failed if none could be read: `read` says so by ValueError or ToolError. Stop above the cap on tokens, with the counts.
    """
    import openai  # half a second, which the offline judge and agent do without

    llm, asked, wait, path = endpoint.llm, endpoint.asked, 0.0, None
    for attempt in range(llm.tries):
        await asyncio.sleep(wait)
        request, reply = make(attempt), None
        path = path or ROOT / llm.cache / f"{digest(llm.url, request)}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        if asked["tokens"] >= llm.max_run_tokens:
            raise Stop(
                f"error: {endpoint.who} has used {asked['tokens']} tokens for {asked[endpoint.unit]} {endpoint.unit} ({bill(endpoint)}); "
                f"config key `llm.max_run_tokens` allows {llm.max_run_tokens}. What was answered so far stands in {llm.cache}"
            )
        asked["requests"] += 1
        try:
            # A deadline for the whole: the client's own timeouts begin anew with every byte that drips in.
            reply = await asyncio.wait_for(
                endpoint.client.chat.completions.create(**request), llm.timeout_s
            )
            value, error = read(reply, request), None
        except (openai.APIError, asyncio.TimeoutError, ValueError, ToolError) as e:
            error = e
        if not isinstance(error, openai.APIError):
            given, written = tokens_of(reply, request)
            asked.update(tokens=given + written, tokens_out=written)
        if error is None:
            asked[endpoint.unit] += 1
            write_atomic(path, to_json(value))
            return value
        status, headers = (
            getattr(error, "status_code", 500),
            getattr(getattr(error, "response", None), "headers", {}),
        )
        if status < 500 and status not in (408, 409, 429):
            break
        asked_for = headers.get("retry-after", "")
        wait = max(
            llm.backoff_s * 2**attempt,
            min(float(asked_for), llm.timeout_s) if asked_for.isdecimal() else 0.0,
        )
    asked.update({endpoint.unit: 1, "failed": 1})
    raise Failed(f"{type(error).__name__} {' '.join(str(error).split()):.400}") from error


def check_failures(endpoint, failed, of, unit, error):
    """Stop if more than `max_failures` of `of` >= 20 have failed."""
    if of >= 20 and failed > endpoint.llm.max_failures * of:
        raise Stop(
            f"error: {endpoint.who} at {endpoint.llm.url} failed on {failed} of {of} {unit}; config key `llm.max_failures` "
            f"allows {endpoint.llm.max_failures:.0%}. The last error: {error}"
        )


async def ask(endpoint, template, properties, values, pictures=(), again=0):
    """The JSON object {name: value} that a prompt asks for; None if none could be had. Another `again` asks the same anew, with other nonces."""
    first, llm = again * endpoint.llm.tries, endpoint.llm
    try:
        return await chat(
            endpoint,
            lambda attempt: make_request(
                llm, template, properties, values, first + attempt, pictures
            ),
            read_object,
        )
    except Failed as e:
        check_failures(
            endpoint, endpoint.asked["failed"], endpoint.asked[endpoint.unit], endpoint.unit, e
        )
        return None


def run_jobs(endpoint, job, items, title=""):
    """[await job(item) for item in items], `concurrency` at once; with a title, under a progress bar. SystemExit with the counts above a cap."""

    async def gather():
        import openai

        slots = asyncio.Semaphore(
            endpoint.llm.concurrency
        )  # first come, first served: in the items' order

        async def one(item):
            async with slots:
                found = await job(item)
            bar.update()
            return found

        with tqdm(
            total=len(items), desc=title, leave=False, mininterval=1, disable=not title
        ) as bar:
            async with openai.AsyncOpenAI(
                base_url=endpoint.llm.url,
                api_key=os.environ.get(endpoint.llm.key_env) or "none",
                max_retries=0,
                timeout=None,
            ) as endpoint.client:
                return await asyncio.gather(*map(one, items))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run = asyncio.run
    else:  # a notebook's thread runs a loop already
        run = lambda work: ThreadPoolExecutor(1).submit(asyncio.run, work).result()  # noqa: E731
    try:
        return run(gather())
    except Stop as e:
        raise SystemExit(str(e)) from e
