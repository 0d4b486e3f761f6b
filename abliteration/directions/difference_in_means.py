"""The difference in means of the residual stream between harmful and harmless prompts."""

from torch import Tensor

from abliteration.activations import Activations

NEEDS_SAMPLES = False


def estimate(harmful: Activations, harmless: Activations, _settings: object) -> Tensor:
    """The candidate refusal direction of every layer and position.

    Args:
        harmful: resid_pre of harmful prompts.
        harmless: the same of harmless prompts.

    Returns:
        [layers, positions, 1, d_model] in float64; its length is what activation addition adds.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    return (harmful.mean - harmless.mean).unsqueeze(-2)
