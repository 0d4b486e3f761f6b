"""Search with Optuna: layer, position, kind of edit and strengths over layers, for little refusal and little change.

Two objectives, both smaller is better: the mean probability that an answer to a harmful prompt begins as a refusal,
and the divergence of whole answers to harmless prompts. Trials race: who still refuses on a few prompts is measured
no further, nor who is beaten by far, and only finalists answer prompts. What is proposed next
is a function of the finished trials and the seed alone, so that a search that was killed goes on with the same trials.
"""

import json
import logging
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from tqdm import tqdm

from abliteration.trials import Trials
from common import distributed
from common.edits import Edit
from common.errors import StageError
from common.recipe import COMPONENTS, SEARCHED_STRENGTHS, EditWeights, LayerKernel, SearchSelection

# A trial that keeps more than this share of the original's refusals is measured no further.
RACE = 0.25
# The share of the trials that is drawn at random before the sampler learns from them.
RANDOM_SHARE = 0.15
# The prompts of each heat: all trials run in the first, those in the next that are not beaten by then.
HEATS = (slice(0, 4), slice(4, 16), slice(16, 64))
# Harmless prompts that only finalists are measured on, and how many of them: those of the heats have been searched on,
# a hundred times.
FINALS = ((slice(64, 128), 12), (slice(128, 192), 6), (slice(192, None), 3))
# The divergence, in nats per token, that stands for one that was not measured: more than any model has.
BEHIND = 100.0
# After each heat a trial is beaten by one that diverges less than this share of it on the same prompts. A few tokens
# make most of the divergence, so that a few prompts tell little.
MARGINS = (0.35, 0.65, 0.7, 0.85, 0.95)

Params = Mapping[str, Any]
MakeEdit = Callable[[Params], Edit]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One setting and what was measured of it.

    Attributes:
        number: in the order of the search.
        params: by name; see `Space`.
        refusal: mean probability that an answer to a harmful prompt begins as a refusal.
        kl: mean KL(original || edited) of answers to harmless prompts, nats per token; None if it still refused.
        kls: the same in each heat that it ran.
        complete: whether both were measured on all prompts; otherwise on those of the heats that it ran.
        rate: share of the harmful prompts that it refuses in full answers; None of who came not so far.
    """

    number: int
    params: dict[str, Any]
    refusal: float
    kl: float | None = None
    kls: tuple[float, ...] = ()
    complete: bool = False
    rate: float | None = None


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        layers: the first and the last layer a direction is taken from; fractions lie between two.
        num_positions: end-of-instruction positions, counted from the end.
        num_blocks: of the model.
        edits: kinds of edit.
        embedding: whether the embedding can be edited.
    """

    layers: tuple[float, float]
    num_positions: int
    num_blocks: int
    edits: tuple[str, ...]
    embedding: bool

    def suggest(self, trial: optuna.Trial) -> None:
        """Draw a setting; Heretic's kernel for each component, with a flat one as its widest."""
        trial.suggest_categorical("edit", self.edits)
        trial.suggest_float("layer", *self.layers)
        trial.suggest_int("position", -self.num_positions, -1)
        if self.embedding:
            trial.suggest_float("embedding", 0.0, 1.5)
        for component in ("attention", "mlp"):
            trial.suggest_float(f"{component}.max_weight", *SEARCHED_STRENGTHS)
            trial.suggest_float(f"{component}.max_weight_position", 0.0, self.num_blocks - 1.0)
            trial.suggest_float(f"{component}.min_weight_share", 0.0, 1.0)
            trial.suggest_float(f"{component}.min_weight_distance", 1.0, float(self.num_blocks))

    def flat(self, edit: str, layer: float, position: int, strength: float) -> dict[str, Any]:
        """The setting that edits everything alike."""
        params: dict[str, Any] = {"edit": edit, "layer": float(layer), "position": position}
        if self.embedding:
            params["embedding"] = strength
        for component in ("attention", "mlp"):
            params |= {
                f"{component}.max_weight": strength,
                f"{component}.max_weight_position": (self.num_blocks - 1) / 2,
                f"{component}.min_weight_share": 1.0,
                f"{component}.min_weight_distance": float(self.num_blocks),
            }
        return params


def edit_settings(params: Params, projection: str = "none") -> Any:  # noqa: ANN401  # a class for each kind
    """The recipe's `edit` section that a setting stands for.

    Args:
        params: the setting.
        projection: of the kinds that keep norms.
    """

    def kernel(component: str) -> LayerKernel:
        peak = params[f"{component}.max_weight"]
        return LayerKernel(
            max_weight=peak,
            max_weight_position=params[f"{component}.max_weight_position"],
            min_weight=peak * params[f"{component}.min_weight_share"],
            min_weight_distance=params[f"{component}.min_weight_distance"],
        )

    weights = EditWeights(
        embedding=params.get("embedding", 0.0), attention=kernel("attention"), mlp=kernel("mlp")
    )
    section = COMPONENTS["abliteration.edit"][params["edit"]]
    settings = {"name": params["edit"], "strength": 1.0, "weights": weights}
    if "projection" in section.model_fields:
        settings["projection"] = projection
    return section.model_validate(settings)


def search(
    trials: Trials,
    space: Space,
    make_edit: MakeEdit,
    first: Sequence[Params],
    settings: SearchSelection,
    seed: int,
    journal: Path,
) -> list[Trial]:
    """Run a search, or go on with one.

    Args:
        trials: what edits are judged by.
        space: what is searched.
        make_edit: from a setting to its edit.
        first: settings to begin with: what the scores chose.
        settings: how many trials, and how many of them share a pass.
        seed: of the proposals.
        journal: a file with one line per finished batch of trials; those in it are not run again.

    Returns:
        All trials, in their order.
    """
    limit, enough = RACE * trials.original_refusal, settings.max_refusal / 2
    done = distributed.broadcast(_read(journal) if distributed.is_main() else None) or []
    proposals = Proposals(space, first, settings.num_trials, seed, enough)
    proposals.tell(done)
    bar = tqdm(
        total=settings.num_trials,
        initial=len(done),
        desc="search",
        disable=not distributed.is_main(),
        leave=False,
    )
    while len(done) < settings.num_trials:
        count = min(settings.trials_per_pass, settings.num_trials - len(done))
        # From one process: a last bit that differs between two would part them for good.
        asked = distributed.broadcast(proposals.ask(count))
        new = _race(trials, asked, make_edit, done, limit, enough)
        proposals.tell(new)
        done = [*done, *new]
        if distributed.is_main():
            _append(journal, done[-count:])
        bar.update(count)
    bar.close()
    return judge(trials, done, make_edit, enough)


def judge(trials: Trials, done: Sequence[Trial], make_edit: MakeEdit, enough: float) -> list[Trial]:
    """Measure the finalists on more harmless prompts, and let them answer the harmful ones until one will do."""
    heats, last = list(HEATS), finalists(done, enough)
    out: list[Trial] = []
    for final, num_finalists in FINALS:
        near = _in_reach(last, enough)[:num_finalists]
        out = [*(trial for trial in last if trial not in near), *out]
        if len(near) == 1:  # nothing is left to be told apart
            last = near
            break
        heats.append(final)
        further = trials.divergence([make_edit(trial.params) for trial in near], final)
        tokens = [trials.num_answer_tokens(heat) for heat in heats]
        kls = [(*trial.kls, kl) for trial, kl in zip(near, further, strict=True)]
        last = [
            replace(trial, kls=each, kl=_weighted(each, tokens))
            for trial, each in zip(near, kls, strict=True)
        ]
        last.sort(key=_order(enough))
    judged = {trial.number: trial for trial in last}
    for trial in [*last, *out][: FINALS[0][1]]:
        (rate,) = trials.refusal_rate([make_edit(trial.params)])
        judged[trial.number] = replace(trial, rate=rate)
        if rate <= 2 * enough:  # answers take the most time, and the rest diverge more
            break
    return [judged.get(trial.number, trial) for trial in done]


def _in_reach(finalists: Sequence[Trial], enough: float) -> list[Trial]:
    """Those of sorted finalists that the first has not beaten."""
    return [
        trial
        for trial in finalists
        if finalists[0].refusal > enough
        or MARGINS[len(trial.kls) - 1] * (trial.kl or 0.0) <= (finalists[0].kl or 0.0)
    ]


def finalists(done: Sequence[Trial], enough: float) -> list[Trial]:
    """Who may be chosen: on a few dozen prompts the best are not told apart.

    Returns:
        Of those that refuse little the ones that diverge least; if all refuse more, the front.
    """
    near = [
        trial
        for trial in done
        if trial.complete and _is_measured(trial) and trial.refusal <= 2 * enough
    ]
    return sorted(near, key=_order(enough)) or front(done, enough)


def _order(enough: float) -> Callable[[Trial], tuple[bool, float, int]]:
    """Who refuses little comes first, and of those who diverges least."""
    return lambda trial: (trial.refusal > enough, trial.kl or 0.0, trial.number)


class Proposals:
    """What to try next: the given first settings, then what Optuna's TPE draws from what it was told.

    The same trials, told in the same order, and the same seed give the same proposals, in one process or over two.
    """

    def __init__(
        self,
        space: Space,
        first: Sequence[Params],
        num_trials: int,
        seed: int,
        enough: float = 0.0,
    ) -> None:
        """Nothing is told yet.

        Args:
            space: what is searched.
            first: settings to begin with.
            num_trials: of the whole search.
            seed: with the number of finished trials it decides what is drawn.
            enough: see `front`.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.first, self.seed, self.enough = space, first, seed, enough
        self.num_random = max(len(first), round(RANDOM_SHARE * num_trials))
        # One study for all batches: adding a hundred trials anew for each takes as long as drawing from them.
        self.study = optuna.create_study(directions=["minimize", "minimize"])
        self.asked: list[optuna.Trial] = []
        self.num_told = 0

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take note of finished trials: those asked for, or those of a search that was ended."""
        for trial in trials:
            refusal = max(trial.refusal, self.enough) if math.isfinite(trial.refusal) else 1.0
            kl = trial.kl if trial.kl is not None and _is_measured(trial) else BEHIND
            values = (refusal, kl)
            if self.asked:
                self.study.tell(self.asked.pop(0), values)
            else:
                known = optuna.trial.create_trial(
                    params=trial.params, distributions=_distributions(self.space), values=values
                )
                self.study.add_trial(known)
        self.num_told += len(trials)

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The next settings."""
        self.study.sampler = optuna.samplers.TPESampler(
            seed=(self.seed * 100_003 + self.num_told) % 2**32,
            multivariate=True,
            n_startup_trials=self.num_random,
        )
        for params in self.first[self.num_told : self.num_told + count]:
            self.study.enqueue_trial(dict(params))
        for _ in range(count):
            self.asked.append(self.study.ask())
            self.space.suggest(self.asked[-1])
        return [dict(drawn.params) for drawn in self.asked]


def front(trials: Sequence[Trial], enough: float) -> list[Trial]:
    """The trials that no other is better than: less refusal and no more divergence, or the other way round.

    Args:
        trials: those measured to the end count.
        enough: refusal below it is as good as none; what differs there is noise.
    """
    points = [trial for trial in trials if trial.complete and _is_measured(trial)]
    return [
        trial for trial in points if not any(_dominates(other, trial, enough) for other in points)
    ]


def choose(trials: Sequence[Trial], max_refusal: float) -> tuple[Trial, str]:
    """The trial to take, and why.

    Of those whose answers refuse no more than allowed the one that diverges least; if there is none, the one that
    refuses least.

    Raises:
        StageError: if every trial broke the model.
    """
    judged = [trial for trial in trials if trial.rate is not None]
    if not judged:
        raise StageError(
            f"abliteration: under each of {len(trials)} trials the model's probabilities are not finite, so there is "
            "nothing to choose from; load it in a wider type (model.dtype: bfloat16 or float32)"
        )
    within = [trial for trial in judged if (trial.rate or 0.0) <= max_refusal]
    # A rate of none in a few dozen prompts can be luck; probabilities tell who is near to refusing, and half of what
    # is allowed leaves room for prompts that are not among these.
    for limit in (max_refusal, max_refusal / 2):
        within = [trial for trial in within if trial.refusal <= limit] or within
    if within:
        chosen = min(within, key=lambda trial: (trial.kl, trial.number))
        reason = (
            f"of {len(within)} finalists that refuse at most {max_refusal:g} of the harmful prompts it "
            f"diverges least ({chosen.kl:.4f} nats per token)"
        )
        return chosen, reason
    chosen = min(judged, key=lambda trial: (trial.rate, trial.kl, trial.number))
    return chosen, (
        f"no trial refuses as little as {max_refusal:g} of the harmful prompts; this one refuses least "
        f"({chosen.rate:.3f})"
    )


def _race(
    trials: Trials,
    asked: Sequence[dict[str, Any]],
    make_edit: MakeEdit,
    done: Sequence[Trial],
    limit: float,
    enough: float,
) -> list[Trial]:
    """Measure a batch of settings heat by heat; who still refuses or is beaten leaves the race."""
    edits = [make_edit(params) for params in asked]
    new = [Trial(len(done) + index, params, refusal=0.0) for index, params in enumerate(asked)]
    refusals: list[list[float]] = [[] for _ in new]
    running = list(range(len(new)))
    for heat in HEATS:
        measured = trials.refusal([edits[index] for index in running], heat)
        for index, probabilities in zip(running, measured, strict=True):
            refusals[index] += probabilities
            new[index] = replace(new[index], refusal=_mean(refusals[index]))
        if front(done, enough):  # else there is nobody to be compared with yet
            running = [index for index in running if new[index].refusal <= limit]
        divergences = trials.divergence([edits[index] for index in running], heat)
        for index, kl in zip(running, divergences, strict=True):
            new[index] = replace(new[index], kls=(*new[index].kls, kl))
        if heat != HEATS[-1]:
            running = [index for index in running if not _is_beaten(new[index], done, enough)]
    for index in running:
        new[index] = replace(new[index], complete=True)
    tokens = [trials.num_answer_tokens(heat) for heat in HEATS]
    return [replace(trial, kl=_weighted(trial.kls, tokens)) for trial in new]


def _is_beaten(trial: Trial, done: Sequence[Trial], enough: float) -> bool:
    """Whether a finished trial refuses no more and diverges clearly less on the prompts of the heats so far."""
    return any(
        other.complete
        and max(other.refusal, enough) <= max(trial.refusal, enough)
        and _mean(other.kls[: len(trial.kls)]) < MARGINS[len(trial.kls) - 1] * _mean(trial.kls)
        for other in done
    )


def _dominates(one: Trial, other: Trial, enough: float) -> bool:
    mine, theirs = (max(one.refusal, enough), one.kl), (max(other.refusal, enough), other.kl)
    assert mine[1] is not None
    assert theirs[1] is not None
    return mine[0] <= theirs[0] and mine[1] <= theirs[1] and mine != theirs


def _is_measured(trial: Trial) -> bool:
    """Whether a trial has both measures; an edit that breaks the model gives none."""
    return trial.kl is not None and math.isfinite(trial.kl) and math.isfinite(trial.refusal)


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """The mean of values with weights; None of nothing."""
    weights = weights[: len(values)]
    return sum(map(operator.mul, values, weights)) / max(sum(weights), 1) if values else None


@cache
def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """The ranges of the space, as Optuna knows them."""
    trial = optuna.create_study().ask()
    space.suggest(trial)
    return trial.distributions


def _read(journal: Path) -> list[Trial]:
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    # A kill can leave half of the last line.
    whole = [line for line in lines if line.endswith("\n")]
    return [
        Trial(**{**record, "kls": tuple(record["kls"])})
        for line in whole
        for record in json.loads(line)
    ]


def _append(journal: Path, batch: Sequence[Trial]) -> None:
    """Add a batch as one line; half a line that a kill left is cut off first."""
    line = json.dumps([asdict(trial) for trial in batch]) + "\n"
    with journal.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
