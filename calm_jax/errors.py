"""The one error that means: the input is wrong, not the program."""


class InputError(ValueError):
  """Bad input: says what was wrong, where, and what to do about it.

  The command lines print its message without a traceback and exit with 2.
  """
