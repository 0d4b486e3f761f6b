"""Which settings mattered: fANOVA importances of a study's parameters, with their uncertainty from the bootstrap.

fANOVA fits a forest of regression trees to the trials and shares out the variance of what it predicts (Hutter, Hoos and
Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance"). With few trials that is a guess:
it is made again on resampled trials, and the middle 90% of those guesses are told beside it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from common.recipe import Parameter
from train.study_choice import Record
from train.study_space import Space, distribution

# A forest needs as many trials, and is not better for more than so many.
FEWEST, MOST = 8, 64
RESAMPLES = 20
TREES = 8


def importances(
    records: Sequence[Record], parameters: Mapping[str, Parameter], objective: str
) -> dict[str, dict[str, float]]:
    """The share of an objective's variation that each parameter explains.

    Args:
        records: all trials; the complete ones count, whether they held the limits or not.
        parameters: of the study; those that only some trials have are left out.
        objective: a field of results.json.

    Returns:
        By parameter, the most important first, `value` with `low` and `high`; nothing where trials are too few or
        all alike.
    """
    done = [record for record in records if record.state == "complete"]
    keys = [key for key, parameter in parameters.items() if not parameter.when]
    varied = [key for key in keys if len({repr(record.setting[key]) for record in done}) > 1]
    if len(done) < FEWEST or not varied or len({r.values[objective] for r in done}) < 2:
        return {}
    if len(varied) == 1:
        return {varied[0]: {"value": 1.0, "low": 1.0, "high": 1.0}}
    space = Space({key: parameters[key] for key in varied})
    trials = [_frozen(record, space, objective) for record in done]
    generator = np.random.default_rng(0)
    size = min(len(trials), MOST)
    found = _fit([trials[index] for index in generator.permutation(len(trials))[:size]], varied)
    again = [
        _fit([trials[index] for index in generator.integers(0, len(trials), size)], varied)
        for _ in range(RESAMPLES)
    ]
    return {
        key: {
            "value": found[key],
            "low": float(np.quantile([one[key] for one in again], 0.05)),
            "high": float(np.quantile([one[key] for one in again], 0.95)),
        }
        for key in sorted(found, key=lambda key: -found[key])
    }


def _frozen(record: Record, space: Space, objective: str) -> FrozenTrial:
    return create_trial(
        params=space.stored({key: record.setting[key] for key in space.parameters}),
        distributions={key: distribution(one) for key, one in space.parameters.items()},
        value=record.values[objective],
    )


def _fit(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> dict[str, float]:
    """The importances by these trials; all alike where they do not vary."""
    study = optuna.create_study()
    study.add_trials(trials)
    evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    alike = dict.fromkeys(keys, 1 / len(keys))
    if len({trial.value for trial in trials}) < 2:
        return alike
    found = get_param_importances(study, evaluator=evaluator)
    shares = {key: float(found.get(key, 0.0)) for key in keys}
    return shares if math.isfinite(sum(shares.values())) else alike
