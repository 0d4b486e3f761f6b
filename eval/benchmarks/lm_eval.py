"""Tasks of lm-evaluation-harness: built-in ones by name, one's own as YAML files in a folder.

The harness finds the tasks, renders the requests and judges the answers. Requests are built and
tokenised once and put to all models; its answer cache is never used, since its key does not contain
the model. Decoding is greedy whatever a task says, so that two models differ by their weights
alone.
"""

import contextlib
import difflib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from common import artifacts
from common.errors import InputError
from common.recipe import LmEval, Recipe
from eval.benchmarks import Subject, place
from eval.items import Item, Row

if TYPE_CHECKING:
    from eval.harness import Encoder, HarnessModel

# What a metric must be: the mean over items of a value that is higher for better answers.
KNOWN_MEANS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
DEFAULT_METRICS = {
    "multiple_choice": "acc",
    "loglikelihood": "acc",
    "generate_until": "exact_match",
}
FEWSHOT_SEED = 1234

# It announces every default it fills in; what matters of that is checked here.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def names(spec: LmEval) -> list[str]:
    """The tasks, with groups and tags replaced by what they hold.

    Raises:
        InputError: if a task is unknown or a task file cannot be read.
    """
    index = _index(spec)
    return [leaf for name in spec.tasks for leaf in _leaves(index, name)]


def check(spec: LmEval, recipe: Recipe) -> list[str]:
    """Unknown tasks, task files without data, and tasks that this evaluation cannot score."""
    where = place(spec, recipe)
    if spec.include_path is not None and not Path(spec.include_path).is_dir():
        return [
            f"{where}.include_path: {spec.include_path} is no folder; name one that holds task "
            f"files"
        ]
    try:
        index = _index(spec)
        tasks = names(spec)
    except InputError as error:
        return [f"{where}.tasks: {error}"]
    problems = [
        f"{where}.tasks: {problem}" for task in tasks for problem in _task_problems(index, task)
    ]
    repeated = sorted({task for task in tasks if tasks.count(task) > 1})
    return problems + [
        f'{where}.tasks: "{task}" is named twice (perhaps by a group); delete one'
        for task in repeated
    ]


def inputs(spec: LmEval) -> dict[str, object]:
    """Settings, the content of task files and of the data beside them, and the harness's version."""
    index = _index(spec)
    contents: dict[str, object] = {}
    for task in names(spec):
        config, folder = _config(index, task)
        contents[task] = {
            "config": _without_paths(config, folder),
            "data": artifacts.hash_files(_local_data(config, folder)),
            "code": artifacts.hash_files(sorted(folder.glob("*.py"))) if folder else None,
        }
    settings = spec.model_dump(mode="json", exclude={"include_path"})
    return settings | {"contents": contents, "lm_eval": _version()}


def texts(spec: LmEval) -> dict[str, list[str]]:
    """Every item as it is asked, and every text field of it, since a template may wrap the question.

    Raises:
        InputError: if a data set cannot be had.
    """
    index = _index(spec)
    return {name: list(_texts(_build(index, name), spec.limit)) for name in names(spec)}


def load(
    spec: LmEval, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> "list[LoadedTask]":
    """The tasks with their data, their requests rendered with the chat template.

    Raises:
        InputError: if a data set cannot be had.
    """
    return [_load_task(spec, name, tokenizer, batch_size) for name in names(spec)]


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

    @property
    def row(self) -> Row:
        """The task's share of right answers."""
        return Row(
            "benchmarks",
            self.name,
            {"metric": self.metric, "role": self.role, "higher_is_better": True},
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
    if task.OUTPUT_TYPE != "generate_until":
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


def _texts(task: Any, limit: int | None) -> Iterator[str]:  # noqa: ANN401  # the harness's Task, untyped
    for _, document in task.doc_iterator(limit=limit):
        question = task.doc_to_text(document)
        if isinstance(question, str):
            yield question
        yield from (value for value in document.values() if isinstance(value, str))


def _load_task(
    spec: LmEval, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> LoadedTask:
    from eval.harness import Encoder  # noqa: PLC0415  # slow to import, and a check must be a blink

    index = _index(spec)
    task = _build(index, name)
    # As the harness does: a task that says 0 shots keeps them.
    if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", spec.num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # a progress bar on every process, with no way to switch it off
        task.build_all_requests(
            limit=spec.limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=_chat_template(tokenizer),
        )
    for instance in task.instances:
        if instance.request_type == "generate_until":
            context, settings = instance.arguments
            instance.arguments = (context, {**settings, "do_sample": False, "temperature": 0.0})
    documents = dict(task.doc_iterator(limit=spec.limit))
    encoder = Encoder(tokenizer)
    encoder.prepare(
        text for instance in task.instances for text in instance.args if isinstance(text, str)
    )
    filters = task.config.filter_list
    return LoadedTask(
        name=name,
        task=task,
        metric=_metric(task),
        filter_name=filters[0]["name"] if filters else "none",
        documents=documents,
        right_answers={number: _right_answers(task, doc) for number, doc in documents.items()},
        role=spec.role,
        tokenizer=tokenizer,
        batch_size=batch_size,
        encoder=encoder,
    )


def _build(index: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401  # the harness's Task, untyped
    import datasets  # noqa: PLC0415  # slow to import, and recipes without lm_eval must load fast
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # see above

    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=False)
    config, folder = _config(index, name, resolve_functions=True)
    try:
        loaded: Mapping[str, Any] = manager.load([_with_paths(config, folder)])["tasks"]
    except Exception as error:  # data sets, hub and task code raise dozens of kinds
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f'the lm-eval task "{name}" cannot be loaded ({type(error).__name__}: {first_line}); '
            f"its data is "
            f"{_data_name(config)}: fetch it while there is a network (HF_HOME keeps it), or "
            f"write a task file with "
            "local data_files and name its folder in include_path"
        ) from error
    return next(iter(loaded.values()))


def _data_name(config: Mapping[str, Any]) -> str:
    path, subset = config.get("dataset_path"), config.get("dataset_name")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return (
        json.dumps(files) if files else f"the data set {path}" + (f" ({subset})" if subset else "")
    )


def _metric(task: Any) -> str:  # noqa: ANN401  # the harness's Task, untyped
    directions = task.higher_is_better()
    aggregations = task.aggregation()
    for name in directions:
        if directions[name] and getattr(aggregations.get(name), "__name__", None) in (
            "mean",
            "nanmean",
        ):
            return str(name)
    raise InputError(
        f'the lm-eval task "{task.task_name}" has no metric that is a mean of right answers'
    )


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


@lru_cache(maxsize=8)
def _index_of(include_path: str | None, with_defaults: bool) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # slow to import, and recipes without lm_eval must load fast

    manager = TaskManager(include_path=include_path, include_defaults=with_defaults)
    entries: Mapping[str, Any] = manager.task_index
    return entries


def _index(spec: LmEval) -> Mapping[str, Any]:
    """All known tasks by name; the built-in ones, which take seconds to list, only where one is needed."""
    if spec.include_path is not None:
        local = _index_of(spec.include_path, False)
        if all(name in local for name in spec.tasks):
            return local
    return _index_of(spec.include_path, True)


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        guess = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "name a built-in task, or set include_path"
        )
        raise InputError(f'"{name}" is no task of lm-eval; {guess}')
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = [
        member if isinstance(member, str) else member.get("task") for member in entry.cfg["task"]
    ]
    if not all(isinstance(member, str) and member in index for member in members):
        raise InputError(
            f'the group "{name}" defines tasks inside itself; name its tasks one by one'
        )
    return [leaf for member in members for leaf in _leaves(index, member)]


def _config(
    index: Mapping[str, Any], name: str, *, resolve_functions: bool = False
) -> tuple[dict[str, Any], Path | None]:
    """A task's settings with its includes, and the folder of its file."""
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415  # the harness has no public way to read one file

    entry = index[name]
    if entry.yaml_path is None:
        return dict(entry.cfg or {}), None
    config = load_yaml(entry.yaml_path, resolve_func=resolve_functions)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return dict(config) | {"task": name}, Path(entry.yaml_path).resolve().parent


def _task_problems(index: Mapping[str, Any], name: str) -> Iterator[str]:
    config, folder = _config(index, name)
    if "class" in config:
        return  # a task in Python says what it is only when it is built
    for path in _local_data(config, folder):
        if not path.is_file():
            yield (
                f'"{name}": its data file {path} does not exist; correct data_files, which are '
                "taken from the folder of its YAML"
            )
    output_type = config.get("output_type", "generate_until")
    if output_type not in DEFAULT_METRICS:
        yield f'"{name}" measures perplexity ({output_type}), not right answers; use the divergence benchmark instead'
    elif not any(_is_mean_of_right_answers(metric) for metric in _metrics(config, output_type)):
        yield (
            f'"{name}" has no metric that is a mean of right answers (such as acc or exact_match); '
            "choose another task"
        )
    if config.get("unsafe_code"):
        yield f'"{name}" runs code that the model wrote; it is not run here'
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        yield f'"{name}" needs images or sound; choose a text task'


def _metrics(config: Mapping[str, Any], output_type: str) -> Iterable[Mapping[str, Any]]:
    listed: Iterable[Mapping[str, Any]] | None = config.get("metric_list")
    return listed or [{"metric": DEFAULT_METRICS[output_type]}]


def _is_mean_of_right_answers(metric: Mapping[str, Any]) -> bool:
    known = metric["metric"] in KNOWN_MEANS
    is_mean = metric.get("aggregation", "mean" if known else None) in ("mean", "nanmean")
    return is_mean and bool(metric.get("higher_is_better", known))


def _local_data(config: Mapping[str, Any], folder: Path | None) -> list[Path]:
    """The files that a task's `data_files` name, taken from the folder of its YAML."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return [] if folder is None or files is None else [folder / file for file in _flat(files)]


def _flat(files: object) -> list[str]:
    if isinstance(files, Mapping):
        return [name for value in files.values() for name in _flat(value)]
    if isinstance(files, list):
        return [name for value in files for name in _flat(value)]
    # Addresses and patterns are left to the datasets library.
    return [str(files)] if not any(sign in str(files) for sign in ("://", "*")) else []


def _with_paths(config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The settings with relative data files made absolute; the harness would take them from the current folder."""

    def absolute(files: Any) -> Any:  # noqa: ANN401  # a name, a list or a mapping, as in YAML
        if isinstance(files, Mapping):
            return {split: absolute(value) for split, value in files.items()}
        if isinstance(files, list):
            return [absolute(value) for value in files]
        return str(folder / files) if folder is not None and _flat(files) else files

    settings = dict(config.get("dataset_kwargs") or {})
    if "data_files" in settings:
        settings["data_files"] = absolute(settings["data_files"])
        return {**config, "dataset_kwargs": settings}
    return dict(config)


def _without_paths(config: object, folder: Path | None) -> object:
    """The settings with the folder cut out of what the harness makes absolute (`!function`)."""
    text = json.dumps(config, sort_keys=True, default=str)
    return artifacts.hash_text(text.replace(f"{folder}/", "") if folder is not None else text)


def _version() -> str:
    import importlib.metadata  # noqa: PLC0415  # only here

    return importlib.metadata.version("lm_eval")
