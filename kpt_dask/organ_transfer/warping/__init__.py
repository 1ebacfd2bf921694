"""Mode `local`: each atlas is warped by a smooth field through its matches, and votes per voxel.

In: matches and crops of atlases. Out: probabilities and labels. `landing` predicts boxes of organs,
`block` sums votes, `border` decides, `schedule` orders these steps. Must not import `moving`.

1. The field of each atlas, an affine trend and a kernel regression of its matches
   (`kpt_dask.matching.displacement.Field`), is refined where its organs are predicted
   (`kpt_dask.organ_transfer.refinement`). It maps voxel x of the scan to y in atlas a, with support
   s_a(x) and local correlation cc_a(x).
2. Votes. The share of organ l at x is

       P_l = Σ_a K_a ρ_al [L_a(y) = l]  /  Σ_a K_a ρ_al
       K_a = [exp(−(I(x) − I_a(y))² / 2ν_l²) + 10⁻⁶] · cc_a² · √s_a

   over the atlases a that annotate the organ and hold y in their crop (`atlas_store.crop`). I is
   the scan, HU; I_a, HU, is interpolated trilinearly; L_a is the label of the nearest voxel; ρ_al
   is the fourth power of the mean of cc_a over the points where any atlas labels l, times the
   square of how far the atlas's labels agree with those of the other atlases
   (`kpt_dask.organ_transfer.refinement.agreement.conformity`). Shares are averaged over neighbours
   with weights 1, 4, 6, 4 and 1 (over 16) along each axis, a Gaussian of 2 mm on the usual grid;
   edges of the scan repeat.
3. HU of the scan. logit P_l grows by 0.3 γ ln(h₁/h₀), where h₁ (Σ P_l over P_l > ½) and h₀
   (Σ (1 − P_l)) are normalized histograms of the HU of all voxels with P_l > 0.02, in bins of
   20 HU, smoothed by a Gaussian of one bin, with 0.2 voxels added to each bin. γ is ½ where the
   atlases' organs are typically 60 mm long or less, 1 from 120 mm on, and linear in between.
   Scattered atlases. It also grows by 2 (logit 0.35 − logit s_l) where s_l < 0.35 is the share of
   the other atlases at which each atlas's label is found best
   (`kpt_dask.organ_transfer.refinement.agreement.best_shares`), unless a threshold was given.
4. Borders. A mean field over organs and background (`warping.kernels.relax`), 5 Jacobi sweeps:

       q_c(x) ∝ U_c(x) · exp(λ Σ_y exp(−(I(x) − I(y))² / 2β²) q_c(y))

   over the six neighbours y of x, with U_l = max(P_l, 10⁻⁴), or 0 where P_l = 0, for an organ and
   U_0 = max(1 − Σ_l P_l, 10⁻³) · θ/(1 − θ) for the background, θ the threshold and β = 25 HU.
   λ = γ² for neighbours up to 3 mm apart, and γ² (3 mm / r)⁴ at r mm. The probability of organ l is
   θ q_l / (θ q_l + (1 − θ) q_0).

A voxel gets the organ with the largest probability (ties go to the organ that comes first in the
table), or 0 where that is below θ. An atlas that does not annotate an organ, or whose crop does not
hold y, votes neither for nor against it. Shares are 0 in cells that no atlas's box of the organ,
mapped by the atlas's field, reaches within `warping.landing.MARGIN`.
"""
