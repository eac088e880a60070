"""Paths as users write them."""

from pathlib import Path

import pytest

from tests.internals import expanded


def test_the_users_folder_is_put_in_place_of_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given in ("~/a/b", Path("~/a/b"), "~//a/./b"):
        assert expanded("out", given) == Path("/home/me/a/b")
    assert expanded("out", "~") == Path("/home/me")
    assert expanded("out", "~root") == Path("~root").expanduser()


@pytest.mark.parametrize("path", ["a/~/b", "./~/a", "/~", "a~", "", "~a.txt/../.."[1:]])
def test_elsewhere_it_is_a_character_like_others(path):
    assert expanded("out", path) == Path(path)


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "~nobody-of-this-name/a", Path("~.zarr")])
def test_a_user_that_is_not_there_is_named(path):
    with pytest.raises(ValueError, match=r"^out must be a path, got '~.*there is no user '"):
        expanded("out", path)
