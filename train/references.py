"""Log-probabilities under the reference, on disk: computed once per model and pair, whoever asks first.

A folder belongs to one model and to all else that the numbers depend on besides the pair. Each file in it holds some
pairs, is named by them and appears whole, so that trials, processes and machines share the folder without a lock.
Nothing of the training itself (learning rate, beta, rank, seed, output folder) is in a name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import artifacts

Logps = tuple[float, float]


@dataclass(frozen=True)
class References:
    """The folder of one reference.

    Attributes:
        folder: made when something is added.
    """

    folder: Path

    def read(self) -> dict[str, Logps]:
        """All that is known: by the pair's key the log-probabilities of chosen and rejected, in nats."""
        return {
            row["pair"]: (row["chosen"], row["rejected"])
            for path in sorted(self.folder.glob("*.jsonl"))
            for row in artifacts.read_jsonl(path)
        }

    def add(self, found: Mapping[str, Logps]) -> None:
        """Keep what was computed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"pair": key, "chosen": chosen, "rejected": rejected}
            for key, (chosen, rejected) in sorted(found.items())
        ]
        name = artifacts.hash_data(sorted(found))[:24]
        artifacts.write_jsonl(self.folder / f"{name}.jsonl", rows)


def token_rows(
    row: Mapping[str, Sequence[int]], max_length: int | None, truncation_mode: str
) -> list[list[int]]:
    """The two rows of a tokenized pair as training reads them, cut as trl's collator cuts them."""
    end = truncation_mode == "keep_end" and max_length is not None
    cut = slice(-(max_length or 0), None) if end else slice(None, max_length)
    return [[*row["prompt_ids"], *row[answer]][cut] for answer in ("chosen_ids", "rejected_ids")]


def pair_key(row: Mapping[str, Sequence[int]], max_length: int | None, truncation_mode: str) -> str:
    """The name of a pair: its tokens as training reads them, and how many of them are the prompt."""
    return artifacts.hash_data(
        [token_rows(row, max_length, truncation_mode), len(row["prompt_ids"])]
    )
