"""Run folders, checkpoints, resume, EMA, seeds, torchrun, progress and logs: what every training loop needs and no paper is about."""


class UserError(ValueError):
    """A mistake that the user can mend: `main` prints the message as one line and exits with code 2."""
