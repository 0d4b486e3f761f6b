"""Kinds of edit: one file each, its name is its recipe key.

Each offers `build(direction, writers, strength, about)`: from a unit direction to an `Edit`, which
`common.edits` applies.
"""
