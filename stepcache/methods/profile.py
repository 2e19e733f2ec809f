"""Profile: what `stepcache tune` has found for a model, replayed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .. import calibrated, profile
from ..gates.made_for import MadeFor
from ..gates.places import Places
from ..options import OptionError, shown
from ..predictors.profiled import Profiled
from ..settings import Settings
from .base import Method
from .registry import method, register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


@register("profile")
def Profile(path: Any = "", **common: Unpack[CommonOptions]) -> Method:
    """Computes and predicts what a profile says, the file that `stepcache tune` writes for a model and a sampler.

    Which evaluations are computed and how each of the others is predicted is known before the run. For another number
    of steps the profile is scaled, and the report says so; for another model it warns. The file may also be one of
    `stepcache tune --method NAME`: it is then that method, with the options that were found for the model.

    Args:
        path: of the file; or a `stepcache.extend.Profile`, or `Settings`.
        **common: every option of `Method`: start, end, mask, warmup, last_step, ... A dynamic mask
            adds to what is computed.

    Raises `OptionError` if the file cannot be read or is no profile.
    Source: ours; docs/tune.md.

    Example:
        >>> from stepcache import method
        >>> from stepcache.profile import Prediction, Profile as File
        >>> known = File((1, 1, 0, 1), {2: Prediction(order=1, share=0.25)})
        >>> method("profile", path=known).name
        'profile'
    """
    if not isinstance(path, (str, os.PathLike, calibrated.Calibrated)) or path == "":
        raise OptionError(f"path={shown(path)}: accepted is the path of a file that stepcache tune wrote")
    known = path if isinstance(path, calibrated.Calibrated) else _read(path)
    if isinstance(known, profile.Profile):
        return Method.make(common, predictor=Profiled(known), gates=(Places(known),), name="profile")
    if not isinstance(known, Settings):
        raise OptionError(f"path={shown(path)}: accepted are a Profile and Settings")
    found = method(known.method, **{**known.options, **common})
    return found.replace(gates=(*found.gates, MadeFor(known)))


def _read(path: str | os.PathLike[str]) -> profile.Profile | Settings:
    given = calibrated.opened(path)
    return Settings.made_of(given) if "method" in given else profile.Profile.made_of(given)


def load_profile(path: str | os.PathLike[str]) -> Method:
    """The method that a file of `stepcache tune` is: `attach(pipe, stepcache.load_profile("sdxl-euler-8.json"))`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import stepcache
        >>> from stepcache.profile import Prediction, Profile
        >>> profile = Profile((1, 1, 0, 1), {2: Prediction(order=1, share=0.25)})
        >>> with TemporaryDirectory() as folder:
        ...     profile.save(f"{folder}/three.json")
        ...     stepcache.load_profile(f"{folder}/three.json").name
        'profile'
    """
    return Profile(path)
