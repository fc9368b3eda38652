"""The import lines of DeepLens's tutorials, with `deeplens` replaced by `deeplens_lightning`."""

import inspect

import pytest

import deeplens_lightning


@pytest.mark.parametrize("name", ["FromHuggingFace", "ExtractSingleSample", "ActivationExtractor"])
def test_the_extractor_module_has_the_names_that_deeplens_users_import(name):
    found = {}
    exec(f"from deeplens_lightning.extractor import {name}", found)
    assert found[name] is getattr(deeplens_lightning, name)


def test_the_notebooks_class_takes_the_notebooks_arguments():
    given = inspect.signature(deeplens_lightning.ActivationExtractor).parameters
    assert [(name, given[name].default) for name in list(given)[:2]] == [
        ("model_name", "gpt2"),
        ("device", "cpu"),
    ]
    call = inspect.signature(deeplens_lightning.ActivationExtractor.get_activations).parameters
    assert list(call) == ["self", "text", "layer_idx"]
    assert call["layer_idx"].default == -1


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'deeplens_lightning' has no attribute 'FromHugginFace'"):
        _ = deeplens_lightning.FromHugginFace


def test_notebooks_complete_the_public_names():
    assert set(deeplens_lightning.__all__) <= set(dir(deeplens_lightning))


def test_a_layer_out_of_range_is_named_with_what_minus_one_means():
    extractor = deeplens_lightning.ActivationExtractor("demo:lm")
    for layer_idx in (6, -7):
        with pytest.raises(
            ValueError,
            match=rf"layer_idx={layer_idx} is out of range: give 0 to 5 for the output of a layer, -2 to -6 .* or -1 "
            "for that of the final norm",
        ):
            extractor.get_activations("a text", layer_idx=layer_idx)
