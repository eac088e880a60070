import sys

import pytest

import negmaml
from tests.internals import lazily, maker, register
from tests.internals import registry_registered as registered


def test_every_name_that_is_offered_is_there():
    for name in negmaml.__all__:
        assert getattr(negmaml, name) is vars(negmaml)[name]  # found once
    assert set(negmaml.__all__) < set(dir(negmaml))


def test_a_name_that_is_not_offered_is_an_error():
    with pytest.raises(AttributeError, match="'negmaml' has no attribute 'mamll'"):
        _ = negmaml.mamll


def test_a_stub_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "lazy_example"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text("value = 3")
    stub = "from lazy_example import part\nfrom lazy_example.part import value\n"
    (folder / "__init__.pyi").write_text(stub + '__all__ = ["value"]\n')
    package = __import__("lazy_example")
    get, names, public = lazily("lazy_example", package.__file__)
    assert public == ["value"] and {"part", "value"} < set(names())
    assert "lazy_example.part" not in sys.modules
    assert get("value") == 3 and get("part") is sys.modules["lazy_example.part"]


def test_a_function_is_imported_when_its_name_is_asked_for(monkeypatch):
    monkeypatch.setattr("negmaml._core.registry._makers", {})
    register("sum", "math:fsum")
    register("own", dict)
    assert registered() == ["own", "sum"]
    assert maker("sum")([0.5, 0.5]) == 1.0 and maker("own") is dict
