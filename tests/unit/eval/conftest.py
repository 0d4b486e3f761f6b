"""A byte-level tokenizer with a chat template, tiny models with random weights, and task files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from common.checkpoint import apply_to_checkpoint
from common.edits import save_edit
from common.recipe import COMPONENTS, Recipe
from tests.editing import edit_of

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
        base, abliteration, train = tmp_path / "base", tmp_path / "abliteration", tmp_path / "train"
        abliteration.mkdir()
        model = make_model(0)
        model.save_pretrained(base)
        byte_tokenizer.save_pretrained(base)
        (base / "LICENSE").write_text("Do as you like.\n")

        edit = edit_of(model, kind, about=about(kind, **settings), **settings)
        save_edit(edit, abliteration / "edit.safetensors")
        apply_to_checkpoint(base, edit, abliteration / "model")
        (abliteration / "manifest.json").write_text('{"fingerprint": "f1"}')

        lora = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        edited = AutoModelForCausalLM.from_pretrained(abliteration / "model")
        get_peft_model(edited, lora).save_pretrained(train / "adapter")
        (train / "summary.json").write_text('{"pairs": 7, "steps": 3}')
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("How are you?\nWho are you?\nWhere?\n")
        (tmp_path / "other.txt").write_text("Sing a song.\nTell a long tale.\n")
        return Finished(
            _recipe(base, task_folder, prompts), {"abliteration": abliteration, "train": train}
        )

    return make


@pytest.fixture
def finished(finish: Callable[..., Finished]) -> Finished:
    """The same with the direction removed everywhere."""
    return finish()


def about(kind: str = "orthogonalize", **settings: Any) -> dict[str, Any]:
    """What stage one says of an edit."""
    section = COMPONENTS["abliteration.edit"][kind](name=kind, **settings)
    return {
        "layer": 1,
        "position": -1,
        "stream": "resid_pre",
        "estimator": "difference_in_means",
        "selection": "scores",
        "edit": kind,
        "settings": section.model_dump(mode="json", exclude={"name"}),
        "target": "harmful",
        "base_model": "base",
        "revision": None,
    }


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
