"""Programs as they are lowered for each platform, and what an accelerator should not find there."""

import re

import jax

PLATFORMS = ("cpu", "cuda", "tpu")
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution|dot)\b.*")
FLOATING = re.compile(r"tensor<(?:\d+x)*(?:bf16|f\d+)>")
# Calls into Python, float64, and libraries of the host.
FOREIGN = re.compile(r"\w*callback\w*|tensor<(?:\d+x)*f64>|lapack\w*")


def lowered(function, *arguments, platforms=PLATFORMS) -> dict[str, str]:
    """The text of a program for each platform; lowering needs no device of it."""
    traced = jax.jit(function).trace(*arguments)
    return {name: traced.lower(lowering_platforms=(name,)).as_text() for name in platforms}


def products(text: str) -> list[str]:
    """Every product of floating point numbers of a program."""
    return [line for line in PRODUCT.findall(text) if FLOATING.search(line)]


def imprecise(text: str) -> list[str]:
    """The products that an accelerator may round."""
    return [line for line in products(text) if "precision = [HIGHEST, HIGHEST]" not in line]


def foreign(text: str) -> set[str]:
    """Calls into Python or libraries of the host, and types of float64."""
    return set(FOREIGN.findall(text))
