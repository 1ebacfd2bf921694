"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const axes = ["z", "y", "x"];
  const shown = new Set(data.organs.map((organ) => organ.number));
  const place = data.start.slice();
  const colours = new Map(data.organs.map((organ) => [organ.number, organ.colour]));
  let range = $("window").value.split(",").map(Number);
  let opacity = $("opacity").value / 100;
  let listeners = [];

  const mm = (axis, index) => data.origin[axis] + data.spacing * index;
  const spoken = (axis, index) => `${axes[axis]} ${mm(axis, index).toFixed(0).replace("-", "−")}`;
  const say = (text) => { $("said").textContent = text; };

  // Pictures, decoded where they are looked at; the last ones are kept.
  const decoded = new Map();
  async function pixels(uri) {
    if (!decoded.has(uri)) {
      decoded.set(uri, (async () => {
        const image = new Image();
        image.src = uri;
        await image.decode();
        const canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.drawImage(image, 0, 0);
        return context.getImageData(0, 0, canvas.width, canvas.height).data;
      })());
      if (decoded.size > 60) decoded.delete(decoded.keys().next().value);
    }
    return decoded.get(uri);
  }

  function greys() {
    const [low, high] = range;
    return Uint8ClampedArray.from(data.hu, (hu) => ((hu - low) / (high - low)) * 255);
  }

  class Panel {
    constructor(figure, view) {
      Object.assign(this, view);
      this.canvas = figure.querySelector("canvas");
      this.slider = figure.querySelector("input");
      this.output = figure.querySelector("output");
      this.context = this.canvas.getContext("2d");
      this.drawn = 0;
      this.fine = false;
      this.slider.addEventListener("input", () => {
        place[this.fixed] = this.fine ? Number(this.slider.value) : this.indices[this.slider.value];
        moved();
      });
      this.canvas.addEventListener("pointerdown", (event) => this.point(event));
      this.canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) this.point(event); });
    }

    // A viewer shows every voxel, pictures only some.
    setFine(fine) {
      this.fine = fine;
      this.slider.max = (fine ? data.shape[this.fixed] : this.indices.length) - 1;
    }

    // Rows run down; z runs up.
    row(index) { return this.rows === 0 ? this.shape[0] - 1 - index : index; }

    point(event) {
      const box = this.canvas.getBoundingClientRect();
      const across = Math.floor(((event.clientX - box.left) / box.width) * this.shape[1]);
      const down = Math.floor(((event.clientY - box.top) / box.height) * this.shape[0]);
      place[this.columns] = Math.min(Math.max(across, 0), this.shape[1] - 1);
      place[this.rows] = this.row(Math.min(Math.max(down, 0), this.shape[0] - 1));
      moved();
    }

    nearest() {
      let best = 0;
      this.indices.forEach((index, n) => {
        if (Math.abs(index - place[this.fixed]) < Math.abs(this.indices[best] - place[this.fixed])) best = n;
      });
      return best;
    }

    async draw() {
      const n = this.nearest();
      const turn = ++this.drawn;
      const index = this.fine ? place[this.fixed] : this.indices[n];
      const where = `${spoken(this.fixed, index)} mm`;
      const [slice, count] = this.fine ? [index, data.shape[this.fixed]] : [n, this.indices.length];
      this.slider.value = slice;
      this.slider.setAttribute("aria-valuetext", `${this.name} slice ${slice + 1} of ${count}, ${where}`);
      this.output.textContent = where;
      const scan = await pixels(this.scan[n]);
      const organs = this.organs[n] ? await pixels(this.organs[n]) : null;
      if (turn !== this.drawn) return;
      const image = this.context.createImageData(this.shape[1], this.shape[0]);
      const grey = greys();
      const seen = new Set();
      for (let i = 0; i < scan.length; i += 4) {
        const tone = grey[scan[i]];
        const number = organs ? organs[i] + 256 * organs[i + 1] : 0;
        const colour = number && shown.has(number) ? colours.get(number) : null;
        if (colour) seen.add(number);
        for (let c = 0; c < 3; c++) image.data[i + c] = colour ? tone + (colour[c] - tone) * opacity : tone;
        image.data[i + 3] = 255;
      }
      this.context.putImageData(image, 0, 0);
      this.cross();
      const list = data.organs.filter((organ) => seen.has(organ.number)).map((organ) => organ.label);
      this.canvas.setAttribute("aria-label",
        `${this.name} plane at ${where}, with ${list.length ? list.join(", ") : "no organ"}`);
    }

    // Lines of the other planes, open around the point itself.
    cross() {
      const x = place[this.columns] + 0.5;
      const y = this.row(place[this.rows]) + 0.5;
      const gap = 6;
      this.context.fillStyle = "rgba(120, 220, 255, .55)";
      this.context.fillRect(0, y - 0.5, x - gap, 1);
      this.context.fillRect(x + gap, y - 0.5, this.shape[1], 1);
      this.context.fillRect(x - 0.5, 0, 1, y - gap);
      this.context.fillRect(x - 0.5, y + gap, 1, this.shape[0]);
    }
  }

  class Turntable {
    constructor(figure, frames) {
      this.frames = frames;
      this.canvas = figure.querySelector("canvas");
      this.context = this.canvas.getContext("2d");
      this.slider = figure.querySelector("input");
      this.output = figure.querySelector("output");
      this.letters = figure.querySelectorAll(".letter");
      this.drawn = 0;
      this.slider.addEventListener("input", () => this.draw());
      let from = null;
      this.canvas.addEventListener("pointerdown", (event) => {
        from = [event.clientX, Number(this.slider.value)];
        this.canvas.setPointerCapture(event.pointerId);
      });
      this.canvas.addEventListener("pointermove", (event) => {
        if (!(event.buttons & 1) || !from) return;
        const n = this.frames.length;
        const by = Math.round((event.clientX - from[0]) / 12);
        this.slider.value = (((from[1] + by) % n) + n) % n;
        this.draw();
      });
    }

    async draw() {
      const turn = ++this.drawn;
      const n = Number(this.slider.value);
      const degrees = Math.round((360 * n) / this.frames.length);
      const sides = ["the front", "the left", "the back", "the right"];
      const side = sides[Math.round(degrees / 90) % 4];
      const frame = await pixels(this.frames[n]);
      if (turn !== this.drawn) return;
      const image = this.context.createImageData(this.canvas.width, this.canvas.height);
      for (let i = 0; i < frame.length; i += 4) {
        const colour = frame[i + 2] && shown.has(frame[i] + 256 * frame[i + 1])
          ? colours.get(frame[i] + 256 * frame[i + 1]) : null;
        if (!colour) continue;
        for (let c = 0; c < 3; c++) image.data[i + c] = (colour[c] * frame[i + 2]) / 255;
        image.data[i + 3] = 255;
      }
      this.context.putImageData(image, 0, 0);
      this.output.textContent = `${degrees}°`;
      this.slider.setAttribute("aria-valuetext", `${degrees} degrees, from ${side}`);
      this.canvas.setAttribute("aria-label", `The organs in 3-D, from ${side}`);
      const exact = degrees % 90 === 0;
      this.letters[0].textContent = exact ? "RALP"[degrees / 90] : "";
      this.letters[1].textContent = exact ? "LPRA"[degrees / 90] : "";
    }
  }

  const panels = [...document.querySelectorAll("[data-view]")].map(
    (figure) => new Panel(figure, data.views[figure.dataset.view]));
  const turntable = data.turntable && new Turntable($("turntable"), data.turntable);

  const settled = () => Promise.all(panels.map((panel) => panel.draw()));
  function moved() { settled(); listeners.forEach((one) => one.moved()); }
  function changed() {
    settled();
    if (turntable) turntable.draw();
    listeners.forEach((one) => one.changed());
  }

  function go(to, what) {
    to.forEach((index, axis) => { place[axis] = index; });
    moved();
    say(`${what}: ${axes.map((_, axis) => spoken(axis, place[axis])).join(", ")} mm`);
  }

  const rows = [...document.querySelectorAll("tr[data-number]")];
  function show(row, on) {
    const number = Number(row.dataset.number);
    row.querySelector("input").checked = on;
    row.classList.toggle("off", !on);
    if (on) shown.add(number); else shown.delete(number);
  }
  for (const row of rows) {
    const organ = data.organs.find((one) => one.number === Number(row.dataset.number));
    row.querySelector("input").addEventListener("change", (event) => {
      show(row, event.target.checked);
      changed();
      say(`${organ.label} ${event.target.checked ? "shown" : "hidden"}`);
    });
    row.querySelector(".go").addEventListener("click", () => {
      rows.forEach((other) => other.classList.toggle("here", other === row));
      if (!shown.has(organ.number)) { show(row, true); changed(); }
      const why = $(`why-${organ.number}`);
      document.querySelectorAll("details[id^=why-]").forEach((one) => { one.open = one === why; });
      if (organ.centre) go(organ.centre, organ.label);
    });
  }
  for (const [id, on] of [["all", true], ["none", false]]) {
    $(id).addEventListener("click", () => {
      rows.forEach((row) => show(row, on));
      changed();
      say(on ? "All organs shown" : "All organs hidden");
    });
  }
  document.querySelectorAll(".place").forEach((button) => button.addEventListener("click", () => {
    go(button.dataset.place.split(",").map(Number), "Keypoint");
    $("scan-title").scrollIntoView({ block: "nearest" });
  }));
  $("window").addEventListener("change", (event) => { range = event.target.value.split(",").map(Number); changed(); });
  $("opacity").addEventListener("input", (event) => {
    opacity = event.target.value / 100;
    event.target.setAttribute("aria-valuetext", `${event.target.value} %`);
    changed();
  });
  // What is closed on the screen is printed all the same.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((one) => { one.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));

  window.kptPage = {
    data, place, shown, go, panels, turntable,
    listen: (one) => { listeners.push(one); },
    range: () => range,
    opacity: () => opacity,
    ready: Promise.all([settled(), turntable && turntable.draw()]),
  };
})();
