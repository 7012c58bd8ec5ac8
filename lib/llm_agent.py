"""lib.llm_agent."""

from collections import Counter

from env import VisGenEnv
from lib.llm import (
    Endpoint,
    Failed,
    bill,
    chat,
    check_failures,
    cost,
    make_request,
    read_object,
    read_text,
    run_jobs,
)
from lib.runs import cut_tail, each_line, seeded_rng
from lib.tasks import load_scenarios
from lib.text import fill_template, to_json
from lib.toolbox import load_defaults, load_tools, tool_schemas, tool_signature
from lib.workflows import load_workflows

# ---------------------------------------------------------------------------------------------------------------------
# VisionAgent by an LLM (`data.agent: openai`): the same two agents, whose words are a model's
NEIGHBOURS = 1  # workflows that MetaAgent is shown: its own, and the nearest to it


async def route_by_llm(endpoint, task):
    """TaskAgent (Fig. 4): {scenario, workflow, tools} for a request, from its text and attached media alone. lib.llm.Failed if none is had."""
    scenarios, workflows, tools = load_scenarios("en")["scenarios"], load_workflows(), load_tools()
    one_of = lambda names: {"type": "string", "enum": list(names)}  # noqa: E731
    form = {
        "scenario": one_of(scenarios),
        "workflow": one_of(workflows),
        "tools": {"type": "array", "items": one_of(tools)},
    }
    values = {
        "request": task["request"],
        "inputs": task["inputs"],
        "scenarios": scenarios,
        "workflows": workflows,
        "tools": [tool_signature(name) for name in tools],
    }
    return await chat(
        endpoint,
        lambda attempt: make_request(
            endpoint.llm, "prompts/task_agent.jinja", form, values, attempt
        ),
        read_object,
    )


def guide_of(route, env, n):
    """What MetaAgent is told beside the environment's messages: how to work, the chosen workflow and the n - 1 nearest to it, the pool's schemas."""
    flows = load_workflows()
    chosen = flows[route["workflow"]]
    apart = lambda flow: len(
        {*flow["requires"], *flow["fits"]} ^ {*chosen["requires"], *chosen["fits"]}
    )  # noqa: E731
    near = sorted(
        (f for f in flows.values() if f["modality"] == chosen["modality"]),
        key=lambda f: (f is not chosen, apart(f)),
    )
    return fill_template(
        "prompts/meta_agent.jinja",
        scenario=load_scenarios("en")["scenarios"][route["scenario"]]["title"],
        workflows=near[:n],
        tools=[to_json(schema["function"]) for schema in tool_schemas(env.pool)],
        most_turns=env.rollout.max_turns,
        most_errors=load_defaults()["max_errors"],
    )


async def vision_agent_by_llm(endpoint, task, config):
    """Run VisionAgent on one task in VisGenEnv: TaskAgent routes, MetaAgent writes turns until the episode ends (Sec. 3.1). Returns the trajectory
    with its `tools`, its `pool` and what TaskAgent said (`agent`). lib.llm.Failed if the endpoint gives some turn no reply.

    The calls are text, so a tool message goes back as the user's: endpoints take the role `tool` only for calls of their own. A turn that is cut
    off at `max_tokens` is played as it is. The guide stands in the requests, not in the trajectory: the policy has to do without.
    """
    route, seed = (
        await route_by_llm(endpoint, task),
        seeded_rng(config.seed, "visgen", task["id"]).getrandbits(31),
    )
    own = {tool for step in load_workflows()[route["workflow"]]["steps"] for tool in step["tool"]}
    env = VisGenEnv(config.rollout)
    opening, info = env.reset(
        {
            **task,
            "workflow": route["workflow"],
            "pool": [t for t in load_tools() if t in own or t in route["tools"]],
        },
        seed,
    )
    guide = guide_of(route, env, NEIGHBOURS)
    said = [{"role": "system", "content": f"{opening[0]['content']}\n\n{guide}"}, *opening[1:]]
    while not env.ended:
        text = await chat(
            endpoint,
            lambda attempt: {
                "model": endpoint.llm.model,
                "messages": list(said),
                "temperature": endpoint.llm.temperature,
                "seed": seed + attempt,
                "max_tokens": endpoint.llm.max_tokens,
            },
            lambda reply, _: read_text(reply)[0],
        )
        replies, *_ = env.step(text)
        responses = "\n".join(
            f"<tool_response>{reply['content']}</tool_response>" for reply in replies
        )
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": responses}]
    return {
        **env.trajectory(),
        "tools": info["tools"],
        "pool": env.pool,
        "agent": {"model": endpoint.llm.model, **route},
    }


def read_finished(path, tasks):
    """{task id: trajectory} of a file of llm_agents; a last line that was broken off is cut from it. SystemExit where it has other requests."""
    cut_tail(path)
    finished = {t["task"]["id"]: t for t in (each_line(path) if path.is_file() else [])}
    for task in tasks:
        if task["id"] in finished and finished[task["id"]]["task"]["request"] != task["request"]:
            raise SystemExit(
                f"error: {path} has another request for task {task['id']}; remove the file, or choose another name (name=...)"
            )
    return finished


def llm_agents(tasks, config, path):
    """VisionAgent by the LLM of section `llm` on many tasks at once: (trajectories in the tasks' order, counts).

    Each finished trajectory is a line of the file `path` at once; tasks that stand there are not made again. A task whose endpoint failed for good is
    left out and counted with its reason. SystemExit with the counts above `max_failures` or `max_run_tokens`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_finished(path, tasks)
    todo, left_out, asked = [t for t in tasks if t["id"] not in done], {}, Counter()
    found, endpoint = (
        len(tasks) - len(todo),
        Endpoint(config.llm, "VisionAgent", "replies", asked),
    )
    with open(path, "a", encoding="utf-8") as file:

        async def job(task):
            try:
                done[task["id"]] = await vision_agent_by_llm(endpoint, task, config)
            except Failed as e:
                left_out[task["id"]] = str(e)
                check_failures(endpoint, len(left_out), len(left_out) + asked["made"], "tasks", e)
                return
            asked["made"] += 1
            file.write(to_json(done[task["id"]]) + "\n")
            file.flush()

        try:
            run_jobs(endpoint, job, todo, "VisionAgent")
        finally:
            print(
                f"VisionAgent by {endpoint.llm.model}: {len(tasks)} tasks, {found} made before, {asked['made']} now, {len(left_out)} left out; "
                f"{bill(endpoint)}"
            )
            for reason, n in Counter(left_out.values()).most_common():
                print(f"  {n} left out: {reason}")
    counts = {
        "tasks": len(tasks),
        "before": found,
        "made": asked["made"],
        "left_out": left_out,
        "requests": asked["requests"],
        "tokens_in": asked["tokens"] - asked["tokens_out"],
        "tokens_out": asked["tokens_out"],
        "usd": cost(endpoint),
    }
    return [done[task["id"]] for task in tasks if task["id"] in done], counts
