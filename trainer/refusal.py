"""What a person must change before the trainer can go on: told in a line, without a traceback."""


class Refusal(ValueError):  # noqa: N818
    """A job, model, data set or machine that cannot be used as asked.

    Its text says what was asked, what was found, and what to change. The trainer prints it, writes
    failure.json and exits with 1.
    """
