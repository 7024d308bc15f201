from pathlib import Path

import pytest

from megatron_klrl.runtime.place import Places, described, last_place, place_file, place_of


def test_an_error_says_where_it_happened_and_the_file_where_the_rank_was(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert last_place(tmp_path, 1) == ""
    places = Places(place_file(tmp_path, 1))
    with places.within("step 7"):
        with places.within("a place with a long name"):
            assert places.now == last_place(tmp_path, 1) == "step 7, a place with a long name"
        assert places.now == last_place(tmp_path, 1) == "step 7", "nothing of a longer name is left"
    with pytest.raises(RuntimeError) as caught, places.within("step 7"), places.within("train"):
        raise RuntimeError("broken")
    assert place_of(caught.value) == "step 7, train"
    assert described(caught.value, rank=1) == "broken (rank 1, step 7, train)"
    assert places.now == last_place(tmp_path, 1) == ""


def test_an_error_outside_of_all_places_is_as_it_was() -> None:
    assert described(RuntimeError("broken"), rank=1) == "broken"
