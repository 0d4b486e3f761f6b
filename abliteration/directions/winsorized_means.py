"""The difference in means of vectors whose outlying components were clipped, prompt by prompt."""

from torch import Tensor

from abliteration.activations import Activations

# Clipping happens where the means are summed (`collect(..., winsorize=settings.quantile)`), so that no sample is kept.
NEEDS_SAMPLES = False


def estimate(harmful: Activations, harmless: Activations, _settings: object) -> Tensor:
    """The candidate refusal direction of every layer and position.

    Args:
        harmful: resid_pre of harmful prompts, collected with `winsorize`.
        harmless: the same of harmless prompts.

    Returns:
        [layers, positions, 1, d_model] in float64.
    """
    return (harmful.mean - harmless.mean).unsqueeze(-2)
