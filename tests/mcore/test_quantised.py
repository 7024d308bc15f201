"""Values of parameters that are taken when they are looked up; weights of 8 bits are in test_primary_weights.py."""

import torch

from megatron_klrl.mcore.quantised import Values, numbers, to_write, written


def test_one_value_at_a_time_and_none_twice_in_a_row() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in "abc"}
    taken: list[torch.nn.Parameter] = []

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        taken.append(parameter)
        return 2 * parameter.detach()

    found = Values(parameters, value=value)
    assert (list(found), len(found)) == (["a", "b", "c"], 3)
    assert found["b"] is found["b"]
    assert torch.equal(found["a"], torch.full((2,), 2.0))
    assert [parameter is parameters[name] for parameter, name in zip(taken, "ba", strict=True)] == [True, True]


def test_a_parameter_of_another_kind_is_its_own_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    new = to_write(parameter)
    assert new is parameter
    with torch.no_grad():
        new.fill_(1)
    written(parameter, new)
    assert numbers(parameter).data_ptr() == parameter.data_ptr()
    assert not numbers(parameter).requires_grad
    assert torch.equal(parameter.detach(), torch.ones(3))
