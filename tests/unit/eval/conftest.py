"""A byte-level tokenizer with a chat template, tiny models with random weights, task files, and a release."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from common import distributed
from common.recipe import Recipe
from tests.editing import edit_of
from tests.releasing import about, make_healed, make_upstream, write_release

# It ends in a newline, like ChatML's, so that the harness's newline trap is set.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, besides the template's marks and a merge across the template's last newline."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"
    vocabulary = {token: index for index, token in enumerate([*alphabet, newline + "a"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="left",
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def make_model(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[int], PreTrainedModel]:
    """Make a tiny Llama from a seed."""

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(byte_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=byte_tokenizer.eos_token_id,
            pad_token_id=byte_tokenizer.pad_token_id,
            bos_token_id=None,
        )
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task and a generation task, with their data beside them under relative names."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    letters = "abcdefghij"
    choices = [
        {
            "question": f"Which letter is {c}?",
            "options": ["a", "b b", c + " yes"],
            "answer": 2,
            "cluster": f"l{i // 2}",
        }
        for i, c in enumerate(letters)
    ]
    sums = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(12)]
    for name, rows in (("letters", choices), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        "letters.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: "
        "options\n"
        "doc_to_target: answer\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    (folder / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        "sums.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


@dataclass(frozen=True)
class Finished:
    """A recipe with the folders that the stages before the evaluation would have left for it."""

    recipe: Recipe
    upstream: dict[str, Path]


@pytest.fixture
def finish(
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
    make_model: Callable[[int], PreTrainedModel],
    task_folder: Path,
) -> Callable[..., Finished]:
    """Make a miniature model, edited and trained at random, with an adapter that has an effect."""

    def make(kind: str = "orthogonalize", **settings: Any) -> Finished:
        model = make_model(0)
        edit = edit_of(model, kind, about=about(kind, **settings), **settings)
        stages = make_healed(tmp_path, model, byte_tokenizer, edit)
        (stages["abliteration"] / "manifest.json").write_text('{"fingerprint": "f1"}')
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("How are you?\nWho are you?\nWhere?\n")
        return Finished(_recipe(tmp_path / "base", task_folder, prompts), stages)

    return make


@pytest.fixture
def finished(finish: Callable[..., Finished]) -> Finished:
    """The same with the direction removed everywhere."""
    return finish()


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play two processes one after the other: what each is dealt, and what is gathered."""

    def dealt(items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
        results: list[Any] = [None] * len(items)
        for process in range(2):
            results[process::2] = work(items[process::2])
        return results

    monkeypatch.setattr(distributed, "share", dealt)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[[int], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> tuple[Path, dict[str, Path]]:
    """A base, the folders of the stages upstream, and beside them a release, which no test may change."""
    folder = tmp_path_factory.mktemp("made")
    upstream = make_upstream(folder, make_model(0), byte_tokenizer)
    write_release(folder, upstream)
    return folder, upstream


@pytest.fixture
def release(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> Path:
    """A copy of that release, to spoil."""
    shutil.copytree(made[0] / "release", tmp_path / "release")
    return tmp_path / "release"


def _recipe(base: Path, tasks: Path, prompts: Path) -> Recipe:
    source = {"path": str(prompts)}
    other = {"path": str(prompts.with_name("other.txt"))}
    return Recipe.model_validate(
        {
            "name": "mini",
            "output_dir": str(base.with_name("runs")),
            "model": {"name_or_path": str(base), "dtype": "float32"},
            "abliteration": {"prompts": {"harmful": source, "harmless": other}},
            "train": {
                "preferences": [{"name": "on_policy", "prompts": source}],
                "anchors": [{"to": "original", "prompts": source}],
            },
            "eval": {
                "batch_size": 4,
                "benchmarks": [
                    {"name": "lm_eval", "tasks": ["letters", "sums"], "include_path": str(tasks)},
                    {
                        "name": "refusal",
                        "panel": "restricted",
                        "prompts": source,
                        "harmless": False,
                        "max_new_tokens": 5,
                    },
                    {
                        "name": "divergence",
                        "panel": "plain",
                        "prompts": source,
                        "max_new_tokens": 5,
                    },
                ],
                "accept": {"refusal[restricted].healed.value": {"max": 0.5}},
            },
        }
    )
