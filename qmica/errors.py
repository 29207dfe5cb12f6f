"""The one exception that means "you can fix this".

The command line prints a QmicaError as one line and exits with status 1. Everything else that is raised is a bug in
qmica: it keeps its traceback and exits with status 70.
"""


class QmicaError(Exception):
    """What is wrong, with which value, what is allowed, and what to do next: one line of text."""
