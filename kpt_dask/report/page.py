"""The page: one HTML file with everything in it, filled from a template."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import AtlasStore, Organ
from kpt_dask.organ_transfer.measures import UNSURE, OrganMeasures
from kpt_dask.report.display import Display, around_organs, coarser, display_of, hu_of_tones
from kpt_dask.report.findings import Findings
from kpt_dask.report.gallery import PIXELS, Gallery, Pair
from kpt_dask.report.reasons import atlas_parts, centre_voxel, matches_of
from kpt_dask.report.slices import AXIAL, CORONAL, SAGITTAL, Pictures, pictures_of
from kpt_dask.report.turntable import turntable_of
from kpt_dask.report.viewer import STEPS, Viewer, how_to_install, organs_nifti, scan_nifti

SLICES = 96
"""Pictures of each plane, at most."""
SLICES_BESIDE_VIEWER = 32
"""… where a viewer shows all voxels, and pictures are for print and for browsers without WebGL."""
MOST_BYTES = 14_500_000
"""Of a page with a viewer, which is filled with as fine a scan as there is room for."""
HOPELESS = 1.7
"""Times too large: no coarser grey values make it fit."""
LEAST_VOXELS = 100_000
"""Fewer voxels than these are not made fewer."""
PAIRS, ALL_PAIRS = 6, 150
"""Matches shown of an organ, and of all organs, at most; each organ has two all the same."""
PARTS = 6
"""Atlases named of an organ; the others are summed up."""

_REASONS = {
    "local": "Each atlas was warped to the scan by a field through its matched keypoints, then"
    " voted for each voxel; its part of an organ's votes grows with how well its HU fit the scan's"
    " around the organ.",
    "across": "Matched keypoints near an organ moved it from the atlas to the scan; an atlas's part"
    " of its votes is that of the weights of these moves.",
}
_MOVED = (
    "Matched keypoints in an organ moved it from the atlas to the scan; an atlas's part of its"
    " votes is that of the weights of these matches."
)
_CONFIDENCE = {
    "local": "it is the mean overlap of two atlases, warped to the scan. Look twice where it is"
    " below 0.35. It tells whether the atlases agree where an organ lies, not whether it is there:"
    " one that was removed is labelled all the same."
}
_SHARES = (
    "it grows with the share of the atlases that found the organ, and with how clear their votes"
    " are. Look twice where it is below 0.35; one that was removed is labelled all the same."
)


def _spoken(name: str) -> str:
    """Name of an organ for people."""
    return name.replace("_", " ")


def page_of(
    findings: Findings, store: AtlasStore | None, viewer: Viewer | None, most_voxels: int
) -> str:
    """Write the page of a segmentation.

    Parameters
    ----------
    findings : Findings
    store : AtlasStore, optional
        Store of the atlases; without it, their patches are left out, and the page says so.
    viewer : Viewer, optional
        NiiVue; without it the page shows pictures, and says what to install.
    most_voxels : int
        Voxels of the scan that are read, at most.

    Returns
    -------
    str
        HTML without a reference to anything outside of it.
    """
    # Imported here: it takes a while, and only pages need it.
    from jinja2 import Environment, StrictUndefined

    organs = [organ for organ in findings.table if organ.name in findings.organs]
    display = _display(findings, organs, most_voxels)
    page, data = _contents(findings, organs, display, store, bool(viewer))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_text("page.html"))

    def render(volumes: Mapping[str, str]) -> str:
        return template.render(
            page=page,
            data=_json(data),
            style=_text("page.css"),
            script=_text("page.js") + (_text("niivue.js") if viewer else ""),
            viewer=viewer,
            install=how_to_install(),
            pixels=PIXELS,
            **volumes,
        )

    if viewer is None:
        return render({})
    rest = len(render(dict.fromkeys(_VOLUMES, "")))
    return render(_volumes(display, MOST_BYTES - rest))


def _text(name: str) -> str:
    return files("kpt_dask.report").joinpath("template", name).read_text("utf-8")


def _json(data: Any) -> Any:
    """JSON that is safe inside an HTML element."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(data)


def _display(findings: Findings, organs: Sequence[Organ], most_voxels: int) -> Display:
    values = [organ.value for organ in organs]
    volume = findings.volume
    return display_of(
        volume.levels, findings.labels, volume.grid, values, most_voxels, volume.source_grid
    )


_VOLUMES = "scan_nifti", "organs_nifti", "solid_nifti", "viewer_spacing"
"""What `_volumes` gives."""


def _volumes(display: Display, room: int) -> dict[str, str]:
    """Volumes for the viewer: the finest that fit into so many characters."""
    while True:
        organs, solid = organs_nifti(display), organs_nifti(around_organs(display))
        left = room - len(organs) - len(solid)
        for step in STEPS:
            scan = scan_nifti(display, step)
            if len(scan) <= left or display.tones.size < LEAST_VOXELS:
                said = f"{display.grid.spacing[0]:g}"
                return dict(zip(_VOLUMES, (scan, organs, solid, said), strict=True))
            if len(scan) > HOPELESS * left:
                break
        display = coarser(display)


def _contents(
    findings: Findings,
    organs: Sequence[Organ],
    display: Display,
    store: AtlasStore | None,
    has_viewer: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collect what the template shows, and what the scripts need."""
    measured = [findings.organs[organ.name] for organ in organs]
    centres = [
        centre_voxel(one, display.organs, number, display.grid)
        for number, one in enumerate(measured, 1)
    ]
    most = SLICES_BESIDE_VIEWER if has_viewer else SLICES
    views = [pictures_of(display, view, most) for view in (AXIAL, CORONAL, SAGITTAL)]
    turned = turntable_of(display.organs)
    gallery = Gallery(findings, store)
    order = sorted(
        (number for number, one in enumerate(measured, 1) if one.volume_ml > 0),
        key=lambda number: measured[number - 1].confidence,
    )
    each = max(min(PAIRS, ALL_PAIRS // max(len(order), 1)), 2)
    table = [_row(findings, organs[n - 1], n, gallery, each, display) for n in order]
    # The first organ of the list, which is the least sure, is what one sees first.
    start = next((centres[n - 1] for n in order if centres[n - 1] is not None), None)
    start = start or [size // 2 for size in display.tones.shape]
    made = findings.about["segmentation"]
    page = {
        "scan": findings.scan,
        "found": len(order),
        "n_atlases": len(findings.atlases),
        "mode": findings.mode,
        "warnings": list(findings.about.get("warnings", ())),
        "organs": organs,
        "views": [_panel(one, start) for one in views],
        "turntable": turned
        and {"columns": turned.shape[1], "rows": turned.shape[0], "last": len(turned.frames) - 1},
        "spacing": f"{display.grid.spacing[0]:g}",
        "volume_grid": findings.volume_grid,
        "table": table,
        "absent": [
            _spoken(organ.name)
            for organ, one in zip(organs, measured, strict=True)
            if not one.volume_ml
        ],
        "confidence": _CONFIDENCE.get(findings.mode, _SHARES),
        "reason": _REASONS.get(findings.mode, _MOVED)
        + " The galleries show matches of the first pass: those that voted for the organ first, the"
        " strongest first.",
        "gallery_note": _gallery_note(store, gallery),
        "software": findings.about["software"],
        "run": findings.about.get("run", ""),
        "parameters": made["parameters"],
    }
    data = {
        "spacing": float(display.grid.spacing[0]),
        "origin": display.grid.origin.tolist(),
        "shape": list(display.tones.shape),
        "start": start,
        "hu": hu_of_tones().tolist(),
        "views": [_for_scripts(one) for one in views],
        "turntable": turned and turned.frames,
        "organs": [
            {
                "number": number,
                "label": _spoken(organ.name),
                "colour": list(organ.colour),
                "centre": centre,
            }
            for number, (organ, centre) in enumerate(zip(organs, centres, strict=True), 1)
        ],
    }
    return page, data


def _panel(pictures: Pictures, start: Sequence[int]) -> dict[str, Any]:
    view = pictures.view
    distance = np.abs(np.array(pictures.indices) - start[view.fixed])
    return {
        "name": view.name,
        "rows": pictures.shape[0],
        "columns": pictures.shape[1],
        "last": len(pictures.indices) - 1,
        "middle": int(distance.argmin()),
        "letters": list(zip(view.letters, ("left", "right", "above", "below"), strict=True)),
    }


def _for_scripts(pictures: Pictures) -> dict[str, Any]:
    view = pictures.view
    return {
        "name": view.name,
        "fixed": view.fixed,
        "rows": view.rows,
        "columns": view.columns,
        "shape": list(pictures.shape),
        "indices": pictures.indices,
        "scan": pictures.scan,
        "organs": pictures.organs,
    }


def _row(
    findings: Findings,
    organ: Organ,
    number: int,
    gallery: Gallery,
    pairs: int,
    display: Display,
) -> dict[str, Any]:
    """One organ: its row of the table, and its reasons."""
    measures = findings.organs[organ.name]
    matches = matches_of(findings.keypoints, organ.value, measures, pairs)
    parts = atlas_parts(findings, organ.name)
    low, high = measures.interval_ml
    return {
        "number": number,
        "label": _spoken(organ.name),
        "colour": organ.colour,
        "confidence": f"{measures.confidence:.2f}",
        "unsure": measures.confidence < UNSURE or (findings.mode == "local" and len(parts) == 1),
        "volume": _millilitres(measures.volume_ml),
        "interval": f"{_millilitres(low)} – {_millilitres(high)}",
        "hu": "" if measures.mean_hu is None else f"{measures.mean_hu:.0f}".replace("-", "−"),
        "at_border": measures.at_border,
        "summary": _summary(measures, parts),
        "parts": _parts(parts),
        "pairs": [_figure(gallery.pair_of(match, organ.value), display) for match in matches],
    }


def _millilitres(volume: float) -> str:
    return f"{volume:.1f}" if volume < 100 else f"{volume:.0f}"


def _summary(measures: OrganMeasures, parts: Sequence[tuple[str, float]]) -> str:
    atlases = "atlas" if len(parts) == 1 else "atlases"
    keypoints = f"{measures.votes} keypoint{'' if measures.votes == 1 else 's'} voted for it"
    return f"confidence {measures.confidence:.2f}; {keypoints}; {len(parts)} {atlases} decided it"


def _parts(parts: Sequence[tuple[str, float]]) -> list[dict[str, str]]:
    # A single other atlas takes no more room by its name.
    n = PARTS if len(parts) > PARTS + 1 else len(parts)
    named = [(name, part, part / parts[0][1]) for name, part in parts[:n]]
    if len(parts) > n:
        # Without a bar: it is no atlas that outweighs all others.
        rest = sum(part for _, part in parts[n:])
        named.append((f"{len(parts) - n} others together", rest, 0.0))
    return [
        {"atlas": name, "percent": f"{100 * part:.0f}", "width": f"{width:.3f}"}
        for name, part, width in named
    ]


def _figure(pair: Pair, display: Display) -> dict[str, Any]:
    z, y, x = pair.position
    last = np.array(display.tones.shape) - 1
    index: NDArray[Any] = np.rint(display.grid.to_index(pair.position)).astype(int)
    return {
        "atlas": pair.atlas,
        "side": f"{pair.side:.0f}",
        "label": "atlas keypoint in " + ("no organ" if pair.label is None else _spoken(pair.label)),
        "place": f"z {z:.0f}, y {y:.0f}, x {x:.0f} mm".replace("-", "−"),
        "voxel": np.clip(index, 0, last).tolist(),
        "scan": pair.scan,
        "other": pair.other,
    }


def _gallery_note(store: AtlasStore | None, gallery: Gallery) -> str:
    if store is None:
        return "Patches of the atlases are left out: name their store by kpt report --store."
    if gallery.missing:
        said = ", ".join(f"{name} {why}" for name, why in sorted(gallery.missing.items()))
        return f"Some patches of atlases are left out: {said}."
    return ""
