"""The one error that a user is meant to see."""


class UserError(ValueError):
    """A mistake that the user can fix: `run_main` prints the message as one line and exits with code 2."""
