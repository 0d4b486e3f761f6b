"""What the two teachers say, on disk: made once for all trainings, whoever asks first.

A file is named by all that its content depends on: the model that says it (weights, configuration, tokenizer and
template), what it is asked, and the settings of its answers. Nothing of the training itself (learning rate, beta, rank,
loss, output folder) is in a name. Each file appears whole, so that trials, processes and machines share the folder
without a lock: two that make the same file at once make it twice, and the second takes the place of the first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, distributed
from common.generation import generate
from common.model import identity_files, resolve, tokenizer_files
from common.recipe import Recipe

Teacher = Literal["original", "abliterated"]
TEACHERS: tuple[Teacher, ...] = ("original", "abliterated")


@dataclass(frozen=True)
class Piece:
    """A file that one of the models makes.

    Attributes:
        path: where it lies.
        teacher: the model that makes it.
        make: writes it on the main process; called on every process.
        is_last: made when all others are there, which it reads.
    """

    path: Path
    teacher: Teacher
    make: Callable[[PreTrainedModel], None]
    is_last: bool = False


@dataclass(frozen=True)
class Shelf:
    """The folder, and who the teachers are.

    Attributes:
        folder: made when something is added.
        models: by content, see `shelf_of`.
        tokenizer: of both.
    """

    folder: Path
    models: Mapping[Teacher, str]
    tokenizer: PreTrainedTokenizerBase

    def path(
        self, name: str, teacher: Teacher, depends: Mapping[str, object], suffix: str = ""
    ) -> Path:
        """Where something lies that a teacher says.

        Args:
            name: of its kind.
            teacher: who says it.
            depends: all that it depends on besides the teacher, as plain data.
            suffix: of the file; none for a folder.
        """
        key = artifacts.hash_data({"model": self.models[teacher], **depends})
        return self.folder / name / f"{key[:24]}{suffix}"


def shelf_of(recipe: Recipe, ablated: Path, tokenizer: PreTrainedTokenizerBase) -> Shelf:
    """The shelf of a recipe's two models, in its store.

    Args:
        recipe: its `model` and `output_dir`.
        ablated: folder of the abliterated model.
        tokenizer: of that folder, which renders the prompts for both.
    """
    store = artifacts.Store(Path(recipe.output_dir))
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    files: dict[Teacher, list[Path]] = {
        "original": [*identity_files(base), *tokenizer_files(ablated)],
        "abliterated": identity_files(ablated),
    }
    models: dict[Teacher, str] = {}
    for teacher, own in files.items():
        content = distributed.broadcast(store.hash_of_files(own) if distributed.is_main() else "")
        models[teacher] = artifacts.hash_data([content, recipe.model.dtype])
    return Shelf(store.root, models, tokenizer)


class Answers:
    """A teacher's greedy answers to prompts.

    Whoever asks the same teacher the same prompts has the same file: sources, anchors and quick evaluations.
    """

    def __init__(
        self,
        shelf: Shelf,
        teacher: Teacher,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Name the file.

        Args:
            shelf: where it lies.
            teacher: who answers.
            prompts: the user's turns.
            max_new_tokens: where an answer is cut if the model does not end it.
            batch_size: prompts per forward pass and process.
        """
        self.shelf, self.teacher, self.prompts = shelf, teacher, prompts
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.depends = {"prompts": list(prompts), "max_new_tokens": max_new_tokens}
        self.path = shelf.path("answers", teacher, self.depends, ".jsonl")
        self.piece = Piece(self.path, teacher, self._make)

    def ids(self) -> list[list[int]]:
        """Token ids without the end token [prompts][answer]."""
        return [row["tokens"] for row in artifacts.read_jsonl(self.path)]

    def texts(self) -> list[str]:
        """The answers' texts."""
        return decoded(self.shelf.tokenizer, self.ids())

    def _make(self, model: PreTrainedModel) -> None:
        ids = generate(
            model,
            self.shelf.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            description=f"answers of the {self.teacher} model",
        )
        if distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_jsonl(self.path, [{"tokens": answer} for answer in ids])


def decoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Answers as texts."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in rows]
