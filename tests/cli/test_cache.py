"""Compiled programs on disk: where, when not, and that two processes may share them."""

import subprocess
import sys

import jax
import pytest

from tests.internals import keep_programs

SCRIPT = """
import jax, jax.numpy as jnp
from negmaml.cli.cache import keep_programs
assert keep_programs() is not None
print(float(jax.jit(lambda x: jnp.linalg.inv(x * jnp.eye(3) + 1)).lower(2.0).compile()(2.0)[0, 0]))
"""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Begin without a folder, and leave the settings of this process as they were."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # that of the tests, for processes
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_variable_names_a_folder_or_switches_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("NEGMAML_CACHE", "off")
    assert keep_programs() is None
    monkeypatch.setenv("NEGMAML_CACHE", str(tmp_path / "programs"))
    assert keep_programs() == tmp_path / "programs"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    assert keep_programs() is None  # JAX has a folder by now


def test_the_folder_may_be_one_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEGMAML_CACHE", "~/programs")
    assert keep_programs() == tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("NEGMAML_CACHE", "~nobody-of-this-name/programs")
    assert keep_programs() is None


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEGMAML_CACHE", str(tmp_path / "file" / "programs"))
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_processes_share_a_folder_and_survive_what_they_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NEGMAML_CACHE", str(tmp_path))
    start = [sys.executable, "-c", SCRIPT]
    both = [subprocess.Popen(start, stdout=subprocess.PIPE) for _ in range(2)]
    printed = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    for entry in tmp_path.iterdir():
        entry.write_bytes(b"half")
    again = subprocess.run(start, stdout=subprocess.PIPE)
    assert again.returncode == 0
    assert printed == {again.stdout}
