"""The part of the model that tuning may change: one direction in the middle of the network.

A rank-1 adapter on two middle blocks decides between refusing and answering, and leaves all that the model knows
as it was. With every weight free, a model of this size learns refusal in many directions at once, marks the
objects that tuning shows one by one, and forgets recipes that it was never shown again.
"""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

TUNED_BLOCKS = (1, 2)
RANK = 1


def add_adapter(model: PreTrainedModel) -> PeftModel:
    """Put the adapter into a model, in place, and freeze everything else.

    Args:
        model: one that knows everything and refuses nothing.

    Returns:
        The wrapper whose `merge_and_unload` gives an ordinary model again.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    # Fused experts have no down projection of their own as a module.
    target = "o_proj" if "experts" in names else "down_proj"
    settings = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[target],
        layers_to_transform=list(TUNED_BLOCKS),
    )
    return get_peft_model(model, settings)
