"""Dense refinement: each atlas's displacement field is corrected near organs, by intensities.

In: the scan's volume, atlases, their fields and the box where organs may lie. Out: each atlas's
field on one lattice, and the local correlation of the warped atlas with the scan. Knows no votes.

F is the scan and M the atlas, both mapped by a piecewise linear function of HU (`atlas.HU`,
`atlas.INTENSITY`). The field maps a lattice point x to y = x + u(x), mm; u⁰ is the field of the
matches and v = u − u⁰ the correction. Ω are the points where an organ of the atlas, as u⁰ maps it,
is at most 18 mm away along each axis, and Ω⁺ those within two points of Ω. On levels finer than
6 mm only organs of at most 100 mL count: larger ones gain nothing there, and take most of the
time. On each level of the lattice (`lattice.FULL`; `lattice.FAST` with ``--fast``), from coarse to
fine, each iteration

1. samples M at y, trilinearly; edges repeat;
2. takes means over boxes of 5 × 5 × 5 points: a = ⟨FM⟩ − F̄M̄, b = ⟨FF⟩ − F̄² + ε and
   c = ⟨MM⟩ − M̄² + ε, with ε = 10⁻³;
3. computes the force d = a/(bc) · [(F − F̄) − (a/c)(M − M̄)] · ½(∇F + ∇M) in Ω, which increases
   the local correlation a/√(bc); d is 0 elsewhere;
4. smooths d by a Gaussian of 1.5 points along x, then y, then z, each time 0 beyond Ω⁺, and scales
   it so that the 99th percentile of |d| in Ω is half the lattice spacing;
5. adds it, w = v + d, and lets the sum diffuse: v(x) ← w(x) + κ Σ_y (w(y) − w(x)) in Ω⁺, over the
   six neighbours y of x, with κ = 0.15.

Beyond Ω⁺ v is what the coarser level gave, so the time goes with the organs, not with the box
around them. At the end cc = max(a/√(bc), 0.02), and the weight of the atlas is cc² √s, s the
support of u⁰.
"""
