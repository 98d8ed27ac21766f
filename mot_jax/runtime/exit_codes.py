"""The exit codes of all commands.

Any other is 1, for a bug, with a traceback, and for a negative result of `mot plan` (the step does not fit) and
`mot bench accelerator` (a part failed or a number was wrong); or 134, an abort by JAX's runtime.
"""

FINISHED = 0
USER_ERROR = 2  # the same command would fail again
DIVERGED = 3  # the loss of a training run is not finite
RETRYABLE = 75  # EX_TEMPFAIL: the same command may succeed later, and resumes a run
INTERRUPTED = 130  # Ctrl-C
PREEMPTED = 143  # a SIGTERM; the default of checkpoint.preempted_exit_code
