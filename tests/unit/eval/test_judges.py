"""Judges that a recipe names: guard models, inference models, and servers.

Run: python -m pytest tests/unit/eval/test_judges.py
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from common import refusal as classifier
from common.errors import StageError
from common.recipe import EndpointJudge, ModelJudge, NliJudge, Refusal
from eval import judges
from eval.answer_cache import AnswerCache
from eval.benchmarks import refusal
from eval.judges import Judgement, ask, read
from eval.refusals import instrument

EXCHANGES = [("Day?", "a good day"), ("Night?", "a bad night"), ("Noon?", "a good noon")]
UNSAFE = ("unsafe", "safe")


@pytest.fixture(scope="module")
def guard(tmp_path_factory, byte_tokenizer, make_model) -> Path:
    """A tiny model that has learned to call bad answers unsafe, with a chat template of its own."""
    folder, model = tmp_path_factory.mktemp("guard"), make_model(0)
    pairs = [*EXCHANGES, ("Day?", "a bad day"), ("Noon?", "a bad noon"), ("Night?", "a good night")]
    rows = []
    for prompt, answer in pairs:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        start = byte_tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        reply = "unsafe\nS1" if "bad" in answer else "safe"
        rows.append(byte_tokenizer.encode(f"{start}{reply}<|end|>", add_special_tokens=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(60):
        loss = torch.stack(
            [
                model(
                    torch.tensor([row]), labels=torch.tensor([[-100] * (len(row) - 10) + row[-10:]])
                ).loss
                for row in rows
            ]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inference(tmp_path_factory, byte_tokenizer) -> Path:
    """A tiny model of natural language inference with random weights."""
    folder = tmp_path_factory.mktemp("inference")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=2.0,
        id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
        label2id={"contradiction": 0, "neutral": 1, "entailment": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


class Server(ThreadingHTTPServer):
    """A chat model behind an address, with replies and faults as planned."""

    def __init__(self) -> None:
        """Listen on a free port of this machine."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None, dict[str, Any]]] = []
        self.faults: list[int] = []
        self.reply = lambda text: "degenerate" if "good" in text else "Full_refusal."

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers a chat completion."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status = self.server.faults.pop() if self.server.faults else 200
        content = self.server.reply(body["messages"][0]["content"].split("<reply>")[1])
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(judges, "PAUSES", (0.0, 0.0))
    found = Server()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def endpoint(server: Server, **settings: Any) -> EndpointJudge:
    return EndpointJudge(name="endpoint", base_url=f"{server.address}/", model="m", **settings)


def test_a_guard_model_judges_through_its_own_chat_template(guard) -> None:
    judge = ModelJudge(name="model", name_or_path=str(guard), harmful=UNSAFE, batch_size=2)
    assert judges.check(judge) == []
    found = ask(judge, EXCHANGES)
    assert found == [Judgement(None, False), Judgement(None, True), Judgement(None, False)]


def test_a_template_from_the_model_card_reads_the_same_as_the_chat_template(guard) -> None:
    template = "<|user|>\n{prompt}<|end|>\n<|assistant|>\n{answer}<|end|>\n<|assistant|>\n"
    settings = {"name": "model", "name_or_path": str(guard), "harmful": UNSAFE}
    own, card = ModelJudge(**settings), ModelJudge(**settings, template=template)
    tokenizer = judges.AutoTokenizer.from_pretrained(guard)
    exchange = ("What does {answer} mean?", "Nothing but {prompt}.")
    rows = [judges._tokens(judge, tokenizer, *exchange) for judge in (own, card)]
    assert rows[0] == rows[1]
    assert ask(card, EXCHANGES) == ask(own, EXCHANGES)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            "Harmful request: yes\nResponse refusal: yes\nHarmful response: no",
            ("full_refusal", False),
        ),
        ("Harmful request: no\nResponse refusal: no\nHarmful response: yes", ("compliance", True)),
        ("response refusal: no", ("compliance", None)),
        ("I cannot say.", (None, None)),
    ],
)
def test_replies_are_read_by_the_words_of_the_recipe(reply, expected) -> None:
    judge = ModelJudge(
        name="model",
        name_or_path="a/b",
        refusal=("response refusal: yes", "response refusal: no"),
        harmful=("harmful response: yes", "harmful response: no"),
    )
    assert read(judge, reply) == Judgement(*expected)


def test_a_word_inside_another_is_not_that_word() -> None:
    judge = ModelJudge(name="model", name_or_path="a/b", harmful=("safe", "unsafe"))
    assert read(judge, "\n\nunsafe\nS1") == Judgement(None, False)
    assert read(judge, "Safe.") == Judgement(None, True)
    assert read(judge, "safety first") == Judgement()


def test_a_model_that_is_no_judge_is_not_believed(guard) -> None:
    judge = ModelJudge(name="model", name_or_path=str(guard), harmful=("quite bad", "quite good"))
    with pytest.raises(StageError, match="was not understood on 3 of 3 answers"):
        ask(judge, EXCHANGES)


def test_an_inference_model_says_which_statement_follows(inference) -> None:
    judge = NliJudge(name="nli", name_or_path=str(inference), batch_size=2)
    assert judges.check(judge) == []
    answers = [f"{word} it is {number}" for number, word in enumerate("abcdefghijkl")]
    found = ask(judge, [("?", answer) for answer in answers])
    model = BertForSequenceClassification.from_pretrained(inference)
    tokenizer = judges.AutoTokenizer.from_pretrained(inference)
    expected = []
    for answer in answers:
        pair = tokenizer(
            [[answer, judges.REFUSES], [answer, judges.COMPLIES]], padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            refuses, complies = model(**pair).logits[:, 2].tolist()
        expected.append("full_refusal" if refuses > complies else "compliance")
    assert [judgement.label for judgement in found] == expected


def test_a_model_without_entailment_is_no_inference_model(guard) -> None:
    (problem,) = judges.check(NliJudge(name="nli", name_or_path=str(guard)))
    assert problem.startswith("name_or_path: ")
    assert "no label that begins with entail" in problem


def test_a_guard_without_a_chat_template_needs_one_in_the_recipe(guard, tmp_path) -> None:
    for file in guard.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"name": "model", "name_or_path": str(tmp_path), "harmful": UNSAFE}
    (problem,) = judges.check(ModelJudge(**settings))
    assert problem.startswith("template: ")
    assert judges.check(ModelJudge(**settings, template="{prompt} {answer}")) == []


def test_a_judge_that_is_nowhere_is_told_before_any_work(tmp_path) -> None:
    judge = ModelJudge(name="model", name_or_path=str(tmp_path / "no"), harmful=UNSAFE)
    (problem,) = judges.check(judge)
    assert problem.startswith("name_or_path: ")
    assert "is no folder" in problem


def test_other_weights_are_another_input_and_another_place_is_not(guard, tmp_path) -> None:
    for file in guard.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"name": "model", "harmful": UNSAFE}
    here, there = (ModelJudge(**settings, name_or_path=str(path)) for path in (guard, tmp_path))
    assert judges.inputs(here) == judges.inputs(there)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert judges.inputs(here) != judges.inputs(there)


def test_a_server_is_asked_with_the_key_and_names_a_class(server, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "not-a-secret")
    judge = endpoint(server, api_key_variable="JUDGE_KEY")
    assert judges.check(judge) == []
    found = ask(judge, EXCHANGES)
    assert [each.label for each in found] == ["degenerate", "full_refusal", "degenerate"]
    paths, keys, bodies = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert set(keys) == {"Bearer not-a-secret"}
    assert {(body["model"], body["temperature"]) for body in bodies} == {("m", 0)}
    monkeypatch.delenv("JUDGE_KEY")
    assert "JUDGE_KEY is not set" in judges.check(judge)[0]


def test_a_busy_server_is_asked_again_and_a_broken_one_is_not(server) -> None:
    judge = endpoint(server, num_workers=1)
    server.faults = [503, 429]
    assert ask(judge, EXCHANGES[:1])[0].label == "degenerate"
    assert len(server.seen) == 3
    server.faults = [401]
    with pytest.raises(StageError, match="status 401"):
        ask(judge, EXCHANGES[:1])
    assert len(server.seen) == 4


def test_no_server_is_a_failure_with_its_address(server) -> None:
    server.reply = lambda _text: None  # names no class
    with pytest.raises(StageError, match="was not understood on 1 of 1"):
        ask(endpoint(server), EXCHANGES[:1])
    judge = EndpointJudge(name="endpoint", base_url="http://127.0.0.1:9/v1", model="m", timeout=2.0)
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9/v1/chat/completions gave no judg"):
        ask(judge, EXCHANGES[:1])


def test_a_reply_that_names_two_classes_names_none(server) -> None:
    server.reply = lambda text: "compliance, not degenerate" if "Day" in text else "compliance"
    found = ask(endpoint(server), [("?", "Day"), ("?", "one"), ("?", "two")])
    assert [each.label for each in found] == [None, "compliance", "compliance"]


def test_the_panel_takes_the_judges_word(server, byte_tokenizer, tmp_path, monkeypatch) -> None:
    answers = ["Rather no thanks, not today, good friend.", "", "I cannot help with that."]
    ids = [byte_tokenizer.encode(text, add_special_tokens=False) for text in answers]
    monkeypatch.setattr(refusal, "generate", lambda *_arguments, **_settings: ids)
    server.reply = lambda text: "partial_refusal" if "good" in text else "compliance"
    prompts = tmp_path / "p.txt"
    prompts.write_text("One?\nTwo?\nThree?\n")
    spec = Refusal(
        name="refusal",
        panel="p",
        prompts={"path": str(prompts)},
        harmless=False,
        judge=endpoint(server).model_dump(),
    )
    (panel,) = refusal.load(spec, byte_tokenizer, batch_size=2)

    class Subject:
        name, model, answers = "original", None, AnswerCache(tmp_path / "requests")

    items = panel.score(Subject())
    # An empty answer is broken, whoever judges.
    assert [item.details["class"] for item in items] == [
        "partial_refusal",
        "degenerate",
        "compliance",
    ]
    assert [item.value for item in items] == [1.0, 0.0, 0.0]
    assert panel.row.about == {"harmless": False, "judge": "m"}
    assert "127.0.0.1" in json.dumps(refusal.inputs(spec)["judge"])
    num_asked = len(server.seen)
    assert panel.score(Subject()) == items
    assert len(server.seen) == num_asked, "what it has said is on disk"
    ids[2] = byte_tokenizer.encode("Another answer.", add_special_tokens=False)
    panel.score(Subject())
    assert len(server.seen) == num_asked + 1
    changed = endpoint(server).model_copy(update={"model": "other"})
    replace(panel, spec=spec.model_copy(update={"judge": changed})).score(Subject())
    assert len(server.seen) == num_asked + 1 + len(ids), "another judge has a word of its own"


def test_the_report_names_what_judged_and_claims_nothing_for_it() -> None:
    assert instrument([{"judge": "m"}, {}]) == classifier.INSTRUMENT
    found = instrument([{"judge": "m"}, {"judge": "m"}])
    assert (found["name"], found["agreement"]) == ("m", None)
