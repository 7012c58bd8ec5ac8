"""VisionAgent by an LLM (`data.agent: openai`): the two agents of Sec. 3.1 in a model's words.

lib.expert.vision_agent is the scripted one; both play in VisGenEnv and give the same trajectories.
"""

from collections import Counter
from pathlib import Path

from env import VisGenEnv
from lib.experiment import Config
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
from lib.scenarios import load_scenarios
from lib.text import fill_template, to_json
from lib.toolbox import load_defaults, load_tools, tool_schemas, tool_signature
from lib.workflows import load_workflows

NEIGHBOURS = 1  # workflows that MetaAgent is shown: its own, and the nearest to it


def llm_agents(tasks: list[dict], config: Config, path: Path) -> tuple[list[dict], dict]:
    """VisionAgent by the LLM of section `llm` on many tasks at once: (trajectories in the tasks'
    order, counts).

    Each finished trajectory is a line of the file `path` at once; tasks that stand there are not
    made again. A task whose endpoint failed for good is left out and counted with its reason.
    SystemExit with the counts above `llm.max_failures` or `llm.max_run_tokens`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = read_finished(path, tasks)
    todo = [task for task in tasks if task["id"] not in finished]
    before = len(tasks) - len(todo)
    asked = Counter()
    left_out = {}  # task id -> the last error
    endpoint = Endpoint(config.llm, "VisionAgent", "replies", asked)
    with open(path, "a", encoding="utf-8") as file:

        async def play(task):
            try:
                trajectory = await vision_agent_by_llm(endpoint, task, config)
            except Failed as e:
                left_out[task["id"]] = str(e)
                check_failures(endpoint, len(left_out), len(left_out) + asked["made"], "tasks", e)
                return
            finished[task["id"]] = trajectory
            asked["made"] += 1
            file.write(to_json(trajectory) + "\n")
            file.flush()

        try:
            run_jobs(endpoint, play, todo, "VisionAgent")
        finally:
            print(
                f"VisionAgent by {endpoint.llm.model}: {len(tasks)} tasks, {before} made before, "
                f"{asked['made']} now, {len(left_out)} left out; {bill(endpoint)}"
            )
            for reason, n in Counter(left_out.values()).most_common():
                print(f"  {n} left out: {reason}")
    counts = {
        "tasks": len(tasks),
        "before": before,
        "made": asked["made"],
        "left_out": left_out,
        "requests": asked["requests"],
        "tokens_in": asked["tokens"] - asked["tokens_out"],
        "tokens_out": asked["tokens_out"],
        "usd": cost(endpoint),
    }
    return [finished[task["id"]] for task in tasks if task["id"] in finished], counts


def read_finished(path, tasks):
    """{task id: trajectory} of a file of llm_agents; a last line that was broken off is cut
    from it. SystemExit where it has other requests."""
    cut_tail(path)
    lines = each_line(path) if path.is_file() else []
    finished = {trajectory["task"]["id"]: trajectory for trajectory in lines}
    for task in tasks:
        if task["id"] in finished and finished[task["id"]]["task"]["request"] != task["request"]:
            raise SystemExit(
                f"error: {path} has another request for task {task['id']}; remove the file, or "
                "choose another name (name=...)"
            )
    return finished


async def vision_agent_by_llm(endpoint: Endpoint, task: dict, config: Config) -> dict:
    """Run VisionAgent on one task in VisGenEnv: TaskAgent routes, MetaAgent writes turns until the
    episode ends (Sec. 3.1). Returns the trajectory with its `tools`, its `pool` and what TaskAgent
    said (`agent`). lib.llm.Failed if the endpoint gives some turn no reply.

    The calls are text, so a tool message goes back as the user's: endpoints take the role `tool`
    only for calls of their own. A turn that is cut off at `max_tokens` is played as it is. The
    guide stands in the requests, not in the trajectory: the policy has to do without.
    """
    route = await route_by_llm(endpoint, task)
    seed = seeded_rng(config.seed, "visgen", task["id"]).getrandbits(31)
    own = {tool for step in load_workflows()[route["workflow"]]["steps"] for tool in step["tool"]}
    pool = [tool for tool in load_tools() if tool in own or tool in route["tools"]]
    env = VisGenEnv(config.rollout)
    opening, info = env.reset({**task, "workflow": route["workflow"], "pool": pool}, seed)
    guide = guide_of(route, env, NEIGHBOURS)
    messages = [{"role": "system", "content": f"{opening[0]['content']}\n\n{guide}"}, *opening[1:]]

    def next_turn(attempt):
        return {
            "model": endpoint.llm.model,
            "messages": list(messages),
            "temperature": endpoint.llm.temperature,
            "seed": seed + attempt,
            "max_tokens": endpoint.llm.max_tokens,
        }

    def read_turn(reply, request):
        text, _ = read_text(reply)
        return text

    while not env.ended:
        text = await chat(endpoint, next_turn, read_turn)
        replies, *_ = env.step(text)
        responses = "\n".join(
            f"<tool_response>{reply['content']}</tool_response>" for reply in replies
        )
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": responses})
    return {
        **env.trajectory(),
        "tools": info["tools"],
        "pool": env.pool,
        "agent": {"model": endpoint.llm.model, **route},
    }


async def route_by_llm(endpoint: Endpoint, task: dict) -> dict:
    """TaskAgent (Fig. 4): {scenario, workflow, tools} for a request, from its text and attached
    media alone. lib.llm.Failed if none is had."""
    scenarios, workflows, tools = load_scenarios("en")["scenarios"], load_workflows(), load_tools()
    properties = {
        "scenario": {"type": "string", "enum": list(scenarios)},
        "workflow": {"type": "string", "enum": list(workflows)},
        "tools": {"type": "array", "items": {"type": "string", "enum": list(tools)}},
    }
    values = {
        "request": task["request"],
        "inputs": task["inputs"],
        "scenarios": scenarios,
        "workflows": workflows,
        "tools": [tool_signature(name) for name in tools],
    }

    def route_request(attempt):
        template = "prompts/task_agent.jinja"
        return make_request(endpoint.llm, template, properties, values, attempt)

    return await chat(endpoint, route_request, read_object)


def guide_of(route: dict, env: VisGenEnv, n: int) -> str:
    """What MetaAgent is told beside the environment's messages: how to work, the chosen workflow
    and the n - 1 nearest to it, the pool's schemas."""
    workflows = load_workflows()
    chosen = workflows[route["workflow"]]

    def distance(workflow):
        needs = {*workflow["requires"], *workflow["fits"]}
        return workflow is not chosen, len(needs ^ {*chosen["requires"], *chosen["fits"]})

    same_modality = [w for w in workflows.values() if w["modality"] == chosen["modality"]]
    return fill_template(
        "prompts/meta_agent.jinja",
        scenario=load_scenarios("en")["scenarios"][route["scenario"]]["title"],
        workflows=sorted(same_modality, key=distance)[:n],
        tools=[to_json(schema["function"]) for schema in tool_schemas(env.pool)],
        most_turns=env.rollout.max_turns,
        most_errors=load_defaults()["max_errors"],
    )
