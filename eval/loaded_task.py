"""A task of lm-evaluation-harness with its requests, put to one model after another.

The harness renders the requests and judges the answers. Requests are built and tokenised once and put to all models;
its answer cache is never used, since its key does not contain the model. Decoding is greedy whatever a task says, so
that two models differ by their weights alone.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from eval.benchmarks import Subject
from eval.items import Item, Row

if TYPE_CHECKING:
    from eval.harness import Encoder, HarnessModel

FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness with its requests, which are put to one model after another.

    Attributes:
        name: of the task.
        task: the harness's object.
        metric: the one that is reported.
        filter_name: the first of the task's answer filters.
        documents: its items by number.
        right_answers: what each item's answer may be, where it is generated.
        role: in the verdicts.
        tokenizer: of all three models.
        batch_size: requests per forward pass and process.
        encoder: holds all texts as token ids, for whichever model is asked.
        standing: in a suite; None outside of one.
    """

    name: str
    task: Any  # the harness's Task, untyped
    metric: str
    filter_name: str
    documents: Mapping[int, Mapping[str, Any]]
    right_answers: Mapping[int, list[str]]
    role: str
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    encoder: "Encoder"
    standing: Mapping[str, Any] | None = None

    @property
    def row(self) -> Row:
        """The task's share of right answers."""
        return Row(
            "benchmarks",
            self.name,
            {"metric": self.metric, "role": self.role, "higher_is_better": True}
            | ({"suite": dict(self.standing)} if self.standing is not None else {}),
        )

    def score(self, subject: Subject) -> list[Item]:
        """Put all requests to a model and let the harness judge the answers."""
        from eval.harness import HarnessModel  # noqa: PLC0415  # slow to import, and a check must be a blink

        model = HarnessModel(
            subject.model,
            self.tokenizer,
            self.batch_size,
            engine=subject.engine,
            answers=subject.answers,
            encoder=self.encoder,
        )
        by_document = self._ask(model, f"{self.name}: {subject.name}")
        logps = _answer_logps(
            self, by_document, model, f"{self.name}: {subject.name}, right answers"
        )
        return [
            self._item(subject, number, by_document[number], logps[number])
            for number in self.documents
        ]

    def _ask(self, model: "HarnessModel", description: str) -> dict[int, list[Any]]:
        """Fill the harness's requests with answers; gives them by item."""
        instances = self.task.instances
        asked = [instance for instance in instances for _ in range(instance.repeats or 1)]
        answers = model.answer(instances[0].request_type, asked, description)
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
        for instance, answer in zip(asked, answers, strict=True):
            instance.resps.append(answer)
        self.task.apply_filters()
        by_document: dict[int, list[Any]] = {number: [] for number in self.documents}
        for instance in sorted(instances, key=lambda instance: int(instance.idx)):
            by_document[instance.doc_id].append(instance)
        return by_document

    def _item(
        self, subject: Subject, number: int, instances: Sequence[Any], logp: float | None
    ) -> Item:
        document = self.documents[number]
        responses = [instance.filtered_resps[self.filter_name] for instance in instances]
        value = float(self.task.process_results(document, responses)[self.metric])
        cluster = document.get("cluster")
        return Item(
            "benchmarks",
            self.name,
            subject.name,
            number,
            value,
            cluster=None if cluster is None else str(cluster),
            answer_logp=logp,
            details={"answer": responses[0]} if isinstance(responses[0], str) else {},
        )


def _answer_logps(
    task: LoadedTask,
    by_document: Mapping[int, Sequence[Any]],
    model: "HarnessModel",
    description: str,
) -> dict[int, float | None]:
    """The log-probability of the right answer to each item; of the likeliest where several are right."""
    if task.task.OUTPUT_TYPE == "generate_until":
        asked = [
            (number, instances[0].args[0], answer)
            for number, instances in by_document.items()
            for answer in task.right_answers[number]
        ]
        logps = model.log_probabilities(
            [(context, answer) for _, context, answer in asked], description
        )
        pairs = [(number, logp) for (number, _, _), logp in zip(asked, logps, strict=True)]
    else:
        pairs = [
            (number, float(instance.resps[0][0]))
            for number, instances in by_document.items()
            for instance in instances
            if instance.idx in _right_options(task, number)
        ]
    best: dict[int, float | None] = dict.fromkeys(by_document)
    for number, logp in pairs:
        known = best[number]
        best[number] = logp if known is None else max(known, logp)
    return best


def _right_answers(task: Any, document: Mapping[str, Any]) -> list[str]:  # noqa: ANN401  # the harness's Task, untyped
    # A number in the task's own settings stands for no answer (IFEval: instructions are checked by code).
    if task.OUTPUT_TYPE != "generate_until" or isinstance(task.config.doc_to_target, int):
        return []
    target = task.doc_to_target(document)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(document)[target]
    targets = target if isinstance(target, list) else [target]
    return [str(answer) for answer in targets if str(answer)]


def _right_options(task: LoadedTask, number: int) -> list[int]:
    """Which of an item's requests hold a right answer."""
    if task.task.OUTPUT_TYPE == "loglikelihood":
        return [0]
    document = task.documents[number]
    # With several contexts and one continuation (winogrande) the right context stands where the
    # text should.
    gold = (
        task.task.doc_to_text(document)
        if task.task.multiple_input
        else task.task.doc_to_target(document)
    )
    if isinstance(gold, str):
        choices = task.task.doc_to_choice(document)
        return [choices.index(gold)] if gold in choices else []
    return list(gold) if isinstance(gold, list) else [int(gold)]


def load_task(
    task: Any,  # noqa: ANN401  # the harness's Task, untyped
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    metric: str,
    limit: int | None,
    role: str,
    standing: Mapping[str, Any] | None = None,
) -> LoadedTask:
    """Render a task's requests with the chat template.

    Args:
        task: the harness's, with its data and the number of its examples.
        tokenizer: of all three models.
        batch_size: requests per forward pass and process.
        metric: the one that is reported.
        limit: items; None: all.
        role: in the verdicts.
        standing: in a suite, for its row of results.json.
    """
    from eval.harness import Encoder  # noqa: PLC0415  # slow to import, and a check must be a blink

    _build_requests(task, tokenizer, limit)
    documents = dict(task.doc_iterator(limit=limit))
    encoder = Encoder(tokenizer)
    encoder.prepare(
        text for instance in task.instances for text in instance.args if isinstance(text, str)
    )
    filters = task.config.filter_list
    return LoadedTask(
        name=task.task_name,
        task=task,
        metric=metric,
        filter_name=filters[0]["name"] if filters else "none",
        documents=documents,
        right_answers={number: _right_answers(task, doc) for number, doc in documents.items()},
        role=role,
        tokenizer=tokenizer,
        batch_size=batch_size,
        encoder=encoder,
        standing=standing,
    )


def _build_requests(task: Any, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:  # noqa: ANN401
    """Let a task make its requests, of which those that are written are written greedily."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    # A progress bar on every process, with no way to switch it off.
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests(
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=_chat_template(tokenizer),
        )
    for instance in task.instances:
        if instance.request_type == "generate_until":
            context, settings = instance.arguments
            instance.arguments = (context, {**settings, "do_sample": False, "temperature": 0.0})


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def render_any(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return render(messages, add_generation_prompt)
        except jinja2.TemplateError:
            # A template without a system role (Gemma): its words open the first user turn instead
            # of being lost.
            if messages[0]["role"] != "system":
                raise
            system, user, *rest = messages
            opened = {
                "role": "user",
                "content": f"{system['content'].rstrip()}\n\n{user['content']}",
            }
            return render([opened, *rest], add_generation_prompt)

    return render_any
