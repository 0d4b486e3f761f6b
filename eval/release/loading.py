"""How a release is loaded, by its form, as Python for its card; and the guard example that begins with it."""

from pathlib import Path
from typing import Literal

EXAMPLE = Path(__file__).with_name("guarded_chat.py")
_LOADED = '    chat = pipeline("text-generation", model=folder)\n'

# weights: transformers' own loading is enough. hooked: the weights with additions that no weight holds. adapters: two
# adapters over the base. edited: an adapter over the base, which has to be edited first.
Loading = Literal["weights", "hooked", "adapters", "edited"]


def lines(loading: Loading, base: str, task: str) -> str:
    """Python that makes `chat`, a pipeline of transformers, out of `folder`."""
    joined = f'chat = pipeline("{task}", model=model, tokenizer=tokenizer)'
    if loading == "weights":
        return f'chat = pipeline("{task}", model=folder)'
    if loading == "hooked":
        return (
            "from common.model import load_model, load_tokenizer  # in the folder that holds train/run.py\n\n"
            f"model, tokenizer = load_model(folder), load_tokenizer(folder)\n{joined}"
        )
    auto = "AutoModelForCausalLM" if task == "text-generation" else "AutoModelForImageTextToText"
    start = (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )
    if loading == "adapters":
        return (
            f'{start}model = {auto}.from_pretrained("{base}")\n'
            'edit = PeftModel.from_pretrained(model, folder, subfolder="edit_adapter")\n'
            'model = PeftModel.from_pretrained(edit.merge_and_unload(), folder, subfolder="adapter")\n'
            f"{joined}"
        )
    return (
        f"# First: python -m abliteration apply --model {base} --edit edit.safetensors --output edited\n"
        f'{start}model = {auto}.from_pretrained("edited")\n'
        'model = PeftModel.from_pretrained(model, folder, subfolder="adapter")\n'
        f"{joined}"
    )


def guard_example(loading: Loading, base: str, task: str) -> str:
    """A program that asks the release with a guard in front and behind."""
    text = EXAMPLE.read_text(encoding="utf-8")
    assert _LOADED in text
    own = "".join(
        f"    {line}\n" if line else "\n" for line in lines(loading, base, task).splitlines()
    )
    return text.replace(_LOADED, own)
