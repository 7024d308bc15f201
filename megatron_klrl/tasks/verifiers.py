"""What verifier processes load: math-verify, a scorer of reasoning-gym, a user's own function."""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klrl.errors import UserError

REWARD_ARGUMENTS = ("question", "response", "answer")


@dataclass(frozen=True, slots=True)
class MathVerifier:
    """Mathematical equality by math-verify, which reads LaTeX and decides with sympy.

    Its own limits are turned off: they are alarm signals like the pool's, and one would replace the other.
    """

    def load(self) -> Callable[..., float]:
        """Function from (right answer, contents of the response's box) to 0 or 1.

        With None for the box: whether math-verify can read the right answer at all.
        """
        from math_verify import parse, verify  # noqa: PLC0415 - sympy: seconds of import, needed in the processes alone

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without its own limit

        def read(text: str) -> list[Any]:
            no_limit: Any = None  # which its annotation does not admit and its documentation asks for
            return parse(f"\\boxed{{{text}}}", parsing_timeout=no_limit)

        def score(gold: str, boxed: str | None) -> float:
            right = read(gold)
            if boxed is None:
                return float(any(not isinstance(part, str) for part in right))  # text is what it falls back to
            # The right answer first: verify is not symmetric.
            return float(bool(right) and verify(right, read(boxed), timeout_seconds=None))

        score("\\frac{1}{2}", "0.5")  # the first call imports and compiles; that must not count as its time
        return score


@dataclass(frozen=True, slots=True)
class ReasoningGymVerifier:
    """The scorer of one of reasoning-gym's data sets; its partial credit counts as 0."""

    dataset: str

    def load(self) -> Callable[..., float]:
        """Function from (contents of the response's box, entry of the data set) to 0 or 1."""
        from reasoning_gym import get_score_answer_fn  # noqa: PLC0415 - optional, and seconds of import

        scorer: Any = get_score_answer_fn(self.dataset)  # annotated as a function without arguments
        return lambda boxed, entry: float(scorer(boxed, entry) >= 1.0)


@dataclass(frozen=True, slots=True)
class FunctionVerifier:
    """A user's function, as `module:function`."""

    path: str

    def load(self) -> Callable[..., float]:
        """Function from (question, response, right answer) to the reward."""
        function = reward_function(self.path)
        return lambda question, response, answer: function(question=question, response=response, answer=answer)


def reward_function(path: str) -> Callable[..., float]:
    """The function that `module:function` names; modules beside the recipe's command are found too.

    It is called by keyword as `function(question=..., response=..., answer=...)`, all text, and returns a finite
    number. Question and answer are the data's, the response has no special tokens.

    Raises:
        UserError: no such module or function, or it does not take these arguments.
    """
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not look into the current directory
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        fix = "write module:function; modules are found in the current directory and where Python finds them"
        raise UserError(f"reward {path}: cannot import {module_name} ({error})", field="data", fix=fix) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        fix = f"functions of {module_name}: {', '.join(functions) or 'none'}"
        raise UserError(f"reward {path}: {module_name} has no function {name!r}", field="data", fix=fix)
    try:
        inspect.signature(function).bind(**dict.fromkeys(REWARD_ARGUMENTS, ""))
    except TypeError as error:
        fix = f"define it as def {name}(question: str, response: str, answer: str) -> float"
        raise UserError(f"reward {path}: {error}", field="data", fix=fix) from error
    return function
