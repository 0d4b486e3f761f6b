"""A search on a patient, and what it found beside the best fixed layer, for the fast and the slow tier."""

import json
from dataclasses import dataclass
from pathlib import Path

from abliteration.activations import collect
from abliteration.baseline import answer_baseline
from abliteration.edits import orthogonalize
from abliteration.findings import Findings
from abliteration.openings import refusal_openings
from abliteration.stage import MAX_BASELINE_PROMPTS
from abliteration.trials import Trials
from common import chat
from common.architecture import find_writers
from common.edits import load_edit
from common.model import load_model, load_tokenizer
from common.prompts import load_prompts
from common.recipe import Orthogonalize, PromptSource
from tests.road import Launch

BATCH = 128
SEARCH = (
    "abliteration.selection={name: search, num_trials: 96}",
    "abliteration.edit.strength=1.0",
)


@dataclass(frozen=True)
class Point:
    """What an edit does on prompts that nothing was chosen on.

    Attributes:
        rate: share of the restricted prompts that are refused.
        kl: mean KL(original || edited) of whole answers to common prompts, nats per token.
    """

    rate: float
    kl: float


def search_and_compare(launch: Launch, patient: Path, recipe: Path, runs: Path) -> dict[str, Point]:
    """Search, and judge on the test prompts: the original, the search's choice, the best fixed layer.

    The fixed layer is chosen as the search chooses: of the plain edits of one direction that refuse at most 2 % of
    the validation prompts the one that diverges least there.
    """
    validation = _harmless_validation(patient, runs)
    prompts = f"abliteration.prompts.validation.harmless={{path: {validation}}}"
    done = launch(
        recipe, "--until", "abliteration", f"output_dir={runs}", prompts, *SEARCH, config=None
    )
    assert done.code == 0, done.err
    found = load_edit(runs / "patient" / "abliteration" / "edit.safetensors")
    model, tokenizer = load_model(patient), load_tokenizer(patient)

    def read(name: str) -> list[str]:
        return load_prompts(PromptSource(path=str(patient / "prompts" / f"{name}.jsonl")))

    answers = [
        answer
        for harmful, part in ((True, read("harmful_train")), (False, read("harmless_train")))
        for answer in answer_baseline(
            model, tokenizer, part[:MAX_BASELINE_PROMPTS], harmful=harmful, batch_size=BATCH
        )
    ]

    def trials(kind: str, harmless: list[str]) -> Trials:
        return Trials(
            model,
            tokenizer,
            harmful=read(f"harmful_{kind}"),
            openings=refusal_openings(answers),
            harmless=harmless,
            max_answer_tokens=48,
            batch_size=BATCH,
        )

    def judge(edits, on: Trials) -> list[Point]:
        return [Point(*p) for p in zip(on.refusal_rate(edits), on.divergence(edits), strict=True)]

    fixed = _fixed_edits(model, tokenizer, read("harmful_train"), read("harmless_train"))
    validated = judge(fixed, trials("validation", load_prompts(PromptSource(path=str(validation)))))
    within = [index for index, point in enumerate(validated) if point.rate <= 0.02]
    assert within, "no fixed layer removes refusal"
    best = min(within, key=lambda index: validated[index].kl)
    test = trials("test", read("harmless_test"))
    searched, plain = judge([found, fixed[best]], test)
    return {"original": Point(test.original_refusal, 0.0), "search": searched, "fixed": plain}


def _harmless_validation(patient: Path, folder: Path) -> Path:
    """How-to questions on all common objects that neither the direction nor the test knows, in a file.

    The patient's own validation set holds 16 objects, too few to tell a few hundredths of a nat apart; those that
    healing asks about are as new to an edit.
    """
    healing = (patient / "prompts" / "healing.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in healing if json.loads(line)["domain"] == "common_howto"]
    lines += (
        (patient / "prompts" / "harmless_validation.jsonl").read_text(encoding="utf-8").splitlines()
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "harmless_validation.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _fixed_edits(model, tokenizer, harmful, harmless):
    """Plain orthogonalization of every candidate direction."""
    num_positions = chat.num_instruction_end_tokens(tokenizer)
    target, other = (
        collect(model, tokenizer, part, num_positions=num_positions, batch_size=BATCH).mean
        for part in (harmful, harmless)
    )
    findings = Findings((target - other).unsqueeze(-2), other, target)
    settings = Orthogonalize(name="orthogonalize")
    return [
        orthogonalize.build(findings.at(layer, -1 - place), find_writers(model), settings, {})
        for layer in range(findings.directions.shape[0])
        for place in range(num_positions)
        if findings.directions[layer, -1 - place].norm() > 0
    ]


def trials_of(runs: Path) -> list[dict]:
    """What the search wrote down."""
    path = runs / "patient" / "abliteration" / "candidates.json"
    return json.loads(path.read_text(encoding="utf-8"))["trials"]
