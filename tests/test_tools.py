"""The 36 tools: schemas, the golden values of the real services, media flow, the audit, and the fidelity dial."""
import json
from collections import Counter

import pytest
from test_env import ANSWER, EXPECTED, HAPPY, TABLE_9, TASK, call, error, fresh, last, studio

from env import RULES, RolloutConfig, audit, load_tools, read_cases, to_json, tool_schemas, tool_signature
from tools import speech_seconds

# ---------------------------------------------------------------------------- the tools as data

def test_names_and_order_are_table_9s():
    assert list(load_tools()) == TABLE_9 == list(HAPPY) and len(TABLE_9) == 36


def test_schemas_are_valid_for_openai_and_match_the_entries():
    schemas = tool_schemas(TABLE_9)
    assert json.loads(json.dumps(schemas)) == schemas

    def walk(schema, path):
        assert schema["type"] in ("object", "array", "string", "integer", "number", "boolean"), path
        if schema["type"] == "object":
            assert schema["additionalProperties"] is False and set(schema["required"]) <= set(schema["properties"]), path
            for name, child in schema["properties"].items():
                walk(child, f"{path}.{name}")
        if schema["type"] == "array":
            walk(schema["items"], path + "[]")
        if "default" in schema:
            assert "enum" not in schema or schema["default"] in schema["enum"], path
    for schema in schemas:
        function = schema["function"]
        assert schema["type"] == "function" and set(function) == {"name", "description", "parameters"}
        assert 0 < len(function["name"]) <= 64 and function["description"]
        walk(function["parameters"], function["name"])
    for name, tool in load_tools().items():
        params = tool["parameters"]["properties"]
        assert set(tool["media"]) | set(tool["screened"]) <= set(params), name
        assert all(rule["rule"] in RULES and rule["param"] in params for rule in tool["rules"]), name
        assert tool["call"] in ("job", "sync", "local") and tool["stands_for"] and "2025" in tool["stands_for"], name


def test_signature_is_one_line():
    assert tool_signature("tool_text2image_gemini") == 'tool_text2image_gemini(prompt, aspect_ratio="1:1", n=1)'
    assert tool_signature("tool_video_speed_adjust") == "tool_video_speed_adjust(video, factor?, target_duration?)"


@pytest.mark.parametrize("name", TABLE_9)
def test_happy_path(name):
    env = studio()
    reply = call(env, name, **HAPPY[name])
    assert "error" not in reply, reply
    record = env.calls[-1]
    assert record["status"] == "ok" and record["arguments"] == HAPPY[name] and record["virtual_s"] >= 0
    makes = load_tools()[name]["makes"]
    if makes == "nothing":
        assert "ids" not in reply and (reply.get("answer") or reply.get("tasks"))
        return
    made = [env.artifacts[i] for i in reply["ids"]]
    assert record["outputs"] == reply["ids"] and made and {m["kind"] for m in made} == {makes}
    for artifact in made:
        for field in ("id", "kind", "width", "height", "duration_s", "fps", "n_frames", "has_audio", "shots", "parents", "tool",
                      "arguments", "media"):
            assert field in artifact
        assert artifact["tool"] == name and (artifact["media"] or makes in ("text", "html", "data"))
        if makes == "video":
            assert sum(artifact["shot_frames"]) == artifact["n_frames"] and len(artifact["shot_frames"]) == artifact["shots"]
            assert artifact["duration_s"] == round(artifact["n_frames"] / artifact["fps"], 6)
    if name in EXPECTED:
        kind, size, duration = EXPECTED[name]
        assert (made[0]["kind"], made[0]["duration_s"]) == (kind, duration)
        assert size is None or (made[0]["width"], made[0]["height"]) == size


@pytest.mark.parametrize("name", TABLE_9)
def test_wrong_arguments_are_refused_by_name(name):
    env = studio(max_turns=10 ** 6)
    env.errors = -10 ** 6      # this test makes more than ten
    schema = load_tools()[name]["parameters"]
    found = error(env, name, **HAPPY[name], colour="red")
    assert (found["code"], found["param"], found["retryable"]) == ("unknown_parameter", "colour", False)
    for param in schema["required"]:
        found = error(env, name, **{k: v for k, v in HAPPY[name].items() if k != param})
        assert (found["code"], found["param"]) == ("missing_parameter", param)
    for param, spec in schema["properties"].items():
        for wrong in ([None, {"a": 1}, True] if spec["type"] != "boolean" else [None, "yes", 1]):
            found = error(env, name, **{**HAPPY[name], param: wrong})
            assert (found["code"], found["param"]) == ("invalid_parameter", param) and param in found["message"]
        if "enum" in spec:
            wrong = "nope" if spec["type"] == "string" else 7
            found = error(env, name, **{**HAPPY[name], param: wrong})
            assert found["param"] == param and str(spec["enum"][0]) in found["message"] and str(wrong) in found["message"]
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in spec:
                found = error(env, name, **{**HAPPY[name], param: spec[bound] + step})
                assert found["param"] == param and str(spec[bound]) in found["message"]
        if "maxLength" in spec:
            assert error(env, name, **{**HAPPY[name], param: "x" * (spec["maxLength"] + 1)})["param"] == param
        if "maxItems" in spec:
            filler = HAPPY[name].get(param, ["in_1"])[0]
            assert error(env, name, **{**HAPPY[name], param: [filler] * (spec["maxItems"] + 1)})["param"] == param
    for param, limits in load_tools()[name]["media"].items():
        if limits.get("or_text"):
            continue
        many = schema["properties"][param]["type"] == "array"
        path = f"{param}[0]" if many else param
        other = "in_1" if "image" not in limits["kinds"] else "in_2"
        base = {**HAPPY[name], **({"mode": "pro"} if param == "image_tail" else {})}
        found = error(env, name, **{**base, param: [other] if many else other})
        assert (found["code"], found["param"]) == ("wrong_kind", path)
        found = error(env, name, **{**base, param: ["vid_99"] if many else "vid_99"})
        known = [i for i, a in env.artifacts.items() if a["kind"] in limits["kinds"]]
        assert (found["code"], found["param"]) == ("file_not_found", path) and all(i in found["message"] for i in known)


def test_messages_stay_short():
    env = studio(max_turns=10 ** 6)
    env.errors = -100
    for name, args in [("tool_text2video_veo", {"prompt": "x", "duration": 5}), ("tool_text2image_gpt", {"prompt": "x", "size": "1920x1080"}),
                       ("tool_image2video_keling", {"image": "in_1", "prompt": "x", "duration": 8})]:
        assert len(error(env, name, **args)["message"]) <= 160
    assert error(env, "tool_text2video_veo", prompt="x", duration=5)["message"].endswith("duration must be one of 4, 6, 8, got 5")


# ---------------------------------------------------------------------------- golden values (facts/tools.md, section 5)

def clips(env, *seconds):
    for s in seconds:
        call(env, *(("tool_image2video_keling",) if s in (5, 10) else ("tool_text2video_veo",)),
             **({"image": "in_1", "prompt": "x", "duration": s} if s in (5, 10) else {"prompt": "x", "duration": s}))
    return [i for i, a in env.artifacts.items() if a["kind"] == "video" and i != "in_2"]


def test_concatenation():
    env = fresh()
    ids = clips(env, 8, 8, 8)
    reply = call(env, "tool_video_composite", videos=ids, transition="crossfade", transition_duration=0.5)
    film = env.artifacts[reply["ids"][0]]
    assert (film["duration_s"], film["n_frames"], film["shots"]) == (23.0, 552, 3)
    assert call(env, "tool_video_composite", videos=ids, transition="fade")["duration_s"] == 24.0
    env = fresh()
    reply = call(env, "tool_video_composite", videos=clips(env, 5, 5, 8))
    film = env.artifacts[reply["ids"][0]]
    assert (film["duration_s"], film["n_frames"], film["has_audio"], film["shot_frames"]) == (18.0, 432, True, [120, 120, 192])


@pytest.mark.parametrize("factor, frames, seconds", [(1.25, 441, 18.375), (1.1, 501, 20.875)])
def test_speed_of_23_s(factor, frames, seconds):
    env = fresh()
    call(env, "tool_video_composite", videos=clips(env, 8, 8, 8), transition="crossfade")
    call(env, "tool_video_speed_adjust", video="vid_4", factor=factor)
    assert (last(env)["n_frames"], last(env)["duration_s"], last(env)["shots"]) == (frames, seconds, 3)


def test_speed_of_10_s():
    env = fresh()
    clips(env, 10)
    call(env, "tool_video_speed_adjust", video="vid_1", factor=0.7)
    assert (last(env)["n_frames"], last(env)["duration_s"]) == (342, 14.25)
    call(env, "tool_video_speed_adjust", video="vid_1", target_duration=7)
    assert last(env)["duration_s"] == 7.0
    assert "0.25 to 4" in error(env, "tool_video_speed_adjust", video="vid_1", target_duration=2)["message"]
    assert error(env, "tool_video_speed_adjust", video="vid_1", target_duration=7, factor=2)["param"] == "factor"


@pytest.mark.parametrize("source, tool, size", [
    ((1664, 928), "tool_image_edit_qwen", (1376, 768)), ((1344, 768), "tool_image_edit_qwen", (1360, 768)),
    ((1344, 768), "tool_image2video_keling", (1270, 726)), ((1024, 1024), "tool_image2video_keling", (960, 960)),
    ((768, 1344), "tool_image2video_keling", (726, 1270)), ((1536, 672), "tool_image2video_keling", (1452, 634)),
    ((768, 1344), "tool_image2video_veo3", (720, 1280)), ((768, 1344), "tool_image_edit_gemini", (768, 1344)),
    ((1024, 1024), "tool_image_edit_gpt", (1024, 1024))])
def test_sizes_that_follow_an_image(source, tool, size):
    env = fresh({"id": "t", "request": "x", "inputs": [{"kind": "image", "width": source[0], "height": source[1]}]})
    key = "images" if "edit" in tool else "image"
    call(env, tool, prompt="x", **{key: ["in_1"] if key == "images" else "in_1"})
    assert (last(env)["width"], last(env)["height"]) == size


def test_cross_tool_traps():
    env = fresh({"id": "t", "request": "x", "inputs": [{"kind": "image", "width": 4096, "height": 1365},
                                                       {"kind": "image", "width": 300, "height": 300}]})
    assert error(env, "tool_image2video_keling", image="in_1", prompt="x")["code"] == "bad_media"
    call(env, "tool_text2image_seed", prompt="x", size="4K")
    assert (last(env)["width"], last(env)["height"]) == (4096, 4096)
    found = error(env, "tool_image_edit_qwen", images=["img_1"], prompt="x")
    assert (found["code"], found["param"]) == ("media_too_large", "images[0]") and "3072" in found["message"]
    assert error(env, "tool_image_edit_qwen", images=["in_2"], prompt="x")["code"] == "media_too_small"
    call(env, "tool_text2image_hunyuan", prompt="x", resolution="1344:704")
    assert "cropped" in call(env, "tool_image2video_veo3", image="img_2", prompt="x")["warning"]
    assert "1664*928" in error(env, "tool_text2image_qwen", prompt="x", size="1024x1024")["message"]
    assert error(env, "tool_image2video_keling", image="in_2", prompt="x", image_tail="in_2")["param"] == "image_tail"
    assert error(env, "tool_text2image_seed", prompt="x", size="5000x5000")["param"] == "size"
    assert error(env, "tool_text2image_seed", prompt="x", n=6, images=["in_2"] * 10)["param"] == "n"
    assert error(env, "tool_text2image_gpt", prompt="x", background="transparent", output_format="jpeg")["param"] == "background"


def test_speech_beats_and_songs():
    speech = load_tools()["tool_tts_generation"]["output"]
    sentence = "The city wakes before the sun does, and so does she."
    assert speech_seconds(speech, {"language": "en", "speed": 1}, sentence) == 4.37
    env = fresh({**TASK, "inputs": [{"kind": "audio", "duration_s": 23.0, "bpm": 120}, {"kind": "audio", "duration_s": 1.5, "bpm": 90}]})
    env.artifacts["in_1"]["beat_offset_s"] = 0.35
    reply = call(env, "tool_beat_detect", audio="in_1")
    assert (reply["tempo"], reply["n_beats"]) == (120.0, 46) and last(env)["beat_times"][:2] == [0.35, 0.85]
    assert "warning" in call(env, "tool_beat_detect", audio="in_2")
    reply = call(env, "tool_music_suno", prompt="piano")
    assert len(reply["ids"]) == 2 and all(120 <= s <= 240 for s in reply["duration_s"])
    env = fresh()
    long = "This sentence is much too long for a clip of eight seconds. " * 5
    found = error(env, "tool_tts_composite", video="in_2", text=long)
    assert "8.0 s" in found["message"] and "shorten" in found["message"]


def test_trims_are_exact_to_the_frame():
    env = fresh({"id": "t", "request": "x", "inputs": [{"kind": "video", "width": 640, "height": 360, "duration_s": 10.0, "fps": 30}]},
                max_turns=10 ** 6)
    for i in range(0, 101, 4):
        for j in range(i + 1, 101, 3):
            call(env, "tool_video_trim_edit", video="in_1", start=i / 10, end=j / 10)
            assert last(env)["n_frames"] == (j - i) * 3, (i, j)
    assert "10.0" in error(env, "tool_video_trim_edit", video="in_1", start=0, end=10.5)["message"]
    assert error(env, "tool_video_trim_edit", video="in_1", start=5, end=5)["param"] == "start"


def test_post_production_refusals():
    env = fresh()
    cue = {"start": 0, "end": 2, "text": "a"}
    assert "8.0" in error(env, "tool_subtitle_add_text", video="in_2", subtitles=[{**cue, "end": 9}])["message"]
    assert error(env, "tool_subtitle_add_text", video="in_2", subtitles=[cue, {**cue, "start": 1}])["param"] == "subtitles[1]"
    assert error(env, "tool_video_postprocess", video="in_2", operations=[{"op": "crop", "width": 2000, "height": 10}])["param"] == "operations[0]"
    assert error(env, "tool_video_postprocess", video="in_2", operations=[{"op": "loop"}])["param"] == "operations[0].count"
    assert error(env, "tool_subtitle_add_text", video="in_2", subtitles=[{**cue, "end": "2"}])["param"] == "subtitles[0].end"
    assert error(env, "tool_audio_edit_cut", audio="in_3", end=2, fade_in=2, fade_out=1)["param"] == "fade_out"
    assert error(env, "tool_sound_fx_gen", prompt="x", video="in_2", duration=3)["param"] == "duration"
    assert error(env, "tool_html_builder", title="x", sections=[{"media_ids": ["img_9"]}])["param"] == "sections[0].media_ids[0]"


def test_where_a_film_sounds():
    env = fresh()
    film = env.artifacts[call(env, "tool_video_composite", videos=clips(env, 5, 5, 8))["ids"][0]]
    assert film["sound_frames"] == [[240, 432]] and film["has_audio"]
    call(env, "tool_video_trim_edit", video=film["id"], start=0, end=11)
    assert (last(env)["sound_frames"], last(env)["has_audio"]) == ([[240, 264]], True)
    cut = last(env)["id"]
    call(env, "tool_video_speed_adjust", video=cut, factor=2)
    assert last(env)["sound_frames"] == [[120, 132]]
    call(env, "tool_video_postprocess", video=cut, operations=[{"op": "reverse"}, {"op": "loop", "count": 2}])
    assert last(env)["sound_frames"] == [[0, 24], [264, 288]] and last(env)["n_frames"] == 528
    call(env, "tool_audio_edit_cut", audio="in_3", end=2)
    call(env, "tool_video_composite", videos=["vid_1", "vid_2"], audio="aud_1")
    assert last(env)["sound_frames"] == [[0, 48]] and last(env)["n_frames"] == 240
    call(env, "tool_video_composite", videos=[film["id"]], audio="aud_1", audio_mode="replace")
    assert last(env)["sound_frames"] == [[0, 48]]
    call(env, "tool_tts_composite", video="vid_1", segments=[{"start": 1, "text": "Hello there."}])
    assert last(env)["sound_frames"] == [[24, 58]]      # 1.45 s of speech
    call(env, "tool_video_composite", videos=["vid_2", "vid_3"], transition="crossfade", transition_duration=1)
    assert last(env)["sound_frames"] == [[96, 288]] and last(env)["n_frames"] == 288


def test_files_that_a_service_cannot_read():
    env = fresh()
    call(env, "tool_text2image_gpt", prompt="x", output_format="webp")
    for name in ("tool_image2video_keling", "tool_image2video_veo3"):
        found = error(env, name, image="img_1", prompt="x")
        assert found["code"] == "unsupported_format" and "webp" in found["message"]
    assert "ids" in call(env, "tool_image_edit_gemini", images=["img_1"], prompt="x")
    call(env, "tool_tts_generation", text="Hello", format="opus")
    assert error(env, "tool_audio_analysis", media=["aud_1"], question="what?")["code"] == "unsupported_format"


def test_songs_follow_their_words():
    for words, (low, high) in {"calm piano": (70, 100), "fast drums": (110, 150)}.items():
        for seed in range(30):
            env = fresh(seed=seed)
            call(env, "tool_music_suno", prompt=words)
            assert all(low <= a["bpm"] <= high for a in env.artifacts.values() if a["tool"] == "tool_music_suno")


def test_prices_that_depend_on_what_goes_in():
    env = fresh()
    call(env, "tool_video_analysis", media=["in_2"], question="how long?")
    assert env.calls[-1]["price_usd"] == 0.006 and env.calls[-1]["virtual_s"] == 4.8      # 8 s at 300 tokens a second, 300 out
    call(env, "tool_tts_composite", video="in_2", text="Hello there.")
    assert env.calls[-1]["price_usd"] == 0.00018
    call(env, "tool_video_composite", videos=["in_2"], resolution="1080p")
    assert env.calls[-1]["virtual_s"] == 0.5 + 8 * 0.6 and (last(env)["width"], last(env)["height"]) == (1920, 1080)


# ---------------------------------------------------------------------------- media flow from tool to tool

def test_chain_and_lineage():
    env = fresh({"id": "t", "request": "x"})
    steps = [("tool_text2image_gemini", {"prompt": "a keeper", "aspect_ratio": "16:9"}, []),
             ("tool_image_edit_gemini", {"images": ["img_1"], "prompt": "on the stairs"}, [("img_1", "reference")]),
             ("tool_image2video_keling", {"image": "img_2", "prompt": "climbs"}, [("img_2", "first_frame")]),
             ("tool_image2video_keling", {"image": "img_1", "image_tail": "img_2", "mode": "pro", "prompt": "x"},
              [("img_1", "first_frame"), ("img_2", "last_frame")]),
             ("tool_video_composite", {"videos": ["vid_1", "vid_2"]}, [("vid_1", "source"), ("vid_2", "source")]),
             ("tool_video_trim_edit", {"video": "vid_3", "start": 0, "end": 7}, [("vid_3", "source")]),
             ("tool_tts_composite", {"video": "vid_4", "text": "Night falls."}, [("vid_4", "source")]),
             ("tool_subtitle_add_text", {"video": "vid_5", "subtitles": [{"start": 0, "end": 3, "text": "Night"}]}, [("vid_5", "source")])]
    for name, args, parents in steps:
        reply = call(env, name, **args)
        assert "error" not in reply, reply
        assert [(p["id"], p["role"]) for p in last(env)["parents"]] == parents
    film = last(env)
    assert (film["duration_s"], film["shots"], film["has_audio"], film["n_cues"]) == (7.0, 2, True, 1)
    assert env.artifacts["vid_3"]["has_audio"] is False
    env.step(ANSWER)
    record = json.loads(to_json(env.trajectory()))
    assert set(record) >= {"task", "messages", "calls", "artifacts", "plan", "plans", "answer", "ended", "reward", "seed", "virtual_s",
                           "price_usd", "turns"}
    assert record["ended"] == "answer" and record["price_usd"] > 0.5 and record["virtual_s"] > 100 and record["reward"] == {}


def test_text_flow():
    env = fresh({"id": "t", "request": "x"})
    assert call(env, "tool_video_script_gen", topic="a lighthouse", duration=24, n_scenes=3)["ids"] == ["txt_1"]
    reply = call(env, "tool_video_shot_gen", script="txt_1")
    shots = env.artifacts["txt_2"]["shot_list"]
    assert reply["n_shots"] == 3 and sum(s["duration"] for s in shots) == pytest.approx(24)
    assert call(env, "tool_storyboard_polish", storyboard="txt_2")["n_shots"] == 3
    call(env, "tool_script_storyboard_merge", script="txt_1", storyboard="txt_2")
    assert all(s["narration"] for s in last(env)["shot_list"]) and [p["id"] for p in last(env)["parents"]] == ["txt_1", "txt_2"]
    assert error(env, "tool_storyboard_polish", storyboard="txt_1")["code"] == "wrong_kind"
    assert len(call(env, "tool_prompt_refine", prompt="fox " * 300)["text"]) <= 200
    assert '"OPEN"' in json.loads(to_json(call(env, "tool_prompt_refine", prompt='a sign "OPEN"')))["text"]


def test_analysis_never_echoes_the_prompt_whole():
    env = fresh()
    prompt = "a weathered keeper carrying lanterns through the spiral staircase during thunder"
    call(env, "tool_text2image_gemini", prompt=prompt)
    answer = call(env, "tool_image_analysis", media=["img_1"], question="what?")["answer"]
    assert "1024x1024" in answer and prompt not in answer and sum(word in answer for word in prompt.split()) <= 4


def test_todo_list_lives_in_the_episode():
    env = fresh()
    call(env, "tool_task_manager", action="create", tasks=[{"id": 1, "title": "draw"}, {"id": 2, "title": "cut"}])
    assert call(env, "tool_task_manager", action="update", tasks=[{"id": 1, "status": "done"}])["tasks"] == ["1 done: draw", "2 todo: cut"]
    assert "2" in error(env, "tool_task_manager", action="update", tasks=[{"id": 5}])["message"]
    assert error(env, "tool_task_manager", action="create")["param"] == "tasks"
    assert call(fresh(), "tool_task_manager", action="list")["tasks"] == []


# ---------------------------------------------------------------------------- fidelity to the real services

def test_the_audit_reproduces_every_case():
    cases = read_cases()
    count = Counter(case["tool"] for case in cases)
    assert len(cases) >= 150 and set(count) == set(TABLE_9) and min(count.values()) >= 3
    assert all(set(case) == {"tool", "arguments", "failure_scale", "expect", "mark", "source"} and case["mark"] in "DSTMA"
               and case["source"] and case["expect"] for case in cases)
    assert len({to_json(case) for case in cases}) == len(cases)
    table, deviations = audit()
    assert deviations == [] and sum(map(sum, table.values())) == 2 * len(cases)
    assert sum(row[1] for row in table.values()) >= 150      # documented ones


def test_the_audit_notices_a_changed_tool(monkeypatch):
    monkeypatch.setitem(load_tools()["tool_text2video_veo"]["output"], "fps", 30)
    table, deviations = audit()
    assert table["tool_text2video_veo"][0] < table["tool_text2video_veo"][1] and deviations
    assert table["tool_text2image_gpt"][0] == table["tool_text2image_gpt"][1]


DIAL_CALLS = [*HAPPY.items(), ("tool_text2video_veo", {"prompt": "x", "duration": 5}), ("tool_image_edit_qwen", {"images": ["in_9"], "prompt": "x"}),
              ("tool_nope", {}), ("tool_text2image_gpt", {"prompt": "x", "n": 10}), ("tool_text2video_veo", {"prompt": "x", "n": 4})]


def outcomes(name, args, fidelity, n=600):
    """Shares of the distinct outcomes of one call. What a faithful service draws from a continuum (a song's length) is left out."""
    env, seen = studio(failure_scale=1.0, fidelity=fidelity) if fidelity == 1 else None, Counter()
    if env is None:
        env = studio(failure_scale=1.0)
        env.rollout = RolloutConfig(fidelity=fidelity)
    for _ in range(n):
        env.used.clear()
        env.errors = 0
        reply = env.call({"name": name, "arguments": args, "error": None})
        more = {k: v for k, v in reply.items() if k != "ids" and (name, k) != ("tool_music_suno", "duration_s")}
        seen[to_json([len(reply.get("ids", [])), more])] += 1
    return {key: count / n for key, count in seen.items()}


def test_the_fidelity_dial_is_the_total_variation():
    distances = {}
    for i, (name, args) in enumerate(DIAL_CALLS):
        args = {**args, "n": 1} if name == "tool_search_inspire" else args      # four sizes, not 4 ** n
        faithful, loose = outcomes(name, args, 1.0), outcomes(name, args, 0.8)
        distances[name, i] = sum(abs(faithful.get(k, 0) - loose.get(k, 0)) for k in {*faithful, *loose}) / 2
    assert all(abs(distance - 0.2) < 0.06 for distance in distances.values()), distances
    assert abs(sum(distances.values()) / len(distances) - 0.2) < 0.01
