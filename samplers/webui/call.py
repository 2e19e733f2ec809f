"""One call of the host's model, as the engine takes it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..batching import CannotSplit, rows_of
from ..k_diffusion import DenoiserCall
from ..parametrization import Scalings

Cut = Callable[[slice], Callable[[], Tensor]]
"""From some rows of a batched call to a function that calls the model for these alone. Raises `CannotSplit`."""


class WebuiCall(DenoiserCall):
    """One call, as `denoised = model(x, sigma)`.

    Args:
        compute: calls the model, with the host's own arguments.
        scalings: sigma -> (c_skip, c_out, c_in).
        names: the branches, in the order of the rows.
        x: what the host passes to the model.
        sigma: the noise level of each row.
        cut: calls the model for some of the rows.

    Attributes:
        error: what the model itself raised.
        indivisible_because: why the call could not be split.
    """

    error: BaseException | None = None
    indivisible_because: str | None = None

    def __init__(
        self,
        compute: Callable[[], Tensor],
        scalings: Scalings,
        names: tuple[str, ...],
        x: Tensor,
        sigma: Tensor,
        cut: Cut,
    ) -> None:
        super().__init__(lambda x, sigma: compute(), scalings, names, x, sigma, {})
        self._cut = cut

    def part(self, name: str) -> WebuiCall | None:
        kept = rows_of(self.names, name, len(self.latent))
        try:
            compute = self._cut(kept)
        except CannotSplit as reason:
            self.indivisible_because = str(reason)
            return None
        return WebuiCall(compute, self._scalings, (name,), self.latent[kept], self.sigma[kept], self._cut)

    def run_model(self) -> Tensor:
        try:
            return super().run_model()
        except BaseException as error:
            self.error = error
            raise
