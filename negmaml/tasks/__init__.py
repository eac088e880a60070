"""Distributions of tasks: pytrees that return `negmaml.Tasks` for a random key."""

from negmaml._core.lazy import public_names, suggesting
from negmaml.tasks.episodes import Episodes, split_classes
from negmaml.tasks.folder import image_folder
from negmaml.tasks.grouped import Grouped
from negmaml.tasks.host import HostEpisodes
from negmaml.tasks.linear import Linear
from negmaml.tasks.quadratic import Quadratic
from negmaml.tasks.sinusoid import Sinusoid

__all__ = [
    "Episodes",
    "Grouped",
    "HostEpisodes",
    "Linear",
    "Quadratic",
    "Sinusoid",
    "image_folder",
    "split_classes",
]

__dir__ = public_names(__name__)
__getattr__ = suggesting(__name__)
