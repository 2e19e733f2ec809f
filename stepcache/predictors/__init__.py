"""Predictors: what a skipped evaluation returns. One file an idea; `base` says what a predictor is."""

from .adaptive_order import AdaptiveOrder
from .base import FixedOrder, LinearPredictor, Predictor
from .chebyshev import Chebyshev
from .dmd import DMD
from .finite_difference import FiniteDifference
from .hermite import Hermite
from .lagrange import Lagrange
from .reuse import Reuse
from .taylorseer import TaylorSeer

__all__ = [
    "DMD",
    "AdaptiveOrder",
    "Chebyshev",
    "FiniteDifference",
    "FixedOrder",
    "Hermite",
    "Lagrange",
    "LinearPredictor",
    "Predictor",
    "Reuse",
    "TaylorSeer",
]
