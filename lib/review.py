"""Human review of trajectories (Fig. 3): a sheet to judge them on, and the verdicts it saves."""

from pathlib import Path

from lib.cards import with_cards
from lib.experiment import Config
from lib.media import thumbnail
from lib.runs import digest, each_line, seeded_rng, write_atomic
from lib.text import fill_template


def key_of(trajectory: dict) -> str:
    """What a verdict is bound to: ids are the same in every run, the messages are not."""
    return digest(trajectory["messages"], size=6)


def export_review(config: Config, folder: Path, ids: list[str], most: int = 100) -> None:
    """Write review.html: up to `most` candidates that nobody has judged yet, chosen by seed, with
    stand-in pictures and boxes for the verdict. `ids`: the candidates."""
    rng = seeded_rng(config.seed, "review", len(ids))
    chosen = set(rng.sample(ids, min(most, len(ids))))
    items = [t for t in each_line(folder / "trajectories.jsonl") if t["task"]["id"] in chosen]
    for trajectory in items:
        trajectory["key"] = key_of(trajectory)
        trajectory["shown"] = [
            with_pictures(with_cards(artifact, trajectory)) for artifact in handed_over(trajectory)
        ]
    page = fill_template(
        "templates/review.jinja",
        items=items,
        name=config.name,
        sheet=digest([trajectory["key"] for trajectory in items], size=6),
    )
    write_atomic(folder / "review.html", page)
    print(
        f"  {folder / 'review.html'}: {len(items)} of {len(ids)} candidates to judge; save the "
        "verdicts there, then the same command with `review --verdicts FILE`"
    )


def handed_over(trajectory):
    """The artifacts that the answer names."""
    ids = (trajectory["answer"] or {}).get("deliverables") or []
    return [artifact for artifact in trajectory["artifacts"] if artifact["id"] in ids]


def with_pictures(artifact):
    """The artifact with a small picture of each of its shots."""
    pictures = []
    if artifact["kind"] in ("image", "video"):
        pictures = [thumbnail(artifact, shot) for shot in range(artifact["shots"] or 1)]
    return {**artifact, "pictures": pictures}


def read_verdicts(path: Path, candidates: dict[str, str]) -> dict[str, dict]:
    """Human verdicts {id: {"key", "verdict": keep | drop, "reason", "reviewer"}} of a file that the
    review sheet saved; the last one on an id counts.

    `candidates`: {id: key_of it}. What cannot be used is said by line and skipped: no JSON, no
    verdict, an id that is no candidate, another trajectory.
    """
    verdicts, bad = {}, 0
    for n, record in each_line(path, numbered=True):
        if fault := fault_of(record, candidates):
            bad += 1
            print(f"  {path}, line {n} {fault}: skipped")
            continue
        fields = ("key", "verdict", "reason", "reviewer")
        verdicts[record["id"]] = {field: str(record.get(field) or "") for field in fields}
    print(f"  {path}: {len(verdicts)} verdicts" + (f", {bad} lines skipped" if bad else ""))
    return verdicts


def fault_of(record, candidates):
    """What is wrong with a record of a verdict file, as the end of a sentence; None for nothing."""
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        return "is no object with `id` and `verdict`"
    if record.get("verdict") not in ("keep", "drop"):
        return f"has the verdict {record.get('verdict')!r}; keep or drop"
    if record["id"] not in candidates:
        return f"names {record['id']!r}, which is no candidate"
    if record.get("key") != candidates[record["id"]]:
        name = record["id"]
        return f"judges another trajectory of the name {name}: another run's, or an older one"
    return None
