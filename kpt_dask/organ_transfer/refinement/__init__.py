"""Dense refinement: each atlas's displacement field is corrected near organs, by intensities.

In: the scan's volume, atlases, their fields and the box where organs may lie. Out: each atlas's
field on one lattice, and the local correlation of the warped atlas with the scan. Knows no votes.

F is the scan and M the atlas, both mapped by a piecewise linear function of HU (`atlas.HU`,
`atlas.INTENSITY`). The field maps a lattice point x to y = x + u(x), mm; u⁰ is the field of the
matches and v = u − u⁰ the correction. On each level of the lattice (`lattice.FULL`; `lattice.FAST`
with ``--fast``), from coarse to fine, each iteration

1. samples M at y, trilinearly; edges repeat;
2. takes means over boxes of 5 × 5 × 5 points, clipped at the edges: a = ⟨FM⟩ − F̄M̄,
   b = ⟨FF⟩ − F̄² + ε and c = ⟨MM⟩ − M̄² + ε, with ε = 10⁻³;
3. computes the force d = a/(bc) · [(F − F̄) − (a/c)(M − M̄)] · ½(∇F + ∇M), which increases the local
   correlation a/√(bc); it is 0 where an organ of the atlas, as u⁰ maps it, is more than 12 mm away
   along any axis;
4. smooths d by a Gaussian of 1.5 points, and scales it so that the 99th percentile of |d| is half
   the lattice spacing;
5. composes v ← u(x + d) + d − u⁰(x), and smooths v by a Gaussian of 0.5 points.

At the end cc = max(a/√(bc), 0.02), and the weight of the atlas is cc² √s, s the support of u⁰.
"""
