"""Estimators of the direction: one file each, its name is its recipe key.

Each offers `estimate(harmful, harmless)`: from the mean residual streams of the two prompt sets, both
[layers, positions, d_model] in float64, to candidate directions of the same shape, not normalized.
"""
