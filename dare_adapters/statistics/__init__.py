"""What a fine-tune's own data says of its weights: Fisher information, Gram matrices of inputs."""

from dare_adapters.statistics.compute import compute_statistics
from dare_adapters.statistics.file import StatisticsFile, open_statistics, write_statistics
from dare_adapters.statistics.fisher import diagonal_fisher
from dare_adapters.statistics.gram import gram_matrices

__all__ = [
    "StatisticsFile",
    "compute_statistics",
    "diagonal_fisher",
    "gram_matrices",
    "open_statistics",
    "write_statistics",
]
