"""Kinds of edit: one file each, its name is its recipe key.

Each offers `build(direction, writers, settings, about)`: from a chosen direction and the writers of a model to
an `Edit`, which `common.edits`, `common.hooks`, `common.checkpoint` and `common.lora` apply.
"""
