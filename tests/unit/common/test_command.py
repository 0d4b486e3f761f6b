"""A command ends with a code that says what happened, and a fault of the program keeps its traceback.

Run: python -m pytest tests/unit/common/test_command.py
"""

import pytest

from common import command
from common.errors import GateError, InputError, StageError


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (StageError("it did not converge"), 1, "it did not converge"),
        (InputError("no such model"), 2, "no such model"),
        (GateError("a gate was missed"), 3, "a gate was missed"),
        (FileNotFoundError(2, "No such file", "here.json"), 1, "here.json: No such file"),
        (OSError("the disk is full"), 1, "a file: the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted; nothing is lost"),
    ],
)
def test_what_a_user_can_cause_is_told_in_a_line(error, code, told, capsys):
    assert command.run(raising(error), interrupted="nothing is lost") == code
    assert capsys.readouterr().err == f"\n{told}\n"


def test_a_command_that_is_done_says_nothing(capsys):
    assert command.run(lambda: None, interrupted="") == 0
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(raising(ZeroDivisionError()), interrupted="")
