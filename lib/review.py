"""Human review of trajectories (Fig. 3): a sheet to judge them on, and the file of verdicts that it saves."""

from lib.media import thumbnail
from lib.runs import digest, each_line, seeded_rng, write_atomic
from lib.text import fill_template


def key_of(trajectory):
    """What a verdict is bound to: ids are the same in every run, the messages are not."""
    return digest(trajectory["messages"], size=6)


def read_verdicts(path, candidates):
    """Human verdicts {id: {"key", "verdict": keep | drop, "reason", "reviewer"}} of a file that the review sheet saved; the last one on an id counts.

    `candidates`: {id: key_of it}. What cannot be used is said by line and skipped: no JSON, no verdict, an id that is no candidate, another trajectory."""
    verdicts, bad = {}, 0
    for n, row in each_line(path, numbered=True):
        wrong = (
            "is no object with `id` and `verdict`"
            if not isinstance(row, dict) or not isinstance(row.get("id"), str)
            else f"has the verdict {row.get('verdict')!r}; keep or drop"
            if row.get("verdict") not in ("keep", "drop")
            else f"names {row['id']!r}, which is no candidate"
            if row["id"] not in candidates
            else f"judges another trajectory of the name {row['id']}: another run's, or an older one"
            if row.get("key") != candidates[row["id"]]
            else None
        )
        if wrong:
            bad += 1
            print(f"  {path}, line {n} {wrong}: skipped")
        else:
            verdicts[row["id"]] = {
                k: str(row.get(k) or "") for k in ("key", "verdict", "reason", "reviewer")
            }
    print(f"  {path}: {len(verdicts)} verdicts" + (f", {bad} lines skipped" if bad else ""))
    return verdicts


def export_review(config, folder, ids, most=100):
    """Write review.html: up to `most` candidates that nobody has judged yet, drawn by seed, with stand-in pictures and boxes for the verdict."""
    chosen = set(seeded_rng(config.seed, "review", len(ids)).sample(ids, min(most, len(ids))))
    items = [t for t in each_line(folder / "trajectories.jsonl") if t["task"]["id"] in chosen]
    for t in items:
        handed = [
            a for a in t["artifacts"] if a["id"] in ((t["answer"] or {}).get("deliverables") or [])
        ]
        t["key"] = key_of(t)
        t["shown"] = [
            {
                **a,
                "pictures": [thumbnail(a, shot) for shot in range(a["shots"] or 1)]
                if a["kind"] in ("image", "video")
                else [],
            }
            for a in handed
        ]
    write_atomic(
        folder / "review.html",
        fill_template(
            "templates/review.jinja",
            items=items,
            name=config.name,
            sheet=digest([t["key"] for t in items], size=6),
        ),
    )
    print(
        f"  {folder / 'review.html'}: {len(items)} of {len(ids)} candidates to judge; save the verdicts there, then "
        "the same command with `review --verdicts FILE`"
    )
