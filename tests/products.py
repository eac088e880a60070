"""Products in lowered programs, and those that do not ask for full precision."""

import re

import jax

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution|dot)\b.*")
FLOATING = re.compile(r"tensor<(?:\d+x)*(?:bf16|f\d+)>")


def products(function, *arguments) -> list[str]:
    """Every product of floating point numbers of the lowered program."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [line for line in PRODUCT.findall(text) if FLOATING.search(line)]


def imprecise(found: list[str]) -> list[str]:
    """The products that an accelerator may round."""
    return [line for line in found if "precision = [HIGHEST, HIGHEST]" not in line]
