"""A conversation with one model: its turns so far, and its next answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat import Messages
from common.errors import InputError
from common.generation import continue_rows
from common.model import load_tokenizer
from common.recipe import load_recipe
from eval.items import MODELS, ModelName
from eval.subjects import load_subject

# What a run has to hold for a model to answer.
NEEDED: Mapping[ModelName, tuple[str, ...]] = {
    "original": (),
    "abliterated": ("abliteration",),
    "healed": ("abliteration", "train"),
}


@dataclass
class Conversation:
    """What was said to a model and by it.

    Attributes:
        name: which of the three it is.
        model: its weights.
        tokenizer: with the chat template.
        system: words in front of everything; None for none.
        turns: of the user and of the model.
    """

    name: ModelName
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    turns: Messages = field(default_factory=list)

    def answer(self, words: str, max_new_tokens: int) -> str:
        """Say something, and take the greedy answer into the conversation.

        Raises:
            InputError: if the conversation has grown beyond what the model reads; it is then as it was before.
        """
        turns = [*self.turns, {"role": "user", "content": words}]
        ids = self.tokenizer(self._render(turns), add_special_tokens=False)["input_ids"]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + max_new_tokens > context:
            raise InputError(
                f"the conversation with the {self.name} model has {len(ids)} tokens, and with an answer of "
                f"{max_new_tokens} more than the {context} it reads; /reset begins a new one"
            )
        (row,) = continue_rows(self.model, self.tokenizer, [ids], max_new_tokens=max_new_tokens)
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
        self.turns = [*turns, {"role": "assistant", "content": text}]
        return text

    def _render(self, turns: Messages) -> str:
        """The conversation and the opening of an answer; a system's words stand in the first turn where need be."""
        if self.system is None:
            return self._apply(turns)
        try:
            text = self._apply([{"role": "system", "content": self.system}, *turns])
        except jinja2.TemplateError:  # the template takes no system role
            text = ""
        if self.system.strip() in text:
            return text
        first = f"{self.system}\n\n{turns[0]['content']}"
        return self._apply([{"role": "user", "content": first}, *turns[1:]])

    def _apply(self, turns: Messages) -> str:
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )


def load_conversations(run: Path, system: str | None = None) -> list[Conversation]:
    """The models that a run has finished, original first, each ready to be talked to.

    Args:
        run: folder of a run.
        system: words in front of everything.

    Raises:
        InputError: if it is no run folder, or a model cannot be read.
    """
    if not (run / "recipe.yaml").is_file():
        raise InputError(
            f"{run} holds no recipe.yaml, so it is no folder of a run; name one, as runs/NAME"
        )
    recipe = load_recipe(run / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
    # The manifest is written last: a stage without it is not finished.
    upstream = {
        stage: run / stage
        for stage in ("abliteration", "train")
        if (run / stage / "manifest.json").is_file()
    }
    return [
        Conversation(name, load_subject(name, recipe, upstream), tokenizer, system)
        for name in MODELS
        if set(NEEDED[name]) <= set(upstream)
    ]
