"""A study through the real command, store and storage, over stages that only pretend (tests/studying.py).

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_study.py
"""

import json

import pytest
import yaml

from tests import studying
from train import run
from train.study_storage import MOST_ATTEMPTS, FileLock, cut_half_line

STRENGTH, BETA, RATE = (
    "abliteration.edit.strength",
    "train.trainer.beta",
    "train.trainer.learning_rate",
)
GRID = {
    "parameters": {
        BETA: {"choices": [0.05, 0.1, 0.5]},
        STRENGTH: {"choices": [1.0, 2.0]},
    }
}
SAMPLED = {
    "parameters": {
        STRENGTH: {"low": 1.0, "high": 2.0},
        BETA: {"low": 0.05, "high": 1.0, "log": True},
    },
    "sampler": {"name": "TPESampler", "n_startup_trials": 3},
    "num_trials": 7,
}


class Command:
    """The main command over pretended stages."""

    def __init__(self, folder, capsys):
        """Begin without a study."""
        self.folder, self.capsys = folder, capsys
        self.log = folder / "log"
        self.log.touch()

    def __call__(self, study, *arguments, **changes):
        """Its exit code; what it printed is in `out` and `err`."""
        recipe = studying.write_recipe(self.folder, study, **changes)
        code = run.main([str(recipe), *arguments])
        self.out, self.err = self.capsys.readouterr()
        return code

    @property
    def study(self):
        return json.loads((self.folder / "runs" / "trying" / "study.json").read_text())

    @property
    def runs(self):
        return studying.runs_of(self.log)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_stages", studying.pretended)
    monkeypatch.setattr(run, "_report", lambda _plan, _stage: None)
    monkeypatch.setenv("STUDY_LOG", str(tmp_path / "log"))
    return Command(tmp_path, capsys)


def problems(command):
    """What is wrong, without file and line."""
    return [line.partition(": ")[2] for line in command.err.strip().splitlines()]


def test_a_grid_runs_each_stage_once_and_says_before_what_it_costs(command):
    assert command(GRID, "--check") == 0
    assert "abliteration  2 runs with sharing, 6 without" in command.out
    assert "train         6 runs with sharing, 6 without" in command.out
    # 2 of the search, 2 of the confirmation, and the release.
    assert "for 5 whole models" in command.out
    assert not command.runs
    assert command(GRID) == 0
    # 2 ablations and 6 healings of the search, then two seeds of the confirmation, and the release.
    assert command.runs == {
        "abliteration": 2 + 2,
        "train": 6 + 2,
        "eval": 6 + 2 + 1,
        "release": 1,
    }
    assert command.study["stages"]["abliteration"]["run"] == 2
    assert command.study["stages"]["train"]["run"] == 6
    assert command(GRID, "--check") == 0
    assert "train         6 runs with sharing, 6 of them there already" in command.out


def test_the_best_is_the_planted_one_and_its_release_is_made(command):
    assert command(GRID) == 0
    best = command.study["trials"][command.study["best"]]
    assert best["setting"] == {BETA: 0.1, STRENGTH: 1.0}
    released = json.loads((command.folder / "runs/trying/release/result.json").read_text())
    assert released == {"strength": 1.0}


def test_the_winners_curse_is_what_was_planted(command):
    """The pretended search is luckier by 0.05, and each new seed costs 0.001."""
    assert command(GRID) == 0
    (confirmed,) = command.study["confirmations"]
    assert confirmed["seeds"] == [1, 2]
    assert confirmed["winners_curse"]["pooled.recovery.value"] == pytest.approx(0.05 + 0.0015)
    assert command.study["test"]["values"]["pooled.recovery.value"] == pytest.approx(0.9)


def test_a_second_launch_runs_nothing_and_ends_the_same(command):
    assert command(GRID) == 0
    before, found = command.runs, command.study
    assert command(GRID) == 0
    assert command.runs == before
    assert command.study == found


def test_changing_tracking_or_paths_reuses_everything_and_one_weight_nothing(command):
    assert command(GRID) == 0
    before = command.runs
    assert command(GRID, "tracking.project=other", "name=renamed") == 0
    assert command.runs == before
    moved = command.folder / "elsewhere"
    (command.folder / "model").rename(moved)
    assert command(GRID, f"model.name_or_path={moved}", "name=moved") == 0
    assert command.runs == before
    (moved / "model.safetensors").write_text("other weights")
    assert command(GRID, f"model.name_or_path={moved}", "name=changed") == 0
    assert command.runs == {stage: 2 * count for stage, count in before.items()}


def test_trials_that_miss_limits_or_break_are_finished_and_the_study_succeeds(command):
    study = {
        "parameters": {
            STRENGTH: {"choices": [0.5, 1.0]},
            BETA: {"choices": [0.1, 8, 9]},  # 8: nothing to measure, 9: training breaks
        }
    }
    assert command(study) == 0
    trials = {(t["setting"][STRENGTH], t["setting"][BETA]): t for t in command.study["trials"]}
    assert trials[0.5, 0.1]["state"] == "complete"
    assert not trials[0.5, 0.1]["feasible"]
    assert (
        "refusal[restricted].healed.value is 0.5, limit at most 0.02" in trials[0.5, 0.1]["missed"]
    )
    assert "was not measured" in trials[1.0, 8]["reason"]
    assert trials[1.0, 9]["reason"] == "train: beta 9 breaks it"
    assert command.study["best"] == trials[1.0, 0.1]["number"]


def test_a_study_in_which_no_trial_holds_the_limits_releases_nothing(command):
    study = {"parameters": {STRENGTH: {"choices": [0.4, 0.5]}}}
    assert command(study) == 3
    assert "no trial held all limits" in command.err
    assert "release" not in command.runs
    assert command.study["best"] is None


def test_a_study_in_which_no_trial_can_be_finished_fails(command):
    assert command({"parameters": {BETA: {"choices": [8, 9]}}}) == 1
    assert "none of 2 trials could be finished" in command.err


def test_everything_that_is_wrong_with_the_study_is_told_at_once_and_nothing_runs(command):
    study = {
        "parameters": {
            STRENGTH: {"choices": [1.0, "strong"]},
            "train.trainr.beta": {"choices": [1, 2]},
            "seed": {"choices": [1, 2]},
            RATE: {"low": 1e-4, "high": 1e-2, "log": True},
        },
        "objectives": {"refusal[unknown].healed.value": "minimize"},
        "sampler": {"name": "TPESampler", "seed": 3, "n_startup": 4},
        "pruner": {"name": "MedianPruner"},
        "num_trials": 20,
    }
    assert command(study, f"{RATE}=1e-3", "--check") == 2
    told = "\n".join(problems(command))
    for text in (
        "study.parameters.abliteration.edit.strength: strong",
        "study.parameters.train.trainr.beta: 1",
        'did you mean "trainer"',
        "study.parameters.seed: is no setting of a trial",
        f"{RATE}=1e-3 has no effect",
        'study.objectives: eval.accept.refusal[unknown].healed.value: "unknown" is not a refusal panel',
        "study.sampler.seed: is set by the recipe's seed",
        "study.sampler.n_startup: TPESampler has no such argument",
        "study.pruner: prunes by quick evaluations",
    ):
        assert text in told
    assert not command.runs


@pytest.mark.parametrize(
    ("study", "text"),
    [
        ({"sampler": {"name": "TPESampler"}, "num_trials": 5}, "begins with 10 trials at random"),
        ({"sampler": {"name": "NSGAIISampler"}, "num_trials": 40}, "begins with 50 trials"),
        ({"sampler": {"name": "QMCSampler"}, "num_trials": 9}, "has no order for choices"),
        ({"sampler": {"name": "GridSampler", "search_space": {}}}, "is set by study.parameters"),
        ({"sampler": {"name": "RandomSampler"}}, "study.num_trials: is missing"),
        ({"num_trials": 3, "sampler": {"name": "GridSampler"}}, "no effect on a grid"),
        ({"storage": "nonsense"}, "is no database URL"),
        ({"storage": "postgresql+psycopg://me:secret@host/name"}, "holds a password"),
        ({"storage": "mysql+nodriver://x/y"}, "study.storage"),
        ({"storage": "sqlite:////no/such/folder/x.db"}, "cannot be reached"),
    ],
)
def test_a_sampler_or_storage_that_cannot_do_what_is_asked_is_told(command, study, text):
    assert command({**GRID, **study}, "--check") == 2
    assert text in command.err
    assert "Traceback" not in command.err
    assert "secret" not in command.err.replace("study.yaml", "")


def test_a_sampler_learns_nothing_about_keys_that_only_some_trials_have(command):
    parameters = {
        STRENGTH: {"choices": [1.0, 2.0]},
        BETA: {"low": 0.1, "high": 1.0, "when": {STRENGTH: [1.0]}},
    }
    study = {"parameters": parameters, "sampler": {"name": "GPSampler"}, "num_trials": 20}
    assert command(study, "--check") == 2
    assert (
        "learns nothing about keys that only some trials have (train.trainer.beta)" in command.err
    )


def test_a_study_that_is_stopped_before_its_evaluation_is_refused(command):
    assert command(GRID, "--until", "train") == 2
    assert "--until train is too early" in command.err


def test_a_study_can_be_evaluated_without_a_release(command):
    assert command(GRID, "--until", "eval") == 0
    assert "release" not in command.runs
    assert command.study["test"] is not None


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "TPESampler", "n_startup_trials": 3, "multivariate": True},
        {"name": "RandomSampler"},
        {"name": "NSGAIISampler", "population_size": 4},
        {"name": "QMCSampler"},
        {"name": "GPSampler", "n_startup_trials": 3},
    ],
    ids=lambda sampler: sampler["name"],
)
def test_a_study_that_goes_on_proposes_what_an_unbroken_one_does(command, sampler):
    study = {**SAMPLED, "sampler": sampler}
    assert command({**study, "num_trials": 5}) == 0
    assert command(study) == 0
    broken = [trial["setting"] for trial in command.study["trials"]]
    assert command(study, "name=unbroken") == 0
    path = command.folder / "runs" / "unbroken" / "study.json"
    unbroken = [trial["setting"] for trial in json.loads(path.read_text())["trials"]]
    assert broken == unbroken
    assert len(broken) == 7
    assert len({json.dumps(setting) for setting in broken}) > 4


def test_the_first_trial_is_the_recipe_as_it_stands(command):
    assert command(SAMPLED) == 0
    assert command.study["trials"][0]["setting"] == {STRENGTH: 1.0, BETA: 0.1}


def test_a_study_that_asks_something_else_is_not_mixed_with_the_old_one(command):
    assert command(GRID) == 0
    assert command({"parameters": {BETA: {"choices": [0.1, 0.2]}}}) == 2
    assert "was begun with other parameters" in command.err


def test_values_are_means_over_the_seeds_of_a_trial(command):
    assert command({"parameters": {BETA: {"choices": [0.1, 0.2]}}, "seeds": 3}) == 0
    trial = command.study["trials"][0]
    assert trial["seeds"] == [0, 1, 2]
    expected = sum(studying.reward(1.0, 0.1, seed) for seed in range(3)) / 3
    assert trial["values"]["pooled.recovery.value"] == pytest.approx(expected)
    assert command.study["confirmations"][0]["seeds"] == [3, 4]
    assert command.runs["abliteration"] == 3 + 2


def test_several_objectives_give_a_front(command):
    objectives = {
        "pooled.recovery.value": "maximize",
        "refusal[restricted].healed.value": "minimize",
    }
    study = {
        "parameters": {STRENGTH: {"choices": [0.5, 1.0]}, BETA: {"choices": [0.1, 0.5]}},
        "objectives": objectives,
        "constraints": {},
    }
    assert command(study) == 0
    front = [command.study["trials"][number] for number in command.study["front"]]
    assert {trial["setting"][STRENGTH] for trial in front} == {0.5, 1.0}
    assert all(trial["setting"][BETA] == 0.1 for trial in front)


def test_time_that_is_up_begins_no_trial(command):
    assert command({**SAMPLED, "timeout": 1e-9}) == 1
    assert "none of 0 trials could be finished" in command.err


def test_poor_trials_are_pruned_by_their_quick_evaluations(command):
    stopping = {
        "questions": {"path": "q.jsonl"},
        "harmful": {"path": "a.jsonl"},
        "harmless": {"path": "b.jsonl"},
        "every": 5,
    }
    text = studying.write_recipe(command.folder, GRID).read_text()
    train = {**yaml.safe_load(text)["train"], "stopping": stopping}
    study = {
        "parameters": {BETA: {"choices": [0.1, 0.11, 0.12, 0.9, 1.0]}},
        "pruner": {"name": "MedianPruner", "n_startup_trials": 2},
    }
    assert command(study, train=train) == 0
    states = {t["setting"][BETA]: t["state"] for t in command.study["trials"]}
    assert states[0.1] == states[0.11] == "complete"
    assert states[0.9] == states[1.0] == "pruned"


def test_a_trial_that_ends_its_workers_again_and_again_is_given_up(command, monkeypatch):
    study = {"parameters": {BETA: {"choices": [0.1, 0.2]}}}
    pretended = studying.pretended()
    do = pretended["train"].run

    def die(recipe, *arguments, **more):
        if recipe.train.trainer["beta"] == 0.2:
            raise MemoryError
        do(recipe, *arguments, **more)

    monkeypatch.setattr(pretended["train"], "run", die)
    monkeypatch.setattr(run, "_stages", lambda: pretended)
    for _ in range(MOST_ATTEMPTS):
        with pytest.raises(MemoryError):
            command(study)
    assert command(study) == 0
    trials = command.study["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed"]
    assert f"it ended its worker {MOST_ATTEMPTS} times" in trials[1]["reason"]


def test_half_a_line_of_a_killed_writer_does_not_spoil_the_journal(tmp_path):
    journal = tmp_path / "study.journal"
    journal.write_bytes(b'{"a": 1}\n{"b": 2}\n{"c"')
    lock = FileLock(journal)
    lock.acquire()
    lock.release()
    assert journal.read_bytes() == b'{"a": 1}\n{"b": 2}\n'
    cut_half_line(journal)
    assert journal.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


def test_settings_of_a_sweep_agent_are_overrides(command):
    recipe = studying.write_recipe(command.folder, GRID)
    data = yaml.safe_load(recipe.read_text())
    del data["study"]
    recipe.write_text(yaml.safe_dump(data))
    assert run.main([str(recipe), "--train.trainer.beta=0.3", "--seed=4", "--until=eval"]) == 0
    found = yaml.safe_load((command.folder / "runs" / "trying" / "recipe.yaml").read_text())
    assert found["train"]["trainer"]["beta"] == 0.3
    assert found["seed"] == 4
    assert "release" not in command.runs


@pytest.mark.slow
def test_tracking_groups_all_runs_of_a_study_and_tells_what_each_trial_reached(
    command, read_wandb, monkeypatch
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    study = {"parameters": {BETA: {"choices": [0.1, 0.2]}}, "confirmation_seeds": 1}
    assert command(study, "tracking.mode=offline", "--until", "eval") == 0
    starts, summaries, tables = [], {}, []
    for file in (command.folder / "runs").rglob("offline-run-*/*.wandb"):
        records = read_wandb(file)
        start = next(record["run"] for record in records if record["type"] == "run")
        starts.append(start)
        summaries[start["display_name"]] = json.dumps(records)
        tables += [
            name for name in ("front", "importances") if f"media/table/{name}" in str(records)
        ]
    assert {start["run_group"] for start in starts} == {"trying"}
    kinds = sorted(start["job_type"] for start in starts)
    # A stage that a trial took over has no second run.
    assert kinds.count("trial") == 2
    assert kinds.count("train") == 2 + 1
    assert kinds.count("abliteration") == 1 + 1
    assert kinds.count("study") == 1
    told = summaries["trying-0-trial"]
    for name in ("objectives/pooled.recovery.value", "parameters/train.trainer.beta", "feasible"):
        assert name in told
    assert "front" in tables
