"""What a study costs beside separate runs of its trials, and what its own machinery costs.

python benchmarks/study.py [--full] [--workers 1] [--patient runs/patient-model]

1. A grid over the patient, and the same recipes one by one, each as a command of its own into an empty output folder:
   with --full 2 edit strengths x 6 settings of the healing at full length (twenty minutes on two cores), else 2 x 2 at
   a twentieth. Runs of each stage and computations of reference log-probabilities are counted, not assumed. As many
   commands (--workers) work on the study as separate runs go on at once, and share the cores in the same way.
2. 200 trials whose stages only pretend, through the real command, store and storage: seconds and memory per trial.

The last line is one JSON object, as in every file of this folder.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STRENGTHS = [2.0, 2.2]
FULL = {"train.trainer.beta": [0.05, 0.1, 0.5], "train.trainer.learning_rate": [1e-3, 3e-3]}
SHORT = {"train.trainer.beta": [0.1, 0.5]}
SHORTER = (
    "train.preferences.0.prompts.slice=0:128",
    "train.anchors.0.prompts.slice=0:128",
    "train.anchors.1.prompts.slice=0:64",
    "train.trainer.max_steps=10",
)
# A study may take this share of the separate runs' time, and its machinery so many seconds a trial.
BAR, OVERHEAD_BAR = 0.6, 0.2
NUM_STUBS = 200


def main() -> None:
    """Run both parts, print what they found, then the JSON line."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        rows = [shared(Path(folder), options), machinery(Path(folder))]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    print(json.dumps({"name": "study", "rows": rows, "ratio": rows[0]["ratio"]}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A study beside separate runs.")
    parser.add_argument("--full", action="store_true", help="12 trials at full length")
    parser.add_argument("--workers", type=int, default=2, help="commands at work at once")
    parser.add_argument("--patient", type=Path, default=ROOT / "runs" / "patient-model")
    return parser.parse_args()


def shared(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A grid as a study, and its trials as separate commands."""
    if not (options.patient / "config.json").is_file():
        build = [sys.executable, "-m", "patient", "--output", str(options.patient)]
        subprocess.run(build, cwd=ROOT, check=True)
    recipe, arguments = write_recipe(folder, options), () if options.full else SHORTER
    began = time.time()
    output = f"output_dir={folder / 'together'}"
    with ThreadPoolExecutor(options.workers) as pool:
        started = [
            pool.submit(command, recipe, *arguments, output, workers=options.workers)
            for _ in range(options.workers)
        ]
        logs = [each.result() for each in started]
    whole = time.time() - began
    study = folder / "together" / "trying"
    # The search alone: what comes after it, separate runs do not do.
    together = max(link.lstat().st_mtime for link in study.glob("trials/*/eval")) - began
    trials = sorted((study / "trials").glob("*/recipe.yaml"))
    began = time.monotonic()
    with ThreadPoolExecutor(options.workers) as pool:
        alone = [
            pool.submit(
                command,
                trial,
                f"output_dir={folder / f'apart-{number}'}",
                workers=options.workers,
            )
            for number, trial in enumerate(trials)
        ]
        for each in alone:
            each.result()
    apart = time.monotonic() - began
    counts, computed = counted(logs)
    return {
        "shape": f"{len(trials)} trials, {len(STRENGTHS)} edit strengths, {'full' if options.full else 'short'}, "
        f"{options.workers} at work",
        "ratio": round(apart / together, 2),
        "bar": round(1 / BAR, 2),
        "study_seconds": round(together, 1),
        "separate_seconds": round(apart, 1),
        "with_confirmation_seconds": round(whole, 1),
        **counts,
        "reference_computations": computed,
    }


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    """The patient's recipe with the study."""
    text = (ROOT / "recipes" / "patient.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text.replace("runs/patient-model", str(options.patient)))
    tried = {"abliteration.edit.strength": STRENGTHS, **(FULL if options.full else SHORT)}
    recipe["study"] = {
        "parameters": {key: {"choices": values} for key, values in tried.items()},
        "constraints": {},
        "confirmation_seeds": 1,
    }
    recipe |= {"name": "trying", "tracking": {"mode": "disabled"}}
    recipe["eval"]["accept"] = {}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def command(recipe: Path, *arguments: str, workers: int) -> str:
    """Run the main command up to the evaluation on its share of the cores; returns what it logged."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    done = subprocess.run(
        [sys.executable, "train/run.py", str(recipe), *arguments, "--until", "eval"],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": threads,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stderr


def counted(logs: Sequence[str]) -> tuple[dict[str, int], int]:
    """Runs of each stage in the search, and the trainings in which reference log-probabilities were computed."""
    searches = [log.partition("study: confirming")[0] for log in logs]
    counts = Counter(
        stage
        for search in searches
        for stage in re.findall(r"^(abliteration|train|eval): running", search, re.MULTILINE)
    )
    trainings = [part for search in searches for part in search.split("train: running")[1:]]
    computed = sum("Computing reference log probs" in part for part in trainings)
    return {f"{stage}_runs": counts[stage] for stage in ("abliteration", "train", "eval")}, computed


def machinery(folder: Path) -> dict[str, Any]:
    """200 trials over stages that only pretend."""
    from tests import studying  # noqa: PLC0415  # imports torch

    studying.install()
    recipe = studying.write_recipe(
        folder,
        {
            "parameters": {
                "abliteration.edit.strength": {"low": 1.0, "high": 2.0},
                "train.trainer.beta": {"low": 0.05, "high": 1.0, "log": True},
            },
            "sampler": {"name": "RandomSampler"},
            "num_trials": NUM_STUBS,
        },
    )
    memory: list[int] = []
    stages = studying.pretended()
    evaluate = stages["eval"].run

    def measured(*given: object) -> None:
        evaluate(*given)
        memory.append(resident_bytes())

    stages["eval"].run = measured
    studying.run._stages = lambda: stages
    logging.disable(logging.INFO)
    began, began_work = time.monotonic(), time.process_time()
    if studying.run.main([str(recipe), "--until", "eval"]):
        raise SystemExit("the pretended study failed")
    # Of this process: a loaded machine is not the study's fault.
    seconds = (time.process_time() - began_work) / NUM_STUBS
    whole = (time.monotonic() - began) / NUM_STUBS
    # Without the two confirmations and the last evaluation, behind which other libraries are loaded.
    quarter, last = len(memory) // 4, len(memory) - 4
    grown = (memory[last] - memory[quarter]) / (last - quarter)
    return {
        "shape": f"{NUM_STUBS} pretended trials",
        "ratio": round(OVERHEAD_BAR / seconds, 2),
        "bar": 1.0,
        "seconds_a_trial": round(seconds, 4),
        "with_waiting": round(whole, 4),
        "bytes_a_trial": round(grown),
    }


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
