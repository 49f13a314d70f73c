"""The one exception that stands for a mistake of the user, not of the program."""


class UserError(Exception):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2; everything else keeps its traceback.
    """
