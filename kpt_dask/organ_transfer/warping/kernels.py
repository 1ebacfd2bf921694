"""Kernels of mode `local`: votes of warped atlases, smoothing, HU histograms, mean field."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.exponential import exp2
from kpt_dask.kernels.jit import kernel

SMALLEST = np.float32(1e-6)
"""Likelihood added to that of intensities, so that weights still decide where no atlas fits."""
FARTHEST = np.float32(40.0)
"""Largest −log₂ of a likelihood; smaller likelihoods count as this one."""
REACH = 2
"""Voxels on each side over which shares are averaged."""
LEAST = np.float32(0.02)
"""Share above which a voxel enters an organ's HU histogram."""
ONE = 1 << 16
"""Count of a share of 1 in the histograms: integers, so that sums are exact in any order."""


class CellPlan(NamedTuple):
    """Cells of a block, their groups of organs, and the organs: arrays of `Cells` for kernels.

    Attributes
    ----------
    step : int
        Edge of a cell, voxels.
    lattice_index : int64 array (cell, 3)
        Lattice index (z, y, x) of each cell.
    groups : int64 array (cell + 1)
        Where the groups of each cell begin.
    organs : int64 array (group + 1)
        Where the organs (slots) of each group begin.
    scale : float32 array (group)
        log₂ e / 2ν², 1/HU².
    """

    step: int
    lattice_index: NDArray[np.int64]
    groups: NDArray[np.int64]
    organs: NDArray[np.int64]
    scale: NDArray[np.float32]


class FieldPart(NamedTuple):
    """An atlas's refined field over a block.

    Attributes
    ----------
    first, shape : int64 arrays (3)
        Voxel of the scan at the first point of the whole lattice, and its number of points.
    per_voxel : float
        Lattice points from one voxel to the next.
    begin : int64 array (3)
        Lattice point at which `values` begins.
    values : float32 array (4, z, y, x)
        Atlas voxel minus scan voxel, in voxels, and the square root of the atlas's weight.
    """

    first: NDArray[np.int64]
    shape: NDArray[np.int64]
    per_voxel: float
    begin: NDArray[np.int64]
    values: NDArray[np.float32]


class AtlasPart(NamedTuple):
    """Planes of an atlas, the field that maps a block to them, and how its labels count.

    Attributes
    ----------
    voxels : uint16 or int32 array (z, y, x)
        HU and labels, from `atlas_store.crop.read_planes`.
    hu : (int, int, int)
        Shift, mask and first HU; see `atlas_store.crop.Coding`.
    label : (int, int)
        Shift and mask.
    box : int64 array (3, 2)
        Voxels of the atlas that `voxels` begins with; beyond them the atlas does not vote.
    field : FieldPart
    codes : uint16 array (slot)
        Code of each organ in the atlas's labels.
    rho : float32 array (slot)
        ρ of the atlas for each organ; 0 where it does not annotate the organ.
    """

    voxels: NDArray[Any]
    hu: tuple[int, int, int]
    label: tuple[int, int]
    box: NDArray[np.int64]
    field: FieldPart
    codes: NDArray[np.uint16]
    rho: NDArray[np.float32]


class VoteSums(NamedTuple):
    """Sums over the atlases: numerator and denominator of each organ's share.

    Attributes
    ----------
    votes, totals : float32 arrays (slot, voxel of the cell)
        Σ K_a ρ_al [L_a = l] and Σ K_a ρ_al.
    """

    votes: NDArray[np.float32]
    totals: NDArray[np.float32]


class BorderWeights(NamedTuple):
    """Weights of the mean field.

    Attributes
    ----------
    theta : float32
        θ, the threshold.
    strength : float32
        λ log₂ e.
    scale : float32
        log₂ e / 2β², 1/HU².
    """

    theta: np.float32
    strength: np.float32
    scale: np.float32


@kernel
def add_votes(part: Any, cells: Any, scan: Any, atlas: Any, sums: Any) -> None:
    """Add an atlas's votes in some cells: K_a ρ_al to the totals, and to the votes of its label.

    K_a = [exp(−(I − I_a)² / 2ν²) + 10⁻⁶] · cc_a² · √s_a.

    Parameters
    ----------
    part : (int, int)
        Range of cells.
    cells : CellPlan
    scan : float32 array (cell, voxel of the cell)
        I, HU.
    atlas : AtlasPart
    sums : VoteSums
        Changed.
    """
    step, index, groups, slots, scales = cells
    packed, (hu_shift, hu_mask, first_hu), (label_shift, label_mask), box, where, codes, rho = atlas
    origin, size, per, begin, field = where
    votes, totals = sums
    nz, ny, nx = size
    _, mz, my, mx = field.shape
    n = scan.shape[1]
    at, label = np.zeros(n, np.int64), np.zeros(n, np.uint16)
    weight, hu, likely = np.zeros(n, np.float32), np.zeros(n, np.float32), np.empty(n, np.float32)
    parts = np.zeros((3, n), np.float32)
    fz, fy, fx = parts[0], parts[1], parts[2]
    mixed = np.empty((4, step + 4), np.float32)
    (oz, ez), (oy, ey), (ox, ex) = box
    _, height, width = packed.shape
    bz, by, bx = np.float32(oz), np.float32(oy), np.float32(ox)
    lz, ly, lx = np.float32(ez - 1), np.float32(ey - 1), np.float32(ex - 1)
    up = height * width if ez - oz > 1 else 0
    across = width if ey - oy > 1 else 0
    along = 1 if ex - ox > 1 else 0
    half, one, nothing = np.float32(0.5), np.float32(1), np.float32(0)
    voxels = packed.reshape(-1)
    near = np.empty(step, np.int64)
    between = np.empty(step, np.float32)
    for cell in range(part[0], part[1]):
        z0, y0, x0 = index[cell, 0] * step, index[cell, 1] * step, index[cell, 2] * step
        left = np.int64(0)
        for x in range(step):
            p = min(max((x0 + x - origin[2]) * per, 0.0), nx - 1.0)
            i = min(np.int64(p), max(nx - 2, 0))
            between[x] = np.float32(p - i)
            i -= begin[2]
            if x == 0:
                left = i
            near[x] = i - left
        points = min(near[step - 1] + 2, mx - left)
        some = False
        for z in range(step):
            p = min(max((z0 + z - origin[0]) * per, 0.0), nz - 1.0)
            k = min(np.int64(p), max(nz - 2, 0))
            gz = np.float32(p - k)
            k -= begin[0]
            k1 = min(k + 1, mz - 1)
            for y in range(step):
                p = min(max((y0 + y - origin[1]) * per, 0.0), ny - 1.0)
                j = min(np.int64(p), max(ny - 2, 0))
                gy = np.float32(p - j)
                j -= begin[1]
                j1 = min(j + 1, my - 1)
                for c in range(4):
                    a, b = field[c, k, j], field[c, k, j1]
                    d, e = field[c, k1, j], field[c, k1, j1]
                    row = mixed[c]
                    for i in range(points):
                        low = (one - gy) * a[left + i] + gy * b[left + i]
                        high = (one - gy) * d[left + i] + gy * e[left + i]
                        row[i] = low + gz * (high - low)
                    row[points] = row[points - 1]
                q0 = (z * step + y) * step
                for x in range(step):
                    i, g = near[x], between[x]
                    q = q0 + x
                    tz = mixed[0, i] + g * (mixed[0, i + 1] - mixed[0, i]) + np.float32(z0 + z)
                    ty = mixed[1, i] + g * (mixed[1, i + 1] - mixed[1, i]) + np.float32(y0 + y)
                    tx = mixed[2, i] + g * (mixed[2, i + 1] - mixed[2, i]) + np.float32(x0 + x)
                    w = mixed[3, i] + g * (mixed[3, i + 1] - mixed[3, i])
                    inside = (tz >= bz - half) & (tz < lz + half) & (ty >= by - half)
                    inside &= (ty < ly + half) & (tx >= bx - half) & (tx < lx + half)
                    weight[q] = w * w if inside else nothing
                    some |= inside & (w > 0)
                    tz, ty, tx = min(max(tz, bz), lz), min(max(ty, by), ly), min(max(tx, bx), lx)
                    kk = min(np.int64(tz - bz), max(ez - oz - 2, 0))
                    jj = min(np.int64(ty - by), max(ey - oy - 2, 0))
                    ii = min(np.int64(tx - bx), max(ex - ox - 2, 0))
                    fz[q] = tz - bz - np.float32(kk)
                    fy[q] = ty - by - np.float32(jj)
                    fx[q] = tx - bx - np.float32(ii)
                    at[q] = (kk * height + jj) * width + ii
        if not some:
            continue
        for q in range(step * step * step):
            i = at[q]
            g = fx[q]
            nearest = i + (up if fz[q] >= half else 0) + (across if fy[q] >= half else 0)
            nearest += along if g >= half else 0
            label[q] = np.uint16(np.int32(voxels[nearest]) >> label_shift & label_mask)
            a = np.float32(np.int32(voxels[i]) >> hu_shift & hu_mask)
            b = np.float32(np.int32(voxels[i + along]) >> hu_shift & hu_mask)
            c0 = a + g * (b - a)
            i += across
            a = np.float32(np.int32(voxels[i]) >> hu_shift & hu_mask)
            b = np.float32(np.int32(voxels[i + along]) >> hu_shift & hu_mask)
            c1 = a + g * (b - a)
            i += up
            a = np.float32(np.int32(voxels[i]) >> hu_shift & hu_mask)
            b = np.float32(np.int32(voxels[i + along]) >> hu_shift & hu_mask)
            c3 = a + g * (b - a)
            i -= across
            a = np.float32(np.int32(voxels[i]) >> hu_shift & hu_mask)
            b = np.float32(np.int32(voxels[i + along]) >> hu_shift & hu_mask)
            c2 = a + g * (b - a)
            low = c0 + fy[q] * (c1 - c0)
            high = c2 + fy[q] * (c3 - c2)
            hu[q] = low + fz[q] * (high - low) + np.float32(first_hu)
        here = scan[cell]
        for g in range(groups[cell], groups[cell + 1]):
            scale = scales[g]
            for q in range(n):
                d = here[q] - hu[q]
                x = min(d * d * scale, FARTHEST)
                likely[q] = (exp2(-x) + SMALLEST) * weight[q]
            for o in range(slots[g], slots[g + 1]):
                code, r = codes[o], rho[o]
                if r == nothing:
                    continue
                vote, total = votes[o], totals[o]
                for q in range(n):
                    w = r * likely[q]
                    total[q] += w
                    vote[q] += w if label[q] == code else nothing


@kernel
def smooth(around: Any, out: Any) -> None:
    """Average over neighbours, with weights 1, 4, 6, 4 and 1 along each axis, over 16.

    Parameters
    ----------
    around : float32 array (z + 4, y + 4, x + 4)
        `REACH` voxels more on every side.
    out : float32 array (z, y, x)
        Changed.
    """
    far, near, middle = np.float32(1 / 16), np.float32(4 / 16), np.float32(6 / 16)
    depth, height, width = out.shape
    rows = np.empty((5, width + 4), np.float32)
    mean = np.empty(width + 4, np.float32)
    for z in range(depth):
        for y in range(height + 4):
            row = rows[y % 5]
            a, b, c = around[z, y], around[z + 1, y], around[z + 2, y]
            d, e = around[z + 3, y], around[z + 4, y]
            for x in range(width + 4):
                row[x] = far * (a[x] + e[x]) + near * (b[x] + d[x]) + middle * c[x]
            if y < 4:
                continue
            a, b, c = rows[(y - 4) % 5], rows[(y - 3) % 5], rows[(y - 2) % 5]
            d, e = rows[(y - 1) % 5], row
            for x in range(width + 4):
                mean[x] = far * (a[x] + e[x]) + near * (b[x] + d[x]) + middle * c[x]
            line = out[z, y - 4]
            for x in range(width):
                ends, sides = mean[x] + mean[x + 4], mean[x + 1] + mean[x + 3]
                line[x] = far * ends + near * sides + middle * mean[x + 2]


@kernel
def count_hu(share: Any, scan: Any, first: Any, width: Any, counts: Any, rows: Any) -> None:
    """Add voxels to the HU histograms inside and outside of an organ, and flag rows with a share.

    Parameters
    ----------
    share : float32 array (z, y, x)
    scan : float32 array (z, y, x)
        HU at the same voxels.
    first, width : float32
        Least HU of the first bin, and width of a bin; ends count what lies beyond.
    counts : int64 array (2, bin)
        h₁, Σ P where P > ½, and h₀, Σ (1 − P), in 1/`ONE` voxels; changed.
    rows : bool array (z, y)
        Changed.
    """
    depth, height, n = share.shape
    last = counts.shape[1] - 1
    for z in range(depth):
        for y in range(height):
            own, hu = share[z, y], scan[z, y]
            some = 0
            for x in range(n):
                some += own[x] > 0
            if some == 0:
                continue
            rows[z, y] = True
            for x in range(n):
                p = own[x]
                if p > LEAST:
                    b = min(max(int(np.floor((hu[x] - first) / width)), 0), last)
                    whole = int(p * np.float32(ONE) + np.float32(0.5))
                    if p > np.float32(0.5):
                        counts[0, b] += whole
                    counts[1, b] += ONE - whole


@kernel
def tell_by_hu(share: Any, scan: Any, first: Any, width: Any, shift: Any) -> None:
    """Shift the logit of an organ's shares by HU, in place.

    Parameters
    ----------
    share, scan, first, width
        As for `count_hu`.
    shift : float32 array (bin)
    """
    depth, height, n = share.shape
    last = shift.size - 1
    for z in range(depth):
        for y in range(height):
            own, hu = share[z, y], scan[z, y]
            for x in range(n):
                p = own[x]
                if p > LEAST:
                    b = min(max(int(np.floor((hu[x] - first) / width)), 0), last)
                    # A shift of the logit multiplies the odds p / (1 − p).
                    odds = p * np.exp(shift[b])
                    own[x] = odds / (odds + (np.float32(1) - p))


@kernel
def relax(shares: Any, scan: Any, border: Any, sweeps: Any, out: Any) -> None:
    """Let neighbours of like intensity agree: mean field over organs and background.

    With U_l = max(P_l, 10⁻⁴) of an organ and U_0 = max(1 − Σ_l P_l, 10⁻³) · θ/(1 − θ) of the
    background, q starts as U, normalized; each sweep is q_c(x) ∝ U_c(x) · exp(λ Σ_y
    exp(−(I(x) − I(y))²/2β²) q_c(y)) over the six neighbours y, of all voxels at once.

    Parameters
    ----------
    shares : float32 array (organ, z, y, x)
        An organ is ruled out where its share is 0.
    scan : float32 array (z, y, x)
        HU.
    border : BorderWeights
    sweeps : int
    out : float32 array (2, organ + 1, z, y, x)
        Changed; which half holds the result, the background last, is `sweeps` % 2.
    """
    theta, strength, scale = border
    organs, depth, height, width = shares.shape
    one, nothing = np.float32(1), np.float32(0)
    odds = theta / (one - theta)
    unary = np.empty((organs + 1, depth, height, width), np.float32)
    toward = np.zeros((3, depth + 1, height + 1, width + 1), np.float32)
    for z in range(depth):
        for y in range(height):
            here = scan[z, y]
            rest = unary[organs, z, y]
            rest[:] = one
            for o in range(organs):
                share, u = shares[o, z, y], unary[o, z, y]
                for x in range(width):
                    rest[x] -= share[x]
                    u[x] = max(share[x], np.float32(1e-4)) if share[x] > 0 else nothing
            for x in range(width):
                rest[x] = max(rest[x], np.float32(1e-3)) * odds
            if z + 1 < depth:
                line, other = toward[0, z + 1, y], scan[z + 1, y]
                for x in range(width):
                    d = here[x] - other[x]
                    line[x] = strength * exp2(-min(d * d * scale, FARTHEST))
            if y + 1 < height:
                line, other = toward[1, z, y + 1], scan[z, y + 1]
                for x in range(width):
                    d = here[x] - other[x]
                    line[x] = strength * exp2(-min(d * d * scale, FARTHEST))
            line = toward[2, z, y]
            for x in range(width - 1):
                d = here[x] - here[x + 1]
                line[x + 1] = strength * exp2(-min(d * d * scale, FARTHEST))
            for x in range(width):
                total = rest[x]
                for o in range(organs):
                    total += unary[o, z, y, x]
                for o in range(organs + 1):
                    out[0, o, z, y, x] = unary[o, z, y, x] / total
    fields = np.empty((organs + 1, width), np.float32)
    total, most = np.empty(width, np.float32), np.empty(width, np.float32)
    for sweep in range(sweeps):
        before, after = out[sweep % 2], out[(sweep + 1) % 2]
        for z in range(depth):
            below, above = max(z - 1, 0), min(z + 1, depth - 1)
            for y in range(height):
                front, back = max(y - 1, 0), min(y + 1, height - 1)
                # At the edges the strength is 0.
                w0, w1 = toward[0, z, y], toward[0, z + 1, y]
                w2, w3 = toward[1, z, y], toward[1, z, y + 1]
                w4 = toward[2, z, y]
                most[:] = nothing
                for o in range(organs + 1):
                    a, b = before[o, below, y], before[o, above, y]
                    c, d = before[o, z, front], before[o, z, back]
                    e, f = before[o, z, y], fields[o]
                    for x in range(width):
                        f[x] = w0[x] * a[x] + w1[x] * b[x] + w2[x] * c[x] + w3[x] * d[x]
                    for x in range(1, width):
                        f[x] += w4[x] * e[x - 1]
                    for x in range(width - 1):
                        f[x] += w4[x + 1] * e[x + 1]
                    for x in range(width):
                        most[x] = max(most[x], f[x])
                total[:] = nothing
                for o in range(organs + 1):
                    u, f = unary[o, z, y], fields[o]
                    for x in range(width):
                        f[x] = u[x] * exp2(max(f[x] - most[x], -FARTHEST * np.float32(2)))
                        total[x] += f[x]
                for o in range(organs + 1):
                    f, line = fields[o], after[o, z, y]
                    for x in range(width):
                        line[x] = f[x] / total[x]
