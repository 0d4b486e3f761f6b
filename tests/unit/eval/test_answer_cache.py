"""Answers on disk: found again by whoever asks the same of the same model, and by nobody else.

Run: python -m pytest tests/unit/eval/test_answer_cache.py
"""

import logging
import os
import random
import signal

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import common.generation
from common import artifacts, distributed
from common.edits import load_edit
from common.generation import continue_rows
from common.hooks import add_for_good
from eval import answer_cache, harness, stage
from eval.answer_cache import AnswerCache, fingerprint
from eval.harness import HarnessModel
from tests.releasing import Tracker


def requests(num_items: int = 12) -> list[Instance]:
    rng = random.Random(0)
    letters = "bcdefghijkl"
    return [
        Instance("loglikelihood", {}, ("".join(rng.choices(letters, k=length)), option), 0)
        for length in range(3, 3 + num_items)
        for option in ("x", "yy", "zzz")
    ]


def generations() -> list[Instance]:
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False, "temperature": 0.0}
    return [
        Instance("generate_until", {}, (text, dict(settings)), 0) for text in ("bc", "def", "g")
    ]


def asked(root, model, tokenizer, engine="packed") -> HarnessModel:
    answers = AnswerCache.of(root, model, tokenizer, engine)
    return HarnessModel(model, tokenizer, 4, engine=engine, answers=answers)


def fail(*_args, **_settings):
    raise AssertionError("the model was asked again")


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_a_second_run_asks_no_model(
    engine, make_model, byte_tokenizer, tmp_path, monkeypatch, caplog
) -> None:
    texts = [Instance("loglikelihood_rolling", {}, ("bcd" * 99,), 0)]

    def run():
        ours = asked(tmp_path, make_model(0), byte_tokenizer, engine)
        kinds = (requests(), texts, generations())
        return [getattr(ours, r[0].request_type)(r) for r in kinds]

    first = run()
    monkeypatch.setattr(harness.PackedScorer, "score", fail)
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", fail)
    monkeypatch.setattr(HFLM, "generate_until", fail)
    with caplog.at_level(logging.INFO, "eval.answer_cache"):
        assert run() == first
    assert "36 of 36 answers are there already" in caplog.messages[0]


def test_another_request_is_another_answer(make_model, byte_tokenizer, tmp_path) -> None:
    ours = asked(tmp_path, make_model(0), byte_tokenizer)
    one, other = ([Instance("loglikelihood", {}, pair, 0)] for pair in (("bcd", "e"), ("bc", "de")))
    assert ours.loglikelihood(one) != ours.loglikelihood(other)
    (request,) = generations()[:1]
    longer = Instance(
        "generate_until", {}, (request.args[0], {**request.args[1], "max_gen_toks": 9}), 0
    )
    assert ours.generate_until([request]) != ours.generate_until([longer])


def test_the_harnesss_own_cache_gives_one_model_anothers_answers_and_this_one_does_not(
    make_model, byte_tokenizer, tmp_path
) -> None:
    pytest.importorskip("sqlitedict", reason="lm-eval's cache needs it")
    models, ours, theirs, alone = (make_model(0), make_model(1)), [], [], []
    for model in models:
        plain = HFLM(pretrained=model, tokenizer=byte_tokenizer, batch_size=4, add_bos_token=False)
        cached = CachingLM(plain, str(tmp_path / "lm-eval.db"))
        theirs.append(cached.loglikelihood(requests()))
        ours.append(asked(tmp_path, model, byte_tokenizer).loglikelihood(requests()))
        alone.append(HarnessModel(model, byte_tokenizer, 4).loglikelihood(requests()))
    assert theirs[0] == theirs[1]  # the fault: if this fails, the harness has mended it
    assert ours == alone
    assert ours[0] != ours[1]


def test_the_smallest_change_of_one_weight_is_another_model(make_model, byte_tokenizer) -> None:
    model = make_model(0)
    before = fingerprint(model, byte_tokenizer, "packed")
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert fingerprint(model, byte_tokenizer, "packed") != before


@pytest.mark.parametrize(
    "change",
    [
        lambda model, tokenizer: setattr(tokenizer, "chat_template", "{{ 'other' }}"),
        lambda model, tokenizer: tokenizer.add_tokens(["<|more|>"]),
        lambda model, tokenizer: setattr(model.config, "rms_norm_eps", 0.1),
        lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", 3),
        lambda model, tokenizer: model.set_attn_implementation("eager"),
        lambda model, tokenizer: model.to(torch.bfloat16),
    ],
    ids=["template", "tokenizer", "configuration", "ends", "attention", "dtype"],
)
def test_what_an_answer_depends_on_is_in_its_place(
    change, make_model, byte_tokenizer, tmp_path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer.__class__.from_pretrained(tmp_path)
    model = make_model(0)
    before = fingerprint(model, tokenizer, "packed")
    assert fingerprint(model, tokenizer, "hf") != before
    tokenizer(["b", "cde"], padding=True, truncation=True, max_length=2)  # leaves a state behind
    assert fingerprint(model, tokenizer, "packed") == before
    change(model, tokenizer)
    assert fingerprint(model, tokenizer, "packed") != before


def test_what_an_edit_adds_by_hooks_is_in_its_place(finish, byte_tokenizer) -> None:
    done = finish("add")
    model = AutoModelForCausalLM.from_pretrained(done.recipe.model.name_or_path)
    before = fingerprint(model, byte_tokenizer, "packed")
    add_for_good(model, load_edit(done.upstream["abliteration"] / "edit.safetensors"))
    assert fingerprint(model, byte_tokenizer, "packed") != before


def test_a_model_is_known_wherever_it_lies(make_model, byte_tokenizer, tmp_path) -> None:
    found = set()
    for place in ("here", "there"):
        make_model(0).save_pretrained(tmp_path / place)
        byte_tokenizer.save_pretrained(tmp_path / place)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        tokenizer = byte_tokenizer.__class__.from_pretrained(tmp_path / place)
        found.add(fingerprint(model, tokenizer, "packed"))
    assert len(found) == 1


# ---- the cache by itself, with numbers for requests

BATCHES = [[0, 3], [1, 4], [2, 5], [6]]


def square(index: int) -> list[int]:
    return [number**2 for number in BATCHES[index]]


def answer(folder, work) -> list[int]:
    return AnswerCache(folder).answer(range(7), BATCHES, work, "x")


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path) -> None:
    child = os.fork()
    if not child:
        answer(
            tmp_path,
            lambda index: square(index) if index < 2 else os.kill(os.getpid(), signal.SIGKILL),
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    computed = []
    found = answer(tmp_path, lambda index: computed.append(index) or square(index))
    assert found == [number**2 for number in range(7)]
    assert computed == [2, 3]


def test_a_batch_with_anything_unknown_is_computed_as_a_whole(tmp_path) -> None:
    AnswerCache(tmp_path).answer([0], [[0]], lambda _: [0], "x")
    computed = []
    found = answer(tmp_path, lambda index: computed.append(index) or square(index))
    assert found == [number**2 for number in range(7)]
    assert computed == [0, 1, 2, 3]


@pytest.mark.usefixtures("two_processes")
def test_processes_share_the_batches_and_the_folder(tmp_path) -> None:
    assert answer(tmp_path, square) == [number**2 for number in range(7)]
    assert answer(tmp_path, fail) == [number**2 for number in range(7)]


def test_what_another_process_has_answered_is_known_to_the_next_question(
    tmp_path, monkeypatch
) -> None:
    """The other one's work is played: its answers come with the gathered ones."""
    monkeypatch.setattr(distributed, "share", lambda items, _work: [square(i) for i in items])
    cache = AnswerCache(tmp_path)
    first = cache.answer(range(7), BATCHES, fail, "x")
    monkeypatch.setattr(distributed, "share", lambda items, work: list(work(items)))
    assert cache.answer(range(7), BATCHES, fail, "x") == first


def test_what_is_shared_in_its_own_way_is_asked_at_once_and_only_what_is_unknown(tmp_path) -> None:
    AnswerCache(tmp_path).answer([3], [[0]], lambda _: [9], "x")
    asked = []

    def ask(numbers):
        asked.append(list(numbers))
        return [number**2 for number in numbers]

    for _ in range(2):
        found = AnswerCache(tmp_path).answer_at_once(range(5), ask, "x")
        assert found == [0, 1, 4, 9, 16]
    assert asked == [[0, 1, 2, 4]]
    assert AnswerCache().answer_at_once(range(2), ask, "x") == [0, 1]
    assert asked[1:] == [[0, 1]]


# ---- generated answers

PROMPTS = ["One?", "Which is the second?", "3?", "Is this the fourth?", "And?"]


def test_answers_are_those_of_the_plain_generation_and_are_made_once(
    make_model, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    settings = {"max_new_tokens": 6, "batch_size": 2}
    plain = common.generation.generate(make_model(0), byte_tokenizer, PROMPTS, **settings)

    def run(seed=0, prompts=PROMPTS, **changes):
        model = make_model(seed)
        answers = AnswerCache.of(tmp_path, model, byte_tokenizer, "packed")
        return answer_cache.generate(
            model, byte_tokenizer, prompts, answers=answers, **settings | changes
        )

    assert run() == plain
    made = []

    def counting(*arguments, **settings):
        made.extend(arguments[2])
        return continue_rows(*arguments, **settings)

    monkeypatch.setattr(answer_cache, "continue_rows", counting)
    assert run() == run(batch_size=5) == plain
    assert run(prompts=PROMPTS[::-1]) == plain[::-1]
    assert made == []
    for changes in ({"seed": 1}, {"system": "Be kind."}, {"max_new_tokens": 7}):
        made.clear()
        run(**changes)
        assert len(made) == len(PROMPTS), changes


def test_without_a_folder_nothing_is_kept() -> None:
    cache = AnswerCache()
    assert cache.answer(range(7), BATCHES, square, "x") == [number**2 for number in range(7)]
    assert cache.answer([0], [[0]], lambda _: [8], "x") == [8]


def test_a_stage_that_is_run_again_asks_for_no_option_twice(
    finished, tmp_path, monkeypatch
) -> None:
    written = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        stage.run(finished.recipe, folder, finished.upstream, Tracker())
        written.append((folder / "items.jsonl").read_bytes())
        monkeypatch.setattr(harness.PackedScorer, "score", fail)
        monkeypatch.setattr(HFLM, "generate_until", fail)
        monkeypatch.setattr(answer_cache, "continue_rows", fail)
    assert written[0] == written[1]
    root = artifacts.Store(tmp_path / "runs").root / "requests"
    assert len(list(root.iterdir())) == 3  # a folder for each model


def test_an_engine_that_cannot_run_is_found_without_weights(finished, monkeypatch) -> None:
    def problems(engine: str, *, tasks: bool = True) -> list[str]:
        kept = [b for b in finished.recipe.eval.benchmarks if tasks or b.name != "lm_eval"]
        section = finished.recipe.eval.model_copy(
            update={"engine": engine, "benchmarks": tuple(kept)}
        )
        return stage.check(finished.recipe.model_copy(update={"eval": section}))

    assert problems("packed") == problems("hf") == []
    (missing,) = problems("vllm")
    assert "vLLM is not installed" in missing
    (idle,) = problems("hf", tasks=False)
    assert "no benchmark is one" in idle
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "launch one process" in problems("vllm")[1]
