"""What one search trial costs here, against the same trial done the plain way, on the same settings in the same run.

Plain: edit the weights, generate 100 tokens for 100 harmful prompts, take the next-token KL of 100 harmless ones, put
the weights back. Here: `abliteration.search`, which edits nothing: several trials share a forward pass.

    python benchmarks/trial.py runs/patient-model            # cost, and whether both rank the trials alike
    python benchmarks/trial.py --random                      # a random-weight Qwen2 of 100M parameters: cost alone
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abliteration import baseline, search
from abliteration.activations import collect
from abliteration.findings import Findings
from abliteration.openings import refusal_openings
from abliteration.selection import next_token_logits
from abliteration.stage import MAX_TRIAL_PROMPTS, _kind
from abliteration.trials import Trials
from common import chat
from common.architecture import find_writers
from common.divergence import kl_divergence
from common.edits import apply_to_weights
from common.model import load_model, load_tokenizer
from common.prompts import load_prompts
from common.recipe import PromptSource, SearchSelection
from common.refusal import is_refusal

PLAIN_PROMPTS, PLAIN_TOKENS, BATCH = 100, 100, 32


def main() -> None:
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
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        trials = search.search(
            judged, space, make_edit, [], settings, 0, Path(folder) / "trials.jsonl"
        )
        ours = (time.perf_counter() - begin) / len(trials)
    begin = time.perf_counter()
    edits = [make_edit(trial.params) for trial in trials]
    for first in range(0, len(edits), options.together):
        judged.refusal(edits[first : first + options.together])
        judged.divergence(edits[first : first + options.together])
    unraced = (time.perf_counter() - begin) / len(trials)
    picked = trials[:: max(1, len(trials) // options.plain)][: options.plain]
    plain, theirs = time_plain(subject, picked, make_edit, min_new_tokens=PLAIN_TOKENS)
    ended, theirs_ended = time_plain(subject, picked, make_edit, min_new_tokens=0)
    report(subject, judged, trials, ours, unraced)
    print(
        f"plain: {theirs:.3f} s per trial over {len(plain)} of the same settings, 100 tokens each"
    )
    print(f"       {theirs_ended:.3f} s where the model may end its answers")
    print(f"ratio: {theirs / ours:.1f}; {theirs_ended / ours:.1f} where it may end its answers")
    print(f"       {theirs / unraced:.1f} without the race")
    if not options.random:
        rank(picked, ended, judged, make_edit)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="runs/patient-model")
    parser.add_argument("--random", action="store_true", help="a random-weight Qwen2 of 100M")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--together", type=int, default=4, help="trials in one forward pass")
    parser.add_argument("--plain", type=int, default=16, help="how many are also done plainly")
    return parser.parse_args()


class Subject:
    """A model with the prompts that both ways read."""

    def __init__(self, name, model, tokenizer, harmful, harmless, openings=None):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.harmful, self.harmless, self.openings = harmful, harmless, openings
        self.plain_harmful = harmful[:PLAIN_PROMPTS]
        self.plain_harmless = harmless[:PLAIN_PROMPTS]
        self.base = next_token_logits(model, tokenizer, self.plain_harmless, BATCH)
        self.weights = {
            writer.name: copy.deepcopy(writer.weight.detach()) for writer in find_writers(model)
        }


def patient(folder: Path) -> Subject:
    def read(name: str) -> list[str]:
        return load_prompts(PromptSource(path=str(folder / "prompts" / f"{name}.jsonl")))

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    # Estimation, trials and the plain way read the validation prompts: the cost is the point, and the ranking.
    return Subject(
        "the patient",
        model,
        tokenizer,
        read("harmful_validation") * 3,
        read("harmless_validation") * 3,
    )


def random_qwen2() -> Subject:
    tokenizer = load_tokenizer("runs/patient-model")
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
    folder = Path("runs/patient-model/prompts")
    harmful = load_prompts(PromptSource(path=str(folder / "harmful_train.jsonl")))
    harmless = load_prompts(PromptSource(path=str(folder / "harmless_train.jsonl")))
    openings = [(index,) for index in range(20, 24)]
    return Subject("a random Qwen2", model, tokenizer, harmful, harmless, openings)


def prepare(subject: Subject, settings: SearchSelection):
    """Directions and trials, as stage one makes them."""
    model, tokenizer = subject.model, subject.tokenizer
    num_positions = chat.num_instruction_end_tokens(tokenizer)
    means = [
        collect(model, tokenizer, part, num_positions=num_positions, batch_size=BATCH).mean
        for part in (subject.harmful[:128], subject.harmless[:128])
    ]
    findings = Findings((means[0] - means[1]).unsqueeze(-2), means[1], means[0])
    openings = subject.openings
    if openings is None:
        answers = [
            answer
            for harmful, part in ((True, subject.harmful[:96]), (False, subject.harmless[:96]))
            for answer in baseline.answer_baseline(
                model, tokenizer, part, harmful=harmful, batch_size=BATCH
            )
        ]
        openings = refusal_openings(answers)
    judged = Trials(
        model,
        tokenizer,
        harmful=subject.harmful[:MAX_TRIAL_PROMPTS],
        openings=openings,
        harmless=subject.harmless[:MAX_TRIAL_PROMPTS],
        max_answer_tokens=settings.answer_tokens,
        batch_size=BATCH * settings.trials_per_pass,
    )
    writers = find_writers(model)
    depth = model.config.num_hidden_layers
    space = search.Space((1.0, int(0.8 * depth) - 1.0), num_positions, depth, settings.edits, True)

    def make_edit(params):
        direction = findings.at(params["layer"], params["position"])
        return _kind(search.edit_settings(params), direction, writers, {})

    return judged, space, make_edit


def time_plain(subject: Subject, picked, make_edit, min_new_tokens: int):
    begin = time.perf_counter()
    plain = [plain_trial(subject, make_edit(trial.params), min_new_tokens) for trial in picked]
    return plain, (time.perf_counter() - begin) / len(picked)


@torch.inference_mode()
def plain_trial(subject: Subject, edit, min_new_tokens: int) -> tuple[float, float]:
    """Edit the weights, generate, first-token KL, reset: refusal rate and KL."""
    apply_to_weights(subject.model, edit)
    pad_id = int(subject.tokenizer.pad_token_id)
    ids, mask = chat.pad_left(
        chat.encode(subject.tokenizer, subject.plain_harmful), pad_id, subject.model.device
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
        subject.model, subject.tokenizer, subject.plain_harmless, PLAIN_PROMPTS
    )
    with torch.no_grad():
        for writer in find_writers(subject.model):
            writer.weight.copy_(subject.weights[writer.name])
    rate = sum(map(is_refusal, texts)) / len(texts)
    return rate, float(kl_divergence(subject.base, logits, torch.float32).mean())


def report(subject, judged, trials, ours, unraced) -> None:
    complete = sum(trial.complete for trial in trials)
    size = sum(parameter.numel() for parameter in subject.model.parameters()) / 1e6
    lengths = [len(row.prompt) for row in judged.harmful]
    print(
        f"{subject.name}, {size:.1f}M parameters, prompts of {min(lengths)} to {max(lengths)} "
        f"tokens, {torch.get_num_threads()} threads"
    )
    print(
        f"here:  {ours:.3f} s per trial over {len(trials)} trials, {complete} of them measured to "
        f"the end; {unraced:.3f} s where every trial is"
    )


def rank(picked, plain, judged, make_edit) -> None:
    """Whether both ways rank the same settings alike, every one of them measured to the end."""
    edits = [make_edit(trial.params) for trial in picked]
    refusal = [sum(each) / len(each) for each in judged.refusal(edits)]
    divergence = judged.divergence(edits)
    rates, first_token = zip(*plain, strict=True)
    for name, ours, theirs in (
        ("refusal", refusal, rates),
        ("divergence (whole answers here, next token plainly)", divergence, first_token),
    ):
        print(f"{name}: Spearman {spearmanr(ours, theirs).statistic:.3f}, n = {len(picked)}")


if __name__ == "__main__":
    main()
