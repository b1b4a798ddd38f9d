"""Why an optimizer cannot be had here."""


class OptimizerUnavailable(RuntimeError):
    """This machine cannot run the run's inner optimizer; one line that says why and what to do."""
