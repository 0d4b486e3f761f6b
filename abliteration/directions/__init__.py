"""Estimators of the direction: one file each, its name is its recipe key.

Each offers `estimate(harmful, harmless, settings)`: from the activations of the two prompt sets to candidate
directions [layers, positions, k, d_model] in float64. The first of the k vectors is not normalized: its length is
what activation addition adds. Any others are unit vectors, orthogonal to it and to each other. Where the prompt sets
do not differ (the first layer at the template's fixed tokens) all are zero. `NEEDS_SAMPLES` says whether the
estimator reads every prompt's vectors, or only their means.
"""
