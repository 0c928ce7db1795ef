"""How a rank belongs to its launcher; what ranks say to each other is in test_train_ranks.py."""

import ctypes

from trainer.joining import exit_with_launcher


def test_the_end_of_a_shell_is_not_the_end_of_the_run() -> None:
    """Only `accelerate launch` takes its child with it; pytest and the shells before it are other parents."""
    exit_with_launcher()
    number = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    assert number.value == 0
