"""An edit in words, for the model card: which direction, where it was found, what was done with it."""

from collections.abc import Mapping
from typing import Any

from common.edits import SIDECAR, Edit
from common.recipe import Recipe

NORMS = {
    "column_norm": "Then the norm of every column was restored: how much each input writes.",
    "row_norm": "Then the norm of every row was restored: how much is written to each coordinate. A part of the "
    "direction can be left by that.",
}


def headline(edit: Edit) -> str:
    """What was done to the base, as the end of its name: `with its refusal direction removed ...`."""
    direction = (
        "direction of false refusal"
        if edit.about["target"] == "falsely_refused"
        else "refusal direction"
    )
    if edit.removals:
        return f"with its {direction} removed from the weights"
    return f"with its {direction} {'added to' if _induces(edit) else 'subtracted from'} the residual stream"


def purpose(edit: Edit) -> str:
    """What the edit was made for."""
    if _induces(edit):
        return "It was made to refuse where its base does not"
    if edit.about["target"] == "falsely_refused":
        return "It was made not to refuse harmless prompts that its base refuses, and to go on refusing harmful ones"
    return "It was made not to refuse where its base does"


def description(recipe: Recipe, edit: Edit) -> list[str]:
    """The paragraphs that say what was removed or added."""
    paragraphs = [f"{_direction(edit)} {_choice(recipe, edit)}"]
    if edit.removals:
        paragraphs.append(_removal(edit))
    paragraphs += [_addition(edit, writer) for writer in edit.additions]
    if edit.left_alone:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(edit.left_alone.items()))
        paragraphs.append(f"Left alone: {reasons}.")
    return paragraphs


def loading() -> str:
    """How to load a release whose additions no weight holds."""
    return (
        f"What is added is in `{SIDECAR}`, since no bias of the model brings it to the residual stream as it is. "
        "transformers, and what is built on it, loads the weights alone and answers without it. The project that "
        "made this release adds it by hooks, as under Use."
    )


def _induces(edit: Edit) -> bool:
    """Whether the edit only adds, and in the sense of the direction: towards refusal."""
    return not edit.removals and all(each.amount > 0 for each in edit.additions.values())


def _num_directions(edit: Edit) -> int:
    return max((len(removal.vectors) for removal in edit.removals.values()), default=1)


def _direction(edit: Edit) -> str:
    about, number = edit.about, _num_directions(edit)
    what = "The direction" if number == 1 else f"The {number} directions"
    kinds = "harmful prompts differ from harmless ones"
    if about["target"] == "falsely_refused":
        kinds = "harmless prompts that the base refuses differ from those it answers"
    layer = float(about["layer"])
    between = f", mixed of layers {int(layer)} and {int(layer) + 1}" if layer % 1 else ""
    kept = (
        " It was made orthogonal to that of harmful prompts, whose refusal is to stay."
        if about["target"] == "falsely_refused"
        else ""
    )
    return (
        f"{what} in which {kinds} in the residual stream ({about['stream']}, layer {layer:g}{between}, token "
        f"position {about['position']} from the end of the prompt; estimator {about['estimator']}).{kept}"
    )


def _choice(recipe: Recipe, edit: Edit) -> str:
    if edit.about["selection"] == "fixed":
        return "The recipe names layer and position."
    if edit.about["selection"] == "scores":
        return "Layer and position were chosen by scores on prompts that were held out."
    trials = getattr(recipe.abliteration.selection, "num_trials", "its")
    return (
        f"Layer, position, kind of edit and strengths were found by a search of {trials} trials on prompts that "
        "were held out."
    )


def _removal(edit: Edit) -> str:
    kind, settings = edit.about["edit"], edit.about["settings"]
    what = _taken(settings.get("projection", kind), _num_directions(edit))
    edited = [removal for removal in edit.removals.values() if not removal.is_void]
    sentences = [
        f"{what} taken out of {len(edited)} matrices that write to the stream ({kind}, strength "
        f"{settings['strength']:g})."
    ]
    if kind in NORMS:
        sentences.append(NORMS[kind])
    strengths = sorted({strength for removal in edited for strength in removal.strengths})
    if strengths and (len(strengths) > 1 or strengths[0] != settings["strength"]):
        weights = "; ".join(f"{name} {_weight(w)}" for name, w in settings["weights"].items())
        sentences.append(
            f"The strength is weighted, so that it runs from {strengths[0]:.3g} to {strengths[-1]:.3g}: {weights}."
        )
    num_void = len(edit.removals) - len(edited)
    if num_void:
        sentences.append(f"Where the weight is 0, {num_void} matrices stayed as they were.")
    return " ".join(sentences)


def _taken(projection: str, number: int) -> str:
    """Subject and verb of what was taken out."""
    it, its, all_of_it = ("it", "its", "It was") if number == 1 else ("them", "their", "They were")
    where = {
        "projected": f"at {its} layer",
        "biprojected": f"at {its} own layer and at that of each matrix,",
    }
    if projection not in where:
        return all_of_it
    return f"What of {it} is orthogonal to the mean of harmless prompts {where[projection]} was"


def _weight(weight: Any) -> str:  # noqa: ANN401  # a number, one per layer, or a kernel
    if isinstance(weight, Mapping):
        return (
            f"{weight['max_weight']:.3g} at layer {weight['max_weight_position']:.3g}, falling to "
            f"{weight['min_weight']:.3g} at a distance of {weight['min_weight_distance']:.3g} layers, 0 beyond"
        )
    if isinstance(weight, list | tuple):
        return f"by layer {', '.join(f'{each:.3g}' for each in weight)}"
    return f"{weight:.3g}"


def _addition(edit: Edit, writer: str) -> str:
    addition = edit.additions[writer]
    return (
        f"It is added to the residual stream at every token, beside {writer} ({edit.about['edit']}, "
        f"{edit.about['settings']['strength']:g} times its own length, {addition.amount:.4g} in the units of the "
        "stream)."
    )
