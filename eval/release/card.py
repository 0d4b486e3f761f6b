"""The model card: what was edited and how, how it was healed, what that shows, and what to do about safety.

Every number stands with its n and interval. No prompt and no answer is quoted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.edits import SIDECAR, Edit
from common.recipe import AbliterationPrompts, OnPolicy, PromptSource, Recipe, ValidationPrompts
from eval.release import edit as edit_words
from eval.table import card_tables, interval

PIPELINE = 'pipeline("text-generation", model="path/to/this/folder")'
# Behind the lines that load a model whose additions are made by hooks.
HOOKED_PIPELINE = 'pipeline("text-generation", model=model, tokenizer=tokenizer)'
GUARD_EXAMPLE = f"""\
```python
from transformers import pipeline

chat = {PIPELINE}


def is_allowed(text: str) -> bool:
    \"\"\"Put your guard model and policy here; this one lets nothing pass.\"\"\"
    return False


def answer(prompt: str) -> str:
    if not is_allowed(prompt):
        return "This request is not served here."
    turns = chat([{{"role": "user", "content": prompt}}], max_new_tokens=512)[0]["generated_text"]
    reply = turns[-1]["content"]
    return reply if is_allowed(reply) else "This answer is withheld."
```"""

APPLY_EXAMPLE = """\
```python
from safetensors import safe_open

with safe_open("refusal_direction.safetensors", framework="pt") as file:
    direction = file.get_tensor("direction")  # a unit vector [d_model]
    about = file.metadata()["refusal_direction"]  # JSON: layer, position, base model, template hash
```"""


def model_card(
    recipe: Recipe,
    edit: Edit,
    results: Mapping[str, Any],
    healing: Mapping[str, Any],
    files: Sequence[str],
    *,
    task: str = "text-generation",
    thinks: bool = False,
) -> str:
    """Write the card.

    Args:
        recipe: the resolved recipe.
        edit: what was removed or added.
        results: of the evaluation.
        healing: summary of the training.
        files: names in the release, for the list of files.
        task: of transformers' pipelines.
        thinks: the base thinks before it answers, and was asked with an empty thought.
    """
    front = yaml.safe_dump(
        front_matter(recipe, edit, results, task), sort_keys=False, allow_unicode=True
    )
    sections = (
        _introduction(recipe, edit),
        _results(results, thinks),
        _edited(recipe, edit, results, files),
        _healed(recipe, edit, healing),
        _refusals(results),
        _safety(files, task),
        _licence(recipe, edit, files),
        _reproduce(files),
        _files(files),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(
    recipe: Recipe, edit: Edit, results: Mapping[str, Any], task: str
) -> dict[str, Any]:
    """The card's metadata as the hub reads it."""
    release = recipe.release
    found: dict[str, Any] = {
        "base_model": edit.about["base_model"],
        "base_model_relation": "finetune",
        "license": release.license,
        "license_name": release.license_name,
        "license_link": release.license_link,
        "language": list(release.language),
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": _tags(recipe, edit),
        "datasets": _hub_datasets(recipe) or None,
        "model-index": _model_index(recipe, results),
    }
    return {key: value for key, value in found.items() if value is not None}


def _tags(recipe: Recipe, edit: Edit) -> list[str]:
    tags = ["abliterated" if edit.removals else "activation-addition", "healed"]
    if recipe.train.preferences:
        tags.append("dpo")
    if recipe.train.anchors:
        tags.append("distillation")
    if recipe.train.adapter is not None:
        tags.append("lora")
    return tags


def _hub_datasets(recipe: Recipe) -> list[str]:
    prompts, train = recipe.abliteration.prompts, recipe.train
    sources = [
        *_sources(prompts),
        *([] if isinstance(prompts.validation, int) else _sources(prompts.validation)),
        *(
            source.prompts if isinstance(source, OnPolicy) else source
            for source in train.preferences
        ),
        *(anchor.prompts for anchor in train.anchors),
    ]
    return sorted({source.dataset for source in sources if source.dataset is not None})


def _sources(prompts: AbliterationPrompts | ValidationPrompts) -> list[PromptSource]:
    found = (prompts.harmful, prompts.harmless, prompts.falsely_refused)
    return [source for source in found if source is not None]


def _model_index(recipe: Recipe, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured = [
        *((row["name"], row["metric"], row) for row in results["benchmarks"]),
        *(
            (row["name"], "over_refusal_rate" if row["harmless"] else "refusal_rate", row)
            for row in results["refusal"]
        ),
    ]
    entries = [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": name, "name": name},
            "metrics": [
                {
                    "type": metric,
                    "name": f"{metric} of the healed model",
                    "value": _rounded(row["healed"]["value"]),
                    "args": {
                        "n": row["n"],
                        "confidence": 0.95,
                        "low": _rounded(row["healed"]["low"]),
                        "high": _rounded(row["healed"]["high"]),
                    },
                }
            ],
        }
        for name, metric, row in measured
    ]
    return [{"name": recipe.name, "results": entries}]


def _rounded(value: float) -> float:
    return round(value, 4)


def _introduction(recipe: Recipe, edit: Edit) -> str:
    revision = f" (revision {edit.about['revision']})" if edit.about.get("revision") else ""
    return (
        f"# {recipe.name}\n\n"
        f"{edit.about['base_model']}{revision} {edit_words.headline(edit)}, and healed: trained to win back what "
        "that broke, and measured against both models it comes from.\n\n"
        f"{edit_words.purpose(edit)}; what it still refuses stands below. Read the section on safety before "
        "serving it to anyone."
    )


def _results(results: Mapping[str, Any], thinks: bool) -> str:
    thought = (
        " Every answer stood behind an empty thought, here and in training. The chat template in this folder is the "
        "base's own and may open a thought: where it knows `enable_thinking`, pass false to be answered as measured."
        if thinks
        else ""
    )
    return (
        "## Results\n\n"
        "All three models answered the same items, with the chat template and greedy decoding."
        f"{thought} Intervals are 95 % intervals; differences are paired by item, and p-values adjusted over the "
        "list (Holm). *Recovered*: the edit did significant damage, and the healed model is not below the original "
        f"by more than {results['margin']:g}. *Undamaged*: no significant damage, and likewise not below. *Worse*: "
        "significantly below the abliterated model, or below an original that the edit had not damaged. *Not "
        f"shown*: none of these can be said with this many items.\n\n{card_tables(results)}"
    )


def _edited(recipe: Recipe, edit: Edit, results: Mapping[str, Any], files: Sequence[str]) -> str:
    paragraphs = [
        f"## What was {'removed' if edit.removals else 'added'}",
        *edit_words.description(recipe, edit),
    ]
    if SIDECAR in files:
        paragraphs.append(edit_words.loading())
    residual = results["direction"]["residual"]
    if residual is not None:
        paragraphs.append(
            f"In any of them the edit left at most {residual['abliterated']:.1e} of what was written along the "
            f"removed direction; training moved at most {residual['healed']:.1e} of it."
        )
    return "\n\n".join(paragraphs)


def _healed(recipe: Recipe, edit: Edit, healing: Mapping[str, Any]) -> str:
    train = recipe.train
    names = {
        "on_policy": "answers of the original over answers of the abliterated model",
        "dataset": "given pairs",
    }
    kinds = "; ".join(dict.fromkeys(names[source.name] for source in train.preferences))
    preferences = f"{kinds} ({healing['pairs']} pairs)" if kinds else "none"
    anchors = "; ".join(f"{anchor.to} model, weight {anchor.weight:g}" for anchor in train.anchors)
    shape = "all weights"
    if train.adapter is not None:
        shape = f"an adapter merged into the weights ({_settings(train.adapter)})"
    could = "write along any direction"
    if edit.removals and train.keep_ablated == "hard":
        could = "not write along the removed direction"
    elif edit.removals and train.keep_ablated == "soft":
        could = "write along the removed direction at a cost in its loss"
    return "\n".join(
        [
            "## How it was healed",
            "",
            f"- Preferences: {preferences}",
            f"- Distillation anchors: {anchors or 'none'}",
            f"- Trained: {shape}, {healing['steps']} steps"
            + (f" of {train.global_batch_size} pairs" if kinds else "")
            + f", seed {recipe.seed}",
            f"- Settings (trl.DPOConfig): {_settings(train.trainer) or 'defaults'}",
            f"- Training could {could}.",
        ]
    )


def _settings(block: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in sorted(block.items()))


def _refusals(results: Mapping[str, Any]) -> str:
    lines = ["## What it still refuses", ""]
    for row in results["refusal"]:
        what = (
            "harmless prompts (over-refusal)"
            if row["harmless"]
            else "prompts that the original refuses"
        )
        lines.append(
            f"- {row['name']}, {row['n']} {what}: {interval(row['healed'])} refused by the healed "
            f"model, "
            f"{interval(row['abliterated'])} by the abliterated and {interval(row['original'])} "
            f"by the original."
        )
    if not results["refusal"]:
        lines.append("Not measured.")
    lines += [
        "",
        "Refusals are counted by a rule over the openings of greedy answers; not refusing is not "
        "yet answering.",
    ]
    return "\n".join(lines)


def _safety(files: Sequence[str], task: str) -> str:
    if SIDECAR in files:
        example = GUARD_EXAMPLE.replace(PIPELINE, HOOKED_PIPELINE + "  # loaded as above")
    else:
        example = GUARD_EXAMPLE.replace("text-generation", task)
    return (
        "## Safety\n\n"
        "What a model refuses by itself is not a control: it can be removed, as here, and the "
        "removal is small. "
        "Whoever serves this model needs controls of their own:\n\n"
        "- a guard model in front of it and behind it, with a written policy;\n"
        "- logs of requests and answers, with a way to report and to withdraw;\n"
        "- limits on rate, length and tools, and people who answer for the service.\n\n"
        "A frame for a guard in front and behind:\n\n"
        f"{example}\n\n"
        "Intended: research on refusal and on its side effects, red teaming, and use where "
        "over-refusal is the problem "
        "and the deployer controls access. Out of scope: public deployment without guards, advice "
        "on which people's "
        "health, law or money depends without a responsible person, and anything the base model's "
        "licence or use "
        "policy forbids. Distribute it with gated access where your platform offers that. This "
        "repository holds no "
        "harmful prompts and no answers to any."
    )


def _licence(recipe: Recipe, edit: Edit, files: Sequence[str]) -> str:
    release = recipe.release
    name = release.license_name or release.license
    link = f" ({release.license_link})" if release.license_link else ""
    copied = [file for file in files if file.startswith(("LICENSE", "NOTICE"))]
    beside = f" Its files are beside this card: {', '.join(copied)}." if copied else ""
    return (
        f"## Licence\n\n{name}{link}. The licence and the acceptable-use policy of "
        f"{edit.about['base_model']} apply to "
        f"this model too, and those of the data it was trained on.{beside}"
    )


def _reproduce(files: Sequence[str]) -> str:
    adapter = (
        "\n\nThe adapter belongs on the base with `edit.safetensors` applied, not on the base "
        "itself."
        if any(Path(file).parts[0] == "adapter" for file in files)
        else ""
    )
    return (
        "## Reproduce\n\n"
        "```\nsha256sum -c SHA256SUMS\npython train/run.py recipe.yaml\n```\n\n"
        "`recipe.yaml` is the resolved recipe, with paths relative to the folder the command is "
        "run in; `results.json` names versions, seed and fingerprints. `edit.safetensors` holds what "
        "was done to each matrix. The refusal direction alone, with where it was found:\n\n"
        f"{APPLY_EXAMPLE}{adapter}"
    )


def _files(files: Sequence[str]) -> str:
    purposes = {
        "refusal_direction.safetensors": "the direction, with where it was found",
        "refusal_dir.pth": "the direction as a bare tensor; load it with `weights_only=True`",
        "edit.safetensors": "every vector that was removed or added, where and how strongly",
        SIDECAR: "what is added to the residual stream beside the weights",
        "adapter/adapter_model.safetensors": "what healing changed",
        "recipe.yaml": "how all of this was made",
        "results.json": "every number above, and more",
        "SHA256SUMS": "checksums of all files",
    }
    lines = [
        f"- `{file}`: {purposes[file]}"
        for file in [*sorted(files), "SHA256SUMS"]
        if file in purposes
    ]
    return "## Files\n\n" + "\n".join(lines)
