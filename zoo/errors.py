"""The error a user can act on."""


class ZooError(Exception):
    """Bad input: one line that names the thing, what was got and what was wanted.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
