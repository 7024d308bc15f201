import pickle

import pytest

from megatron_klrl.errors import UserError, WorkError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("is wrong", field="a.b", fix="write c"), "a.b: is wrong. Fix: write c"),
        (UserError("is wrong.", field="a.b", fix="write c"), "a.b: is wrong. Fix: write c"),
        (UserError("is wrong", field="a.b"), "a.b: is wrong"),
        (UserError("is wrong"), "is wrong"),
    ],
)
def test_text(error: UserError, text: str) -> None:
    assert str(error) == text


def test_exit_codes() -> None:
    assert (UserError("x").exit_code, WorkError("x").exit_code) == (2, 1)


def test_a_user_error_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(UserError("is wrong", field="a.b", fix="write c")))
    assert (again.problem, again.field, again.fix, str(again)) == (
        "is wrong",
        "a.b",
        "write c",
        "a.b: is wrong. Fix: write c",
    )
