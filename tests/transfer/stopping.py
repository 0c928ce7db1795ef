"""A training that is told to stop, without a signal."""


class StopAfter:
    """As a signal that comes in the step of this number."""

    name = "SIGTERM"

    def __init__(self, steps: int) -> None:
        self.left = steps

    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0
