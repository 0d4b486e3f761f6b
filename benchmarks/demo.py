"""Where the demo's time goes: the share of each stage in the wall time of recipes/patient.yaml.

python benchmarks/demo.py

Reads the manifests of a finished run in runs/patient, and makes the run first where there is none. There is no
peer to compare with, so the ratio is null. The last line is one JSON object, as in every file of this folder.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("abliteration", "train", "eval", "release")


def main() -> None:
    """Print a table of seconds and shares, then the JSON line."""
    run = ROOT / "runs" / "patient"
    if not all((run / stage / "manifest.json").is_file() for stage in STAGES):
        subprocess.run(["make", "demo"], cwd=ROOT, check=True, stdout=sys.stderr)
    seconds = {"patient": _read(ROOT / "runs" / "patient-model" / "patient.json")["seconds"]}
    seconds |= {stage: _read(run / stage / "manifest.json")["seconds"] for stage in STAGES}
    total = sum(seconds.values())
    for name, value in seconds.items():
        print(f"{name:<13} {value:7.1f} s  {value / total:6.1%}")
    print(f"{'total':<13} {total:7.1f} s")
    rows = [
        {
            "shape": name,
            "ratio": None,
            "bar": None,
            "seconds": value,
            "share": round(value / total, 4),
        }
        for name, value in seconds.items()
    ]
    print(json.dumps({"name": "demo", "rows": rows, "ratio": None}))


def _read(path: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
