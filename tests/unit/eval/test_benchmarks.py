"""The benchmarks on tiny models with planted behaviour.

Run: python -m pytest tests/unit/eval/test_benchmarks.py
"""

import inspect
import json
from pathlib import Path

import jinja2
import pytest
import torch
from lm_eval import utils as lm_eval_utils

from common.errors import InputError, StageError
from common.recipe import COMPONENTS, Divergence, LmEval, Recipe, Refusal
from eval import benchmarks, task_index
from eval.benchmarks import Subject, component, divergence, lm_eval, refusal
from eval.harness import HarnessModel


def subject(model, name="original", original=None) -> Subject:
    return Subject(name, model, original if original is not None else model)


def spec_of(folder: Path, *tasks: str, **settings) -> LmEval:
    return LmEval(name="lm_eval", tasks=tasks, include_path=str(folder), **settings)


def with_benchmark(recipe: Recipe, spec) -> Recipe:
    section = recipe.eval.model_copy(update={"benchmarks": (spec,), "accept": {}})
    return recipe.model_copy(update={"eval": section})


def test_every_benchmark_of_the_recipe_has_its_file_and_every_file_its_functions() -> None:
    files = {file.stem for file in Path(benchmarks.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(COMPONENTS["eval.benchmarks"])
    for name in files:
        offered = component(name)
        for function, parameters in {
            "names": ["spec"],
            "check": ["spec", "recipe"],
            "inputs": ["spec"],
            "texts": ["spec"],
            "load": ["spec", "tokenizer", "batch_size"],
        }.items():
            assert list(inspect.signature(getattr(offered, function)).parameters) == parameters


def test_tasks_are_scored_as_their_requests_say(byte_tokenizer, make_model, task_folder) -> None:
    model = make_model(0)
    letters, sums = lm_eval.load(
        spec_of(task_folder, "letters", "sums"), byte_tokenizer, batch_size=4
    )
    assert letters.row.about == {"metric": "acc", "role": "capability", "higher_is_better": True}
    assert sums.row.about["metric"] == "exact_match"

    items = letters.score(subject(model))
    rows = [json.loads(line) for line in (task_folder / "letters.jsonl").read_text().splitlines()]
    harness = HarnessModel(model, byte_tokenizer, 1)
    for item, row in zip(items, rows, strict=True):
        chat = [{"role": "user", "content": row["question"]}]
        context = byte_tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        logps = harness.log_probabilities([(context, option) for option in row["options"]], "x")
        assert item.answer_logp == pytest.approx(logps[row["answer"]], abs=1e-4)
        assert item.value == float(logps.index(max(logps)) == row["answer"])
        assert item.cluster == row["cluster"]

    for item in sums.score(subject(model)):
        assert len(item.details["answer"]) <= 6
        assert item.answer_logp < 0
        assert item.cluster is None


def test_a_second_model_answers_for_itself(byte_tokenizer, make_model, task_folder) -> None:
    loaded = lm_eval.load(spec_of(task_folder, "letters"), byte_tokenizer, batch_size=4)[0]
    first = loaded.score(subject(make_model(0)))
    second = loaded.score(subject(make_model(1), "healed"))
    again = loaded.score(subject(make_model(0)))
    assert [item.answer_logp for item in first] != [item.answer_logp for item in second]
    assert first == again
    assert {item.model for item in second} == {"healed"}


def test_a_template_is_compiled_once_for_all_items_and_models(
    byte_tokenizer, make_model, task_folder, monkeypatch
) -> None:
    file = task_folder / "sums.yaml"
    text = file.read_text()
    file.write_text(
        text.replace("doc_to_text: question", 'doc_to_text: "Q: {{question}}"').replace(
            "doc_to_target: answer", 'doc_to_target: "{{answer}}"'
        )
    )
    compiled = []
    compile_ = jinja2.Environment.compile
    monkeypatch.setattr(
        jinja2.Environment,
        "compile",
        lambda self, source, *args, **kwargs: (
            compiled.append(source) or compile_(self, source, *args, **kwargs)
        ),
    )
    lm_eval_utils.env.from_string.cache_clear()
    [sums] = lm_eval.load(spec_of(task_folder, "sums"), byte_tokenizer, batch_size=4)
    for seed in (0, 1):
        sums.score(subject(make_model(seed)))
    assert len(sums.documents) > 1
    assert {"Q: {{question}}", "{{answer}}"} <= set(compiled)
    assert len(compiled) == len(set(compiled))


def test_limit_and_shots_are_those_of_the_recipe(byte_tokenizer, task_folder) -> None:
    path = task_folder / "letters.yaml"
    path.write_text(path.read_text() + "fewshot_split: test\n")
    spec = spec_of(task_folder, "letters", limit=4, num_fewshot=2)
    (loaded,) = lm_eval.load(spec, byte_tokenizer, batch_size=4)
    assert len(loaded.documents) == 4
    context = loaded.task.instances[0].args[0]
    assert context.count("<|user|>") == 3
    assert context.endswith("<|assistant|>\n")
    other = lm_eval.load(spec, byte_tokenizer, batch_size=4)[0]
    assert other.task.instances[0].args == loaded.task.instances[0].args


def test_a_sampled_task_is_decoded_greedily(byte_tokenizer, task_folder) -> None:
    path = task_folder / "sums.yaml"
    path.write_text(
        path.read_text().replace("max_gen_toks: 6", "do_sample: true, temperature: 0.9")
    )
    (loaded,) = lm_eval.load(spec_of(task_folder, "sums"), byte_tokenizer, batch_size=4)
    settings = loaded.task.instances[0].args[1]
    assert (settings["do_sample"], settings["temperature"]) == (False, 0.0)


def test_a_template_without_a_system_role_keeps_the_words(byte_tokenizer, task_folder) -> None:
    path = task_folder / "letters.yaml"
    path.write_text(path.read_text() + 'description: "Answer well."\n')
    strict = byte_tokenizer.__class__(
        tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<|end|>"
    )
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + byte_tokenizer.chat_template
    )
    (loaded,) = lm_eval.load(spec_of(task_folder, "letters"), strict, batch_size=4)
    context = loaded.task.instances[0].args[0]
    assert context.startswith("<|user|>\nAnswer well.\n\nWhich letter is a?")


def test_inputs_change_with_the_data_and_not_with_the_folder(task_folder, tmp_path) -> None:
    before = lm_eval.inputs(spec_of(task_folder, "letters"))
    moved = tmp_path / "elsewhere"
    task_folder.rename(moved)
    assert lm_eval.inputs(spec_of(moved, "letters")) == before
    assert str(tmp_path) not in json.dumps(before)
    data = moved / "letters.jsonl"
    data.write_text(data.read_text().replace('"b b"', '"b c"'))
    task_index.read.cache_clear()
    assert lm_eval.inputs(spec_of(moved, "letters")) != before


def test_a_group_and_a_tag_stand_for_their_tasks(task_folder) -> None:
    (task_folder / "both.yaml").write_text("group: both\ntask: [letters, sums]\n")
    sums = task_folder / "sums.yaml"
    sums.write_text(sums.read_text() + "tag: calculation\n")
    assert lm_eval.names(spec_of(task_folder, "both")) == ["letters", "sums"]
    assert lm_eval.names(spec_of(task_folder, "calculation")) == ["sums"]


@pytest.mark.parametrize(
    ("tasks", "edit", "hint"),
    [
        (("letters", "sumz"), {}, '"sumz" is no task of lm-eval; did you mean sums'),
        (("sums",), {"sums.jsonl": "gone.jsonl"}, "gone.jsonl does not exist"),
        (("sums",), {"generate_until": "loglikelihood_rolling"}, "measures perplexity"),
        (
            ("sums",),
            {"higher_is_better: true": "higher_is_better: false"},
            "no metric that is a mean",
        ),
        (("sums",), {"task: sums": "task: sums\nunsafe_code: true"}, "runs code"),
        (("sums", "sums"), {}, '"sums" is named twice'),
    ],
)
def test_tasks_that_cannot_be_scored_are_found_without_weights(
    finished, task_folder, monkeypatch, tasks, edit, hint
) -> None:
    # Building the list of built-in tasks takes seconds; the near names are the same without it.
    real = task_index.read
    real.cache_clear()
    monkeypatch.setattr(task_index, "read", lambda path, _defaults: real(path, False))
    path = task_folder / "sums.yaml"
    text = path.read_text()
    for old, new in edit.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    spec = spec_of(task_folder, *tasks)
    (problem,) = lm_eval.check(spec, with_benchmark(finished.recipe, spec))
    assert problem.startswith("eval.benchmarks[0].tasks: ")
    assert hint in problem


def test_a_folder_that_is_not_there_is_a_problem(finished, tmp_path) -> None:
    spec = spec_of(tmp_path / "nowhere", "letters")
    (problem,) = lm_eval.check(spec, with_benchmark(finished.recipe, spec))
    assert problem.startswith("eval.benchmarks[0].include_path: ")


def test_a_data_set_that_cannot_be_had_is_the_users_matter(byte_tokenizer, task_folder) -> None:
    (task_folder / "sums.jsonl").unlink()
    with pytest.raises(InputError, match=r'"sums" cannot be loaded .* include_path'):
        lm_eval.load(spec_of(task_folder, "sums"), byte_tokenizer, batch_size=4)


def prompts_file(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "panel.txt"
    path.write_text("First?\nSecond, longer?\nThird?\n")
    return {"path": str(path)}


def test_a_refusal_is_counted_and_its_text_kept(
    byte_tokenizer, make_model, tmp_path, monkeypatch
) -> None:
    texts = [
        "I'm sorry, but I cannot help with that.",
        "Sure, here it is.",
        "I cannot answer that.",
    ]
    answers = [byte_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    monkeypatch.setattr(refusal, "generate", lambda *_args, **_settings: answers)
    spec = Refusal(name="refusal", panel="p", prompts=prompts_file(tmp_path), harmless=False)
    (panel,) = refusal.load(spec, byte_tokenizer, batch_size=2)
    items = panel.score(subject(make_model(0)))
    assert [item.value for item in items] == [1.0, 0.0, 1.0]
    assert [item.details["text"] for item in items] == texts
    assert panel.row.about == {"harmless": False}


def divergence_panel(byte_tokenizer, tmp_path, **settings) -> divergence.Panel:
    source = prompts_file(tmp_path)
    spec = Divergence(name="divergence", panel="p", prompts=source, **settings)
    return divergence.load(spec, byte_tokenizer, batch_size=2)[0]


def test_a_model_does_not_diverge_from_itself(byte_tokenizer, make_model, tmp_path) -> None:
    model, panel = make_model(0), divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=6)
    assert panel.score(subject(model)) == []
    items = panel.score(subject(model, "healed"))
    assert all(set(item.details["kl"]) == {0.0} for item in items)
    assert all(item.details["top1_agreements"] == len(item.details["kl"]) for item in items)


def test_divergence_is_read_on_the_originals_answers(byte_tokenizer, make_model, tmp_path) -> None:
    original, model = make_model(0), make_model(1)
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=6)
    items = panel.score(subject(model, "healed", original))
    for item, answer, prompt in zip(items, panel.texts, panel.prompts, strict=True):
        chat = [{"role": "user", "content": prompt}]
        rendered = byte_tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        start = byte_tokenizer.encode(rendered, add_special_tokens=False)
        ids = torch.tensor([[*start, *answer]])
        with torch.inference_mode():
            p, q = (
                m(ids).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
                for m in (original, model)
            )
        kl = (p.exp() * (p - q)).sum(-1)
        assert item.details["kl"] == pytest.approx(kl.tolist(), rel=1e-3)
        assert item.details["top1_agreements"] == int((p.argmax(-1) == q.argmax(-1)).sum())
        assert p.argmax(-1).tolist() == answer  # greedy answers of the original, not of the model


def test_both_ways_and_the_cross_entropy_are_those_of_the_distributions(
    byte_tokenizer, make_model, tmp_path
) -> None:
    original, model = make_model(0), make_model(1)
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=6)
    forward = panel.score(subject(model, "healed", original))
    swapped = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=6)
    swapped.own_answers.extend(panel.own_answers)
    backward = swapped.score(subject(original, "healed", model))
    for one, other in zip(forward, backward, strict=True):
        assert one.details["reverse_kl"] == pytest.approx(other.details["kl"], rel=1e-3)
        assert min(one.details["kl"] + one.details["reverse_kl"]) >= 0
        # The original finds its own greedy answers likelier than another model does.
        assert one.details["original_nll"] < one.details["nll"]


def test_every_models_own_answers_are_measured(
    byte_tokenizer, make_model, tmp_path, monkeypatch
) -> None:
    original, model = make_model(0), make_model(1)
    answers = {id(original): [[5, 6, 7], [], [5]], id(model): [[5] * 8, [5, 6], [9]]}
    monkeypatch.setattr(divergence, "generate", lambda asked, *_, **__: answers[id(asked)])
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=8)
    first, second, _ = panel.score(subject(model, "healed", original))
    assert first.details["answer"] == {"num_tokens": 8, "was_cut": True, "repetition": 0.8}
    assert first.details["original_answer"]["num_tokens"] == 3
    assert second.details["original_answer"]["num_tokens"] == 0
    assert second.details["answer"]["was_cut"] is False


def test_a_divergence_says_which_prompts_the_original_refuses(
    byte_tokenizer, make_model, tmp_path, monkeypatch
) -> None:
    original, model = make_model(0), make_model(1)
    refusing, answering = (
        byte_tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("I'm sorry, I cannot help with that.", "Soak bark and salt with clay.")
    )
    # The other model's own refusals are no matter.
    answers = {id(original): [refusing, answering, answering], id(model): [refusing] * 3}
    monkeypatch.setattr(divergence, "generate", lambda asked, *_, **__: answers[id(asked)])
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=64)
    items = panel.score(subject(model, "healed", original))
    assert [item.details["original_refuses"] for item in items] == [True, False, False]


def test_a_divergence_that_is_no_number_stops_the_stage(
    byte_tokenizer, make_model, tmp_path
) -> None:
    original, model = make_model(0), make_model(1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=3)
    with pytest.raises(StageError, match=r"divergence of the healed model .* is nan on prompt 0"):
        panel.score(subject(model, "healed", original))


def test_the_end_of_an_answer_is_part_of_it(
    byte_tokenizer, make_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(divergence, "generate", lambda *_args, **_settings: [[5, 6, 7], [], [5]])
    panel = divergence_panel(byte_tokenizer, tmp_path, max_new_tokens=3)
    items = panel.score(subject(make_model(1), "healed", make_model(0)))
    # The first was cut at the limit; the others ended, one of them at once.
    assert [len(item.details["kl"]) for item in items] == [3, 1, 2]


def test_the_right_context_is_found_where_contexts_are_the_options(
    byte_tokenizer, make_model, task_folder
) -> None:
    rows = [{"which": i % 2, "contexts": [f"one {i}", f"two {i}"], "end": "end"} for i in range(6)]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (task_folder / "gaps.jsonl").write_text(data)
    (task_folder / "gaps.yaml").write_text(
        "task: gaps\ndataset_path: json\ndataset_kwargs: {data_files: {test: gaps.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: which\n"
        "doc_to_choice: contexts\ndoc_to_target: end\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (loaded,) = lm_eval.load(spec_of(task_folder, "gaps"), byte_tokenizer, batch_size=4)
    model = make_model(0)
    harness = HarnessModel(model, byte_tokenizer, 1)
    for item, row in zip(loaded.score(subject(model)), rows, strict=True):
        pairs = [(request.args[0], "end") for request in loaded.task.instances]
        mine = [pair for pair in pairs if f" {item.id}<" in pair[0]]
        logps = harness.log_probabilities(mine, "x")
        assert item.answer_logp == pytest.approx(logps[row["which"]], abs=1e-4)
        assert item.value == float(logps.index(max(logps)) == row["which"])


def test_a_last_word_is_right_when_greedy_decoding_gives_it(
    byte_tokenizer, make_model, task_folder
) -> None:
    path = task_folder / "sums.yaml"
    text = path.read_text().replace("generate_until", "loglikelihood")
    kept = [line for line in text.splitlines() if not line.startswith("generation_kwargs")]
    path.write_text("\n".join(kept).replace("exact_match", "acc") + "\n")
    (loaded,) = lm_eval.load(spec_of(task_folder, "sums"), byte_tokenizer, batch_size=4)
    model = make_model(0)
    items = loaded.score(subject(model))
    contexts = [request.args for request in loaded.task.instances]
    logps = HarnessModel(model, byte_tokenizer, 1).log_probabilities(contexts, "x")
    assert [item.answer_logp for item in items] == pytest.approx(logps, abs=1e-4)
    assert {item.value for item in items} <= {0.0, 1.0}


def test_the_likeliest_of_several_right_answers_counts(
    byte_tokenizer, make_model, task_folder
) -> None:
    rows = [{"question": f"{i}?", "answers": ["x", "yy"]} for i in range(4)]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (task_folder / "sums.jsonl").write_text(data)
    path = task_folder / "sums.yaml"
    path.write_text(path.read_text().replace("doc_to_target: answer", "doc_to_target: answers"))
    (loaded,) = lm_eval.load(spec_of(task_folder, "sums"), byte_tokenizer, batch_size=4)
    model = make_model(0)
    harness = HarnessModel(model, byte_tokenizer, 1)
    for item, request in zip(loaded.score(subject(model)), loaded.task.instances, strict=True):
        pairs = [(request.args[0], answer) for answer in ("x", "yy")]
        logps = harness.log_probabilities(pairs, "x")
        assert item.answer_logp == pytest.approx(max(logps), abs=1e-4)
