"""Preference pairs: one file per source, its name is its recipe key.

Each source offers `check(source, key)` (problems in words, no weights), `inputs(source, excluded)` (what its pairs
depend on, for the fingerprint), `prompts_used(source)` (for the overlap check) and either `load(source)`, for
pairs that exist, or `pair(...)`, for pairs that the models make. All pairs end in one form, chat messages, and pass
the filters of `train.preferences.filters`.
"""
