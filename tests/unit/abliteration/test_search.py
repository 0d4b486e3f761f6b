"""A search proposes by what is finished and the seed alone, measures no more than it must, and can be gone on with.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_search.py
"""

import importlib
import math
from dataclasses import replace

import pytest

from abliteration.search import (
    BEHIND,
    FINALS,
    HEATS,
    MARGINS,
    RACE,
    Proposals,
    Space,
    Trial,
    choose,
    edit_settings,
    finalists,
    front,
    judge,
    search,
)
from common.architecture import find_writers
from common.errors import StageError
from common.recipe import SearchSelection
from tests.editing import direction_of, edit_of

SPACE = Space((1.0, 4.0), 3, 6, ("orthogonalize", "column_norm"), embedding=True)
FIRST = [SPACE.flat(kind, 2.0, -1, 1.0) for kind in SPACE.edits]
SETTINGS = SearchSelection(name="search", num_trials=36, trials_per_pass=4)
LIMIT, ENOUGH = 0.9 * RACE, SETTINGS.max_refusal / 2
NUM_PROMPTS = 240
LAST = [heat for heat, _ in FINALS]


class PlantedTrials:
    """Objectives that are known: refusal is least at one layer, and strength costs divergence.

    An edit is its setting here. Every prompt gives the same up to a little, and what was measured is on record.
    """

    original_refusal = 0.9

    def __init__(self):
        """Nothing is on record yet."""
        self.asked = {"refusal": [], "divergence": [], "rate": []}

    @staticmethod
    def refusal_of(edit, prompt=0):
        reached = edit["attention.max_weight"] * math.exp(-((edit["layer"] - 3) ** 2))
        return 0.9 * math.exp(-3 * reached) * (1 + 0.01 * math.sin(prompt))

    @staticmethod
    def kl_of(edit, prompt=0):
        cost = edit["attention.max_weight"] ** 2 + edit["mlp.max_weight"] ** 2
        return 0.1 * cost * (1 + 0.01 * math.cos(prompt))

    def refusal(self, edits, prompts):
        self.asked["refusal"] += [(edit, prompts) for edit in edits]
        part = range(NUM_PROMPTS)[prompts]
        return [[self.refusal_of(edit, prompt) for prompt in part] for edit in edits]

    def divergence(self, edits, prompts):
        self.asked["divergence"] += [(edit, prompts) for edit in edits]
        part = range(NUM_PROMPTS)[prompts]
        return [sum(self.kl_of(edit, p) for p in part) / max(len(part), 1) for edit in edits]

    def num_answer_tokens(self, prompts):
        return len(range(NUM_PROMPTS)[prompts])

    def refusal_rate(self, edits):
        self.asked["rate"] += edits
        return [round(self.refusal_of(edit), 2) for edit in edits]


def _search(journal, judged=None, settings=SETTINGS, seed=0):
    return search(judged or PlantedTrials(), SPACE, dict, FIRST, settings, seed, journal)


def propose(done, space, first, count, num_trials, seed, enough=0.0):
    """What a search proposes that goes on behind finished trials."""
    proposals = Proposals(space, first, num_trials, seed, enough)
    proposals.tell(done)
    return proposals.ask(count)


def _finished(count):
    """Finished trials of a search, without the racing."""
    done = []
    for number in range(count):
        params = propose(done, SPACE, FIRST, 1, 30, seed=0)[0]
        refusal, kl = PlantedTrials.refusal_of(params), PlantedTrials.kl_of(params)
        done.append(Trial(number, params, refusal, kl, complete=True))
    return done


@pytest.fixture(scope="module")
def finished():
    return _finished(14)


# Proposals.


def test_the_same_finished_trials_and_seed_give_the_same_proposals(finished):
    once, again = (propose(finished, SPACE, FIRST, 4, 30, seed=3) for _ in range(2))
    assert once == again
    assert len({tuple(params.values()) for params in once}) == 4


def test_another_seed_and_other_finished_trials_give_other_proposals(finished):
    known = propose(finished, SPACE, FIRST, 2, 30, seed=3)
    assert propose(finished, SPACE, FIRST, 2, 30, seed=4) != known
    assert propose(finished[:-1], SPACE, FIRST, 2, 30, seed=3) != known
    worse = [replace(trial, refusal=1 - trial.refusal, kl=1 - trial.kl) for trial in finished]
    assert propose(worse, SPACE, FIRST, 2, 30, seed=3) != known


def test_a_search_that_is_gone_on_with_proposes_what_an_unbroken_one_does(finished):
    unbroken, done = Proposals(SPACE, FIRST, 30, seed=0), []
    for count in (2, 3, 4, 2, 4):
        asked = unbroken.ask(count)
        assert asked == propose(done, SPACE, FIRST, count, 30, seed=0)
        new = [replace(finished[len(done) % 7], number=len(done), params=each) for each in asked]
        unbroken.tell(new)
        done += new


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_seed_that_a_recipe_takes_can_be_drawn_from(seed, finished):
    assert len(propose(finished, SPACE, FIRST, 2, 30, seed)) == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_given_settings_come_first(count):
    asked = []
    while len(asked) < 3:
        done = [Trial(index, params, 0.5) for index, params in enumerate(asked)]
        asked += propose(done, SPACE, FIRST, count, 30, seed=0)
    assert asked[:2] == FIRST
    assert asked[2] not in FIRST


@pytest.mark.parametrize("embedding", [True, False])
def test_proposals_stay_inside_the_space(embedding):
    space = Space((1.5, 2.5), 2, 4, ("projected",), embedding=embedding)
    asked = propose([], space, [], 40, 30, seed=1)
    for params in asked:
        assert params["edit"] == "projected"
        assert 1.5 <= params["layer"] <= 2.5
        assert params["position"] in (-2, -1)
        assert ("embedding" in params) == embedding
        assert 0 <= params["mlp.max_weight_position"] <= 3
        assert 0.1 <= params["attention.max_weight"] <= 1.5
        # Whatever is proposed is a recipe's section.
        settings = edit_settings(params)
        assert settings.name == "projected"
        assert settings.weights.mlp.min_weight <= settings.weights.mlp.max_weight
    assert len({params["layer"] for params in asked}) == 40
    assert {params["position"] for params in asked} == {-2, -1}


def test_a_space_of_one_layer_one_position_and_one_block_can_be_drawn_from():
    space = Space((2.0, 2.0), 1, 1, ("orthogonalize",), embedding=False)
    assert {params["layer"] for params in propose([], space, [], 3, 4, seed=0)} == {2.0}


def test_proposals_learn_where_the_planted_optimum_is(tmp_path):
    settings = SETTINGS.model_copy(update={"num_trials": 60})
    trials = _search(tmp_path / "trials.jsonl", settings=settings)
    drawn, learnt = trials[:15], trials[-20:]

    def distance(part):
        return sum(abs(trial.params["layer"] - 3) for trial in part) / len(part)

    assert distance(learnt) < 0.7 * distance(drawn)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_trial_that_broke_the_model_stands_behind_all_others(broken, finished):
    odd = [replace(finished[0], kl=broken), *finished[1:]]
    behind = [replace(finished[0], kl=BEHIND), *finished[1:]]
    out = [replace(finished[0], kl=None, complete=False), *finished[1:]]
    expected = propose(behind, SPACE, FIRST, 2, 30, seed=0)
    assert propose(odd, SPACE, FIRST, 2, 30, seed=0) == expected
    assert propose(out, SPACE, FIRST, 2, 30, seed=0) == expected
    propose([replace(trial, refusal=math.nan) for trial in finished], SPACE, FIRST, 2, 30, seed=0)


# The front and the choice.


def test_refusal_below_what_is_enough_makes_no_difference_to_proposals(finished):
    low = [replace(trial, refusal=0.001 * trial.number) for trial in finished]
    none = [replace(trial, refusal=0.0) for trial in finished]
    enough = 0.001 * len(finished)
    asked = [propose(part, SPACE, FIRST, 2, 30, 0, enough) for part in (low, none)]
    assert asked[0] == asked[1]
    assert propose(low, SPACE, FIRST, 2, 30, 0) != asked[0]


def _trial(number, refusal, kl=None, rate=None):
    return Trial(number, {}, refusal, kl, complete=kl is not None, rate=rate)


def test_the_front_holds_what_nothing_beats():
    trials = [
        _trial(0, 0.9, 0.0),
        _trial(1, 0.5, 0.2),
        _trial(2, 0.5, 0.3),  # beaten by 1
        _trial(3, 0.6, 0.2),  # beaten by 1
        _trial(4, 0.1, 0.9),
        _trial(5, 0.5, 0.2),  # as good as 1
        _trial(6, 0.0),  # not measured
        replace(_trial(7, 0.0, 0.0), complete=False),  # on a few prompts only
    ]
    assert [trial.number for trial in front(trials, 0.0)] == [0, 1, 4, 5]
    assert [trial.number for trial in front(trials[::-1], 0.0)] == [5, 4, 1, 0]
    assert front([], 0.0) == []


def test_refusal_that_is_little_enough_counts_as_none():
    trials = [_trial(0, 0.001, 0.3), _trial(1, 0.01, 0.2), _trial(2, 0.02, 0.1)]
    assert [trial.number for trial in front(trials, 0.0)] == [0, 1, 2]
    assert [trial.number for trial in front(trials, 0.01)] == [1, 2]
    assert [trial.number for trial in front(trials, 0.05)] == [2]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_broke_the_model_is_never_on_the_front(broken):
    trials = [_trial(0, 0.0, broken), _trial(1, 0.9, 5.0), _trial(2, broken, 0.0)]
    assert [trial.number for trial in front(trials, 0.01)] == [1]
    assert front([trials[0], trials[2]], 0.01) == []


def test_of_those_within_the_limit_the_one_that_diverges_least_is_chosen():
    trials = [
        _trial(0, 0.9, 0.0, 0.9),
        _trial(1, 0.1, 0.3, 0.02),
        _trial(2, 0.2, 0.2, 0.02),
        _trial(3, 0.2, 0.2, 0.01),
        _trial(4, 0.0, 0.0),  # no finalist
    ]
    chosen, reason = choose(trials, 0.02)
    assert chosen.number == 2
    assert "of 3 finalists that refuse at most 0.02" in reason
    assert "(0.2000 nats per token)" in reason


def test_a_trial_that_is_near_to_refusing_gives_way_to_one_that_is_not():
    """No refusal in a few dozen answers can be luck."""
    near, far = _trial(0, 0.03, 0.1, 0.0), _trial(1, 0.015, 0.3, 0.0)
    assert choose([near, far], 0.02)[0] == far
    assert choose([near], 0.02)[0] == near


def test_if_none_is_within_the_limit_the_one_that_refuses_least_is_chosen():
    trials = [_trial(0, 0.9, 0.0, 0.9), _trial(1, 0.3, 0.4, 0.3), _trial(2, 0.3, 0.2, 0.3)]
    chosen, reason = choose(trials, 0.02)
    assert chosen.number == 2
    assert "no trial refuses as little as 0.02" in reason
    assert "(0.300)" in reason


def test_if_every_trial_broke_the_model_there_is_nothing_to_choose():
    with pytest.raises(StageError, match=r"under each of 2 trials .* not finite"):
        choose([_trial(0, math.nan), _trial(1, 0.1, math.nan)], 0.02)


# The search.


def test_all_trials_come_in_their_order_with_the_given_first(tmp_path):
    trials = _search(tmp_path / "trials.jsonl")
    assert [trial.number for trial in trials] == list(range(SETTINGS.num_trials))
    assert [trial.params for trial in trials[:2]] == FIRST
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 9


def _heats(judged, trial, kind):
    """The heats in which something was measured of a trial."""
    return [heat for edit, heat in judged.asked[kind] if edit == trial.params]


def _over(heats, objective, params):
    prompts = [prompt for heat in heats for prompt in range(NUM_PROMPTS)[heat]]
    return sum(objective(params, prompt) for prompt in prompts) / len(prompts)


def test_what_was_measured_is_the_mean_over_the_prompts_of_all_heats(tmp_path):
    judged = PlantedTrials()
    trials = _search(tmp_path / "trials.jsonl", judged)
    for trial in trials:
        refused, diverged = (_heats(judged, trial, kind) for kind in ("refusal", "divergence"))
        raced = [heat for heat in diverged if heat not in LAST]
        assert trial.refusal == pytest.approx(_over(refused, judged.refusal_of, trial.params))
        assert trial.rate is None or raced == list(HEATS)
        raced = diverged
        assert len(trial.kls) == len(raced)
        for heat, kl in zip(raced, trial.kls, strict=True):
            assert kl == pytest.approx(_over([heat], judged.kl_of, trial.params))
        if raced:
            assert trial.kl == pytest.approx(_over(raced, judged.kl_of, trial.params))
        else:
            assert trial.kl is None
        assert trial.complete == (len(raced) >= len(HEATS))


def test_who_still_refuses_is_measured_no_further_and_only_finalists_answer(tmp_path):
    judged = PlantedTrials()
    trials = _search(tmp_path / "trials.jsonl", judged)
    # The first batch has nobody to be compared with.
    assert all(trial.complete for trial in trials[:4])
    assert any(trial.complete for trial in trials[4:])
    for trial in trials[4:]:
        refused, diverged = (
            [heat for heat in _heats(judged, trial, kind) if heat not in LAST]
            for kind in ("refusal", "divergence")
        )
        assert refused == list(HEATS[: len(refused)])
        assert diverged in (refused, refused[:-1])
        out = trial.refusal > LIMIT
        assert (len(diverged) < len(refused)) == out, "out as soon as it refuses, and not before"
    assert {True, False} == {trial.kl is None for trial in trials[4:]}
    rated = [trial for trial in trials if trial.rate is not None]
    assert {trial.number for trial in rated} <= {t.number for t in finalists(trials, ENOUGH)}
    assert judged.asked["rate"] == [trial.params for trial in rated]


def test_answers_are_generated_until_one_finalist_will_do():
    judged = PlantedTrials()
    strong = SPACE.flat("orthogonalize", 3.0, -1, 1.5)  # refuses .01 of the prompts
    weak = SPACE.flat("orthogonalize", 1.0, -1, 0.5)
    trials = [Trial(n, weak, 0.005, 0.1 + n, (0.1 + n,) * 3, complete=True) for n in range(20)]
    trials[4] = replace(trials[4], params=strong)
    rates = [trial.rate for trial in judge(judged, trials, dict, 0.01)]
    assert all(rate > 0.02 for rate in rates[:4])
    assert rates[4:] == [0.01] + [None] * 15
    trials[4] = replace(trials[4], params=weak)
    rates = [trial.rate for trial in judge(judged, trials, dict, 0.01)]
    assert all(rate > 0.02 for rate in rates[: FINALS[0][1]])
    assert rates[FINALS[0][1] :] == [None] * (20 - FINALS[0][1])


def test_finalists_that_are_beaten_are_measured_no_further():
    def trial(number, kl):
        params = SPACE.flat("orthogonalize", 3.0, -1, 1.0 + 0.001 * number)
        return Trial(number, params, 0.005, kl, (kl,) * 3, complete=True)

    def heats(ratio):
        class Constant(PlantedTrials):
            def divergence(self, edits, prompts):
                return [
                    1.0 if edit == trial(0, 1.0).params else ratio
                    for edit, _ in zip(edits, super().divergence(edits, prompts), strict=True)
                ]

        judged = Constant()
        judge(judged, [trial(0, 1.0), trial(1, ratio)], dict, 0.01)
        return [heat for _, heat in judged.asked["divergence"]]

    first, second, third = MARGINS[-3:]
    assert heats(1.01 / first) == []
    assert heats(0.99 / first) == [LAST[0]] * 2
    assert heats(0.99 / second) == [LAST[0]] * 2 + [LAST[1]] * 2
    assert heats(0.99 / third) == [heat for heat in LAST for _ in range(2)]


def test_finalists_are_those_who_refuse_little_and_diverge_least():
    def trial(number, refusal, kl):
        return Trial(number, {}, refusal, kl, complete=True)

    near, mild, broken = trial(0, 0.015, 0.1), trial(1, 0.3, 0.01), trial(2, 0.005, math.nan)
    safe = [trial(3 + number, 0.005, 0.2 + 0.01 * number) for number in range(11)]
    unfinished = Trial(90, {}, 0.0, 0.001)
    last = finalists([near, *safe, mild, broken, unfinished], 0.01)
    assert [each.number for each in last] == [*(each.number for each in safe), 0]
    assert finalists([mild, broken, unfinished], 0.01) == [mild], "if all refuse, the front"


def test_fewer_and_fewer_finalists_are_measured_on(tmp_path):
    """Who diverges most after each of the last heats goes."""

    def trial(number):
        params = SPACE.flat("orthogonalize", 3.0, -1, 1.0 + 0.001 * number)
        return Trial(number, params, 0.005, 0.1, (0.1,) * 3, complete=True)

    trials = [trial(number) for number in reversed(range(20))]
    judged = PlantedTrials()
    judge(judged, trials, dict, 0.01)
    for heat, num_finalists in FINALS:
        measured = [edit for edit, on in judged.asked["divergence"] if on == heat]
        assert measured == [trial(number).params for number in range(num_finalists)]


def test_the_luck_of_the_prompts_that_were_searched_on_is_seen_on_more(tmp_path):
    class Lucky(PlantedTrials):
        def divergence(self, edits, prompts):
            found = super().divergence(edits, prompts)
            lucky = [edit["edit"] == "column_norm" for edit in edits]
            factor = 20.0 if prompts in LAST else 0.5
            return [kl * factor if luck else kl for kl, luck in zip(found, lucky, strict=True)]

    trials = _search(tmp_path / "trials.jsonl", Lucky())
    measured = [trial.params["edit"] for trial in trials if len(trial.kls) > len(HEATS)]
    assert "column_norm" in measured
    assert choose(trials, 0.02)[0].params["edit"] == "orthogonalize"


def test_who_is_beaten_by_far_is_measured_no_further(tmp_path):
    """And whoever was left out of a heat was beaten indeed."""
    trials = _search(tmp_path / "trials.jsonl")
    beaten = [trial for trial in trials[4:] if trial.kl is not None and not trial.complete]
    assert beaten
    for trial in beaten:
        assert trial.refusal > LIMIT or any(
            other.complete
            and max(PlantedTrials.refusal_of(other.params), ENOUGH)
            <= max(1.02 * PlantedTrials.refusal_of(trial.params), ENOUGH)
            and PlantedTrials.kl_of(other.params)
            < 1.02 * MARGINS[len(trial.kls) - 1] * PlantedTrials.kl_of(trial.params)
            for other in trials[: trial.number]
        )


def test_the_race_loses_nothing_of_the_front_among_those_who_do_not_refuse(tmp_path):
    trials = _search(tmp_path / "raced.jsonl")
    everywhere = [slice(0, NUM_PROMPTS)]
    exhaustive = [
        Trial(
            trial.number,
            trial.params,
            _over(everywhere, PlantedTrials.refusal_of, trial.params),
            _over(everywhere, PlantedTrials.kl_of, trial.params),
            complete=True,
        )
        for trial in trials
    ]
    wanted = {trial.number for trial in front(exhaustive, ENOUGH) if trial.refusal <= LIMIT}
    assert wanted
    assert wanted <= {trial.number for trial in front(trials, ENOUGH)}


def test_if_all_refuse_the_first_batch_is_measured_all_the_same(tmp_path):
    class Stubborn(PlantedTrials):
        @staticmethod
        def refusal_of(edit, prompt=0):
            return 0.8 + 0.01 * edit["layer"]

    trials = _search(tmp_path / "trials.jsonl", Stubborn())
    assert [trial.number for trial in trials if trial.kl is not None] == [0, 1, 2, 3]
    assert choose(trials, 0.02)[0].number < 4


@pytest.mark.parametrize("num_prompts", [3, 8, 11, 16])
def test_few_prompts_leave_heats_empty_and_change_nothing_else(num_prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_PROMPTS", num_prompts)
    trials = _search(tmp_path / "trials.jsonl")
    best = choose(trials, 0.02)[0]
    assert best.refusal == pytest.approx(
        _over([slice(0, num_prompts)], PlantedTrials.refusal_of, best.params)
    )
    assert best.kl == pytest.approx(
        _over([slice(0, num_prompts)], PlantedTrials.kl_of, best.params)
    )


@pytest.mark.parametrize("broken", ["refusal", "kl", "both"])
def test_a_search_goes_on_behind_settings_that_break_the_model(broken, tmp_path):
    class Breaking(PlantedTrials):
        @staticmethod
        def breaks(edit):
            return edit["edit"] == "orthogonalize"

        @classmethod
        def refusal_of(cls, edit, prompt=0):
            bad = cls.breaks(edit) and broken != "kl"
            return math.nan if bad else PlantedTrials.refusal_of(edit, prompt)

        @classmethod
        def kl_of(cls, edit, prompt=0):
            bad = cls.breaks(edit) and broken != "refusal"
            return math.nan if bad else PlantedTrials.kl_of(edit, prompt)

    trials = _search(tmp_path / "trials.jsonl", Breaking())
    assert choose(trials, 0.02)[0].params["edit"] == "column_norm"
    # What cannot be compared is kept in the journal all the same.
    again = _search(tmp_path / "trials.jsonl", Breaking())
    assert repr(again) == repr(trials)


@pytest.mark.parametrize("lines", range(7))
@pytest.mark.parametrize("half", [False, True])
def test_a_search_that_was_cut_off_goes_on_with_the_same_trials(lines, half, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = _search(whole)
    written = whole.read_bytes().splitlines(keepends=True)
    torn = written[lines][:-20] if half and lines < len(written) else b""
    cut.write_bytes(b"".join(written[:lines]) + torn)
    judged = PlantedTrials()
    assert _search(cut, judged) == expected
    assert cut.read_bytes() == whole.read_bytes()
    heats = [edit for edit, part in judged.asked["refusal"] if part == HEATS[0]]
    assert heats == [trial.params for trial in expected[4 * lines :]]


def test_a_finished_search_measures_only_finalists_again(tmp_path):
    journal = tmp_path / "trials.jsonl"
    trials = _search(journal)
    judged = PlantedTrials()
    assert _search(journal, judged) == trials
    assert judged.asked["refusal"] == []
    assert all(heat in LAST for _, heat in judged.asked["divergence"])
    assert judged.asked["rate"]


def test_searches_of_two_seeds_differ(tmp_path):
    one, two = (_search(tmp_path / f"{seed}.jsonl", seed=seed) for seed in (0, 1))
    assert [t.params for t in one[:2]] == [t.params for t in two[:2]]
    assert all(a.params != b.params for a, b in zip(one[2:], two[2:], strict=True))


# From a setting to an edit.


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        ("orthogonalize", "none"),
        ("biprojected", "none"),
        ("column_norm", "none"),
        ("column_norm", "projected"),
        ("row_norm", "biprojected"),
    ],
)
@pytest.mark.parametrize("strength", [0.6, 1.0, 1.5])
def test_the_flat_setting_is_the_edit_without_weights(kind, projection, strength, build_model):
    model = build_model("qwen3_moe")
    space = Space((0.0, 2.0), 4, 3, (kind,), embedding=True)
    settings = edit_settings(space.flat(kind, 1, -1, strength), projection)
    builder = importlib.import_module(f"abliteration.edits.{kind}")
    flat = builder.build(direction_of(), find_writers(model), settings, {})
    given = {"projection": projection} if kind.endswith("norm") else {}
    plain = edit_of(model, kind, strength=strength, **given)
    assert flat.removals.keys() == plain.removals.keys()
    for name, removal in flat.removals.items():
        assert removal.strengths == pytest.approx(plain.removals[name].strengths)
        assert removal.vectors == plain.removals[name].vectors
        assert removal.keep_norm == plain.removals[name].keep_norm
    # And it can be proposed as it is.
    assert propose([], space, [space.flat(kind, 1, -1, strength)], 1, 8, 0) == [
        space.flat(kind, 1, -1, strength)
    ]


def test_a_setting_says_how_strong_each_component_is_edited(build_model):
    params = {
        **SPACE.flat("orthogonalize", 1, -1, 1.0),
        "embedding": 0.3,
        "attention.max_weight": 0.8,
        "attention.max_weight_position": 2.0,
        "attention.min_weight_share": 0.5,
        "attention.min_weight_distance": 2.0,
        "mlp.min_weight_share": 0.0,
        "mlp.max_weight_position": 0.0,
        "mlp.min_weight_distance": 1.0,
    }
    edit = edit_of(build_model("llama"), **_without_name(edit_settings(params)))
    found = {name: removal.strengths[0] for name, removal in edit.removals.items()}
    assert found == pytest.approx(
        {
            "model.embed_tokens": 0.3,
            **{f"model.layers.{i}.self_attn.o_proj": s for i, s in enumerate([0.4, 0.6, 0.8])},
            **{f"model.layers.{i}.mlp.down_proj": s for i, s in enumerate([1.0, 0.0, 0.0])},
        }
    )


def _without_name(settings):
    return {"strength": settings.strength, "weights": settings.weights}
