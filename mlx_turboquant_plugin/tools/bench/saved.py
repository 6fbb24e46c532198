"""What a run has measured, kept in its JSON file as it goes on, so that another can resume it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...rules import SettingsError
from ..output import as_json
from .measurement import Measurement, Results, Skipped

# Known only later.
CHANGING = {"fallbacks", "remarks"}


def saved(notes: dict[str, Any], results: Results) -> str:
    """Everything that was found so far, as the file holds it: seconds and bytes."""
    report = {
        "notes": notes,
        "interrupted": bool(results.missing),
        "missing": results.missing,
        **asdict(results),
    }
    for row, m in zip(report["measurements"], results.measurements):
        row["seconds"] = m.seconds and asdict(m.seconds)
    return as_json(report)


def resume(path: Path, notes: dict[str, Any]) -> Results:
    """What an earlier run with the same ``notes`` has saved; nothing if there is no file yet.

    Raises:
        SettingsError: the file is of another kind of run, or none of ours.
    """
    if not path.exists():
        return Results()
    try:
        found = json.loads(path.read_text("utf-8"))
        before = found["notes"]
        measured, skipped = found["kept"]
        # The seconds follow from the samples. What was left in its middle is measured again.
        rows = [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in found["measurements"][:measured]
        ]
        results = Results(
            [Measurement(**row) for row in rows],
            [Skipped(**row) for row in found["skipped"][:skipped]],
            found["done"],
            (measured, skipped),
            # Until it is known what this run asks for.
            found["asked"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"--resume: {str(path)!r} is not what bench --json writes ({error!r}): name "
            "another file"
        ) from error
    # As JSON gives it back.
    now = json.loads(json.dumps(notes))
    for name in {**before, **now}:
        if name not in CHANGING and before.get(name) != now.get(name):
            raise SettingsError(
                f"--resume: {str(path)!r} was measured with {name} {before.get(name)!r}, and now "
                f"it is {now.get(name)!r}: use the same arguments on the same machine, or another "
                "file"
            )
    return results
