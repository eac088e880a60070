from negmaml.paper import cross_check as cross_check
from negmaml.paper import figures as figures
from negmaml.paper import gain_map as gain_map
from negmaml.paper import nonlinear as nonlinear
from negmaml.paper import phases as phases
from negmaml.paper import reproduce as reproduce

__all__ = ["cross_check", "figures", "gain_map", "nonlinear", "phases", "reproduce"]
