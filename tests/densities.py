"""Densities in Python floats."""

from __future__ import annotations

import math


def log_density(x, components):
    """``components``: (weight, mean, std) each; the log of the sum, shifted by its largest term."""
    terms = []
    for weight, mean, std in components:
        if weight == 0:
            continue
        term = math.log(weight)
        for value, m, s in zip(x, mean, std, strict=True):
            term -= 0.5 * ((value - m) / s) ** 2 + math.log(s) + 0.5 * math.log(2 * math.pi)
        terms.append(term)
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))
