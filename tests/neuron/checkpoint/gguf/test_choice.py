from __future__ import annotations

import pytest
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.gguf.choice import NoSuchQuant, chosen_model

FOLDER = (
    "README.md",
    "mmproj-X-Q8_0.gguf",
    "mtp-X-Q8_0.gguf",
    "X.imatrix.gguf",
    "X-Q8_0.gguf",
    "X-BF16.gguf",
    "X-Q4_K_M.gguf",
    "X-Q4_K_S.gguf",
    "X-UD-Q4_K_XL.gguf",
)


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        ("q8_0", "X-Q8_0.gguf"),
        ("Q4_K_M", "X-Q4_K_M.gguf"),
        ("q4km", "X-Q4_K_M.gguf"),
        ("q4_k_xl", "X-UD-Q4_K_XL.gguf"),
    ],
)
def test_a_quant_is_a_whole_tag(quant: str, name: str) -> None:
    assert chosen_model(FOLDER, quant).name == name


def test_a_part_that_several_have_is_refused_with_their_names() -> None:
    with pytest.raises(NoSuchQuant) as error:
        chosen_model(FOLDER, "q4_k")
    assert error.value.facts["available"] == ["X-Q4_K_M.gguf", "X-Q4_K_S.gguf", "X-UD-Q4_K_XL.gguf"]


def test_what_is_not_there_names_the_nearest() -> None:
    with pytest.raises(NoSuchQuant, match="nearest is `Q8_0`"):
        chosen_model(FOLDER, "q8_1")
    with pytest.raises(NoSuchQuant):
        chosen_model(FOLDER, "f16")  # no part of BF16


def test_without_a_quant_only_a_model_alone_is_meant() -> None:
    assert chosen_model(("mmproj-X-F16.gguf", "X-Q8_0.gguf"), None).name == "X-Q8_0.gguf"
    with pytest.raises(NoSuchQuant, match="any of 5"):
        chosen_model(FOLDER, None)
    with pytest.raises(NoSuchQuant, match="no GGUF model is there"):
        chosen_model(("mmproj-X-F16.gguf",), None)


def test_splits_are_one_model_and_all_must_be_there() -> None:
    splits = [f"Q6_K/X-Q6_K-0000{number}-of-00003.gguf" for number in (3, 1, 2)]
    model = chosen_model((*FOLDER, *splits), "q6_k")
    assert model.files == tuple(sorted(splits))
    with pytest.raises(CheckpointError, match="1 of 3 splits") as error:
        chosen_model(splits[1:], "q6_k")
    assert error.value.tensors == (splits[0],)
