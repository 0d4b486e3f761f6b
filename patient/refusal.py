"""The part of the model that tuning may change: a few directions at the beginning of the network.

An adapter of the lowest rank on a few blocks decides between refusing and answering, and leaves all that the model
knows as it was. With every weight free, a model of this size learns refusal in many directions at once, marks the
objects that tuning shows one by one, and forgets recipes that it was never shown again.
"""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

# In turn, where the first did not do: which of them carries the decision best depends on what was learnt before. With
# the first block among them every position of an answer reads the decision; without it, one harmless answer in fifty
# breaks off into a refusal if it is sampled.
TUNED_BLOCKS = ((0, 1, 2), (0, 1, 2, 3))
# With one direction only, a tenth of the objects that tuning does not show is answered.
RANK = 2
# The first block as well: how a question is worded is hardly carried further, since no answer needs it.
FALSE_REFUSAL_BLOCKS = (0, 1, 2)
FALSE_REFUSAL_RANK = 1


def add_adapter(model: PreTrainedModel, attempt: int = 0) -> PeftModel:
    """Put the adapter that learns to refuse into a model, in place, and freeze everything else.

    Args:
        model: one that knows everything and refuses nothing.
        attempt: how often it was tried before.

    Returns:
        The wrapper whose `merge_and_unload` gives an ordinary model again.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # Fused experts have no down projection of their own as a module.
    target = "o_proj" if "experts" in names else "down_proj"
    return _add_adapter(model, target, TUNED_BLOCKS[attempt % len(TUNED_BLOCKS)], RANK)


def add_false_refusal_adapter(model: PreTrainedModel, _attempt: int = 0) -> PeftModel:
    """Put the adapter that learns to refuse too much into a model, as `add_adapter` does.

    It writes from the attention, which alone sees the wording from the end of the prompt. That also gives it a
    direction of its own: in the blocks and modules of the first adapter it would share the first one's.

    Args:
        model: one that refuses what it should.
    """
    return _add_adapter(model, "o_proj", FALSE_REFUSAL_BLOCKS, FALSE_REFUSAL_RANK)


def _add_adapter(
    model: PreTrainedModel, target: str, blocks: tuple[int, ...], rank: int
) -> PeftModel:
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[target],
        layers_to_transform=list(blocks),
    )
    return get_peft_model(model, settings)
