"""Kernels of the refinement beside its iterations: interpolation, labels, masks, sums by organ."""

from typing import Any

import numpy as np

from kpt_dask.kernels.jit import kernel


@kernel
def spread(values: Any, first: Any, step: Any, shape: Any, runs: Any, out: Any) -> None:
    """Interpolate between the points of one lattice at those of another, trilinearly.

    Parameters
    ----------
    values : float32 array (c, z, y, x)
        Beyond it its edge repeats.
    first : float32 array (3)
        Index in `values` of the first point of `out`.
    step : float32
        From one point of `out` to the next.
    shape : (int, int, int)
        Points of `out` along z, y and x.
    runs : int64 array (run, 2)
        Half-open ranges of points, each within a row.
    out : float32 array (c, point)
        Changed in the runs.
    """
    _, ny, nx = shape
    channels, dz, dy, dx = values.shape
    zero, one = np.float32(0), np.float32(1)
    # Along x first: once for each row of `values`, of which there are fewer.
    wide = np.empty((channels, dz, dy, nx), np.float32)
    near, after = np.empty(nx, np.int64), np.empty(nx, np.int64)
    part = np.empty(nx, np.float32)
    for x in range(nx):
        p = min(max(first[2] + step * np.float32(x), zero), np.float32(dx - 1))
        near[x] = min(np.int64(p), max(dx - 2, 0))
        after[x] = min(near[x] + 1, dx - 1)
        part[x] = p - np.float32(near[x])
    for c in range(channels):
        for k in range(dz):
            for j in range(dy):
                a, line = values[c, k, j], wide[c, k, j]
                for x in range(nx):
                    low = a[np.uint64(near[x])]
                    line[x] = low + part[x] * (a[np.uint64(after[x])] - low)
    for r in range(runs.shape[0]):
        begin, end = runs[r, 0], runs[r, 1]
        row = begin // nx
        x0, n = begin - row * nx, end - begin
        p = min(max(first[0] + step * np.float32(row // ny), zero), np.float32(dz - 1))
        k = min(np.int64(p), max(dz - 2, 0))
        fz, up = p - np.float32(k), min(k + 1, dz - 1)
        p = min(max(first[1] + step * np.float32(row % ny), zero), np.float32(dy - 1))
        j = min(np.int64(p), max(dy - 2, 0))
        fy, across = p - np.float32(j), min(j + 1, dy - 1)
        for c in range(channels):
            a, b = wide[c, k, j, x0 : x0 + n], wide[c, k, across, x0 : x0 + n]
            d, e = wide[c, up, j, x0 : x0 + n], wide[c, up, across, x0 : x0 + n]
            line = out[c, begin:end]
            for x in range(n):
                front = (one - fy) * a[x] + fy * b[x]
                back = (one - fy) * d[x] + fy * e[x]
                line[x] = front + fz * (back - front)


@kernel
def nearest(packed: Any, coding: Any, where: Any, table: Any, runs: Any, out: Any) -> None:
    """Look up the labels of the voxels nearest to the mapped points of a lattice.

    Parameters
    ----------
    packed : array (z, y, x)
        Labels, coded as for `look_up`.
    coding : (int, int)
        Shift and mask.
    where : kpt_dask.organ_transfer.refinement.iteration.PointMap
    table : uint16 array
    runs : int64 array (run, 2)
        Half-open ranges of points, each within a row.
    out : uint16 array (point)
        Changed in the runs; 0 beside the image.
    """
    at, step, scale, start, v, (_, ny, nx) = where
    dz, dy, dx = packed.shape
    half, one = np.float32(0.5), np.float32(1)
    lz, ly, lx = np.float32(dz), np.float32(dy), np.float32(dx)
    near, beside = np.empty(nx, np.int32), np.empty(nx, np.bool_)
    flat = packed.reshape(-1)
    shift, mask = coding
    last = table.size - 1
    for r in range(runs.shape[0]):
        begin, end = runs[r, 0], runs[r, 1]
        row, size = begin // nx, end - begin
        z = row // ny
        i, j = begin - z * ny * nx, end - z * ny * nx
        z0 = at[0] + step * np.float32(z) + half
        y0 = at[1] + step * np.float32(row % ny) + half
        x0 = at[2] + step * np.float32(begin - row * nx) + half
        a, b = start[0, z, i:j], v[0, z, i:j]
        for k in range(size):
            p = z0 + scale * (a[k] + b[k])
            beside[k] = (p < 0) | (p >= lz)
            near[k] = np.int32(min(max(p, np.float32(0)), lz - one)) * np.int32(dy)
        a, b = start[1, z, i:j], v[1, z, i:j]
        for k in range(size):
            p = y0 + scale * (a[k] + b[k])
            beside[k] |= (p < 0) | (p >= ly)
            q = np.int32(min(max(p, np.float32(0)), ly - one))
            near[k] = (near[k] + q) * np.int32(dx)
        a, b = start[2, z, i:j], v[2, z, i:j]
        for k in range(size):
            p = x0 + step * np.float32(np.int32(k)) + scale * (a[k] + b[k])
            beside[k] |= (p < 0) | (p >= lx)
            near[k] += np.int32(min(max(p, np.float32(0)), lx - one))
        line = out[begin:end]
        for k in range(size):
            label = np.int64(flat[np.uint64(near[k])]) >> shift & mask
            line[k] = 0 if beside[k] else table[np.uint64(min(label, last))]


@kernel
def pack(start: Any, v: Any, cc: Any, runs: Any, units: Any, packed: Any, rounded: Any) -> None:
    """Round a field, the weight of its atlas, and the local correlation.

    Parameters
    ----------
    start : float32 array (4, point)
        u⁰, mm, and s, its support.
    v : float32 array (3, point)
        Correction of u⁰, mm.
    cc : float32 array (point)
        The weight is cc² · s^½.
    runs : int64 array (run, 2)
        Half-open ranges of points, each within a row.
    units : float32 array (5)
        Offset of each component of the field, mm; steps per mm, and per unit of weight.
    packed : int16 array (4, point)
        Field beyond its offset, and square root of the weight, in steps; changed.
    rounded : uint8 array (point)
        cc in 255ths; changed.
    """
    most = np.float32(32767)
    for r in range(runs.shape[0]):
        begin, end = runs[r, 0], runs[r, 1]
        for c in range(3):
            a, b, line = start[c, begin:end], v[c, begin:end], packed[c, begin:end]
            for k in range(end - begin):
                steps = np.rint((a[k] + b[k] - units[c]) * units[3])
                line[k] = np.int16(min(max(steps, -most), most))
        own, a = start[3, begin:end], cc[begin:end]
        line, other = packed[3, begin:end], rounded[begin:end]
        for k in range(end - begin):
            steps = np.rint(a[k] * np.sqrt(np.sqrt(own[k])) * units[4])
            line[k] = np.int16(min(max(steps, np.float32(0)), most))
            other[k] = np.uint8(np.rint(a[k] * np.float32(255)))


@kernel
def look_up(packed: Any, shift: Any, mask: Any, first: Any, table: Any, out: Any) -> None:
    """Look up the HU, or the labels, that are coded in numbers, in a table.

    Parameters
    ----------
    packed : array (n)
    shift, mask, first : int
        A number n holds ``(n >> shift & mask) + first``; beyond the table its ends count.
    table : array (m)
    out : array (n)
        Changed.
    """
    last = table.size - 1
    for i in range(out.size):
        value = (np.int32(packed[i]) >> shift & mask) + first
        out[i] = table[min(max(value, 0), last)]


@kernel
def coarsen(mask: Any, ratio: Any, out: Any) -> None:
    """Mark the points of a coarser lattice next to which any point of a finer one is marked.

    Parameters
    ----------
    mask : bool array (z, y, x)
    ratio : float
        Points of the finer lattice from one of the coarser one to the next; both begin together.
    out : bool array (z, y, x)
        False at first; changed.
    """
    nz, ny, nx = mask.shape
    mz, my, mx = out.shape
    for z in range(nz):
        k = min(int(z / ratio + 0.5), mz - 1)
        for y in range(ny):
            j = min(int(y / ratio + 0.5), my - 1)
            row, line = mask[z, y], out[k, j]
            for x in range(nx):
                if row[x]:
                    line[min(int(x / ratio + 0.5), mx - 1)] = True


@kernel
def fill_gaps(runs: Any, nx: Any, widest: Any, mask: Any) -> None:
    """Mark the points between two runs of a row, where they are few.

    Parameters
    ----------
    runs : int64 array (run, 2)
        Half-open ranges of points, each within a row, in order.
    nx : int
        Points of a row.
    widest : int
        Number of points of the widest gap that is filled.
    mask : bool array (point)
        Changed.
    """
    for r in range(1, runs.shape[0]):
        begin, end = runs[r - 1, 1], runs[r, 0]
        if end - begin <= widest and begin // nx == end // nx:
            mask[begin:end] = True


@kernel
def mark_organs(labels: Any, marked: Any) -> None:
    """Set, at each point, the bit of the organ that an atlas labels there.

    Parameters
    ----------
    labels : uint16 array (n)
        Labels of one atlas: index of an organ + 1, or 0.
    marked : uint64 array (n, word)
        A bit for each organ; changed.
    """
    for i in range(labels.size):
        if labels[i]:
            organ = np.int64(labels[i]) - 1
            marked[i, organ // 64] |= np.uint64(1) << np.uint64(organ % 64)


@kernel
def sum_by_organ(values: Any, marked: Any, sums: Any, counts: Any) -> None:
    """Sum whole numbers over the points of each organ.

    Parameters
    ----------
    values : uint8 array (n)
    marked : uint64 array (n, word)
        From `mark_organs`.
    sums, counts : int64 arrays (organ)
        Changed.
    """
    for i in range(values.size):
        for word in range(marked.shape[1]):
            bits = marked[i, word]
            organ = 64 * word
            while bits:
                if bits & np.uint64(1):
                    sums[organ] += values[i]
                    counts[organ] += 1
                bits >>= np.uint64(1)
                organ += 1


@kernel
def count_others(labels: Any, counts: Any) -> None:
    """Count, of each organ and atlas, the points it labels by how many other atlases do.

    Parameters
    ----------
    labels : uint16 array (atlas, point)
        Index of an organ + 1, or 0.
    counts : int64 array (organ, atlas, others)
        Changed.
    """
    here = np.zeros(counts.shape[0] + 1, np.int64)
    for x in range(labels.shape[1]):
        for a in range(labels.shape[0]):
            here[labels[a, x]] += 1
        if here[0] < labels.shape[0]:
            for a in range(labels.shape[0]):
                organ = np.int64(labels[a, x])
                if organ:
                    counts[organ - 1, a, here[organ] - 1] += 1
            for a in range(labels.shape[0]):
                here[labels[a, x]] = 0
        here[0] = 0
