"""Panels: prompts of the recipe's own that a benchmark puts to the models. What such benchmarks share."""

from dataclasses import dataclass

from common import artifacts
from common.errors import InputError
from common.prompts import check_prompts, describe, load_prompts, load_rows
from common.recipe import Divergence, PanelPrompts, Recipe, Refusal
from common.schema import PLACEHOLDER
from eval import panel_formats
from eval.benchmarks import place

Spec = Divergence | Refusal


@dataclass(frozen=True)
class Prompt:
    """A prompt of a panel.

    Attributes:
        text: one user turn.
        category: what it is about, where that is named.
    """

    text: str
    category: str | None = None


def names(spec: Spec) -> list[str]:
    """The panel."""
    return [spec.panel]


def check(spec: Spec, recipe: Recipe) -> list[str]:
    """Whether the prompts can be loaded."""
    key = f"{place(spec, recipe)}.prompts"
    if isinstance(spec, Divergence):
        return check_prompts(spec.prompts, key)
    try:
        load_panel(spec)
    except InputError as error:
        return [f"{key}: {error}"]
    return []


def inputs(spec: Spec) -> dict[str, object]:
    """Settings and the content of the prompts."""
    settings = spec.model_dump(mode="json", exclude={"prompts", "judge"})
    if isinstance(spec, Divergence):
        return settings | {"prompts": artifacts.hash_data(load_prompts(spec.prompts))}
    asked = [[prompt.text, prompt.category] for prompt in load_panel(spec)]
    return settings | {"prompts": artifacts.hash_data(asked)}


def texts(spec: Spec) -> dict[str, list[str]]:
    """The prompts."""
    if isinstance(spec, Divergence):
        return {spec.panel: load_prompts(spec.prompts)}
    return {spec.panel: [prompt.text for prompt in load_panel(spec)]}


def load_panel(spec: Refusal) -> list[Prompt]:
    """Load a panel's prompts with their categories, in order.

    Raises:
        InputError: as `load_prompts`; if a row has no category where a column names one; if the rows are not of the
            published set that the recipe names, or that set has no prompts of the kind.
    """
    source = spec.prompts
    if source.format is not None:
        return _load_published(source, panel_formats.FORMATS[source.format], spec.harmless)
    prompts = load_prompts(source)
    if source.category is None:
        return [Prompt(prompt) for prompt in prompts]
    rows = load_rows(source)
    if len(rows) != len(prompts):
        raise InputError(
            f"{describe(source)} has {len(rows) - len(prompts)} rows without a prompt, so that categories cannot be "
            "told apart from theirs; delete those rows"
        )
    for row in rows:
        if not str(row.get(source.category) or "").strip():
            raise InputError(
                f"{describe(source)}: column {source.category!r} should name a category in every row (found: "
                f"{', '.join(map(str, row))}); correct the file, or `category`"
            )
    return [
        Prompt(prompt, str(row[source.category])) for row, prompt in zip(rows, prompts, strict=True)
    ]


def _load_published(
    source: PanelPrompts, form: panel_formats.Format, harmless: bool
) -> list[Prompt]:
    asked_for = "harmless" if harmless else "harmful"
    if form.harmless is not None and form.harmless != harmless:
        raise InputError(
            f"{source.format} has no {asked_for} prompts; set harmless: {str(not harmless).lower()}"
        )
    found = []
    for row in load_rows(source):
        missing = [column for column in panel_formats.columns(form) if column not in row]
        if missing:
            raise InputError(
                f"{describe(source)} is not in the format {source.format}: it has no column {missing[0]!r} (found: "
                f"{', '.join(map(str, row))}); delete format and name column and category"
            )
        if panel_formats.belongs(row, form, harmless=harmless):
            try:
                text = panel_formats.prompt_of(row, form)
            except InputError as error:
                raise InputError(f"{describe(source)}: {error}; correct the file") from error
            found.append(Prompt(text, str(row[form.category])))
    found = [prompt for prompt in found if prompt.text.strip()]
    if not found:
        raise InputError(f"{describe(source)} holds no {asked_for} prompts of {source.format}")
    if source.template is None:
        return found
    return [
        Prompt(source.template.replace(PLACEHOLDER, prompt.text), prompt.category)
        for prompt in found
    ]
