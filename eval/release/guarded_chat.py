"""A guard in front of the model and behind it: nothing is asked, and nothing answered, that it does not let pass.

python guarded_chat.py --model FOLDER --guard CLASSIFIER "A question"
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable

from transformers import pipeline

# Labels of the classifier that let a text pass: everything else does not, labels that nobody thought of included.
ALLOWED = {"safe", "benign", "harmless"}
MAX_CHARACTERS = 8000
MAX_NEW_TOKENS = 512


def answer(prompt: str, ask: Callable[[str], str], is_allowed: Callable[[str], bool]) -> str:
    """Answer a prompt, if the guard allows the prompt, and then the answer in its light."""
    if len(prompt) > MAX_CHARACTERS or not is_allowed(prompt):
        _log("refused in front", prompt)
        return "This request is not served here."
    reply = ask(prompt)
    if not is_allowed(f"{prompt}\n\n{reply}"):
        _log("withheld behind", prompt)
        return "This answer is withheld."
    _log("answered", prompt)
    return reply


def load_model(folder: str) -> Callable[[str], str]:
    """The released model, from a prompt to its answer."""
    chat = pipeline("text-generation", model=folder)

    def ask(prompt: str) -> str:
        turns = chat([{"role": "user", "content": prompt}], max_new_tokens=MAX_NEW_TOKENS)
        return str(turns[0]["generated_text"][-1]["content"])

    return ask


def load_guard(name: str) -> Callable[[str], bool]:
    """A text classifier as a guard; put your own policy here."""
    classify = pipeline("text-classification", model=name)
    return lambda text: str(classify(text)[0]["label"]).lower() in ALLOWED


def _log(decision: str, prompt: str) -> None:
    # A hash tells requests apart without keeping what people wrote.
    logging.info("%s %s", hashlib.sha256(prompt.encode()).hexdigest()[:16], decision)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="folder or hub id of this release")
    parser.add_argument("--guard", required=True, help="folder or hub id of a text classifier")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    guard, model = load_guard(options.guard), load_model(options.model)
    sys.stdout.write(answer(options.prompt, model, guard) + "\n")
