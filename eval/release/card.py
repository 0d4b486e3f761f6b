"""The model card: what was edited and how, how it was healed, what that shows, and what to do about safety.

Every number stands with its n and interval. No prompt and no answer is quoted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.edits import SIDECAR, Edit
from common.recipe import (
    AbliterationPrompts,
    LmEval,
    OnPolicy,
    PromptSource,
    Recipe,
    ValidationPrompts,
)
from eval.release import edit as edit_words
from eval.release import licences
from eval.release import runtimes as runtime_words
from eval.release.loading import EXAMPLE, Loading, guard_example, lines
from eval.table import card_tables, interval

GATE = (
    "What this model says is the responsibility of whoever runs it: serve it behind a guard, and within the licence "
    "and use policy of its base."
)

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
    loading: Loading = "weights",
    task: str = "text-generation",
    thinks: bool = False,
    runtimes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the card.

    Args:
        recipe: the resolved recipe.
        edit: what was removed or added.
        results: of the evaluation.
        healing: summary of the training.
        files: names in the release, for the list of files.
        loading: how the release is loaded.
        task: of transformers' pipelines.
        thinks: the base thinks before it answers, and was asked with an empty thought.
        runtimes: what was measured on each GGUF file, as in gguf/scores.json.
    """
    front = yaml.safe_dump(
        front_matter(recipe, edit, results, task), sort_keys=False, allow_unicode=True
    )
    base = str(edit.about["base_model"])
    sections = (
        _introduction(recipe, edit),
        _use(loading, base, task),
        _results(results, thinks),
        *runtime_words.sections(runtimes),
        _edited(recipe, edit, results, loading),
        _healed(recipe, edit, healing),
        _refusals(results),
        _safety(guard_example(loading, base, task)),
        _licence(recipe, edit, files),
        _reproduce(recipe, files),
        _files(files),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(
    recipe: Recipe, edit: Edit, results: Mapping[str, Any], task: str
) -> dict[str, Any]:
    """The card's metadata as the hub reads it."""
    release = recipe.release
    is_adapter = release.form == "adapter"
    found: dict[str, Any] = {
        "base_model": edit.about["base_model"],
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "license": release.license,
        "license_name": release.license_name,
        "license_link": release.license_link,
        "language": list(release.language),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": task,
        "tags": _tags(recipe, edit),
        "datasets": _hub_datasets(recipe) or None,
        "extra_gated_prompt": f"{edit_words.purpose(edit)}. {GATE}",
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
    shots = {
        task: spec.num_fewshot
        for spec in recipe.eval.benchmarks
        if isinstance(spec, LmEval) and spec.num_fewshot is not None
        for task in spec.tasks
    } | {
        row["name"]: row["suite"]["num_fewshot"] for row in results["benchmarks"] if "suite" in row
    }
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
                        **({"num_fewshot": shots[name]} if name in shots else {}),
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
    banner = licences.duties_of(recipe.release.license, recipe.release.license_name).banner
    shown = f"**{banner}**\n\n" if banner else ""
    return (
        f"# {recipe.name}\n\n{shown}"
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


def _use(loading: Loading, base: str, task: str) -> str:
    code = lines(loading, base, task)
    start = "from transformers import pipeline\n\n"
    ask = 'print(chat([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])'
    return (
        f'## Use\n\n```python\n{start}folder = "path/to/this/folder"\n{code}\n{ask}\n```\n\n'
        "Put a guard around it before anyone else may ask: see the section on safety."
    )


def _edited(recipe: Recipe, edit: Edit, results: Mapping[str, Any], loading: Loading) -> str:
    paragraphs = [
        f"## What was {'removed' if edit.removals else 'added'}",
        *edit_words.description(recipe, edit),
    ]
    if loading == "hooked":
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
    anchors = "; ".join(
        f"{anchor.to} model, weight {anchor.weight:g}"
        + (f", residual stream {anchor.residual.weight:g}" if anchor.residual is not None else "")
        for anchor in train.anchors
    )
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
    paragraphs = ["## What it still refuses", _refusal_lines(results["refusal"])]
    categories = [
        (row["name"], each) for row in results["refusal"] for each in row.get("by_category", ())
    ]
    if categories:
        paragraphs.append(_by_category(categories))
    paragraphs.append(_judged(results.get("refusal_instrument")))
    return "\n\n".join(paragraphs)


def _refusal_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        what = (
            "harmless prompts (over-refusal)"
            if row["harmless"]
            else "prompts that the original refuses"
        )
        lines.append(
            f"- {row['name']}, n = {row['n']} {what}: {interval(row['healed'])} refused by the healed model, "
            f"{interval(row['abliterated'])} by the abliterated and {interval(row['original'])} by the original."
        )
    return "\n".join(lines) if lines else "Not measured."


def _by_category(categories: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Rates by panel and category as a table."""
    lines = [
        "| panel | category | n | original | abliterated | healed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for panel, row in categories:
        rates = (interval(row[model]) for model in ("original", "abliterated", "healed"))
        cells = (panel, str(row["category"]), str(row["n"]), *rates)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(["**Refusals by category (rate, 95 % interval)**", "", *lines])


def _judged(instrument: Mapping[str, Any] | None) -> str:
    limits = "Not refusing is not yet answering."
    if instrument is None:
        return f"Refusals are counted by a rule over the openings of greedy answers. {limits}"
    if instrument.get("agreement") is None:
        return f"Refusals are counted by {instrument['name']}, which was not held against people here. {limits}"
    return (
        f"Refusals are counted by {instrument['name']}. On {instrument['measured_on']} it agrees with people on "
        f"{instrument['agreement']:.3f} of the answers (kappa {instrument['kappa']:.2f}) and misses a model's share of "
        f"refusals by up to {instrument['rate_error']:.3f}: read every number above with that in mind. {limits}"
    )


def _safety(example: str) -> str:
    return (
        "## Safety\n\n"
        "What a model refuses by itself is not a control: it can be removed, as here, and the removal is small. What "
        "this one still refuses, and how often, stands above. Whoever serves it needs controls of their own:\n\n"
        "- a guard model in front of it and behind it, with a written policy;\n"
        "- logs of requests and answers, with a way to report and to withdraw;\n"
        "- limits on rate, length and tools, and people who answer for the service.\n\n"
        f"A frame for a guard in front and behind, `{EXAMPLE.name}` in this folder:\n\n"
        f"```python\n{example.rstrip()}\n```\n\n"
        "Intended: research on refusal and on its side effects, red teaming, and use where over-refusal is the problem "
        "and the deployer controls access. Out of scope: public deployment without guards, advice on which people's "
        "health, law or money depends without a responsible person, and anything the base model's licence or use "
        "policy forbids. Distribute it with gated access where your platform offers that (the metadata of this card "
        "holds a text for it). This repository holds no harmful prompts and no answers to any: hashes stand "
        "in their place. Report what goes wrong in this repository's discussions."
    )


def _licence(recipe: Recipe, edit: Edit, files: Sequence[str]) -> str:
    release, base = recipe.release, edit.about["base_model"]
    name = release.license_name or release.license
    link = f" ({release.license_link})" if release.license_link else ""
    copied = [file for file in files if file.startswith(("LICENSE", "NOTICE", "USE_POLICY"))]
    beside = f" Its files are beside this card: {', '.join(copied)}." if copied else ""
    duties = licences.duties_of(release.license, release.license_name)
    policy = f" Acceptable use: {duties.policy}." if duties.policy else ""
    banner = f" {duties.banner}." if duties.banner else ""
    return (
        f"## Licence\n\n{name}{link}. The licence and the acceptable-use policy of {base} apply to this model too, "
        f"and those of the data it was trained on.{policy}{banner}{beside} The weights were changed, as this card says."
    )


def _reproduce(recipe: Recipe, files: Sequence[str]) -> str:
    adapter = (
        "\n\nThe adapter belongs on the base with `edit.safetensors` applied, not on the base itself."
        if any(Path(file).parts[0] == "adapter" for file in files)
        else ""
    )
    revision = f" at revision {recipe.model.revision}" if recipe.model.revision else ""
    return (
        "## Reproduce\n\n"
        "```\nsha256sum -c SHA256SUMS\npython -m eval verify path/to/this/folder --base path/to/the/base\n"
        "python train/run.py recipe.yaml\n```\n\n"
        f"The second line makes the weights again, from the base{revision}, the edit and the adapter, and compares "
        "every tensor's hash; the third repeats everything, from the resolved recipe, with paths relative to the "
        "folder the command is run in. `reproduce/` names versions, seed, data and hashes. `edit.safetensors` holds "
        "what was done to each matrix. The refusal direction alone, with where it was found:\n\n"
        f"{APPLY_EXAMPLE}{adapter}"
    )


def _files(files: Sequence[str]) -> str:
    purposes = {
        "refusal_direction.safetensors": "the direction, with where it was found",
        "refusal_dir.pth": "the direction as a bare tensor; load it with `weights_only=True`",
        "edit.safetensors": "every vector that was removed or added, where and how strongly",
        SIDECAR: "what is added to the residual stream beside the weights",
        "adapter/adapter_model.safetensors": "what healing changed",
        "edit_adapter/adapter_model.safetensors": "the edit as an adapter of the base",
        EXAMPLE.name: "a guard in front of the model and behind it",
        "recipe.yaml": "how all of this was made",
        "reproduce/README.md": "how to make it again, with versions, seed and a hash of every tensor",
        "results.json": "every number above, and more",
        "items.jsonl": "what every model did on every item, with hashes in place of texts",
        "report.html": "the evaluation as a page",
        "gguf/Modelfile": "how Ollama runs it: `ollama create NAME -f gguf/Modelfile`",
        "gguf/scores.json": "what was measured on each GGUF file",
        "SHA256SUMS": "checksums of all files",
    }
    lines = [
        f"- `{file}`: {purposes[file]}"
        for file in [*sorted(files), "SHA256SUMS"]
        if file in purposes
    ]
    return "## Files\n\n" + "\n".join(lines)
