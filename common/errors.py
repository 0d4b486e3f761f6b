"""The errors a user can cause, each with the exit code the main command ends with.

A message says what was found, why it cannot work, and what to do. Everything else that is raised is
a fault of this program and keeps its traceback.
"""

from collections.abc import Sequence


class HealingError(Exception):
    """Anything that ends a run with a message instead of a traceback."""

    exit_code = 1


class StageError(HealingError):
    """A stage could not reach its result: exit code 1."""


class InputError(HealingError):
    """A file, data set, model or launch that the recipe names is not usable: exit code 2."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe itself is wrong; carries every problem found, not just the first: exit code 2."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Join the problems, one per line."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[list[str]]]:
        """Travel to other processes with the problems, not with what they were joined to."""
        return type(self), (self.problems,)


class GateError(HealingError):
    """The stages ran, but a limit of `eval.accept` was missed: exit code 3."""

    exit_code = 3
