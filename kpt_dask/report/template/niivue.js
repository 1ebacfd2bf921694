
// NiiVue, where the browser has WebGL 2: two views of one scene, planes and 3-D.
window.kptScenes = {};
window.kptViewer = (async () => {
  const page = window.kptPage;
  const { data, place } = page;
  const box = document.getElementById("viewer");
  const chosen = document.getElementById("shown-by");
  const section = document.querySelector(".scan");
  const by = (viewer) => {
    box.hidden = !viewer;
    section.classList.toggle("by-viewer", viewer);
    page.panels.forEach((panel) => { panel.setFine(viewer); panel.draw(); });
  };
  const fail = (why) => {
    by(false);
    chosen.value = "pictures";
    chosen.disabled = true;
    const note = document.getElementById("no-viewer");
    note.textContent = `NiiVue cannot be shown (${why}); these are pictures.`;
    note.hidden = false;
  };
  if (!document.createElement("canvas").getContext("webgl2")) return fail("this browser has no WebGL 2");
  by(true);
  try {
    const text = (id) => document.getElementById(id).textContent;
    const image = (id, name, more) => niivue.NVImage.loadFromBase64({ base64: text(id), name, ...more });
    const colours = () => {
      const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
      for (const { number, label, colour } of data.organs) {
        table.R.push(colour[0]);
        table.G.push(colour[1]);
        table.B.push(colour[2]);
        table.A.push(page.shown.has(number) ? 255 : 0);
        table.I.push(number);
        table.labels.push(label);
      }
      return table;
    };
    const common = {
      isRadiologicalConvention: true, sagittalNoseLeft: true, dragAndDropEnabled: false,
      scrollRequiresFocus: true, isColorbar: false, showLegend: false, logLevel: "error", loadingText: "",
      backColor: [0, 0, 0, 1], crosshairColor: [0.47, 0.86, 1, 0.8], isAntiAlias: true,
      fontColor: [1, 0.91, 0.29, 1], showAllOrientationMarkers: true,
    };
    const planes = new niivue.Niivue({ ...common, crosshairGap: 6, multiplanarPadPixels: 4 });
    const solid = new niivue.Niivue({ ...common, isOrientCube: true, crosshairWidth: 0 });
    Object.assign(window.kptScenes, { planes, solid });
    await planes.attachToCanvas(document.getElementById("planes"), true);
    await solid.attachToCanvas(document.getElementById("solid"), true);
    planes.opts.multiplanarShowRender = 0;
    planes.setSliceType(planes.sliceTypeMultiplanar);
    solid.setSliceType(solid.sliceTypeRender);
    const [low, high] = page.range();
    const scan = await image("scan-nifti", "scan.nii.gz", { colormap: "gray", cal_min: low, cal_max: high });
    const organs = await image("organs-nifti", "organs.nii.gz", { opacity: page.opacity() });
    organs.setColormapLabel(colours());
    planes.addVolume(scan);
    planes.addVolume(organs);
    const alone = await image("solid-nifti", "organs.nii.gz", {});
    alone.setColormapLabel(colours());
    solid.addVolume(alone);
    solid.setRenderAzimuthElevation(180, 10);
    solid.setScale(1.25);
    await solid.setVolumeRenderIllumination(0.4);

    // Its world grows to the right and to the front, the page's to the left and to the back.
    const mm = (axis) => data.origin[axis] + data.spacing * place[axis];
    let following = false;
    const follow = () => {
      following = true;
      planes.scene.crosshairPos = planes.mm2frac([-mm(2), -mm(1), mm(0)]);
      planes.drawScene();
      following = false;
    };
    planes.onLocationChange = (location) => {
      if (following || !location || !location.mm) return;
      const [x, y, z] = location.mm;
      const to = [z, -y, -x].map((c, axis) => Math.min(Math.max(
        Math.round((c - data.origin[axis]) / data.spacing), 0), data.shape[axis] - 1));
      if (to.some((index, axis) => index !== place[axis])) {
        to.forEach((index, axis) => { place[axis] = index; });
        page.panels.forEach((panel) => panel.draw());
      }
    };
    page.listen({
      moved: follow,
      changed: () => {
        [scan.cal_min, scan.cal_max] = page.range();
        organs.opacity = page.opacity();
        for (const volume of [organs, alone]) volume.setColormapLabel(colours());
        planes.updateGLVolume();
        solid.updateGLVolume();
      },
    });
    const steps = { ArrowLeft: [2, -1], ArrowRight: [2, 1], ArrowUp: [1, -1], ArrowDown: [1, 1], PageUp: [0, 1], PageDown: [0, -1] };
    document.getElementById("planes").addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      const to = place.slice();
      to[step[0]] = Math.min(Math.max(to[step[0]] + step[1], 0), data.shape[step[0]] - 1);
      page.go(to, "Cross");
    }, true);
    const turns = { ArrowLeft: [15, 0], ArrowRight: [-15, 0], ArrowUp: [0, 15], ArrowDown: [0, -15] };
    document.getElementById("solid").addEventListener("keydown", (event) => {
      const turn = turns[event.key];
      if (!turn) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      solid.setRenderAzimuthElevation(solid.scene.renderAzimuth + turn[0], solid.scene.renderElevation + turn[1]);
    }, true);
    chosen.addEventListener("change", () => {
      by(chosen.value === "viewer");
      if (chosen.value === "viewer") { planes.resizeListener(); solid.resizeListener(); }
    });
    follow();
  } catch (error) {
    console.error(error);
    fail(error.message);
  }
})();
