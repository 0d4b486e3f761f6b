"""What one search trial costs here, against the same trial done the plain way, on the same settings in the same run.

Plain: edit the weights, generate 100 tokens for 100 harmful prompts, take the next-token KL of 100 harmless ones, put
the weights back. Here: `abliteration.search`, which edits nothing: several trials share a forward pass.

    python benchmarks/trial.py runs/patient-model            # cost, and whether both rank the trials alike
    python benchmarks/trial.py --random                      # a random-weight Qwen2 of 100M parameters: cost alone
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abliteration import baseline, search
from abliteration.activations import collect
from abliteration.findings import Findings
from abliteration.openings import refusal_openings
from abliteration.prompt_sets import sample
from abliteration.selection import next_token_logits
from abliteration.stage import MAX_HARMLESS_PROMPTS, MAX_TRIAL_PROMPTS
from abliteration.trials import Trials
from common import chat
from common.architecture import find_writers
from common.divergence import kl_to_each
from common.edits import Edit, apply_to_weights
from common.model import load_model, load_tokenizer
from common.prompts import load_prompts
from common.recipe import PromptSource, SearchSelection
from common.refusal import is_refusal

PLAIN_PROMPTS, PLAIN_TOKENS, BATCH = 100, 100, 32
# The same search so many times, each followed by its share of the plain trials: a machine's speed changes in minutes.
ROUNDS = 3


MakeEdit = Callable[[Mapping[str, Any]], Edit]


@dataclass(frozen=True)
class Subject:
    """A model with the prompts that both ways read.

    Attributes:
        name: for the report.
        model: the model.
        tokenizer: its tokenizer.
        harmful: prompts that it refuses.
        harmless: prompts that it answers.
        openings: how refusals begin; None where the model's own answers tell.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    harmful: list[str]
    harmless: list[str]
    openings: list[tuple[int, ...]] | None = None


def main() -> None:
    """Time both ways on the same settings and print the ratios."""
    options = parse()
    torch.manual_seed(0)
    subject = random_qwen2() if options.random else patient(Path(options.model))
    settings = SearchSelection(
        name="search",
        num_trials=options.trials,
        trials_per_pass=options.together,
        edits=("orthogonalize", "projected", "column_norm", "row_norm"),
    )
    judged, space, make_edit = prepare(subject, settings)
    ours, theirs, trials, picked = [], [], [], []
    for part in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            journal = Path(folder) / "trials.jsonl"
            trials = search.search(judged, space, make_edit, [], settings, 0, journal)
            ours.append((time.perf_counter() - begin) / len(trials))
        picked = trials[:: max(1, len(trials) // options.plain)][: options.plain]
        _, seconds = time_plain(subject, picked[part::ROUNDS], make_edit, PLAIN_TOKENS)
        theirs.append(seconds)
    medians = [statistics.median(seconds) for seconds in (ours, theirs)]
    theirs_ended, ranks = medians[1], {}
    if not options.random:  # random weights end no answer, and rank nothing
        ended, theirs_ended = time_plain(subject, picked, make_edit, min_new_tokens=0)
        ranks = rank(subject, picked, ended, judged, make_edit)
    report(subject, judged, trials, *medians, theirs_ended, ranks)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="runs/patient-model")
    parser.add_argument("--random", action="store_true", help="a random-weight Qwen2 of 100M")
    parser.add_argument("--trials", type=int, default=96)
    together = SearchSelection(name="search").trials_per_pass
    parser.add_argument("--together", type=int, default=together, help="trials in one forward pass")
    parser.add_argument("--plain", type=int, default=16, help="how many are also done plainly")
    return parser.parse_args()


def read(folder: Path, name: str) -> list[str]:
    """Test prompts of the patient, the questions of all kinds mixed."""
    prompts = load_prompts(PromptSource(path=str(folder / "prompts" / f"{name}_test.jsonl")))
    return sample(prompts, len(prompts), seed=0)


def patient(folder: Path) -> Subject:
    """The trained patient; what both ways read was not tuned on."""
    kinds = [read(folder, kind) for kind in ("harmful", "harmless")]
    return Subject("the patient", load_model(folder), load_tokenizer(folder), *kinds)


def random_qwen2() -> Subject:
    """A model of a usual shape; its weights are random, so that only the cost is told."""
    folder = Path("runs/patient-model")
    tokenizer = load_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=32768,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=int(tokenizer.pad_token_id),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    kinds = [read(folder, kind) for kind in ("harmful", "harmless")]
    return Subject(
        "a random Qwen2", model, tokenizer, *kinds, openings=[(token,) for token in range(20, 24)]
    )


def prepare(subject: Subject, settings: SearchSelection) -> tuple[Trials, search.Space, MakeEdit]:
    """Directions and trials, as stage one makes them."""
    model, tokenizer = subject.model, subject.tokenizer
    num_positions = chat.num_instruction_end_tokens(tokenizer)
    target, harmless = (
        collect(model, tokenizer, part[:128], num_positions=num_positions, batch_size=BATCH).mean
        for part in (subject.harmful, subject.harmless)
    )
    findings = Findings((target - harmless).unsqueeze(-2), harmless, target)
    judged = Trials(
        model,
        tokenizer,
        harmful=subject.harmful[-MAX_TRIAL_PROMPTS:],
        openings=subject.openings or learn_openings(subject),
        harmless=subject.harmless[-MAX_HARMLESS_PROMPTS:],
        max_answer_tokens=settings.answer_tokens,
        batch_size=BATCH * settings.trials_per_pass,
    )
    writers = find_writers(model)
    depth = model.config.num_hidden_layers
    space = search.Space((1.0, depth - 1.0), num_positions, depth, settings.edits, embedding=True)

    def make_edit(params: Mapping[str, Any]) -> Edit:
        kind = importlib.import_module(f"abliteration.edits.{params['edit']}")
        direction = findings.at(params["layer"], params["position"])
        edit: Edit = kind.build(direction, writers, search.edit_settings(params), {})
        return edit

    return judged, space, make_edit


def learn_openings(subject: Subject) -> list[tuple[int, ...]]:
    """How the model's own refusals begin."""
    answers = [
        answer
        for harmful, part in ((True, subject.harmful), (False, subject.harmless))
        for answer in baseline.answer_baseline(
            subject.model, subject.tokenizer, part[:96], harmful=harmful, batch_size=BATCH
        )
    ]
    return refusal_openings(answers)


def time_plain(
    subject: Subject,
    picked: Sequence[search.Trial],
    make_edit: MakeEdit,
    min_new_tokens: int,
) -> tuple[list[tuple[float, float]], float]:
    """Refusal rate and KL of each setting the plain way, and the seconds that one took."""
    prompts = subject.harmless[:PLAIN_PROMPTS]
    base = next_token_logits(subject.model, subject.tokenizer, prompts, PLAIN_PROMPTS)
    weights = {w.name: w.weight.detach().clone() for w in find_writers(subject.model)}
    begin = time.perf_counter()
    plain = [
        plain_trial(subject, make_edit(trial.params), base, weights, min_new_tokens)
        for trial in picked
    ]
    return plain, (time.perf_counter() - begin) / len(picked)


@torch.inference_mode()
def plain_trial(
    subject: Subject,
    edit: Edit,
    base: Tensor,
    weights: Mapping[str, Tensor],
    min_new_tokens: int,
) -> tuple[float, float]:
    """Edit the weights, generate, next-token KL, reset: refusal rate and KL."""
    apply_to_weights(subject.model, edit)
    pad_id = int(subject.tokenizer.pad_token_id)
    ids, mask = chat.pad_left(
        chat.encode(subject.tokenizer, subject.harmful[:PLAIN_PROMPTS]),
        pad_id,
        subject.model.device,
    )
    answers = subject.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=PLAIN_TOKENS,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
    )
    texts = subject.tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
    logits = next_token_logits(
        subject.model, subject.tokenizer, subject.harmless[:PLAIN_PROMPTS], PLAIN_PROMPTS
    )
    for writer in find_writers(subject.model):
        writer.weight.copy_(weights[writer.name])
    rate = sum(map(is_refusal, texts)) / len(texts)
    (divergence,) = kl_to_each(base, [logits])
    return rate, float(divergence.mean())


def rank(
    subject: Subject,
    picked: Sequence[search.Trial],
    plain: Sequence[tuple[float, float]],
    judged: Trials,
    make_edit: MakeEdit,
) -> dict[str, float]:
    """How alike both ways rank the same settings, every one of them measured to the end here too.

    Refusal below half of what a search allows counts as none, as in the search: a hundred prompts that are all answered
    do not tell a probability of 1e-3 from one of 1e-6.

    The next token's divergence is another quantity than that of whole answers, so ours is also held against whole
    answers to the prompts that the plain way reads.
    """
    edits = [make_edit(trial.params) for trial in picked]
    others = Trials(
        subject.model,
        subject.tokenizer,
        harmful=subject.harmful[:1],
        openings=judged.harmful[0].continuations,
        harmless=subject.harmless[:PLAIN_PROMPTS],
        max_answer_tokens=PLAIN_TOKENS,
        batch_size=PLAIN_PROMPTS,
    )
    divergence = judged.divergence(edits)
    none = SearchSelection(name="search").max_refusal / 2
    refusal = [max(sum(each) / len(each), none) for each in judged.refusal(edits)]
    rates, next_token = zip(*((max(rate, none), kl) for rate, kl in plain), strict=True)
    return {
        "spearman_refusal": float(spearmanr(refusal, rates).statistic),
        "spearman_kl_next_token": float(spearmanr(divergence, next_token).statistic),
        "spearman_kl_whole_answers": float(
            spearmanr(divergence, others.divergence(edits)).statistic
        ),
    }


def report(
    subject: Subject,
    judged: Trials,
    trials: Sequence[search.Trial],
    ours: float,
    theirs: float,
    theirs_ended: float,
    ranks: Mapping[str, float],
) -> None:
    """Print what was measured, and one line of JSON."""
    complete = sum(trial.complete for trial in trials)
    size = sum(parameter.numel() for parameter in subject.model.parameters()) / 1e6
    lengths = [len(row.prompt) for row in judged.harmful]
    shape = (
        f"{subject.name}, {size:.1f}M parameters, prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    print(shape)
    print(f"here:  {ours:.3f} s per trial; {complete} of {len(trials)} were measured to the end")
    print(
        f"plain: {theirs:.3f} s, {PLAIN_PROMPTS} prompts x {PLAIN_TOKENS} tokens: {theirs / ours:.1f} times"
    )
    print(
        f"       {theirs_ended:.3f} s where the model may end its answers: {theirs_ended / ours:.1f} times"
    )
    for name, value in ranks.items():
        print(f"{name}: {value:.3f}")
    row = {"shape": shape, "ratio": theirs / ours, "bar": 20, "here_s": ours, "plain_s": theirs}
    row |= {"plain_ended_s": theirs_ended, **ranks}
    print(json.dumps({"name": "trial", "rows": [row], "ratio": row["ratio"]}))


if __name__ == "__main__":
    main()
