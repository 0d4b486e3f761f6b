"""The healed release: full weights, what was removed, the adapter, the evidence, and a model card."""
