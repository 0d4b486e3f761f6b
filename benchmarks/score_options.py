"""Options scored in packed rows, against lm-eval's own HFLM on the same items and model, in turns.

OMP_NUM_THREADS=1 python benchmarks/score_options.py

A random Llama of width 256, 6 layers and 32k tokens scores items of four options: texts of 3 to 14 tokens behind
contexts of 40 to 120, zero-shot and behind the same 400 tokens of examples, and letters. Either way is handed texts,
and its own tokenising is timed with the rest. Sums of log-probabilities are held equal to 1e-4 nats, and greedy
verdicts are held equal. Time is the CPU time of the process. The last line is one JSON object.
"""

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402  # a script's own folder comes first on the path
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.comparison import in_turns, number_words  # noqa: E402
from eval.harness import HarnessModel  # noqa: E402

VOCABULARY = 32_000
ITEMS, OPTIONS, BATCH, REPEATS = 20, 4, 10, 3
LETTERS = ("10", "11", "12", "13")
# By options and tokens of the examples in front: how many times faster the packed engine has to be.
SHAPES = {("texts", 0): 4.0, ("texts", 400): 12.0, ("letters", 0): 1.0, ("letters", 400): 1.0}


def main() -> None:
    """Print every shape's times, then the JSON line."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        )
    ).eval()
    rows = [compare(model, kind, shots, bar) for (kind, shots), bar in SHAPES.items()]
    print(json.dumps({"name": "score_options", "rows": rows, "ratio": rows[0]["ratio"]}))


def compare(model: LlamaForCausalLM, kind: str, shots: int, bar: float) -> dict[str, Any]:
    """Median seconds of both for one set of items, in turns."""
    words = number_words(VOCABULARY)
    asked = requests(kind, shots)

    def packed() -> list[tuple[float, bool]]:
        return HarnessModel(model, words, BATCH).loglikelihood(asked, disable_tqdm=True)

    def hflm() -> list[tuple[float, bool]]:
        theirs = HFLM(pretrained=model, tokenizer=words, batch_size=BATCH, add_bos_token=False)
        return theirs.loglikelihood(asked, disable_tqdm=True)

    found, taken = in_turns({"packed": packed, "hflm": hflm}, REPEATS)
    pairs = list(zip(found["packed"][-1], found["hflm"][-1], strict=True))
    distance = max(abs(mine - theirs) for (mine, _), (theirs, _) in pairs)
    assert distance < 1e-4, distance
    assert all(mine == theirs for (_, mine), (_, theirs) in pairs)
    options = "letters" if kind == "letters" else "options of 3 to 14 tokens"
    shape = (
        f"Llama 256 x 6, 32k tokens; {ITEMS} items, {OPTIONS} {options}, context 40 to 120, {shots} tokens of "
        f"examples, batch {BATCH}; float32, {torch.get_num_threads()} threads"
    )
    ratio = taken["hflm"] / taken["packed"]
    print(
        f"{shape}\n  packed {taken['packed']:.2f} s, HFLM {taken['hflm']:.2f} s: {ratio:.2f}x, "
        f"largest difference {distance:.1e} nats"
    )
    return {
        "shape": shape,
        "ratio": round(ratio, 3),
        "bar": bar,
        "seconds": {way: round(value, 4) for way, value in taken.items()},
        "largest_difference": distance,
    }


def requests(kind: str, shots: int) -> list[Instance]:
    """Random words, a token each."""
    rng = random.Random(0)

    def draw(tokens: int) -> str:
        return "".join(f" {rng.randrange(20, VOCABULARY)}" for _ in range(tokens))

    examples = draw(shots)
    asked = []
    for item in range(ITEMS):
        context = examples + draw(rng.randint(40, 120))
        texts = [f" {letter}" for letter in LETTERS]
        if kind == "texts":
            texts = [draw(rng.randint(3, 14)) for _ in range(OPTIONS)]
        asked += [Instance("loglikelihood", {}, (context, text), item) for text in texts]
    return asked


if __name__ == "__main__":
    main()
