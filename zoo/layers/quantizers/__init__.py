"""Quantizers: from vectors to codes of a finite set and back. All have the face of `quantizer.Quantizer`."""

from zoo.layers.quantizers.bottleneck import KeyValueBottleneck
from zoo.layers.quantizers.codebook import VectorQuantizer, kmeans
from zoo.layers.quantizers.quantizer import COLLECTION, RNG, Quantized, Quantizer, straight_through, unit
from zoo.layers.quantizers.residual import GroupedQuantizer, ResidualQuantizer
from zoo.layers.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from zoo.layers.quantizers.soft import AnnealedQuantizer, GumbelQuantizer, annealed_one_hot

__all__ = [
    "COLLECTION",
    "RNG",
    "AnnealedQuantizer",
    "FiniteScalarQuantizer",
    "GroupedQuantizer",
    "GumbelQuantizer",
    "KeyValueBottleneck",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "annealed_one_hot",
    "kmeans",
    "straight_through",
    "unit",
]
