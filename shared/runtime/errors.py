"""The one exception that a reader is meant to see."""


class CourseError(ValueError):
    """Something the reader can put right: one sentence saying what is wrong and what to do.

    The command line prints the sentence and exits with status 2; no traceback is shown without `--debug`.
    """
