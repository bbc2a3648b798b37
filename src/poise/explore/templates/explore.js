"use strict";
(() => {
  const scene = JSON.parse(document.getElementById("scene").textContent);
  const byId = (id) => document.getElementById(id);
  const [channels, side] = scene.shape;
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");

  window.addEventListener("error", ({ message }) => fail(message));
  window.addEventListener("unhandledrejection", ({ reason }) => fail(reason));
  function fail(reason) {
    byId("failure").hidden = false;
    byId("failure").textContent = `This page has failed: ${reason}`;
  }

  function bytesOf(id) {
    const element = byId(id), text = element.textContent;
    // A copy that a browser saved has the texts that the next line has emptied.
    if (!text && id === "arrays") throw new Error("this copy has no weights; open the original file");
    element.textContent = "";  // the text is a third larger than its bytes
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return bytes;
  }

  const model = new Model(scene, bytesOf);
  const { arrays } = model;
  const row = (name, k) => model.row(name, k);
  const decode = (latents) => model.decode(latents);
  const encode = (image) => model.encode(image);
  const between = (a, b, t) => model.between(a, b, t);

  // -- Pictures --------------------------------------------------------------------------------
  function draw(canvas, image) {
    if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
    const pixels = new ImageData(side, side), plane = side * side;
    for (let i = 0; i < plane; i++) {
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = 255 * image[Math.min(c, channels - 1) * plane + i];
      pixels.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }
  const sheet = new Image();
  function drawPicture(canvas, k) {
    const { columns, tile } = scene.pictures;
    canvas.width = canvas.height = tile;
    canvas.getContext("2d").drawImage(sheet, k % columns * tile, Math.floor(k / columns) * tile, tile, tile, 0, 0, tile, tile);
  }
  const code = (k) => row("codes", k);
  const named = (k) => `${k + 1} of ${scene.pictures.count} ${scene.pictures.kind}`;

  // -- Latents ---------------------------------------------------------------------------------
  const sliders = [];
  // A browser that reloads the page restores the choice.
  let kind = document.querySelector("[name=kind]:checked").value;
  let base = arrays.centre, origin = "", waiting = false, milliseconds = 0, shown = 0;

  function latents() {
    const z = Float32Array.from(base);
    sliders.forEach((slider, k) => {
      const direction = row(kind, k);
      for (let i = 0; i < z.length; i++) z[i] += slider.value * direction[i];
    });
    return z;
  }
  function show() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const before = performance.now();
      draw(byId("picture"), decode(latents()));
      const now = performance.now() - before;
      // The first image includes the reading of the weights.
      milliseconds = shown < 2 ? now : 0.8 * milliseconds + 0.2 * now;
      if (shown++ > 0) byId("speed").textContent = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms an image`;
    });
  }
  function startAt(code, words, scroll = true) {
    base = Float32Array.from(code);
    origin = words;
    resetSliders();
    if (scroll) {
      byId("latents").scrollIntoView();
      sliders[0].focus({ preventScroll: true });
    }
  }
  function resetSliders() {
    for (const slider of sliders) {
      slider.value = 0;
      slider.output.textContent = "0.0";
    }
    byId("from").textContent = `Start: ${origin}.`;
    show();
  }
  function makeSliders() {
    sliders.length = 0;
    byId("sliders").replaceChildren(...scene.directions[kind].map((name, k) => {
      const line = document.createElement("div"), label = document.createElement("label");
      const slider = document.createElement("input"), output = document.createElement("output");
      line.className = "slider";
      Object.assign(slider, { type: "range", min: -4, max: 4, step: 0.1, value: 0, id: `slider-${k}`, output });
      Object.assign(label, { htmlFor: slider.id, textContent: name });
      slider.addEventListener("input", () => {
        output.textContent = Number(slider.value).toFixed(1);
        show();
      });
      sliders.push(slider);
      line.append(label, slider, output);
      return line;
    }));
  }
  byId("kinds").addEventListener("change", (event) => {
    if (sliders.some((slider) => Number(slider.value))) origin = "the code before the switch";
    base = latents();
    kind = event.target.value;
    makeSliders();
    resetSliders();
  });
  byId("reset").addEventListener("click", resetSliders);
  byId("average").addEventListener("click", () => startAt(arrays.centre, "the average code", false));
  byId("anyone").addEventListener("click", () => {
    const k = Math.floor(Math.random() * scene.pictures.count);
    startAt(code(k), named(k), false);
  });

  // -- Samples ---------------------------------------------------------------------------------
  const SAMPLES = 12;
  let turn = 0;
  async function drawSamples() {
    const mine = ++turn, seed = Math.trunc(Number(byId("seed").value) || 0);
    const prior = scene.priors[document.querySelector("[name=prior]:checked").value];
    const tiles = [...byId("grid").children];
    byId("drawn").textContent = `Drawing ${SAMPLES} images of seed ${seed}, from ${prior.words}`;
    for (let image = 0; image < SAMPLES; image++) {
      await Model.pause();
      const z = await model.latentsOf(prior, seed, image);
      if (mine !== turn) return;
      draw(tiles[image].firstChild, decode(z));
      tiles[image].onclick = () => startAt(z, `image ${image} of seed ${seed}, prior ${prior.name}`);
      tiles[image].ariaLabel = `image ${image} of seed ${seed}`;
      tiles[image].disabled = false;
    }
    byId("drawn").textContent = `Images 0 to ${SAMPLES - 1} of seed ${seed}, from ${prior.words}`;
  }
  function makeSamples() {
    if (!byId("grid")) return;
    if (!document.querySelector("[name=prior]:checked")) document.querySelector("[name=prior]").checked = true;
    for (let k = 0; k < SAMPLES; k++) {
      const tile = document.createElement("button"), canvas = document.createElement("canvas");
      Object.assign(tile, { type: "button", disabled: true, ariaLabel: `image ${k}, not drawn yet` });
      canvas.width = canvas.height = side;
      tile.append(canvas);
      byId("grid").append(tile);
    }
    byId("priors").addEventListener("change", drawSamples);
    byId("seed").addEventListener("change", drawSamples);
    byId("next").addEventListener("click", () => {
      byId("seed").value = Math.trunc(Number(byId("seed").value) || 0) + 1;
      drawSamples();
    });
    drawSamples();
  }

  // -- Between two images ----------------------------------------------------------------------
  const STRIP = 7;
  const ends = () => [code(Number(byId("a").value)), code(Number(byId("b").value))];
  function showMiddle() {
    draw(byId("middle"), decode(between(...ends(), byId("t").value / 100)));
  }
  // Draw at most once in a frame, however often a slider moves.
  function eachFrame(drawing) {
    let due = false;
    return () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => { due = false; drawing(); });
    };
  }
  function showEnds() {
    drawPicture(byId("start"), Number(byId("a").value));
    drawPicture(byId("end"), Number(byId("b").value));
    showMiddle();
  }
  function showPath() {
    [...byId("strip").children].forEach((canvas, k) => draw(canvas, decode(between(...ends(), k / (STRIP - 1)))));
    showEnds();
  }
  function makePath() {
    for (let k = 0; k < STRIP; k++) {
      const canvas = document.createElement("canvas");
      canvas.role = "img";
      canvas.ariaLabel = `step ${k + 1} of ${STRIP} from A to B`;
      byId("strip").append(canvas);
    }
    for (const id of ["a", "b"]) {
      byId(id).max = scene.pictures.count - 1;
      byId(id).addEventListener("input", eachFrame(showEnds));
      byId(id).addEventListener("change", showPath);
    }
    byId("b").value = 1;
    byId("t").addEventListener("input", eachFrame(showMiddle));
    const play = byId("play");
    play.hidden = still.matches;
    still.addEventListener("change", () => { play.hidden = still.matches; stop(); });
    let playing = false, began = 0;
    function stop() {
      playing = false;
      play.ariaPressed = "false";
      play.textContent = "Play";
    }
    function frame(now) {
      if (!playing) return;
      const phase = (now - began) / 2500 % 2;
      byId("t").value = 100 * (phase < 1 ? phase : 2 - phase);
      showMiddle();
      requestAnimationFrame(frame);
    }
    play.addEventListener("click", () => {
      if (playing) return stop();
      playing = true;
      play.ariaPressed = "true";
      play.textContent = "Stop";
      began = performance.now();
      requestAnimationFrame(frame);
    });
    showPath();
  }

  // -- Your image ------------------------------------------------------------------------------
  async function pixelsOf(file) {
    const bitmap = await createImageBitmap(file);
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d"), size = Math.min(bitmap.width, bitmap.height);
    context.fillStyle = "white";
    context.fillRect(0, 0, side, side);
    context.imageSmoothingQuality = "high";
    context.imageSmoothingEnabled = size !== side;
    context.drawImage(bitmap, (bitmap.width - size) / 2, (bitmap.height - size) / 2, size, size, 0, 0, side, side);
    const { data } = context.getImageData(0, 0, side, side), plane = side * side;
    const image = new Float32Array(channels * plane);
    for (let i = 0; i < plane; i++) {
      const [r, g, b] = data.subarray(4 * i);
      if (channels === 1) image[i] = (0.299 * r + 0.587 * g + 0.114 * b) / 255;
      else [r, g, b].forEach((value, c) => { image[c * plane + i] = value / 255; });
    }
    return image;
  }
  function makeOwn() {
    if (!byId("own")) return;
    const drop = byId("drop"), words = drop.querySelector("span");
    async function use(file) {
      if (!file) return;
      let image;
      try {
        image = await pixelsOf(file);
      } catch {
        words.textContent = `${file.name || "This"} is not an image that this browser can read`;
        return;
      }
      words.textContent = "Choose or drop another image";
      const z = encode(image), restored = decode(z);
      draw(byId("given"), image);
      draw(byId("restored"), restored);
      const error = image.reduce((sum, value, k) => sum + (value - restored[k]) ** 2, 0) / image.length;
      byId("error").textContent = `Reconstruction, MSE ${error.toFixed(5)}`;
      byId("pair").hidden = byId("take").hidden = false;
      byId("take").onclick = () => startAt(z, "your image");
    }
    byId("file").addEventListener("change", (event) => use(event.target.files[0]));
    for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
      document.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("over", name === "dragenter" || name === "dragover");
        if (name === "drop") use(event.dataTransfer.files[0]);
      });
    }
    document.addEventListener("paste", (event) => use(event.clipboardData.files[0]));
  }

  // -- Map -------------------------------------------------------------------------------------
  function makeMap() {
    const canvas = byId("plane"), { count, columns, tile } = scene.pictures;
    const along = (z, axis) => row("plane", axis).reduce((sum, value, i) => sum + value * (z[i] - arrays.centre[i]), 0);
    const points = Array.from({ length: count }, (_, k) => [along(code(k), 0), -along(code(k), 1)]);
    const reach = [0, 1].map((axis) => Math.max(1e-6, ...points.map((point) => Math.abs(point[axis]))));
    let zoom = 1, middle = [0, 0], chosen = 0;

    const unit = (axis) => zoom * 0.46 * (axis ? canvas.clientHeight : canvas.clientWidth) / reach[axis];
    const place = ([x, y]) => [canvas.clientWidth / 2 + (x - middle[0]) * unit(0), canvas.clientHeight / 2 + (y - middle[1]) * unit(1)];
    function paint() {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = canvas.clientWidth * ratio;
      canvas.height = canvas.clientHeight * ratio;
      const context = canvas.getContext("2d");
      context.scale(ratio, ratio);
      context.imageSmoothingEnabled = false;
      const size = Math.min(72, Math.sqrt(canvas.clientWidth * canvas.clientHeight / count) * 0.6 * Math.sqrt(zoom));
      const order = [...points.keys()].filter((k) => k !== chosen).concat(chosen);
      for (const k of order) {
        const [x, y] = place(points[k]), s = k === chosen ? 1.6 * size : size;
        context.drawImage(sheet, k % columns * tile, Math.floor(k / columns) * tile, tile, tile, x - s / 2, y - s / 2, s, s);
        if (k === chosen) {
          context.lineWidth = 3;
          context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
          context.strokeRect(x - s / 2 - 1.5, y - s / 2 - 1.5, s + 3, s + 3);
        }
      }
    }
    function choose(k) {
      chosen = k;
      const [x, y] = place(points[k]);
      if (x < 0 || y < 0 || x > canvas.clientWidth || y > canvas.clientHeight) middle = [...points[k]];
      drawPicture(byId("one"), k);
      byId("chosen").textContent = `Chosen: ${named(k)}`;
      paint();
    }
    // The nearest picture; in a direction, those far off its axis count as further.
    function nearest(x, y, direction) {
      let best = chosen, least = Infinity;
      points.forEach((point, k) => {
        const [px, py] = place(point), dx = px - x, dy = py - y;
        let distance = Math.hypot(dx, dy);
        if (direction) {
          const ahead = dx * direction[0] + dy * direction[1];
          if (k === chosen || ahead <= 0) return;
          distance = ahead + 2.5 * Math.abs(dx * direction[1] - dy * direction[0]);
        }
        if (distance < least) [best, least] = [k, distance];
      });
      return best;
    }
    function zoomBy(factor) {
      zoom = Math.min(20, Math.max(1, zoom * factor));
      middle = zoom === 1 ? [0, 0] : [...points[chosen]];
      paint();
    }
    const move = () => startAt(code(chosen), named(chosen));
    const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const KEYS = { "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), Enter: move };
    canvas.addEventListener("keydown", (event) => {
      const direction = DIRECTIONS[event.key];
      if (direction) choose(nearest(...place(points[chosen]), direction));
      else if (KEYS[event.key]) KEYS[event.key]();
      else return;
      event.preventDefault();
    });
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      held = { x: event.offsetX, y: event.offsetY, from: [...middle], moved: false };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!held || event.pointerType !== "mouse" || !event.buttons) return;
      const [dx, dy] = [event.offsetX - held.x, event.offsetY - held.y];
      held.moved ||= Math.hypot(dx, dy) > 4;
      if (!held.moved) return;
      middle = [held.from[0] - dx / unit(0), held.from[1] - dy / unit(1)];
      paint();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (held && !held.moved) choose(nearest(event.offsetX, event.offsetY));
      held = null;
    });
    canvas.addEventListener("pointercancel", () => { held = null; });
    byId("nearer").addEventListener("click", () => zoomBy(1.5));
    byId("farther").addEventListener("click", () => zoomBy(1 / 1.5));
    byId("move").addEventListener("click", move);
    for (const end of ["a", "b"]) {
      byId(`as-${end}`).addEventListener("click", () => {
        byId(end).value = chosen;
        showPath();
        byId("path").scrollIntoView();
      });
    }
    new ResizeObserver(paint).observe(canvas);
    choose(0);
  }

  makeSliders();
  startAt(arrays.centre, "the average code", false);
  sheet.onload = () => {
    makePath();
    makeMap();
    makeSamples();
    document.documentElement.dataset.ready = "yes";
  };
  sheet.src = scene.pictures.sheet;
  makeOwn();
  // For the console, and for tests.
  window.poise = model;
})();
