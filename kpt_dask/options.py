"""Options of the transfer: modes, thresholds, ν and widths of kernels.

Light to import: the command line takes its defaults and its syntax from here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

from kpt_dask.errors import ParameterError

if TYPE_CHECKING:
    from atlas_store import OrganTable


@dataclass(frozen=True)
class Mode:
    """A way to transfer organs.

    Attributes
    ----------
    does : str
        Description in a few words.
    threshold : float
        Default threshold: voxels whose largest probability is below it are background.
    least_nu : float
        Lower limit of ν, HU; the organ table's ν is used where it is larger.
    probability : str
        Meaning of its probabilities, as the output records it.
    """

    does: str
    threshold: float
    least_nu: float
    probability: str


_WHOLE = (
    "share of each organ's vote weight that places the organ at a voxel and agrees with the "
    "scan's intensity there"
)
_BY_FIELDS = (
    "share of the organ at a voxel, beside the background: of the votes among the atlases that "
    "annotate the organ, which count the more, the better the warped atlas agrees with the scan "
    "there; then of what the organ's HU in the scan and neighbouring voxels say, and "
    "of how far the atlases are scattered, unless a threshold was given"
)

MODES: Mapping[str, Mode] = {
    "local": Mode(
        "warps each atlas by a field through all its matches, refined by intensities",
        0.4,
        0.0,
        _BY_FIELDS,
    ),
    "across": Mode("moves organs whole, by all matches near them", 0.15, 100.0, _WHOLE),
    "affine": Mode(
        "maps an organ by one affine where it has three matches or more, else as organ does",
        0.15,
        0.0,
        _WHOLE,
    ),
    "organ": Mode("moves organs whole, by their own matches, as the paper does", 0.15, 0.0, _WHOLE),
}
"""Ways to transfer, the most accurate first on OpenKBP. The 0.15 of `organ` and `affine` and the
organs' own ν are the paper's. Those of `across`, and `RHO`, are the best mean Dice of a dozen
settings on ten patients with 40 atlases; figures on patients that include these flatter it a
little. Those of `local` come from a prototype on head-and-neck and abdominal CT."""

SCANS, LABELS = "{id}_ct.nii.gz", "{id}_seg.nii.gz"
"""Default names of the scans and label maps in a folder."""

SPACINGS = (0.1, 100.0)
"""Least and largest spacing of a store's working grid, mm: no scan is finer, no organ larger."""

RHO = 10.0
"""ρ of mode `across`, mm: scale on which a match's weight falls off with its distance from the
organ."""
SIGMA_X = 25.0
"""σ_x of mode `local`, mm: standard deviation of the field's kernel in space."""
SIGMA_T = 10.0
"""σ_t of mode `local`, mm: standard deviation of the field's kernel in translation, by which
matches that disagree hardly influence each other."""


SMALLEST, LARGEST = 1e-3, 1e6
"""Limits of widths in mm, and of ν in HU or its factor: what single precision resolves."""


@dataclass(frozen=True)
class TransferOptions:
    """Options of the transfer; defaults depend on the mode and the organ table.

    Attributes
    ----------
    threshold : float, optional
        Voxels whose largest probability is below it are background; over 0, at most 1. If given,
        mode `local` does not raise the shares of organs whose atlases are scattered.
    nu : float or mapping of str to float
        A factor for every ν, or ν in HU of some organs by name.
    rho, sigma_x, sigma_t : float
        Widths of kernels, mm; see `RHO`, `SIGMA_X`, `SIGMA_T`.
    across : mapping of str to sequence of str
        By organ, in which organs matches must lie to move it, in all modes but `local`.
    fast : bool
        Whether mode `local` ends its refinement at 6 mm instead of 3 mm.

    Raises
    ------
    ParameterError
        If a number is out of range.
    """

    threshold: float | None = None
    nu: float | Mapping[str, float] = 1.0
    rho: float = RHO
    sigma_x: float = SIGMA_X
    sigma_t: float = SIGMA_T
    across: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fast: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ParameterError(
                f"The threshold must be over 0 and at most 1, not {self.threshold:g}."
            )
        given = self.nu if isinstance(self.nu, Mapping) else {"": self.nu}
        numbers = {"nu" + f" of {name}" * bool(name): nu for name, nu in given.items()}
        for name in ("rho", "sigma_x", "sigma_t"):
            numbers[name] = getattr(self, name)
        for name, number in numbers.items():
            if not 0 < number < math.inf:
                raise ParameterError(f"{name} must be a positive number, not {number:g}.")
            if not SMALLEST <= number <= LARGEST:
                raise ParameterError(
                    f"{name} must lie between {SMALLEST:g} and {LARGEST:g}, not be {number:g}."
                )

    def smallest_share(self, mode: str) -> float:
        """Share below which a voxel is background."""
        return MODES[mode].threshold if self.threshold is None else self.threshold

    def nus(self, mode: str, organs: "OrganTable") -> tuple[float, ...]:
        """ν of every organ, HU, in the order of the table."""
        usual = {organ.name: max(organ.nu, MODES[mode].least_nu) for organ in organs}
        if isinstance(self.nu, Mapping):
            return tuple(self.nu.get(name, nu) for name, nu in usual.items())
        return tuple(self.nu * nu for nu in usual.values())

    def to_json(self, mode: str, organs: "OrganTable") -> dict[str, Any]:
        """All values that a mode uses, in JSON types."""
        return {
            "threshold": self.smallest_share(mode),
            "threshold_given": self.threshold is not None,
            "nu": dict(zip(organs.names, self.nus(mode, organs), strict=True)),
            "rho": self.rho,
            "sigma_x": self.sigma_x,
            "sigma_t": self.sigma_t,
            "across": {name: list(movers) for name, movers in self.across.items()},
            "fast": self.fast,
        }

    def check(self, mode: str, organs: "OrganTable", wanted: "OrganTable | None" = None) -> None:
        """Refuse a mode or organs that do not exist, and what would not be looked at.

        Parameters
        ----------
        mode : str
        organs : OrganTable
            Those of the store.
        wanted : OrganTable, optional
            Those of them that are segmented; all if not given.

        Raises
        ------
        ParameterError
        """
        if mode not in MODES:
            *others, last = MODES
            raise ParameterError(
                f"The mode {mode!r} is unknown; use {', '.join(others)} or {last}."
            )
        set_for = {*self.across} | ({*self.nu} if isinstance(self.nu, Mapping) else set())
        check_organs({*set_for, *(n for many in self.across.values() for n in many)}, organs)
        if idle := sorted(set_for - {*(wanted or organs).names}):
            raise ParameterError(
                f"--nu or --across is given for {', '.join(idle)}, which is not segmented; name it"
                " in --organs too, or leave that out."
            )
        if self.across and mode == "local":
            raise ParameterError(
                "In mode local all matches move all organs; use another mode with --across."
            )
        if self.fast and mode != "local":
            raise ParameterError(
                f"--fast is for mode local, whose fields are refined; mode {mode} has none."
            )


def check_count(what: str, number: object) -> None:
    """Refuse what is no positive whole number; None is none at all.

    Raises
    ------
    ParameterError
        If it is something else.

    Examples
    --------
    >>> check_count("The limit", 2.0)
    Traceback (most recent call last):
    kpt_dask.errors.ParameterError: The limit must be a whole number of at least 1, not 2.0.
    """
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ParameterError(f"{what} must be a whole number of at least 1, not {number!r}.")


def check_organs(names: Iterable[str], organs: "OrganTable") -> None:
    """Refuse names of organs that the atlases do not know.

    Raises
    ------
    ParameterError
    """
    if unknown := sorted(set(names) - set(organs.names)):
        raise ParameterError(
            f"The atlases know no organ {', '.join(unknown)}; they know {', '.join(organs.names)}."
        )


MEMORY = 1 << 30
"""Bytes that the large arrays of a process take at most, by default: see
`kpt_dask.runtime.cluster.budget`."""

DEFAULTS = TransferOptions()
"""All options at their defaults."""


def parse_nu(text: str) -> float | dict[str, float]:
    """Read a factor ("1.5") or ν of some organs ("mandible=300,larynx=80").

    Raises
    ------
    ParameterError
        If it is neither.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = (part.split("=") for part in text.split(","))
        return {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        raise ParameterError(
            f"{text!r} says no nu; write a factor such as 1.5, or HU by organ such as"
            " mandible=300,larynx=80."
        ) from None


def parse_across(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read which organs move which ("spleen=lung_left,liver", one text for each organ).

    Raises
    ------
    ParameterError
        If a text says something else.
    """
    found = {}
    for text in texts:
        organ, _, movers = text.partition("=")
        names = tuple(name.strip() for name in movers.split(","))
        if not organ.strip() or not all(names):
            raise ParameterError(
                f"{text!r} does not say which organs move which; write for instance"
                " spleen=lung_left,liver."
            )
        found[organ.strip()] = names
    return found
