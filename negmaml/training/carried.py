"""Leaves of the parameters that do not train: carried along as they are."""

import jax


@jax.tree_util.register_pytree_node_class
class Carried:
    """A tree of such leaves: arrays are traced, anything else is part of the structure.

    So a program takes it as an argument whatever a module holds: functions, strings, integers.
    """

    def __init__(self, tree):
        self.tree = tree
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(leaf) and type(leaf).__hash__ is None:
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} is neither an array nor hashable, got "
                    f"{type(leaf).__name__}; keep it out of the parameters and close over it"
                )

    def tree_flatten(self):
        """Arrays, and all else with the structure."""
        leaves, treedef = jax.tree.flatten(self.tree)
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        return arrays, (treedef, tuple(None if _is_array(leaf) else leaf for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, structure, arrays):
        """The tree again."""
        treedef, others = structure
        own = iter(arrays)
        self = object.__new__(cls)
        self.tree = treedef.unflatten([next(own) if o is None else o for o in others])
        return self


def split_arrays(tree):
    """(the arrays of a tree, a function that puts arrays in their places)."""
    arrays, structure = Carried(tree).tree_flatten()
    return arrays, lambda own: Carried.tree_unflatten(structure, own).tree


def _is_array(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")
