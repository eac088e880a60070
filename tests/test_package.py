"""The wheel as its users and the package index see it."""

import re
import tomllib
import zipfile
from email import message_from_string

import pytest

from negmaml import __version__
from tests.documents import GUIDES, ROOT

build = pytest.importorskip("hatchling.build")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = PROJECT["urls"]["Source"]
CITATION = (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / build.build_wheel(str(folder)))


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_files_that_are_not_modules_are_in_the_wheel(wheel):
    names = {str(path.relative_to(ROOT)) for path in GUIDES}
    names |= {"negmaml/py.typed", "negmaml/__init__.pyi", "negmaml/examples/phase_map.toml"}
    assert names <= set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "negmaml",
        f"negmaml-{__version__}.dist-info",
    }


def test_links_and_pictures_of_the_description_are_absolute(metadata):
    page = metadata.get_payload()
    targets = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith("https://")] == []
    assert f"]({SOURCE}/raw/v{__version__}/benchmarks/reproduction.png)" in page
    assert f"]({SOURCE}/blob/v{__version__}/README.md#meta-learn-a-network)" in page


def test_code_of_the_description_is_that_of_readme(metadata):
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    there, here = metadata.get_payload(), (ROOT / "README.md").read_text()
    assert code.findall(there) == code.findall(here) != []


def test_version_is_one(metadata):
    assert metadata["Version"] == __version__
    assert f"\nversion: {__version__}\n" in CITATION
    released = re.findall(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__


def test_address_is_one():
    assert all(url.startswith(SOURCE) for url in PROJECT["urls"].values())
    assert f"\nrepository-code: {SOURCE}\n" in CITATION
