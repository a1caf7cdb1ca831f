"""The inference cycle's recurrence: how a step's output becomes the next step's query, key and value."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
_EPSILON = np.float32(1e-12)


@dataclass(frozen=True)
class OrthogonalMap:
    """A seeded orthogonal map of R^head_dim: a signed permutation after a Householder reflection, O(head_dim) to apply.

    x -> sign * y[permutation], y = x - 2 u (u . x), |u| = 1.

    Attributes
    ----------
    reflector : (head_dim,) float32 unit vector u.
    permutation : (head_dim,) int32.
    sign : (head_dim,) float32, +-1.
    """

    reflector: Float32
    permutation: NDArray[np.int32]
    sign: Float32

    @classmethod
    def seeded(cls, head_dim: int, seed: int) -> "OrthogonalMap":
        """Return the map of a seed."""
        rng = np.random.default_rng(seed)
        u = rng.standard_normal(head_dim)
        return cls(
            (u / np.linalg.norm(u)).astype(np.float32),
            rng.permutation(head_dim).astype(np.int32),
            rng.choice(np.array([-1.0, 1.0], np.float32), head_dim),
        )

    def __call__(self, x: Float32) -> Float32:
        """Apply the map to the last axis."""
        y = x - 2 * self.reflector * (x @ self.reflector)[..., None]
        return self.sign * y[..., self.permutation]


@dataclass(frozen=True)
class Feedback:
    """The recurrence q(t+1), k(t+1), v(t+1) = maps of the RMS-normalized o(t).

    Query head h is fed by output head h; KV head g by the first output head of its group.

    Attributes
    ----------
    query, key, value : orthogonal maps.
    query_rms, key_rms, value_rms : root mean square of the elements of each map's scaled result.
    """

    query: OrthogonalMap
    key: OrthogonalMap
    value: OrthogonalMap
    query_rms: float
    key_rms: float
    value_rms: float

    @classmethod
    def seeded(cls, head_dim: int, seed: int, query_rms: float, key_rms: float, value_rms: float) -> "Feedback":
        """Return the recurrence of a seed, scaled to these magnitudes."""
        query, key, value = (OrthogonalMap.seeded(head_dim, 3 * seed + i) for i in range(3))
        return cls(query, key, value, query_rms, key_rms, value_rms)

    def __call__(self, outputs: Float32, group: int) -> tuple[Float32, Float32, Float32]:
        """Return the next queries, keys and values.

        Parameters
        ----------
        outputs : (batch, query_heads, head_dim).
        group : query heads of a KV head.
        """
        x = outputs / np.sqrt((outputs**2).mean(axis=-1, keepdims=True) + _EPSILON)
        first = x[:, ::group]
        return (
            (np.float32(self.query_rms) * self.query(x)).astype(np.float32),
            (np.float32(self.key_rms) * self.key(first)).astype(np.float32),
            (np.float32(self.value_rms) * self.value(first)).astype(np.float32),
        )
