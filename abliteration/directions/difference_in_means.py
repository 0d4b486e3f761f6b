"""The difference in means of the residual stream between harmful and harmless prompts."""

from torch import Tensor


def estimate(harmful: Tensor, harmless: Tensor) -> Tensor:
    """The candidate refusal direction of every layer and position.

    Args:
        harmful: mean resid_pre over harmful prompts [layers, positions, d_model].
        harmless: the same over harmless prompts.

    Returns:
        [layers, positions, d_model]; its length is what activation addition adds.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    return harmful - harmless
