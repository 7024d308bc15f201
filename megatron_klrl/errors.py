"""The exceptions a user sees without a traceback: wrong input, and work that failed."""


class UserError(Exception):
    """The user's input or configuration is wrong; the program ends with exit code 2.

    Args:
        problem: what is wrong, in words a reader of the recipe understands.
        field: dotted recipe key, command-line option or file the problem is in.
        fix: what to write or do instead.
    """

    exit_code = 2

    def __init__(self, problem: str, *, field: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.field = field
        self.fix = fix
        super().__init__(_sentence(problem, field, fix))

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles by its args, which would lose the keyword-only parts when a rank sends an error to another.
        return _rebuild_user_error, (self.problem, self.field, self.fix)


class WorkError(Exception):
    """The work itself failed (a run diverged, a check did not hold); the program ends with exit code 1."""

    exit_code = 1


class DivergenceError(WorkError):
    """Training left the numbers: a loss, gradient or weight is not finite. A study counts it as a result."""


def _sentence(problem: str, field: str | None, fix: str | None) -> str:
    text = problem if field is None else f"{field}: {problem}"
    if fix is None:
        return text
    return f"{text.rstrip('.')}. Fix: {fix}"


def _rebuild_user_error(problem: str, field: str | None, fix: str | None) -> UserError:
    return UserError(problem, field=field, fix=fix)
