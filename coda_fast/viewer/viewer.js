// The interactive view of one picture (coda_fast.viewer). It starts every <div class="coda-viewer"> of the page
// from the JSON inside it, also those that are added later. It asks for nothing outside the page.
(() => {
  "use strict";

  const PERCENTILE = 99.5; // of coda_fast.plot.symmetric_scale
  // The longer side of drawings, about, in their own pixels. The map has finer ones, for the lines of a box;
  // the page enlarges the others in sharp squares, which takes less memory.
  const MAP_SIDE = 640, SIDE = 320;
  const DECADES = 2; // the temperature goes from T / 100 to 100 T

  // -- numbers

  // Base64 of little-endian float32, [count, size], as one array for each class. All browsers run on
  // little-endian machines.
  function decode(text, count) {
    const bytes = atob(text), array = new Uint8Array(bytes.length);
    for (let i = 0; i < bytes.length; i++) array[i] = bytes.charCodeAt(i);
    const all = new Float32Array(array.buffer), size = all.length / count;
    return Array.from({ length: count }, (_, k) => all.subarray(k * size, (k + 1) * size));
  }

  // The end of a symmetric colour scale, as coda_fast.plot.symmetric_scale computes it.
  function symmetricScale(values) {
    const sorted = Float64Array.from(values, Math.abs).sort(), last = sorted.length - 1;
    const place = (PERCENTILE / 100) * last, low = Math.floor(place), high = Math.min(low + 1, last);
    return sorted[low] + (place - low) * (sorted[high] - sorted[low]) || sorted[last] || 1;
  }

  function sum(values) {
    let total = 0; // numbers are float64, so that what the browser adds is not lost to rounding
    for (const value of values) total += value;
    return total;
  }

  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const minus = (text) => text.replaceAll("-", "\u2212");
  const fixed = (x) => minus(x.toFixed(6));
  const short = (x) => minus(String(Number(x.toPrecision(3))));
  // Seven digits, which is what float32 holds.
  const signed = (x) => (x < 0 ? "" : "+") + minus(x.toPrecision(7));
  // As coda_fast.plot.probability: never 0.000 or 1.000.
  const probability = (p) => (p < 0.001 ? "< 0.001" : p > 0.999 ? "> 0.999" : p.toFixed(3));

  // -- elements

  // Names of files and classes are hostile input: all text is set as text, never as HTML.
  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  // The name for screen readers is given apart, because the text of a label includes the options within it.
  function field(label, control, name) {
    control.setAttribute("aria-label", name);
    return make("label", { className: "coda-field" }, make("span", {}, label), control);
  }

  // -- drawing

  // A map as an image with one pixel for each of its values; "bwr" of matplotlib with its 256 colours.
  function coloured(values, width, height, scale) {
    const canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    values.forEach((value, i) => {
      const level = Math.min(255, Math.max(0, Math.floor(128 * (value / scale + 1)))) / 255;
      const pale = Math.round(255 * 2 * Math.min(level, 1 - level));
      image.data.set([level < 0.5 ? pale : 255, pale, level < 0.5 ? 255 : pale, 255], 4 * i);
    });
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // Where things lie on a drawing: its size, and the box of what the network saw, of whole pixels each.
  function geometry(data, side) {
    const [left, top, right, bottom] = data.surroundings ? data.surroundings.box : [0, 0, 1, 1];
    const width = data.width / (right - left), height = data.height / (bottom - top);
    const pixel = Math.max(1, Math.ceil(side / Math.max(width, height)));
    return {
      width: Math.max(1, Math.round(width * pixel)),
      height: Math.max(1, Math.round(height * pixel)),
      x: Math.round(left * width * pixel),
      y: Math.round(top * height * pixel),
      w: data.width * pixel,
      h: data.height * pixel,
      pixel,
    };
  }

  // The picture, and over it a map with this opacity, on the picture around the crop.
  function paint(canvas, place, images, map, opacity) {
    Object.assign(canvas, { width: place.width, height: place.height }); // which also clears it
    const context = canvas.getContext("2d"), box = [place.x, place.y, place.w, place.h];
    context.imageSmoothingEnabled = false;
    // The page shows pixels as sharp squares, but of a large picture, which it has no room for, averages.
    canvas.style.imageRendering = place.pixel < 4 ? "auto" : "pixelated";
    const draw = (image, ...where) => image.naturalWidth && context.drawImage(image, ...where);
    if (images.surroundings) draw(images.surroundings, 0, 0, place.width, place.height);
    draw(images.picture, ...box);
    if (map) {
      context.globalAlpha = opacity;
      context.drawImage(map, ...box);
      context.globalAlpha = 1;
    }
    if (images.surroundings) frame(context, box, ["#444"]);
    return context;
  }

  // A line around a box, of several colours side by side, to be seen on any ground. A page may show the drawing
  // at a fraction of its size, without averaging, and must not lose the line.
  function frame(context, [x, y, w, h], colours = ["#fff", "#000"]) {
    const line = 2 * Math.ceil(context.canvas.width / 400);
    context.lineWidth = line;
    colours.forEach((colour, i) => {
      const away = line * (i + 0.5);
      context.strokeStyle = colour;
      context.strokeRect(x - away, y - away, w + 2 * away, h + 2 * away);
    });
  }

  // -- the state of a view, and what follows from it

  // classIndex and other (the class to compare with, or -1) are places in data.classes; decades is
  // log10(T / T of the network); cursor is a pixel [x, y] of the map, and box two of them.
  function initial() {
    return { classIndex: 0, other: -1, level: 0, opacity: 1, decades: 0, cursor: null, box: null };
  }

  // The map that is shown, at the network's own T, and its scale. Differences are taken in float64.
  function shownMap(data, maps, state) {
    const level = data.levels[state.level];
    maps[state.level] ??= decode(level.maps, level.count);
    const map = maps[state.level][state.classIndex];
    if (state.other < 0) return { level, values: map, scale: level.scale };
    const other = maps[state.level][state.other], values = Float64Array.from(map, (v, i) => v - other[i]);
    return { level, values, scale: symmetricScale(values) };
  }

  // Logits are evidence / T + bias, so that another T rescales all contributions by one factor.
  const rescaling = (state) => 10 ** -state.decades;
  const logitAt = (data, state, k) =>
    (data.classes[k].logit - data.logit_bias) * rescaling(state) + data.logit_bias;

  function proof(data, state, { values }) {
    const total = sum(values) * rescaling(state), logit = logitAt(data, state, state.classIndex);
    const own = state.decades ? "the logit at this T" : "the network's logit";
    const error = (found, expected) => `(error ${minus(Math.abs(found - expected).toExponential(1))})`;
    const name = data.classes[state.classIndex].name;
    if (state.other < 0) {
      const found = data.logit_bias + total;
      return [
        `bias ${fixed(data.logit_bias)} + sum of ${values.length} contributions ${fixed(total)} = `,
        fixed(found), `; ${own} of ${name}: ${fixed(logit)} ${error(found, logit)}`,
      ];
    }
    const other = logitAt(data, state, state.other), those = state.decades ? "logits at this T" : "logits";
    return [
      `sum of ${values.length} differences = `, fixed(total),
      `; ${those} of ${name} and ${data.classes[state.other].name}: ` +
        `${fixed(logit)} \u2212 (${fixed(other)}) = ${fixed(logit - other)} ${error(total, logit - other)}`,
    ];
  }

  function reading(data, state, { level, values }) {
    const at = (x, y) => values[y * level.width + x] * rescaling(state);
    const unit = state.level || level.width !== data.width || level.height !== data.height ? "place" : "pixel";
    if (state.box) {
      const [[x0, y0], [x1, y1]] = ordered(state.box);
      let total = 0;
      for (let y = y0; y <= y1; y++) for (let x = x0; x <= x1; x++) total += at(x, y);
      const count = (x1 - x0 + 1) * (y1 - y0 + 1);
      return `box x ${x0} to ${x1}, y ${y0} to ${y1} (${count} ${unit}s): sum ${signed(total)} logits`;
    }
    if (!state.cursor) return `Point at a ${unit} to read it; drag for the sum of a box.`;
    const [x, y] = state.cursor;
    return `${unit} x ${x}, y ${y}: ${signed(at(x, y))} logits`;
  }

  const ordered = ([[ax, ay], [bx, by]]) => [
    [Math.min(ax, bx), Math.min(ay, by)],
    [Math.max(ax, bx), Math.max(ay, by)],
  ];

  // -- one view

  function start(root) {
    const source = root.querySelector('script[type="application/json"]');
    if (!source) return;
    root.dataset.started = "yes";
    const data = JSON.parse(source.textContent), place = geometry(data, MAP_SIDE);
    const state = initial(), maps = [], parts = build(data);
    const load = (png) => make("img", { src: `data:image/png;base64,${png}` });
    const images = { picture: load(data.picture) };
    if (data.surroundings) images.surroundings = load(data.surroundings.picture);
    root.append(...parts.all);

    let shown, drawn; // the map that is shown, and its image, at one pixel for each value
    function select() {
      const level = data.levels[state.level];
      if (state.classIndex >= level.count) state.classIndex = 0; // a layer may have the first class alone
      if (state.other >= level.count || state.other === state.classIndex) state.other = -1;
      shown = shownMap(data, maps, state);
      drawn = coloured(shown.values, level.width, level.height, shown.scale);
      refresh(root, data, state, shown, parts);
      draw();
    }
    function draw() {
      const context = paint(parts.map, place, images, drawn, state.opacity);
      const { width, height } = shown.level, w = place.w / width, h = place.h / height;
      if (state.box || state.cursor) {
        const [[x0, y0], [x1, y1]] = state.box ? ordered(state.box) : [state.cursor, state.cursor];
        frame(context, [place.x + x0 * w, place.y + y0 * h, (x1 - x0 + 1) * w, (y1 - y0 + 1) * h]);
      }
      parts.reading.textContent = reading(data, state, shown);
    }
    function drawOthers() {
      const small = geometry(data, SIDE);
      paint(parts.picture, small, images);
      data.methods.forEach((m, i) => {
        const map = coloured(decode(m.maps, 1)[0], m.width, m.height, m.scale);
        paint(parts.methods[i], small, images, map, 1);
      });
    }

    const change = (part) => {
      Object.assign(state, part, "level" in part ? { cursor: null, box: null } : {});
      select();
    };
    parts.rows.forEach((row, k) => (row.button.onclick = () => change({ classIndex: k })));
    parts.other.onchange = () => change({ other: Number(parts.other.value) });
    parts.level.onchange = () => change({ level: Number(parts.level.value) });
    parts.temperature.oninput = () => change({ decades: Number(parts.temperature.value) });
    parts.reset.onclick = () => change({ decades: 0 });
    parts.opacity.oninput = () => {
      state.opacity = Number(parts.opacity.value) / 100;
      draw();
    };
    parts.save.onclick = () => save(root, data, parts);
    pointing(parts.map, place, state, () => shown.level, draw);
    select();
    const decoded = Object.values(images).map((image) => image.decode().catch(() => {}));
    Promise.all(decoded).then(() => (draw(), drawOthers(), (root.dataset.started = "drawn")));
  }

  // The elements of a view; refresh() fills in what changes.
  function build(data) {
    const range = (min, max, step, value) => make("input", { type: "range", min, max, step, value });
    const option = (text, value) => make("option", { value }, text);
    const canvas = (label) => make("canvas", { role: "img", "aria-label": label });
    const figure = (drawing, ...caption) =>
      make("figure", {}, drawing, make("figcaption", {}, ...caption));
    const stored = data.levels[0].count, first = data.classes[0].name;

    const rows = data.classes.map(({ name }) => {
      const row = { bar: make("span", { className: "coda-bar" }), p: make("span"), logit: make("span") };
      const track = make("span", { className: "coda-track", "aria-hidden": "true" }, row.bar);
      const label = make("span", { className: "coda-name", title: name }, name);
      row.button = make("button", { type: "button" }, label, track, row.p, row.logit);
      return row;
    });
    const notes = [];
    if (rows.length < data.class_count) notes.push(`The ${rows.length} most likely of ${data.class_count}.`);
    if (stored < rows.length) notes.push(stored > 1 ? `The first ${stored} have maps.` : "The first has a map.");

    const parts = { rows };
    parts.map = make("canvas", { tabIndex: 0, role: "application" });
    parts.caption = make("span");
    parts.ends = [make("span"), make("span", {}, "0"), make("span")];
    parts.reading = make("p", { className: "coda-reading", role: "status" });
    parts.proof = make("p", { className: "coda-proof" });
    const whole = data.surroundings ? ", in its place" : "";
    const seen = `what the network saw: ${data.width} x ${data.height} pixels${whole}`;
    parts.picture = canvas(seen);
    parts.methods = data.methods.map(({ label }) => canvas(`${label} for ${first}`));
    parts.other = make("select", {}, option("nothing", -1), ...data.classes.map((c, k) => option(c.name, k)));
    parts.level = make("select", {}, ...data.levels.map((level, i) => option(level.label, i)));
    parts.opacity = range(0, 100, 1, 100);
    parts.temperature = range(-DECADES, DECADES, 0.01, 0);
    parts.t = make("span");
    parts.reset = make("button", { type: "button" }, `back to the network's T = ${short(data.temperature)}`);
    parts.save = make("button", { type: "button" }, "Save as PNG");

    const scale = make("div", { className: "coda-scale" }, make("div", { className: "coda-colours" }),
      make("div", { className: "coda-ends" }, ...parts.ends));
    const head = make("div", { className: "coda-row coda-titles", "aria-hidden": "true" },
      ...["class", "p", "logit"].map((title) => make("span", {}, title)));
    const list = make("ul", { "aria-label": "classes" }, ...rows.map((row) => make("li", {}, row.button)));
    const classes = make("div", { className: "coda-classes" }, head, list,
      ...notes.map((note) => make("p", { className: "coda-note" }, note)));
    const main = figure(parts.map, parts.caption);
    main.className = "coda-main";
    main.append(scale, parts.reading, parts.proof);
    const pictures = figure(parts.picture, seen);
    pictures.className = "coda-picture";
    const methods = parts.methods.map((drawing, i) =>
      figure(drawing, `${data.methods[i].label} for ${first}, a scale of its own`));
    classes.append(make("div", { className: "coda-fields" },
      field("and not", parts.other, "and not"),
      field("contributions of", parts.level, "contributions of"),
      field("picture \u2194 map", parts.opacity, "opacity of the map, in percent"),
      field(parts.t, parts.temperature, "temperature"),
      make("div", { className: "coda-field" }, parts.reset, parts.save)));
    const panels = make("div", { className: "coda-panels" }, pictures, main, classes);
    if (methods.length) panels.append(make("div", { className: "coda-methods" }, ...methods));
    parts.all = [panels];
    return parts;
  }

  // All that depends on the state, except the drawing.
  function refresh(root, data, state, shown, parts) {
    const factor = rescaling(state), t = short(data.temperature / factor), own = short(data.temperature);
    const { name } = data.classes[state.classIndex], { count } = shown.level;
    const other = state.other < 0 ? null : data.classes[state.other].name;
    parts.rows.forEach(({ button, bar, p, logit }, k) => {
      const value = logitAt(data, state, k), sure = sigmoid(value);
      button.className = "coda-row";
      button.disabled = k >= count;
      button.setAttribute("aria-pressed", String(k === state.classIndex));
      button.setAttribute("aria-label", `${data.classes[k].name}, p ${probability(sure)}, logit ${short(value)}`);
      bar.style.width = `${100 * sure}%`;
      p.textContent = probability(sure);
      logit.textContent = minus(value.toFixed(3));
    });
    for (const option of parts.other.options) {
      const k = Number(option.value);
      option.disabled = k >= count || k === state.classIndex;
    }
    parts.other.value = state.other;
    const entering = state.level ? `, by what enters ${shown.level.label}` : "";
    parts.caption.textContent = `why ${name}${other === null ? "" : ` and not ${other}`}${entering}`;
    const scale = short(shown.scale * factor), [low, , high] = parts.ends;
    low.textContent = `\u2212${scale} ${other === null ? "against" : `for ${other}`}`;
    high.textContent = `for ${other === null ? "" : `${name} `}+${scale}`;
    const [before, total, after] = proof(data, state, shown);
    parts.proof.replaceChildren(before, make("strong", {}, total), after);
    parts.t.textContent = `temperature T = ${t}`;
    parts.temperature.value = state.decades;
    parts.temperature.setAttribute("aria-valuetext", `T = ${t}`);
    parts.reset.disabled = !state.decades;
    const where = state.decades ? `, at the network's own T = ${own}` : "";
    root.querySelector("h2").textContent = `${data.name}: ${data.verdict}${where}`;
    parts.map.setAttribute("aria-label",
      `map: ${parts.caption.textContent}. Arrow keys read its values; with shift, the sum of a box.`);
  }

  // Reading pixels and boxes by pointer, and by arrow keys. Calls draw() after each change of the state.
  function pointing(canvas, place, state, level, draw) {
    const inside = (value, size) => Math.min(size - 1, Math.max(0, value));
    const at = (event, clamped) => {
      const bounds = canvas.getBoundingClientRect(), { width, height } = level();
      const along = (position, size, first, length) => ((position / size) - first) / length;
      const x = Math.floor(width * along(event.clientX - bounds.left, bounds.width,
        place.x / place.width, place.w / place.width));
      const y = Math.floor(height * along(event.clientY - bounds.top, bounds.height,
        place.y / place.height, place.h / place.height));
      const nearest = [inside(x, width), inside(y, height)];
      return clamped || (nearest[0] === x && nearest[1] === y) ? nearest : null;
    };
    let from = null; // where a drag began
    canvas.onpointerdown = (event) => {
      from = event.button ? null : at(event, false);
      Object.assign(state, { box: null, cursor: from });
      if (from) canvas.setPointerCapture(event.pointerId);
      draw();
    };
    canvas.onpointermove = (event) => {
      if (!from && state.box) return; // a finished box stays until the next press
      state.cursor = at(event, Boolean(from));
      const moved = from && String(state.cursor) !== String(from);
      if (moved || (from && state.box)) state.box = [from, state.cursor];
      draw();
    };
    canvas.onpointerup = canvas.onpointercancel = () => (from = null);
    canvas.onpointerleave = () => {
      if (from || state.box) return;
      state.cursor = null;
      draw();
    };
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.onkeydown = (event) => {
      const step = steps[event.key], { width, height } = level();
      if (event.key === "Escape") Object.assign(state, { cursor: null, box: null });
      else if (!step) return;
      else {
        const [x, y] = state.cursor ?? [width >> 1, height >> 1];
        const next = [inside(x + step[0], width), inside(y + step[1], height)];
        state.box = event.shiftKey ? [state.box ? state.box[0] : [x, y], next] : null;
        state.cursor = next;
      }
      event.preventDefault(); // the page does not scroll as well
      draw();
    };
  }

  // The view as a PNG file: all its drawings with their captions, the colour bar and the proof.
  function save(root, data, parts) {
    const figures = [...root.querySelectorAll("figure")], gap = 16, width = 320, line = 20;
    const { width: w, height: h } = parts.map, height = Math.round(width * Math.min(1, h / w));
    const shrunk = Math.min(width, (height * w) / h);
    const canvas = make("canvas", {
      width: Math.max(2, figures.length) * (width + gap) + gap,
      height: height + 7 * line + 2 * gap,
    });
    const context = canvas.getContext("2d");
    const write = (text, x, y, most, bold = "") => {
      context.fillStyle = "#1a1a1a";
      context.font = `${bold} 14px system-ui, sans-serif`;
      context.fillText(text, x, y, most);
    };
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    const all = canvas.width - 2 * gap, top = gap + 1.5 * line;
    write(root.querySelector("h2").textContent, gap, gap + 0.6 * line, all, "bold");
    figures.forEach((figure, i) => {
      const x = gap + i * (width + gap);
      context.drawImage(figure.querySelector("canvas"), x, top, shrunk, height);
      write(figure.querySelector("figcaption").textContent, x, top + height + line, width);
      if (!figure.contains(parts.map)) return;
      const bar = context.createLinearGradient(x, 0, x + width, 0);
      ["#00f", "#fff", "#f00"].forEach((colour, stop) => bar.addColorStop(stop / 2, colour));
      context.fillStyle = bar;
      context.fillRect(x, top + height + 1.5 * line, width, 0.6 * line);
      write(parts.ends[0].textContent, x, top + height + 3 * line, width / 2);
      context.textAlign = "right";
      write(parts.ends[2].textContent, x + width, top + height + 3 * line, width / 2);
      context.textAlign = "left";
    });
    const level = `contributions of: ${data.levels[Number(parts.level.value)].label}; ${parts.t.textContent}`;
    write(level, gap, top + height + 4.2 * line, all);
    write(parts.proof.textContent, gap, top + height + 5.2 * line, all);
    canvas.toBlob((blob) => {
      const name = data.name.replace(/\.\w+$/, "").replace(/[^\w.-]+/g, "_").slice(-80);
      const url = URL.createObjectURL(blob);
      make("a", { href: url, download: `${name}_explained.png` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000); // some browsers read it later
    });
  }

  // -- the page

  function startAll() {
    if (document.readyState === "loading") return; // the JSON of a view may not have arrived in full
    for (const root of document.querySelectorAll(".coda-viewer:not([data-started])")) {
      try {
        start(root);
      } catch (error) {
        root.append(make("p", {}, `This view cannot be shown: ${error.message}`));
      }
    }
  }
  document.addEventListener("DOMContentLoaded", startAll);
  new MutationObserver(startAll).observe(document.documentElement, { childList: true, subtree: true });
  startAll();
})();
