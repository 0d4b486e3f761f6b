"""The recipe as types: every key, its default, its meaning and its limits.

Models are frozen and refuse unknown keys; words, numbers and booleans are never converted into each
other. The file name of a component (a direction, an edit, a benchmark...) is the `name` that
selects it here: `COMPONENTS` lists them all.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Text = Annotated[str, Field(strict=True, min_length=1)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]

Key = tuple[str | int, ...]

# Tags of unions begin with it, so that they can be told from keys in the place of an error.
TAG_MARK: Final = "="


def nearest(word: object, known: Iterable[str]) -> str:
    """Return `; did you mean "x"? (known: x, y)` for a word that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    guess = f'; did you mean "{close[0]}"?' if close else ""
    return f"{guess} (known: {', '.join(names)})"


def fail(*problems: tuple[Key, str]) -> None:
    """Raise problems from inside a validator, each with its place below the validated value."""
    if problems:
        raise ValidationError.from_exception_data(
            "recipe",
            [
                InitErrorDetails(
                    type=PydanticCustomError("recipe", "{text}", {"text": text}),
                    loc=place,
                    input=None,
                )
                for place, text in problems
            ],
        )


def _named(kind: str) -> Discriminator:
    """Tell the members of a union apart by `name`; the error for an unknown one says its kind."""

    def tag(value: object) -> str:
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        return f"{TAG_MARK}{name}"

    return Discriminator(tag, custom_error_type="component", custom_error_message=kind)


def _not_zero(problem: str) -> BeforeValidator:
    """Refuse the number 0 with a better remedy than a larger one."""

    def check(value: object) -> object:
        if type(value) in (int, float) and value == 0:
            fail(((), f"is 0, {problem}"))
        return value

    return BeforeValidator(check)


class Section(BaseModel):
    """A mapping of the recipe: frozen, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_once(words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a list that names something twice."""
    fail(
        *(
            ((index,), f'"{word}" is there already; delete one')
            for index, word in enumerate(words)
            if word in words[:index]
        )
    )
    return words


def _check_slice(text: str) -> str:
    """Refuse what is not `start:stop`, and what selects everything or nothing."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    problem = None
    if match is None:
        problem = 'is not a slice; write "start:stop" in whole numbers, e.g. "0:128"'
    else:
        start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
        if start == 0 and stop is None:
            problem = "selects every row, so it has no effect; delete it"
        elif stop is not None and (start < 0) == (stop < 0) and start >= stop:
            problem = "selects no row; the stop must lie behind the start"
    if problem:
        fail(((), f'"{text}" {problem}'))
    return text


Slice = Annotated[Text, AfterValidator(_check_slice)]


class Source(Section):
    """Rows of a local file or of a hub data set."""

    path: Text | None = Field(
        default=None, description="A local file: JSONL, CSV or text. Give this or dataset."
    )
    dataset: Text | None = Field(
        default=None, description="A data set on the hub, by its id. Give this or path."
    )
    revision: Text | None = Field(
        default=None,
        description="Commit, tag or branch of the data set; pin a commit to reproduce.",
    )
    subset: Text | None = Field(default=None, description="Configuration name of the data set.")
    split: Text | None = Field(
        default=None, description='Split of the data set; "train" when nothing is given.'
    )
    slice: Slice | None = Field(
        default=None, description='Rows to take, as a Python slice: "0:128", ":100", "-50:".'
    )

    @model_validator(mode="before")
    @classmethod
    def _default_split(cls, data: object) -> object:
        """Fill in the split, which only a data set has."""
        if isinstance(data, Mapping) and data.get("dataset") and data.get("split") is None:
            return {**data, "split": "train"}
        return data

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        """Ask for exactly one origin, and for settings that belong to it."""
        if self.path is None and self.dataset is None:
            fail(((), "names no rows; give path (a local file) or dataset (a hub id)"))
        if self.path is not None and self.dataset is not None:
            fail((("dataset",), "is given beside path; keep one of the two"))
        if self.path is not None:
            fail(
                *(
                    ((key,), "has no effect on a local file; delete it, or give dataset")
                    for key in ("revision", "subset", "split")
                    if getattr(self, key) is not None
                )
            )
        return self


PLACEHOLDER: Final = "{prompt}"


def _check_template(text: str) -> str:
    """Refuse a text that has no one place for the prompt, and the prompt alone."""
    count = text.count(PLACEHOLDER)
    if count != 1:
        fail(
            ((), f"holds {PLACEHOLDER} {count} times; write it exactly once, where the prompt goes")
        )
    if text == PLACEHOLDER:
        fail(((), "is the prompt alone, so it has no effect; delete it, or put words around it"))
    return text


Template = Annotated[Text, AfterValidator(_check_template)]


class PromptSource(Source):
    """Prompts: one column of a file or data set."""

    column: Text = Field(
        default="prompt", description="The column (JSONL key, CSV header) of the prompt."
    )
    template: Template | None = Field(
        default=None,
        description='Text around every prompt, e.g. "Answer in verse. {prompt}"; null: none.',
    )

    @model_validator(mode="after")
    def _text_has_no_columns(self) -> Self:
        """Refuse a column of a file that has one prompt per line."""
        if self.path is not None and self.path.endswith(".txt") and self.column != "prompt":
            fail((("column",), "has no effect on a text file (one prompt per line); delete it"))
        return self


class ModelSection(Section):
    """The model to change."""

    name_or_path: Text = Field(description="A local folder, or the id of a model on the hub.")
    revision: Text | None = Field(
        default=None, description="Commit, tag or branch on the hub; pin a commit to reproduce."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="auto", description="Number type of the weights; auto: as they are saved."
    )


class ValidationPrompts(Section):
    """Prompts of their own for choosing the direction."""

    harmful: PromptSource = Field(description="Prompts the model refuses, for the choice.")
    harmless: PromptSource = Field(description="Prompts the model answers, for the choice.")
    falsely_refused: PromptSource | None = Field(
        default=None, description="Harmless prompts the model refuses, for the choice."
    )


def _validation_form(value: object) -> str:
    """Tell a number of held-out prompts from sources of their own."""
    return "=prompts" if isinstance(value, Mapping | ValidationPrompts) else "=number"


class AbliterationPrompts(Section):
    """The two kinds of prompts whose difference is the direction."""

    harmful: PromptSource = Field(description="Prompts that the model refuses.")
    harmless: PromptSource = Field(description="Prompts of the same form that it answers.")
    falsely_refused: PromptSource | None = Field(
        default=None,
        description="Harmless prompts that the model refuses. Given, only their refusal is removed: "
        "their direction is made orthogonal to that of the harmful prompts.",
    )
    validation: Annotated[
        Annotated[Count, Tag("=number")] | Annotated[ValidationPrompts, Tag("=prompts")],
        Discriminator(_validation_form),
    ] = Field(
        default=32,
        description="Prompts for choosing the direction: how many to hold out of each kind, "
        "or sources of their own.",
    )

    @model_validator(mode="after")
    def _two_kinds(self) -> Self:
        """Refuse twice the same prompts: their means do not differ."""
        if self.harmful == self.harmless:
            fail((("harmless",), "is the same as harmful, so there is no difference to find"))
        if self.falsely_refused in (self.harmful, self.harmless):
            fail(
                (
                    ("falsely_refused",),
                    "is the same as harmful or harmless; name prompts of its own",
                )
            )
        if isinstance(self.validation, ValidationPrompts):
            if self.falsely_refused and not self.validation.falsely_refused:
                fail(
                    (
                        ("validation", "falsely_refused"),
                        "is missing; add it beside harmful and harmless",
                    )
                )
            if self.validation.falsely_refused and not self.falsely_refused:
                fail(
                    (
                        ("validation", "falsely_refused"),
                        "has no effect without prompts.falsely_refused; delete it or add that",
                    )
                )
        return self


class DifferenceInMeans(Section):
    """Mean activation on harmful prompts minus the mean on harmless ones."""

    name: Literal["difference_in_means"] = Field(description="The direction estimator.")


class GeometricMedian(Section):
    """Difference of geometric medians, which single odd prompts cannot move."""

    name: Literal["geometric_median"] = Field(description="The direction estimator.")


class WinsorizedMeans(Section):
    """Difference in means, each prompt's own outlying components clipped first."""

    name: Literal["winsorized_means"] = Field(description="The direction estimator.")
    quantile: Number = Field(
        default=0.995,
        gt=0.5,
        lt=1,
        description="Components beyond this quantile of a prompt's own magnitudes are clipped.",
    )


class Svd(Section):
    """Several directions: the mean difference, then the main axes of what it leaves over."""

    name: Literal["svd"] = Field(description="The direction estimator.")
    num_directions: Count = Field(
        default=2, ge=2, description="How many directions, the mean difference included."
    )


class LogisticRegression(Section):
    """The weight vector of a linear probe that tells the two kinds of prompts apart."""

    name: Literal["logistic_regression"] = Field(description="The direction estimator.")
    l2: Number = Field(default=1.0, gt=0, description="Strength of the L2 penalty.")


class _ByScores(Section):
    """What a choice by scores is bounded by."""

    max_kl: Number = Field(
        default=0.1,
        gt=0,
        description="Largest divergence (nats) that removing it may cause on harmless prompts.",
    )
    min_induce: Number = Field(
        default=0.0,
        description="Smallest refusal score that adding it must cause on harmless prompts.",
    )
    skip_last_layers: Number = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Fraction of the layers, from the end, that are not tried.",
    )
    min_refusals: Count = Field(
        default=8,
        description="Harmful prompts the model itself must refuse for there to be a direction.",
    )


class ScoresSelection(_ByScores):
    """Choose layer and position by how well removing the direction stops refusals."""

    name: Literal["scores"] = Field(description="Choose by scores on the validation prompts.")


EditKind = Literal["orthogonalize", "projected", "biprojected", "column_norm", "row_norm"]


# The strengths a search tries at the peak of its kernels.
SEARCHED_STRENGTHS: Final = (0.1, 1.5)


class SearchSelection(_ByScores):
    """Search layer, position, kind of edit and strengths over layers with Optuna."""

    name: Literal["search"] = Field(description="Search with Optuna, starting from the scores.")
    num_trials: Count = Field(default=96, description="Settings that are tried.")
    edits: Annotated[tuple[EditKind, ...], AfterValidator(_check_once)] = Field(
        default=("orthogonalize", "projected", "column_norm"),
        min_length=1,
        description="Kinds of edit to try; the recipe's own edit is the first trial.",
    )
    max_refusal: Number = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Refusal rate on the validation prompts that the chosen point may keep: of "
        "the points below it the one that diverges least is taken.",
    )
    trials_per_pass: Count = Field(
        default=6, description="Trials that share a forward pass, each on rows of its own."
    )
    answer_tokens: Count = Field(
        default=32, description="Tokens of each harmless answer that divergence is measured on."
    )


class FixedSelection(Section):
    """Take the direction of one layer and position."""

    name: Literal["fixed"] = Field(description="Take a known layer and position.")
    layer: Number = Field(
        ge=0, description="Index of the block whose input is read, from 0; 9.5 mixes 9 and 10."
    )
    position: Whole = Field(lt=0, description="Token position from the end of the prompt: -1, -2.")


class LayerKernel(Section):
    """A triangle over the layers: largest at one layer, falling in a straight line, 0 beyond."""

    max_weight: Number = Field(default=1.0, gt=0, description="Weight at the peak.")
    max_weight_position: Number = Field(ge=0, description="Layer of the peak, from 0.")
    min_weight: Number = Field(default=0.0, ge=0, description="Weight at the edge.")
    min_weight_distance: Number = Field(gt=0, description="Layers from the peak to the edge.")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        """Refuse a kernel whose edge is above its peak."""
        if self.min_weight > self.max_weight:
            fail((("min_weight",), "is above max_weight; the peak must be the largest"))
        return self


def _weight_form(value: object) -> str:
    """Tell one number, a number per layer, and a kernel apart."""
    if isinstance(value, Mapping | LayerKernel):
        return "=kernel"
    return "=list" if isinstance(value, list | tuple) else "=number"


Weight = Annotated[Number, Field(ge=0)]
LayerWeights = Annotated[
    Annotated[Weight, Tag("=number")]
    | Annotated[tuple[Weight, ...], Tag("=list")]
    | Annotated[LayerKernel, Tag("=kernel")],
    Discriminator(_weight_form),
]


class EditWeights(Section):
    """How the strength is shared out: by component, and for blocks by layer."""

    embedding: Weight = Field(default=1.0, description="Weight of the token embedding.")
    attention: LayerWeights = Field(
        default=1.0, description="Attention outputs: a number, one per layer, or a kernel."
    )
    mlp: LayerWeights = Field(
        default=1.0, description="MLP and expert outputs: a number, one per layer, or a kernel."
    )


class _Removal(Section):
    """What every kind of removal has."""

    strength: Number = Field(
        default=1.0, gt=0, description="Share of the component to remove: 1 removes all of it."
    )
    weights: EditWeights = Field(
        default=EditWeights(), description="Factors on the strength, by component and layer."
    )


class Orthogonalize(_Removal):
    """Remove the direction from every matrix that writes to the residual stream."""

    name: Literal["orthogonalize"] = Field(description="The edit.")


class Projected(_Removal):
    """Remove only what of the direction is orthogonal to the harmless mean at its layer."""

    name: Literal["projected"] = Field(description="The edit.")


class Biprojected(_Removal):
    """As projected, and orthogonal to the harmless mean of every layer that is edited as well."""

    name: Literal["biprojected"] = Field(description="The edit.")


class _KeepingNorms(_Removal):
    """A removal that restores norms of the weights."""

    projection: Literal["none", "projected", "biprojected"] = Field(
        default="none", description="What of the direction is removed: see those edits."
    )


class ColumnNorm(_KeepingNorms):
    """Remove the direction and keep the norm of every column: of what each input writes."""

    name: Literal["column_norm"] = Field(description="The edit.")


class RowNorm(_KeepingNorms):
    """Remove the direction and keep the norm of every row, as Heretic does."""

    name: Literal["row_norm"] = Field(description="The edit.")


class Add(Section):
    """Add the direction to the residual stream, so that the behaviour is induced."""

    name: Literal["add"] = Field(description="The edit.")
    strength: Annotated[
        Number, _not_zero("so nothing would be added; give a number above or below 0")
    ] = Field(
        default=1.0,
        description="Times the direction's own length: 1 moves the mean of one prompt set onto "
        "the other's; below 0 it moves the other way.",
    )


class AbliterationSection(Section):
    """Stage 1: find the direction and remove it."""

    prompts: AbliterationPrompts = Field(description="What the direction is found on.")
    direction: Annotated[
        Annotated[DifferenceInMeans, Tag("=difference_in_means")]
        | Annotated[GeometricMedian, Tag("=geometric_median")]
        | Annotated[WinsorizedMeans, Tag("=winsorized_means")]
        | Annotated[Svd, Tag("=svd")]
        | Annotated[LogisticRegression, Tag("=logistic_regression")],
        _named("direction"),
    ] = Field(
        default=DifferenceInMeans(name="difference_in_means"),
        description="How candidate directions are estimated.",
    )
    selection: Annotated[
        Annotated[ScoresSelection, Tag("=scores")]
        | Annotated[SearchSelection, Tag("=search")]
        | Annotated[FixedSelection, Tag("=fixed")],
        _named("selection"),
    ] = Field(default=ScoresSelection(name="scores"), description="How one candidate is chosen.")
    edit: Annotated[
        Annotated[Orthogonalize, Tag("=orthogonalize")]
        | Annotated[Projected, Tag("=projected")]
        | Annotated[Biprojected, Tag("=biprojected")]
        | Annotated[ColumnNorm, Tag("=column_norm")]
        | Annotated[RowNorm, Tag("=row_norm")]
        | Annotated[Add, Tag("=add")],
        _named("edit"),
    ] = Field(
        default=Orthogonalize(name="orthogonalize"),
        description="How it is removed from the weights.",
    )
    load_in_4bit: Flag = Field(
        default=False,
        description="Find the direction on weights in 4 bits (bitsandbytes); the full-precision "
        "source is what is edited.",
    )
    layer_by_layer: Flag = Field(
        default=False,
        description="Read the residual stream with one block in memory at a time; needs a fixed "
        "selection.",
    )
    batch_size: Count = Field(default=32, description="Prompts per forward pass and rank.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """Refuse parts that cannot work together."""
        fail(
            *_addition_problems(self),
            *_search_problems(self),
            *_false_refusal_problems(self),
            *_memory_problems(self),
        )
        return self


def _addition_problems(section: AbliterationSection) -> Iterator[tuple[Key, str]]:
    """What does not go with adding a direction."""
    if section.edit.name != "add":
        return
    selection = section.selection
    if selection.name != "fixed":
        reason = f'is "{selection.name}", which tries removals; write fixed to add'
        yield ("selection", "name"), reason
    elif selection.layer < 1 or selection.layer % 1:
        reason = (
            f"is {selection.layer:g}, but a direction is added behind one block: write 1, 2, ..."
        )
        yield ("selection", "layer"), reason
    if section.direction.name == "svd":
        yield ("direction", "name"), "is svd, but one direction is added; take another"
    if section.prompts.falsely_refused:
        yield ("edit", "name"), 'is "add", but false refusals are removed; take a removal'


def _search_problems(section: AbliterationSection) -> Iterator[tuple[Key, str]]:
    """What of the edit a search cannot begin with."""
    if section.selection.name != "search" or section.edit.name == "add":
        return
    low, high = SEARCHED_STRENGTHS
    if not low <= section.edit.strength <= high:
        reason = f"is {section.edit.strength:g}, but a search begins with it and tries {low:g} to {high:g}"
        yield ("edit", "strength"), f"{reason}; give one in between"
    if section.edit.weights != EditWeights():
        yield ("edit", "weights"), "has no effect: a search finds them; delete it"
    if section.edit.name not in section.selection.edits:
        reason = (
            f'is "{section.edit.name}", which the search begins with; add it to selection.edits'
        )
        yield ("edit", "name"), reason
    if section.prompts.falsely_refused:
        reason = 'is "search", which does not watch the true refusals; write scores, which does'
        yield ("selection", "name"), reason


def _false_refusal_problems(section: AbliterationSection) -> Iterator[tuple[Key, str]]:
    """What would turn a direction of false refusal back towards true refusal."""
    projection = getattr(section.edit, "projection", "none")
    if section.prompts.falsely_refused and (
        "projected" in section.edit.name or projection != "none"
    ):
        reason = "is projected, which turns the direction towards true refusal; write {name: orthogonalize}"
        yield ("edit",), reason


def _memory_problems(section: AbliterationSection) -> Iterator[tuple[Key, str]]:
    """What cannot be done on a part of the model, or on packed weights."""
    selection = section.selection
    kinds = {section.edit.name, *(selection.edits if selection.name == "search" else ())}
    keeping = " and ".join(sorted(kinds & {"column_norm", "row_norm"}))
    if section.load_in_4bit and keeping:
        reason = f"packs the weights, whose norms {keeping} would keep; use edits without norms"
        yield ("load_in_4bit",), reason
    if section.layer_by_layer and selection.name != "fixed":
        yield (
            ("layer_by_layer",),
            f"reads prompts only, but selection {selection.name} must run the whole model; write "
            "selection: {name: fixed, layer: ..., position: ...}",
        )
    if section.layer_by_layer and section.load_in_4bit:
        yield ("layer_by_layer",), "is set beside load_in_4bit; keep one of the two"


class _PairSource(Section):
    """What every source of pairs has: its part in the mix."""

    weight: Number = Field(
        default=1.0,
        gt=0,
        description="How often each of its pairs is drawn, relative to those of the other sources; "
        "the number of pairs in all stays the same.",
    )
    cap: Count | None = Field(
        default=None,
        description="Most pairs that are kept, drawn with the seed after the filters; null: all.",
    )
    domain: Text | None = Field(
        default=None, description="A tag of its pairs, which are counted by it; null: none."
    )

    @property
    def has_rejected(self) -> bool:
        """Whether a worse answer stands beside the better one."""
        return True


class TaggedPrompts(PromptSource):
    """Prompts, each with what it asks about."""

    domain: Text | None = Field(
        default=None, description="The column of each prompt's domain; null: none."
    )


class Questions(TaggedPrompts):
    """Prompts with what is known about them."""

    answer: Text | None = Field(
        default=None, description="The column of the right answer; null: none is known."
    )


class OnPolicy(_PairSource):
    """Pairs made here: the original model's answer is chosen, the abliterated model's rejected."""

    name: Literal["on_policy"] = Field(description="Make pairs from the two models' own answers.")
    prompts: Questions = Field(
        description="Prompts that the original model does not refuse. Where right answers are known, chosen must be "
        "right and rejected wrong."
    )
    num_candidates: Count = Field(
        default=1,
        description="Answers sampled for each prompt: the one that the original model finds least "
        "likely per token is rejected.",
    )
    max_new_tokens: Count = Field(default=256, description="Longest answer, in tokens.")
    temperature: Number = Field(
        default=1.0, ge=0, description="Sampling temperature of the rejected answer; 0 is greedy."
    )
    top_p: Number = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample among the likeliest tokens that hold this much probability together.",
    )
    batch_size: Count = Field(default=32, description="Prompts per generation batch and rank.")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        """Refuse sampling settings beside greedy decoding, and two origins of a domain."""
        if self.temperature == 0:
            if self.num_candidates > 1:
                fail((("num_candidates",), "are all the same at temperature 0; raise it"))
            if self.top_p < 1:
                fail((("top_p",), "has no effect at temperature 0; delete it"))
        if self.domain is not None and self.prompts.domain is not None:
            fail((("domain",), "is given beside prompts.domain; keep one of the two"))
        return self


class Columns(Section):
    """Where a preference data set keeps its three parts."""

    prompt: Text | None = Field(
        default="prompt",
        description="Column of the prompt; null: it is the common start of the answers.",
    )
    chosen: Text = Field(default="chosen", description="Column of the better answer.")
    rejected: Text | None = Field(
        default="rejected",
        description="Column of the worse answer; null: there is none, as in instruction data, which only loss_type "
        "[sft] learns from.",
    )
    domain: Text | None = Field(
        default=None, description="Column of the pair's domain; null: none."
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        """Refuse one column in two roles."""
        named = [name for name in (self.prompt, self.chosen, self.rejected) if name is not None]
        if len(set(named)) < len(named):
            fail(((), "names one column twice; prompt, chosen and rejected must differ"))
        return self


class PreferenceDataset(_PairSource, Source):
    """Pairs that exist already."""

    name: Literal["dataset"] = Field(description="Take pairs from a file or data set.")
    columns: Columns | None = Field(
        default=None, description="Column names; null: prompt, chosen and rejected as usual."
    )

    @property
    def has_rejected(self) -> bool:
        """Not so in instruction data."""
        return self.columns is None or self.columns.rejected is not None

    @model_validator(mode="after")
    def _one_domain(self) -> Self:
        """Refuse two origins of a domain."""
        if self.domain is not None and self.columns is not None and self.columns.domain is not None:
            fail((("domain",), "is given beside columns.domain; keep one of the two"))
        return self


class Filters(Section):
    """Which pairs are dropped.

    Beside these always: pairs without a chosen answer, items of a benchmark, and prompts that alone fill the
    trainer's max_length, which trl would drop without a word.
    """

    refusals: Flag = Field(
        default=True,
        description="Drop pairs whose chosen answer opens with the words of a refusal.",
    )
    direction: Flag = Field(
        default=False,
        description="Drop pairs whose chosen answer stands out along the removed direction in the original "
        "model, in any language; the limit comes from the original's own answers of stage 1.",
    )
    swap: Flag = Field(
        default=False,
        description="Where chosen refuses and rejected does not, exchange the two instead of dropping the pair.",
    )
    identical: Flag = Field(
        default=True,
        description="Drop pairs whose two answers are the same: they have no gradient.",
    )
    duplicates: Flag = Field(default=True, description="Drop pairs that are there already.")

    @model_validator(mode="after")
    def _something_to_swap(self) -> Self:
        """Refuse a swap that nothing can lead to."""
        if self.swap and not (self.refusals or self.direction):
            fail((("swap",), "has no effect without refusals or direction; set one of them"))
        return self


class ResidualTerm(Section):
    """Hold the residual stream itself to the teacher's, at every token and block, off the removed direction."""

    weight: Annotated[Number, _not_zero("so it has no effect; delete residual")] = Field(
        default=10.0, gt=0, description="Weight in the loss of the mean squared relative distance."
    )
    size: Count = Field(
        default=64,
        description="Numbers that are kept of the teacher's stream for each token and block: a random projection, "
        "another for each prompt; all of it where the model is no wider.",
    )


class Anchor(Section):
    """Distillation: hold the healed model's next-token probabilities to a teacher's."""

    to: Literal["original", "abliterated"] = Field(
        description="The teacher: original on harmless prompts, abliterated on the once refused."
    )
    prompts: TaggedPrompts = Field(
        description="Prompts the teacher answers; those of a damage-aware mix can have domains."
    )
    weight: Annotated[Number, _not_zero("so the anchor has no effect; delete the anchor")] = Field(
        default=1.0, gt=0, description="Weight of this term in the loss."
    )
    batch_size: Count = Field(default=16, description="Prompts per optimizer step, over all ranks.")
    top_k: Count = Field(
        default=64, description="Teacher probabilities that are kept for each token."
    )
    max_new_tokens: Count = Field(default=256, description="Longest teacher answer, in tokens.")
    drop_refusals: Flag = Field(
        default=True,
        description="Leave out the prompts that the teacher refuses, which would teach refusal again; false keeps "
        "refusals that are meant to stay.",
    )
    residual: ResidualTerm | None = Field(
        default=None,
        description="Hold the residual stream to the teacher's as well; null: the probabilities alone.",
    )

    @model_validator(mode="after")
    def _only_damage_is_weighed(self) -> Self:
        """Refuse domains of what the edit unlocked: there it damaged nothing."""
        if self.to == "abliterated" and self.prompts.domain is not None:
            fail(
                (
                    ("prompts", "domain"),
                    "has no effect on an anchor to the abliterated model, which knows nothing of damage; delete it",
                )
            )
        return self


def _unusable(value: object, place: Key) -> Iterator[tuple[Key, str]]:
    """Find numbers that no library can use, however deep they are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, f"is {value}, which is not a usable number"
    inner: Iterable[tuple[Any, object]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for step, child in inner:
        yield from _unusable(child, (*place, step))


def _check_block(block: dict[str, Any]) -> dict[str, Any]:
    """Refuse a pass-through block that holds infinity or no number."""
    fail(*_unusable(block, ()))
    return block


Block = Annotated[dict[Text, Any], AfterValidator(_check_block)]


class QuickQuestions(Section):
    """What a quick evaluation asks, to see what the edit broke."""

    questions: Questions = Field(
        description="What damage and recovery are measured on; stage 3 may not use them. Where no right answer is "
        "known the original model's own counts as right."
    )
    max_new_tokens: Count = Field(default=64, description="Longest answer, in tokens.")
    batch_size: Count = Field(default=32, description="Prompts per forward pass and rank.")


class Mix(QuickQuestions):
    """A damage-aware mix: both models answer questions first, and what the edit broke is trained on most."""

    floor: Number = Field(
        default=0.05, ge=0, lt=1, description="Least share of a domain in the mix, damaged or not."
    )
    cap: Number = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Largest share that damage raises a domain to; one that has more as it comes is not cut.",
    )

    @model_validator(mode="after")
    def _has_domains(self) -> Self:
        """Refuse questions that name no domain, and a floor over the cap."""
        problems: list[tuple[Key, str]] = []
        if self.questions.domain is None:
            reason = "is missing; name the column that says which domain a question is of"
            problems.append((("questions", "domain"), reason))
        if self.floor >= self.cap:
            reason = (
                f"is {self.floor:g}, not below cap {self.cap:g}, so every share would be the same"
            )
            problems.append((("floor",), f"{reason}; lower it"))
        fail(*problems)
        return self


class Stopping(QuickQuestions):
    """Quick evaluations during training: stop where the damage is won back, and keep the best weights."""

    every: Count = Field(default=20, description="Optimizer steps between quick evaluations.")
    patience: Count = Field(
        default=3, description="Stop after so many quick evaluations in a row without a new best."
    )
    min_recovery: Number = Field(
        default=0.85,
        ge=0,
        lt=1,
        description="Full recovery inside the interval ends training where the lower end is at least this: "
        "inside a wide one it shows nothing.",
    )
    max_refusal: Number = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Weights that refuse more of the formerly refused prompts are never kept.",
    )
    max_over_refusal: Number = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Weights that refuse more of the harmless prompts are never kept.",
    )
    harmful: PromptSource = Field(description="Prompts that the original model refuses.")
    harmless: PromptSource = Field(
        description="Prompts that it answers: for over-refusal, and for the divergence from it."
    )


class TrainSection(Section):
    """Stage 2: win back what the edit broke."""

    preferences: tuple[
        Annotated[
            Annotated[OnPolicy, Tag("=on_policy")] | Annotated[PreferenceDataset, Tag("=dataset")],
            _named("preference source"),
        ],
        ...,
    ] = Field(
        default=(), description="Where preference pairs come from; all of them are used together."
    )
    filters: Filters = Field(default=Filters(), description="Which pairs are dropped.")
    anchors: tuple[Anchor, ...] = Field(
        default=(), description="Distillation terms beside the pairs."
    )
    keep_ablated: Literal["none", "soft", "hard"] = Field(
        default="hard",
        description="hard: training cannot write along the removed direction; soft: it costs, most at "
        "the start; none: it can.",
    )
    l2: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="Weight in the loss of the squared distance to the abliterated weights; null: no such term.",
    )
    adapter: Block | None = Field(
        default={"r": 16, "lora_alpha": 32},
        description="peft.LoraConfig by its own names; null: train all weights.",
    )
    load_in_4bit: Flag = Field(
        default=False,
        description="Train the adapter on weights in 4 bits (bitsandbytes, QLoRA); it is merged into the "
        "full-precision ones.",
    )
    engine: Literal["shared", "trl"] = Field(
        default="shared",
        description="shared: the prompt of a pair is read once for both answers, with the same result; trl: twice.",
    )
    global_batch_size: Count = Field(
        default=32, description="Pairs per optimizer step over all ranks, however many there are."
    )
    trainer: Block = Field(default={}, description="trl.DPOConfig by its own names.")
    mix: Mix | None = Field(
        default=None,
        description="Weigh pairs and anchors by what the edit damaged; null: as many as there are of each domain.",
    )
    stopping: Stopping | None = Field(
        default=None,
        description="Quick evaluations that end training and choose its weights; null: train to the end.",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        """Refuse training without pairs: anchors stand beside a preference loss, never alone."""
        if not self.preferences:
            fail(((), "has no preferences; name at least one source of pairs"))
        return self

    @model_validator(mode="after")
    def _something_to_swap(self) -> Self:
        """Refuse to exchange answers where none stands beside the chosen one."""
        if self.filters.swap and not any(source.has_rejected for source in self.preferences):
            reason = "has no effect on sources with columns.rejected: null, where no other answer could be chosen"
            fail((("filters", "swap"), f"{reason}; delete it"))
        return self

    @model_validator(mode="after")
    def _weights_differ(self) -> Self:
        """Refuse weights that change no proportion."""
        weights = {source.weight for source in self.preferences}
        if len(weights) == 1 and weights != {1.0}:
            reason = "is the same for all sources, so it changes no proportion; delete it"
            fail(*((("preferences", i, "weight"), reason) for i in range(len(self.preferences))))
        return self

    @model_validator(mode="after")
    def _domains_are_weighed(self) -> Self:
        """Refuse domains of anchors that nothing reads; those of pairs are counted at least."""
        if self.mix is None:
            fail(
                *(
                    (
                        ("anchors", index, "prompts", "domain"),
                        "has no effect without train.mix; delete it",
                    )
                    for index, anchor in enumerate(self.anchors)
                    if anchor.prompts.domain is not None
                )
            )
        return self

    @model_validator(mode="after")
    def _packed_weights_are_not_trained(self) -> Self:
        """Refuse full training of weights in 4 bits, which have no gradients."""
        if self.load_in_4bit and self.adapter is None:
            fail(
                (
                    ("load_in_4bit",),
                    "packs the weights, which cannot be trained then; give train.adapter, or delete it",
                )
            )
        return self


_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.\-]*"
_RATE: Final = frozenset({"value", "low", "high"})
_MODELS: Final = frozenset({"original", "abliterated", "healed"})
_DIVERGENCE: Final = frozenset(
    {
        "mean_kl",
        "answered_kl",
        "median_kl",
        "p95_kl",
        "p99_kl",
        "top1_agreement",
        "first_token_kl",
        "after_first_token_kl",
    }
)
_RATES: Final[Mapping[str, Collection[str]]] = dict.fromkeys(sorted(_MODELS), _RATE)
# How an answer to a refusal panel is judged.
Label = Literal["full_refusal", "partial_refusal", "compliance", "degenerate"]
LABELS: Final[tuple[Label, ...]] = get_args(Label)

_FLIPS: Final = frozenset(
    {"broken", "fixed", "still_broken", "newly_broken", "unlocked", "newly_right"}
)

# The numbers of results.json that a gate can name: list, then field, then its own fields, and so on.
RESULT_FIELDS: Final[Mapping[str, Mapping[str, Collection[str]]]] = {
    "benchmarks": {
        **_RATES,
        "n": (),
        "answer_logp": _MODELS,
        "damage": _RATE | {"p"},
        "gap": _RATE | {"p"},
        "minimum_detectable_effect": (),
        "flips": _FLIPS,
        "recovery": _RATE,
    },
    "refusal": {
        **_RATES,
        "n": (),
        "classes": dict.fromkeys(sorted(_MODELS), LABELS),
        "calibrated": _RATES,
    },
    "divergence": {
        "num_tokens": (),
        "num_answered": (),
        "abliterated": _DIVERGENCE,
        "healed": _DIVERGENCE,
        "cross_entropy": _MODELS,
        "repetition": _MODELS,
    },
    "cross_entropy": {
        **_RATES,
        "num_tokens": (),
        "damage": _RATE | {"p"},
        "gap": _RATE | {"p"},
    },
    "suites": {**_RATES, "n": (), "damage": _RATE, "gap": _RATE},
    "pooled": {"n": (), "damage": _RATE, "recovery": _RATE},
    "direction": dict.fromkeys(
        ("residual", "residual_bfloat16", "residual_nf4"), frozenset({"abliterated", "healed"})
    ),
}
_ITEM_LISTS: Final = frozenset({"benchmarks", "suites", "refusal", "divergence", "cross_entropy"})


def _check_gate(path: str) -> str:
    """Refuse a gate that names no number of results.json."""
    problem = _gate_problem(path)
    if problem:
        fail(((), problem))
    return path


def _gate_problem(path: str) -> str | None:
    """Say what is wrong with the dotted path of a gate, if anything is."""
    match = re.fullmatch(r"([^\[\].]+)(?:\[([^\[\]]+)\])?((?:\.[^\[\].]+)+)", path)
    if not match:
        return (
            "is not a field of results.json; write e.g. refusal[restricted].healed.value "
            "or pooled.recovery.value"
        )
    head, item, rest = match.groups()
    if head not in RESULT_FIELDS:
        return f'"{head}" is not in results.json{nearest(head, RESULT_FIELDS)}'
    if (item is not None) != (head in _ITEM_LISTS):
        form = f"{head}[name].field" if head in _ITEM_LISTS else f"{head}.field"
        return f"{head} is {'a list' if head in _ITEM_LISTS else 'not a list'}; write {form}"
    return _field_problem(head, RESULT_FIELDS[head], rest[1:].split("."))


def _field_problem(where: str, fields: Collection[str], path: Sequence[str]) -> str | None:
    """Say where a path leaves the fields of a part of results.json, or ends before a number."""
    name, *leaves = path
    if name not in fields:
        return f'"{name}" is not a field of {where}{nearest(name, fields)}'
    inner: Collection[str] = fields[name] if isinstance(fields, Mapping) else ()
    if not inner:
        return f"{name} is one number; delete .{'.'.join(leaves)}" if leaves else None
    if not leaves:
        return f"{name} is not a number; add one of: {', '.join(sorted(inner))}"
    return _field_problem(name, inner, leaves)


Gate = Annotated[Text, AfterValidator(_check_gate)]


class Limit(Section):
    """The range in which a gate passes."""

    min: Number | None = Field(default=None, description="Smallest value that passes.")
    max: Number | None = Field(default=None, description="Largest value that passes.")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        """Refuse a range that everything or nothing passes."""
        if self.min is None and self.max is None:
            fail(((), "has neither min nor max, so everything passes; give one or delete it"))
        elif self.min is not None and self.max is not None and self.min > self.max:
            fail(((), f"min {self.min} is above max {self.max}, so nothing passes; swap them"))
        return self


Panel = Annotated[Text, Field(pattern=f"^{_NAME}$")]


BenchmarkRole = Annotated[
    Literal["capability", "unlocked"],
    Field(
        description="capability: the original is the reference; unlocked: the abliterated model "
        "is, for what only the edit made answerable.",
    ),
]
SuiteName = Literal["leaderboard-v1", "leaderboard-v2", "nous", "quick"]


class LmEval(Section):
    """Tasks of lm-evaluation-harness."""

    name: Literal["lm_eval"] = Field(description="Tasks of lm-evaluation-harness.")
    tasks: tuple[Text, ...] = Field(
        default=(), description="Task names as lm-eval knows them. Give this or suite."
    )
    suite: SuiteName | None = Field(
        default=None,
        description="A list of tasks with the shots, metrics and averages of a published table. Give this or tasks.",
    )
    include_path: Text | None = Field(
        default=None, description="Folder with task files of your own."
    )
    data: dict[Text, Text | dict[Text, Text]] = Field(
        default={},
        description="Local data by task: a folder that holds a copy of its data set, or a file by each of the splits "
        "that the task reads (JSONL, CSV or Parquet, in the columns of its data set).",
    )
    num_fewshot: Whole | None = Field(
        default=None, ge=0, description="Examples before each item; null: as the task says."
    )
    limit: Count | None = Field(default=None, description="Items per task; null: all of them.")
    role: BenchmarkRole = "capability"

    @model_validator(mode="after")
    def _tasks_or_a_suite(self) -> Self:
        """Ask for exactly one of the two, and for no shots beside those of a suite."""
        if not self.tasks and self.suite is None:
            fail((("tasks",), "is empty; name at least one task, or a suite"))
        if self.tasks and self.suite is not None:
            fail((("suite",), "is given beside tasks; write two entries, or keep one of the two"))
        if self.suite is not None and self.num_fewshot is not None:
            fail((("num_fewshot",), "has no effect: a suite has its published shots; delete it"))
        return self


class LocalQuestions(Source):
    """Questions with right answers in a file or data set of one's own."""

    name: Literal["local"] = Field(
        description="Questions of one's own: several options, or an answer that is written."
    )
    task: Panel = Field(description="Name of the questions, in results and gates.")
    question: Text = Field(default="question", description="The column of the question.")
    answer: Text | None = Field(
        default=None,
        description="The column of the right answer, which the model has to write. Give this or choices.",
    )
    choices: Text | tuple[Text, ...] | None = Field(
        default=None,
        description="The column that holds the list of options, or the columns that hold one option each. Give this "
        "or answer.",
    )
    label: Text | None = Field(
        default=None,
        description="The column that says which option is right: its number from 0, its letter from A, or its text.",
    )
    cluster: Text | None = Field(
        default=None,
        description="The column of what several questions rest on (a passage, a subject); null: each stands alone.",
    )
    max_new_tokens: Count | None = Field(
        default=None, description="Longest answer that is written, in tokens; null: 256."
    )
    role: BenchmarkRole = "capability"

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Self:
        """Ask for exactly one kind of answer, and for settings that belong to it."""
        if (self.answer is None) == (self.choices is None):
            fail(((), "needs one of the two: answer (a column), or choices with label"))
        if self.choices is not None and self.label is None:
            fail((("label",), "is missing; name the column that says which option is right"))
        if self.choices is not None and self.max_new_tokens is not None:
            fail((("max_new_tokens",), "has no effect on options, which are scored; delete it"))
        if self.answer is not None and self.label is not None:
            fail((("label",), "has no effect beside answer; delete it"))
        if isinstance(self.choices, tuple) and len(self.choices) < 2:
            fail((("choices",), "names one option; name two columns, or a list's column as text"))
        return self


PanelFormat = Literal[
    "xstest",
    "coconot_contrast",
    "or_bench",
    "jailbreakbench",
    "harmbench",
    "strongreject",
    "sorry_bench",
]


class PanelPrompts(PromptSource):
    """Prompts of a panel, with what each is about."""

    category: Text | None = Field(
        default=None, description="The column of each prompt's category; null: none."
    )
    format: PanelFormat | None = Field(
        default=None,
        description="A published set by name: its own columns are read, and of a set that holds both harmful and "
        "harmless prompts those that `harmless` asks for; null: column and category.",
    )

    @model_validator(mode="after")
    def _format_names_the_columns(self) -> Self:
        """Refuse columns beside a format that has its own."""
        if self.format is not None:
            reason = f"has no effect beside format {self.format}; delete one of the two"
            given = [("column", self.column != "prompt"), ("category", self.category is not None)]
            fail(*(((key,), reason) for key, is_given in given if is_given))
        return self


Words = tuple[Text, Text]


class ModelJudge(Section):
    """A language model that was trained to judge answers and says so in fixed words: Llama Guard, WildGuard..."""

    name: Literal["model"] = Field(description="A guard model, by hub id or path.")
    name_or_path: Text = Field(description="A local folder, or the id of a model on the hub.")
    revision: Text | None = Field(
        default=None, description="Commit, tag or branch on the hub; pin a commit to reproduce."
    )
    template: Text | None = Field(
        default=None,
        description="Text that is put to it, with {prompt} and {answer}, as its model card states; null: its own chat "
        "template, for a conversation of the two (Llama Guard).",
    )
    refusal: Words | None = Field(
        default=None,
        description="What its reply holds for a refusal, and for none, e.g. [response refusal: yes, response refusal: "
        "no] (WildGuard); null: refusals are counted as without it.",
    )
    harmful: Words | None = Field(
        default=None,
        description="What its reply holds for a harmful answer, and for a harmless one, e.g. [unsafe, safe] (Llama "
        "Guard) or [yes, no] (HarmBench); null: not judged.",
    )
    max_new_tokens: Count = Field(default=32, description="Longest reply, in tokens.")
    batch_size: Count = Field(default=8, description="Answers per forward pass and rank.")

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        """Refuse a judge whose replies nobody can read, and a template that shows it nothing."""
        if self.refusal is None and self.harmful is None:
            reason = "is missing, and harmful too; name the words of its replies for one of them"
            fail((("refusal",), reason))
        if self.template is not None and not {"{prompt}", "{answer}"} <= {
            word for word in ("{prompt}", "{answer}") if self.template.count(word) == 1
        }:
            fail((("template",), "must hold {prompt} and {answer}, each exactly once"))
        return self


class NliJudge(Section):
    """A model of natural language inference that was never trained on refusals (zero-shot)."""

    name: Literal["nli"] = Field(description="A zero-shot classifier, by hub id or path.")
    name_or_path: Text = Field(description="A local folder, or the id of a model on the hub.")
    revision: Text | None = Field(
        default=None, description="Commit, tag or branch on the hub; pin a commit to reproduce."
    )
    batch_size: Count = Field(default=8, description="Answers per forward pass and rank.")


class EndpointJudge(Section):
    """Any chat model behind an OpenAI-compatible address. Prompts and answers are sent there."""

    name: Literal["endpoint"] = Field(description="A server that speaks OpenAI's protocol.")
    base_url: Text = Field(description="Address up to the version, e.g. http://127.0.0.1:8000/v1.")
    model: Text = Field(description="The model's name there.")
    api_key_variable: Text | None = Field(
        default=None, description="Environment variable that holds the key; null: none is sent."
    )
    timeout: Annotated[Number, Field(gt=0)] = Field(
        default=60.0, description="Seconds to wait for a reply."
    )
    num_workers: Count = Field(default=4, description="Requests at a time and rank.")

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        """Refuse what is no address on the web or on this machine."""
        if not re.match(r"https?://[^/\s]+", value):
            fail(((), f"{value} is no address; write e.g. http://127.0.0.1:8000/v1"))
        return value.rstrip("/")


Judge = Annotated[
    Annotated[ModelJudge, Tag("=model")]
    | Annotated[NliJudge, Tag("=nli")]
    | Annotated[EndpointJudge, Tag("=endpoint")],
    _named("judge"),
]


class Refusal(Section):
    """The rate of refusals on a set of prompts."""

    name: Literal["refusal"] = Field(description="The rate of refusals.")
    panel: Panel = Field(description="Name of the prompt set, in results and gates.")
    prompts: PanelPrompts = Field(description="Prompts that no earlier stage has used.")
    harmless: Flag = Field(
        description="true: refusing these is over-refusal; false: the original refuses these."
    )
    system: Text | None = Field(
        default=None,
        description="System prompt in front of every prompt; null: none. For both, name two panels.",
    )
    judge: Judge | None = Field(
        default=None,
        description="What judges the answers; null: the classifier that comes with the project.",
    )
    max_new_tokens: Count = Field(default=256, description="Longest answer, in tokens.")


class Divergence(Section):
    """How far the answers' probabilities moved away from the original model's."""

    name: Literal["divergence"] = Field(description="KL divergence to the original model.")
    panel: Panel = Field(description="Name of the prompt set, in results and gates.")
    prompts: PromptSource = Field(description="Prompts that the original model answers.")
    max_new_tokens: Count = Field(default=128, description="Longest answer, in tokens.")


class CrossEntropy(Section):
    """How well plain text is predicted."""

    name: Literal["cross_entropy"] = Field(description="Cross-entropy of plain text.")
    panel: Panel = Field(description="Name of the text, in results and gates.")
    documents: PromptSource = Field(
        description="Plain text: one document a row (of a text file: a line), read without a chat template."
    )
    max_tokens: Whole = Field(default=512, ge=2, description="Where a document is cut, in tokens.")


Benchmark = Annotated[
    Annotated[LmEval, Tag("=lm_eval")]
    | Annotated[LocalQuestions, Tag("=local")]
    | Annotated[Refusal, Tag("=refusal")]
    | Annotated[Divergence, Tag("=divergence")]
    | Annotated[CrossEntropy, Tag("=cross_entropy")],
    _named("benchmark"),
]


def _repeated(
    benchmarks: Sequence[LmEval | LocalQuestions | Refusal | Divergence | CrossEntropy],
) -> list[tuple[Key, str]]:
    """Find tasks and panels whose results would have the same name."""
    seen: set[tuple[str, str]] = set()
    problems: list[tuple[Key, str]] = []
    for index, entry in enumerate(benchmarks):
        names: list[tuple[Key, str]] = []
        if isinstance(entry, LmEval):
            names += [((index, "tasks", i), task) for i, task in enumerate(entry.tasks)]
            names += [((index, "suite"), entry.suite)] if entry.suite else []
        elif isinstance(entry, LocalQuestions):
            names.append(((index, "task"), entry.task))
        else:
            names.append(((index, "panel"), entry.panel))
        for place, name in names:
            if (entry.name, name) in seen:
                problems.append((place, f'"{name}" is there already; rename or delete one'))
            seen.add((entry.name, name))
    return problems


Engine = Literal["packed", "hf", "vllm"]


class EvalSection(Section):
    """Stage 3: measure the original, the abliterated and the healed model on the same items."""

    margin: Number = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Loss (as a fraction) that still counts as not inferior.",
    )
    batch_size: Count = Field(default=32, description="Items per forward pass and rank.")
    engine: Engine = Field(
        default="packed",
        description="What answers lm_eval's tasks: packed rows (all options of an item in one, what items begin with "
        "read once), hf (lm-eval's HFLM), or vllm where it is installed.",
    )
    part: Literal["all", "search", "confirmation", "test"] = Field(
        default="all",
        description="Items that are measured: all, or one of three parts that share none; a study sets it.",
    )
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1, description="What is measured.")
    labels: Text | None = Field(
        default=None,
        description="A CSV file with what people say of some answers to the refusal panels: labels.csv of an earlier "
        "evaluation, filled in; null: none.",
    )
    accept: dict[Gate, Limit] = Field(
        default={}, description="Limits on fields of results.json; a missed one stops the release."
    )

    @field_validator("benchmarks")
    @classmethod
    def _names_differ(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        """Refuse two results of one name."""
        fail(*_repeated(value))
        return value

    @field_validator("accept")
    @classmethod
    def _panels_exist(cls, value: dict[str, Limit], info: ValidationInfo) -> dict[str, Limit]:
        """Refuse a gate on a panel that is not measured."""
        if "benchmarks" not in info.data:
            return value
        for gate in value:
            head, _, rest = gate.partition("[")
            panels = [entry.panel for entry in info.data["benchmarks"] if entry.name == head]
            panel = rest.partition("]")[0]
            if head in ("refusal", "divergence", "cross_entropy") and panel not in panels:
                known = nearest(panel, panels) if panels else f"; add a {head} benchmark"
                fail(((gate,), f'"{panel}" is not a {head} panel of this recipe{known}'))
        return value

    @field_validator("accept")
    @classmethod
    def _labels_are_given(cls, value: dict[str, Limit], info: ValidationInfo) -> dict[str, Limit]:
        """Refuse a gate on a rate that nobody's labels correct."""
        if info.data.get("labels", "") is None:
            reason = (
                "a rate is calibrated by people's labels, and eval.labels is null; fill in the labels.csv of a first "
                "evaluation and name it there, or name the rate itself"
            )
            fail(*(((gate,), reason) for gate in value if "].calibrated." in gate))
        return value


class ReleaseSection(Section):
    """What the release holds, what its model card says, and where it goes."""

    license: Text = Field(default="other", description="Licence id as the hub knows it.")
    license_name: Text | None = Field(
        default=None, description="Name of the licence, when it is other."
    )
    license_link: Text | None = Field(
        default=None, description="Link to the licence, when it is other."
    )
    language: tuple[Text, ...] = Field(
        default=("en",), min_length=1, description="Language codes, e.g. [en, de]."
    )
    form: Literal["full", "adapter"] = Field(
        default="full",
        description="full: the healed weights; adapter: edit and adapter alone, for owners of the base.",
    )
    gguf: Annotated[
        tuple[Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"], ...],
        AfterValidator(_check_once),
    ] = Field(
        default=(),
        description="Types of GGUF files for llama.cpp and Ollama; the last three need the package cyllama.",
    )
    gguf_converter: Text | None = Field(
        default=None,
        description="Path of llama.cpp's convert_hf_to_gguf.py, for models that the own writer does not know.",
    )
    push_to_hub: Annotated[Text, Field(pattern=rf"^{_NAME}/{_NAME}$")] | None = Field(
        default=None,
        description="Id of a private repository (owner/name) that the finished release is uploaded to; null: none.",
    )

    @model_validator(mode="after")
    def _gguf_holds_full_weights(self) -> Self:
        """Refuse what has no effect, and files of full weights in a release that leaves them out."""
        if self.gguf_converter is not None and not self.gguf:
            fail(
                (("gguf_converter",), "has no effect without release.gguf; add that, or delete it")
            )
        if self.gguf and self.form == "adapter":
            fail((("gguf",), "holds full weights, which form adapter leaves out; choose one"))
        return self

    @model_validator(mode="after")
    def _other_is_described(self) -> Self:
        """Refuse a name or link beside a licence that has both."""
        if self.license != "other":
            fail(
                *(
                    ((key,), f"has no effect beside license {self.license}; delete it")
                    for key in ("license_name", "license_link")
                    if getattr(self, key) is not None
                )
            )
        return self


class TrackingSection(Section):
    """Where numbers are logged."""

    project: Text = Field(default="healing", description="wandb project.")
    entity: Text | None = Field(
        default=None, description="wandb user or team; null: your default one."
    )
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None, description="null: online when an API key is set, else offline."
    )


class Parameter(Section):
    """What a study tries for one key of the recipe: a list of choices, or a range."""

    choices: tuple[Any, ...] | None = Field(
        default=None, description="Values to try, of any form that the key takes."
    )
    low: Whole | Number | None = Field(default=None, description="Smallest value of a range.")
    high: Whole | Number | None = Field(default=None, description="Largest value of a range.")
    step: Whole | Number | None = Field(
        default=None,
        description="Distance of the values of a range; null: rounded numbers, so that trials can share stages.",
    )
    log: Flag = Field(default=False, description="Whether a range is drawn from by its logarithm.")
    when: dict[Text, tuple[Any, ...]] = Field(
        default={},
        description="Other keys of the study with the choices of theirs beside which this key is tried.",
    )

    @model_validator(mode="after")
    def _choices_or_range(self) -> Self:
        """Ask for choices or for a range, and for settings that belong to it."""
        given = [key for key in ("low", "high", "step") if getattr(self, key) is not None]
        given += ["log"] if self.log else []
        if self.choices is not None:
            fail(*(((key,), "has no effect beside choices; delete it") for key in given))
            fail(*_choice_problems(self.choices))
        elif self.low is None or self.high is None:
            fail(((), "is no set of values; give choices: [...], or low and high"))
        else:
            fail(*self._range_problems(self.low, self.high))
        return self

    def _range_problems(self, low: float, high: float) -> Iterator[tuple[Key, str]]:
        if low >= high:
            yield ("high",), f"{high:g} is not above low {low:g}, so there is nothing to try"
        if self.step is not None and self.step <= 0:
            yield ("step",), f"is {self.step:g}; it must be greater than 0"
        if self.log and low <= 0:
            yield ("low",), f"{low:g} has no logarithm; raise it above 0, or delete log"
        if self.log and self.step is not None:
            yield ("step",), "cannot stand beside log; delete one, or list the values in choices"
        if self.whole and isinstance(self.step, float):
            yield (
                ("step",),
                f"{self.step:g} is no whole number, but low and high are; write 1.0, not 1",
            )

    @property
    def whole(self) -> bool:
        """Whether the values of a range are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def _choice_problems(choices: tuple[Any, ...]) -> Iterator[tuple[Key, str]]:
    """Refuse a list with nothing to choose from, and one with the same choice twice."""
    if len(choices) < 2:
        reason = "has fewer than two values; add one, or set the key in the recipe itself"
        yield ("choices",), reason
    for index, choice in enumerate(choices):
        if any(type(choice) is type(other) and choice == other for other in choices[:index]):
            yield ("choices", index), f"{choice} is there already; delete one"


class Sampler(Section):
    """What proposes the settings of the next trial: a sampler of Optuna, with its own arguments."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: Literal[
        "TPESampler",
        "GPSampler",
        "NSGAIISampler",
        "RandomSampler",
        "QMCSampler",
        "GridSampler",
    ] = Field(description="A sampler by Optuna's name; its arguments stand beside it.")


class Pruner(Section):
    """What ends a trial early whose quick evaluations are poor: a pruner of Optuna, with its own arguments."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: Literal[
        "MedianPruner",
        "PercentilePruner",
        "SuccessiveHalvingPruner",
        "HyperbandPruner",
        "ThresholdPruner",
    ] = Field(description="A pruner by Optuna's name; its arguments stand beside it.")


class StudySection(Section):
    """Many settings of one recipe, each a trial; stages that trials have in common run once."""

    parameters: dict[Text, Parameter] = Field(
        min_length=1, description="What is tried, by the dotted key of the recipe."
    )
    objectives: dict[Gate, Literal["maximize", "minimize"]] = Field(
        default={"pooled.recovery.value": "maximize"},
        min_length=1,
        description="Fields of results.json that trials are judged by.",
    )
    constraints: dict[Gate, Limit] | None = Field(
        default=None,
        description="Limits on fields of results.json; null: those of eval.accept on rates of refusal.",
    )
    num_trials: Count | None = Field(
        default=None, description="Trials in all; null: every combination of the choices (a grid)."
    )
    timeout: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="Seconds after which no trial is begun; null: no limit."
    )
    seeds: Count = Field(default=1, description="Runs of a trial, each with a seed of its own.")
    confirmation_seeds: Count = Field(
        default=2, description="Runs of the best trial on items and with seeds that are new to it."
    )
    sampler: Sampler | None = Field(
        default=None, description="null: a grid without num_trials, else TPESampler."
    )
    pruner: Pruner | None = Field(
        default=None, description="Ends poor trials by train.stopping's evaluations; null: none."
    )
    storage: Text | None = Field(
        default=None,
        description="Database URL for Optuna, e.g. postgresql+psycopg://host/name; null: a file in the run folder.",
    )

    @property
    def sampler_name(self) -> str:
        """The sampler that is meant."""
        if self.sampler is not None:
            return self.sampler.name
        bounded = self.num_trials is not None or self.timeout is not None
        return "TPESampler" if bounded else "GridSampler"

    @model_validator(mode="after")
    def _trials_are_counted(self) -> Self:
        """Refuse a grid with a number, an endless search, and a grid over what cannot be listed."""
        if self.sampler_name != "GridSampler":
            if self.num_trials is None and self.timeout is None:
                fail((("num_trials",), "is missing; say how many trials, or give timeout"))
            return self
        problems: list[tuple[Key, str]] = []
        if self.num_trials is not None:
            reason = "has no effect on a grid, which is tried whole; delete it"
            problems.append((("num_trials",), reason))
        reason = "cannot be listed for a grid; give choices or step, or num_trials"
        problems += [
            (("parameters", key), reason)
            for key, tried in self.parameters.items()
            if tried.choices is None and tried.step is None and not tried.whole
        ]
        fail(*problems)
        return self

    @model_validator(mode="after")
    def _conditions_hold(self) -> Self:
        """Refuse conditions on what the study does not try."""
        problems: list[tuple[Key, str]] = []
        for key, tried in self.parameters.items():
            for other, values in tried.when.items():
                place: Key = ("parameters", key, "when", other)
                parent = self.parameters.get(other)
                if parent is None:
                    known = [name for name in self.parameters if name != key]
                    problems.append((place, f"is not tried by this study{nearest(other, known)}"))
                elif parent.choices is None:
                    problems.append((place, "has a range, and a condition needs choices"))
                elif unknown := [value for value in values if value not in parent.choices]:
                    problems.append((place, f"{unknown[0]} is none of its choices"))
                elif list(self.parameters).index(other) >= list(self.parameters).index(key):
                    problems.append((place, f"stands behind {key}; put it in front"))
        fail(*problems)
        return self

    @model_validator(mode="after")
    def _pruning_is_possible(self) -> Self:
        """Refuse pruning by several objectives: Optuna prunes by one."""
        if self.pruner is not None and len(self.objectives) > 1:
            fail((("pruner",), "judges by one objective, but there are several; delete it"))
        return self


class Recipe(Section):
    """One healed model: which model, how it is abliterated, healed, measured and released."""

    name: Annotated[Text, Field(pattern=f"^{_NAME}$", max_length=100)] = Field(
        description="Name of the run and of its folder."
    )
    seed: Whole = Field(default=0, ge=0, lt=2**32, description="Seed of everything that is drawn.")
    processes: Count | None = Field(
        default=None, description="Processes the launch must have; null: any number."
    )
    output_dir: Text = Field(default="runs", description="Folder that holds the run folders.")
    model: ModelSection = Field(description="The model to change.")
    abliteration: AbliterationSection = Field(description="Stage 1.")
    train: TrainSection = Field(description="Stage 2.")
    eval: EvalSection = Field(description="Stage 3.")
    release: ReleaseSection = Field(
        default=ReleaseSection(), description="What is released, and where it goes."
    )
    tracking: TrackingSection = Field(default=TrackingSection(), description="wandb.")
    study: StudySection | None = Field(
        default=None, description="Many settings of this recipe; null: the recipe alone."
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        """Refuse a number of processes that cannot share the batch."""
        size = self.train.global_batch_size
        if self.processes is not None and size % self.processes:
            fail(
                (
                    ("train", "global_batch_size"),
                    f"{size} pairs cannot be shared by {self.processes} processes; "
                    f"choose a multiple of {self.processes}",
                )
            )
        return self


# Every component by the recipe key that selects it. A component's name is its file's name.
COMPONENTS: Final[Mapping[str, Mapping[str, type[Section]]]] = {
    "abliteration.direction": {
        "difference_in_means": DifferenceInMeans,
        "geometric_median": GeometricMedian,
        "winsorized_means": WinsorizedMeans,
        "svd": Svd,
        "logistic_regression": LogisticRegression,
    },
    "abliteration.selection": {
        "scores": ScoresSelection,
        "search": SearchSelection,
        "fixed": FixedSelection,
    },
    "abliteration.edit": {
        "orthogonalize": Orthogonalize,
        "projected": Projected,
        "biprojected": Biprojected,
        "column_norm": ColumnNorm,
        "row_norm": RowNorm,
        "add": Add,
    },
    "train.preferences": {"on_policy": OnPolicy, "dataset": PreferenceDataset},
    "eval.benchmarks": {
        "lm_eval": LmEval,
        "local": LocalQuestions,
        "refusal": Refusal,
        "divergence": Divergence,
        "cross_entropy": CrossEntropy,
    },
}
