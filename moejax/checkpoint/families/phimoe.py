"""Phi-3.5-MoE (arXiv 2404.14219): the tensor names of Mixtral."""

from moejax.checkpoint.families import mixtral
from moejax.checkpoint.families.family import ServedFamily

PHIMOE = ServedFamily(names=mixtral.names)
