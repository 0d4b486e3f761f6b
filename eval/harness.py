"""A model as lm-evaluation-harness sees it: one of the harness's own `LM`s, whose work an engine does.

`packed` scores options with common/branches, `hf` with the harness's HFLM, `vllm` with its vLLM; the two latter also
write the answers of generation tasks, HFLM those of `packed`. All of them have two faults of the harness put right.
It tokenises a question and an answer apart, at the chat template's boundary: the harness moves the newline that ends
most templates into the answer, whose log-probability then holds that of a newline the model never writes. And it
deals fixed batches out to the processes of the launch, so that the numbers do not depend on how many there are.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import InputError
from common.recipe import Engine
from eval.answer_cache import AnswerCache
from eval.packed import Ids, PackedScorer, Pair, Scored

logging.getLogger("lm_eval").setLevel(logging.ERROR)

# The harness compiles a task's template anew for every document it renders: half of an evaluation's time, if the model
# is small.
utils.env.from_string = lru_cache(utils.env.from_string)

# vLLM makes its own batches, the better the more it knows; a kill loses no more than so many answers.
VLLM_BATCH = 1024


class Encoder:
    """Texts as token ids; each is tokenised once, however many requests and models it is put to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin with nothing."""
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text alone: a chat template gives the special tokens, so the tokenizer must add none."""
        self.prepare([text])
        return self._known[text]

    def prepare(self, texts: Iterable[str]) -> None:
        """Tokenise what is new, together."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            ids = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            self._known.update(zip(new, ids, strict=True))


class Scorer(Protocol):
    """How an engine scores options."""

    def batches(self, pairs: Sequence[Pair], batch_size: int) -> Sequence[Any]:
        """Gather requests into batches, whose `numbers` are the indices of those that they answer, in order."""

    def score(self, batch: Any) -> list[Scored]:  # noqa: ANN401  # a batch of its own making
        """Answer a batch."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """Scores and continues texts with a model that is in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        *,
        engine: Engine = "packed",
        answers: AnswerCache | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """Wrap a model; every process holds all of it.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer.
            batch_size: contexts per forward pass and process.
            engine: what computes the answers.
            answers: what this model has answered before.
            encoder: what other models have had tokenised.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.lm = _of_the_harness(model, tokenizer, batch_size, engine)
        self.batch_size = VLLM_BATCH if engine == "vllm" else batch_size
        self.scorer: Scorer = (
            PackedScorer(model, int(tokenizer.pad_token_id or 0))
            if engine == "packed"
            else _HarnessScorer(self.lm)
        )
        self.answers = answers or AnswerCache()
        self.encoder = encoder or Encoder(tokenizer)
        self.description = "requests"

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.lm.eot_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without a context."""
        return int(self.lm.prefix_token_id)

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return int(self.lm.max_length)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under."""
        return str(self.lm.tokenizer_name)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, as the harness's own commands ask for it."""
        return str(self.lm.apply_chat_template(chat_history, add_generation_prompt))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,  # noqa: ANN401  # the harness's
    ) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.encoder(string)

    def answer(
        self, request_type: str, requests: Sequence[Instance], description: str
    ) -> list[Any]:
        """Answer requests of one of the harness's types, in order, under a labelled progress bar."""
        self.description = description
        answers: list[Any] = getattr(self, request_type)(list(requests))
        return answers

    def log_probabilities(self, pairs: Sequence[tuple[str, str]], description: str) -> list[float]:
        """Log-probability, in nats, of each answer behind its context."""
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        return [logp for logp, _ in self.answer("loglikelihood", requests, description)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """Log-probability of each answer, and whether greedy decoding would give it.

        Raises:
            InputError: if an answer is empty, or longer than the model can read.
        """
        self.encoder.prepare(text for request in requests for text in request.args)
        for request in requests:
            if not self.encoder(request.args[1]):
                raise InputError(
                    f"a benchmark has an empty option behind {request.args[0][-60:]!r}, which has no probability; "
                    "correct the task's doc_to_choice or its data"
                )
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,
    ) -> list[float]:
        """Log-probability of each text from its first token on, in windows as long as the model can read."""
        self.encoder.prepare(request.args[0] for request in requests)
        windows, counts = [], []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                self.encoder(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scored = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encoder(context), self.encoder(continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        **_: Any,  # noqa: ANN401  # the harness's
    ) -> list[Scored]:
        pairs = [self._fitted(context, answer) for _, context, answer in requests]
        batches = self.scorer.batches(pairs, self.batch_size)
        answers = self.answers.answer(
            [["loglikelihood", *pair] for pair in pairs],
            [batch.numbers for batch in batches],
            lambda index: self.scorer.score(batches[index]),
            self.description,
        )
        return [(logp, is_greedy) for logp, is_greedy in answers]

    def _fitted(self, context: list[int], answer: list[int]) -> Pair:
        """Cut a question from the left where question and answer are too long for the model."""
        room = self.max_length + 1 - len(answer)
        if room < 1:
            raise InputError(
                f"an answer of {len(answer)} tokens does not fit into the model's {self.max_length}; choose a task "
                "with shorter answers"
            )
        return tuple(context[-room:]), tuple(answer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context greedily until the model ends or one of the request's stops appears."""
        self.encoder.prepare(request.args[0] for request in requests)
        lengths = [len(self.encoder(request.args[0])) for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        order = sorted(
            range(len(requests)), key=lambda i: (settings[i], lengths[i], requests[i].args[0])
        )
        groups: list[list[int]] = []
        for index in order:
            if (
                not groups
                or len(groups[-1]) == self.batch_size
                or settings[groups[-1][0]] != settings[index]
            ):
                groups.append([])
            groups[-1].append(index)

        def work(index: int) -> list[str]:
            room = self.max_length - max(lengths[number] for number in groups[index])
            batch = [_with_room(requests[number], room) for number in groups[index]]
            texts: list[str] = self.lm.generate_until(batch, disable_tqdm=True)
            return texts

        asked = [["generate_until", *request.args] for request in requests]
        return self.answers.answer(asked, groups, work, self.description)


@dataclass(frozen=True)
class _Requests:
    """Requests as the harness's own classes take them."""

    numbers: list[int]
    pairs: list[Pair]


class _HarnessScorer:
    """Scores options with one of the harness's own classes."""

    def __init__(self, lm: Any) -> None:  # noqa: ANN401  # the harness is untyped
        self.lm = lm

    def batches(self, pairs: Sequence[Pair], batch_size: int) -> list[_Requests]:
        # The harness reads what differs in the last token alone (letters behind one question) as one row.
        rows: dict[Ids, list[int]] = {}
        for number, (context, answer) in enumerate(pairs):
            rows.setdefault((*context, *answer[:-1]), []).append(number)
        ordered = sorted(rows, key=lambda row: (len(row), row))
        groups = [
            ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)
        ]
        by_group = [[number for row in group for number in rows[row]] for group in groups]
        return [_Requests(group, [pairs[number] for number in group]) for group in by_group]

    def score(self, batch: _Requests) -> list[Scored]:
        requests = [(None, list(context), list(answer)) for context, answer in batch.pairs]
        scored: list[Scored] = self.lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return scored


# Starting vLLM takes a minute: one for all tasks of a model.
_vllm: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()


def _of_the_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, engine: Engine
) -> Any:  # noqa: ANN401  # the harness is untyped
    """The harness's own view of a model."""
    if engine != "vllm":
        return HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False
        )
    if model not in _vllm:
        from lm_eval.models.vllm_causallms import VLLM  # noqa: PLC0415  # where it is installed

        with tempfile.TemporaryDirectory() as folder:  # vLLM reads models from the disk
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _vllm[model] = VLLM(
                folder, dtype=str(model.dtype).removeprefix("torch."), add_bos_token=False
            )
    return _vllm[model]


def _with_room(request: Instance, room: int) -> Instance:
    """A copy of a generation request that asks for no more tokens than the model has room for."""
    context, settings = request.args
    wanted = int(settings.get("max_gen_toks", 256))
    if room < 1:
        raise InputError(
            "a benchmark question leaves the model no room for an answer; choose a task with shorter questions, or "
            "fewer examples (num_fewshot)"
        )
    fitted = {**settings, "max_gen_toks": min(wanted, room - 1) if room > 1 else 1}
    return Instance(request.request_type, request.doc, (context, fitted), request.idx)
