"""What images are answered with."""

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]
"""[N, classes]"""
