"""Answers are the model's own: greedy is the argmax, a sample is a draw, and batches do not matter.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_generation.py
"""

import copy

import pytest
import scipy.stats
import torch

from common import chat
from common.generation import GumbelSampling, end_tokens, generate

PROMPTS = ["a", "How do I do it?", "the other thing", "x y z", "Tell me more about the rest of it."]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=3)


def _greedy_by_hand(model, tokenizer, prompt, ends):
    """One token after the other on the bare, unpadded prompt, without a cache."""
    ids = chat.encode(tokenizer, [prompt])[0]
    answer = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


def _answers(model, tokenizer, prompts=PROMPTS, **settings):
    defaults = {"max_new_tokens": NEW_TOKENS, "batch_size": 2}
    return generate(model, tokenizer, prompts, **{**defaults, **settings})


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_are_the_argmax_one_token_at_a_time(
    family, batch_size, build_model, tokenizer
):
    model = build_model(family, seed=3)
    ends = end_tokens(model, tokenizer)
    expected = [_greedy_by_hand(model, tokenizer, prompt, ends) for prompt in PROMPTS]
    assert _answers(model, tokenizer, batch_size=batch_size) == expected
    assert len({tuple(answer) for answer in expected}) > 1, "all answers alike prove nothing"


def test_the_checkpoints_own_generation_settings_do_not_bend_the_answers(model, tokenizer):
    bent = copy.deepcopy(model)
    bent.generation_config.update(
        do_sample=True, temperature=0.3, top_k=2, top_p=0.5, repetition_penalty=1.8
    )
    bent.generation_config.no_repeat_ngram_size = 1
    assert _answers(bent, tokenizer) == _answers(model, tokenizer)
    sampled = {"temperature": 1.0, "seed": 5}
    assert _answers(bent, tokenizer, **sampled) == _answers(model, tokenizer, **sampled)


def test_an_answer_stops_before_its_end_token(model, tokenizer):
    full = _answers(model, tokenizer, ["a"])[0]
    ended = copy.deepcopy(model)
    ended.generation_config.eos_token_id = [full[4], tokenizer.eos_token_id]
    assert _answers(ended, tokenizer, ["a"])[0] == full[: full.index(full[4])]
    # In a batch the row that ends first is filled up, and nothing of that is left.
    batch = _answers(ended, tokenizer, ["a", *PROMPTS], batch_size=6)
    assert batch[0] == full[: full.index(full[4])]


def test_the_end_tokens_are_the_models_and_the_tokenizers(model, tokenizer):
    changed = copy.deepcopy(model)
    changed.generation_config.eos_token_id = [7, 9]
    assert end_tokens(changed, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})
    changed.generation_config.eos_token_id = None
    assert end_tokens(changed, tokenizer) == [tokenizer.eos_token_id]


def test_answers_have_at_most_the_wanted_number_of_tokens(model, tokenizer):
    assert all(len(answer) <= 3 for answer in _answers(model, tokenizer, max_new_tokens=3))


def test_no_prompts_give_no_answers(model, tokenizer):
    assert _answers(model, tokenizer, []) == []


def test_a_sample_depends_on_its_prompt_and_the_seed_alone(model, tokenizer):
    def sample(prompts, batch_size, seed=0):
        answers = _answers(
            model, tokenizer, prompts, batch_size=batch_size, temperature=1.0, seed=seed
        )
        return dict(zip(prompts, answers, strict=True))

    alone = sample(PROMPTS, 1)
    assert sample(PROMPTS, 5) == alone
    assert sample(PROMPTS[::-1], 3) == alone
    assert sample(PROMPTS[2:4], 2) == {prompt: alone[prompt] for prompt in PROMPTS[2:4]}
    assert sample(PROMPTS, 1, seed=1) != alone
    assert len({tuple(answer) for answer in alone.values()}) == len(PROMPTS)


def test_sampling_does_not_depend_on_the_global_random_state(model, tokenizer):
    torch.manual_seed(1)
    first = _answers(model, tokenizer, temperature=1.0)
    torch.manual_seed(2)
    assert _answers(model, tokenizer, temperature=1.0) == first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_come_as_often_as_softmax_says(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, float("-inf")])
    draws = 4000
    sampling = GumbelSampling(temperature, 1.0, list(range(draws)))
    tokens = sampling(torch.zeros(draws, 1), logits.expand(draws, -1)).argmax(dim=-1)
    counts = torch.bincount(tokens, minlength=6)
    expected = torch.softmax(logits / temperature, dim=-1) * draws
    assert counts[5] == 0
    # A right sampler fails once in ten thousand seeds, and these are fixed.
    assert (
        scipy.stats.chisquare(
            counts[:5], expected[:5].double() * (draws / expected[:5].double().sum())
        ).pvalue
        > 1e-4
    )
    wrong = torch.softmax(logits[:5] / (1.5 * temperature), dim=-1).double()
    assert scipy.stats.chisquare(counts[:5], wrong / wrong.sum() * draws).pvalue < 1e-4


def test_one_stream_draws_anew_at_every_position():
    sampling = GumbelSampling(1.0, 1.0, [0])
    logits = torch.zeros(1, 4)
    tokens = [int(sampling(torch.zeros(1, 1), logits).argmax()) for _ in range(2000)]
    counts = torch.bincount(torch.tensor(tokens), minlength=4)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_first_tokens_of_samples_come_as_often_as_the_model_says(model, tokenizer):
    prompt = "a"
    with torch.no_grad():
        logits = model(torch.tensor(chat.encode(tokenizer, [prompt]))).logits[0, -1].float()
    temperature = 0.4
    probabilities = torch.softmax(logits / temperature, dim=-1).double()
    likely = int(probabilities.argmax())
    share = float(probabilities[likely])
    ends = end_tokens(model, tokenizer)
    assert likely not in ends
    assert 0.02 < share < 0.9
    draws = 150
    hits = 0
    for seed in range(draws):
        answer = generate(
            model,
            tokenizer,
            [prompt],
            max_new_tokens=1,
            batch_size=1,
            temperature=temperature,
            seed=seed,
        )[0]
        hits += answer == [likely]
    assert scipy.stats.binomtest(hits, draws, share).pvalue > 1e-4
