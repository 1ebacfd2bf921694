"""Modes `organ`, `affine` and `across`: whole organs are moved by matches (eqs. 8 to 11).

In: matches and organ strips. Out: filled slabs of the probability volume.
`plan` turns matches into moves, `schedule` distributes slabs, `kernels` sum the organs.
Must not import `warping`.

Wachinger et al., Keypoint Transfer Segmentation, IPMI 2015,
https://doi.org/10.1007/978-3-319-19992-4_18.

The share of organ l at voxel x is

    Σ_m w_lm · [S_m(x) = l] · exp(−(I(x) − I_m(x))² / 2ν_l²)  /  Σ_m w_lm

over the matches m that move the organ; I_m and S_m are the atlas's image and label map, moved. A
voxel gets the organ with the largest share (ties go to the organ that comes first in the table),
or 0 where that is below the threshold. An atlas that does not annotate an organ does not move it,
so it does not count against it. The modes differ in which matches move an organ, in their weights,
and in how:

- `organ` (eqs. 8–11): matches whose atlas label and test keypoint's label are l, with
  w_lm = p(L) · p(m), by their translation, rounded to voxels.
- `affine`: the same, but where an atlas has `organ_affines.LEAST` matches of the organ, these
  together move it by one affine, held to the affine of the atlas's whole body; each counts as far
  as it agrees. I_m and S_m are those of the voxel nearest to where x came from.
- `across`: all matches, of any label or none, with w_lm = p(m) · exp(−d² / 2ρ²), d the distance of
  the atlas keypoint to the organ, by their translation. Matches farther than `distances.REACH_RHO`
  · ρ do not count, nor do the lightest moves, up to `plan.NEGLIGIBLE` of the organ's weight.

In all three, ``options.across`` names organs that others move: by matches of these labels, with
w_lm = p(L) · p(m).
"""
