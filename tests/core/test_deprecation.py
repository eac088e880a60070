"""Old names warn, and give what the new names give."""

import sys
from types import ModuleType

import pytest

from tests.internals import renamed_arguments, renamed_attribute, renamed_exports


def test_an_old_export_warns_and_gives_the_new_one(monkeypatch):
    module = ModuleType("made_up")
    module.new = object()
    monkeypatch.setitem(sys.modules, "made_up", module)
    module.__getattr__ = renamed_exports("made_up", {"old": "new"})
    with pytest.warns(DeprecationWarning, match=r"made_up\.old was renamed: use made_up\.new"):
        assert module.old is module.new
    with pytest.raises(AttributeError, match="module 'made_up' has no attribute 'other'"):
        _ = module.other


def test_an_old_argument_warns_and_is_passed_by_its_new_name():
    @renamed_arguments(part="worker")
    def f(x, *, worker=0):
        return x, worker

    with pytest.warns(DeprecationWarning, match=r"f\(part=...\) was renamed: use worker="):
        assert f(1, part=2) == (1, 2)
    assert f(1, worker=3) == (1, 3)
    with pytest.raises(TypeError, match="got both part and worker"):
        f(1, part=2, worker=3)


def test_an_old_value_of_an_old_argument_is_passed_as_the_new_one():
    @renamed_arguments({"this": "strict"}, checkpoint_of="resume")
    def f(*, resume="strict"):
        return resume

    said = r"f\(checkpoint_of='this'\) was renamed: use resume='strict'\."
    with pytest.warns(DeprecationWarning, match=said):
        assert f(checkpoint_of="this") == "strict"
    with pytest.warns(DeprecationWarning, match=r"\(checkpoint_of=\.\.\.\) .* use resume=\."):
        assert f(checkpoint_of="any") == "any"


def test_an_old_attribute_warns_and_gives_the_new_one():
    class Result:
        significant = True
        told = renamed_attribute("Result.told", "significant")

    with pytest.warns(DeprecationWarning, match=r"Result\.told was renamed: use significant"):
        assert Result().told is True
