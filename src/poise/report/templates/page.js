"use strict";
(() => {
  const values = JSON.parse(document.getElementById("values").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const units = { s: 1, min: 60, h: 3600 };

  // The unit that suits the longest run.
  function timeUnit() {
    const longest = Math.max(0, ...Object.values(values.axes).map((axis) => axis.seconds.at(-1)));
    return longest > 7200 ? "h" : longest > 300 ? "min" : "s";
  }
  const unit = timeUnit();
  const seconds = (axis) => axis.seconds.map((value) => value / units[unit]);
  const xOf = (trace, kind) => {
    if (!trace.axis) return trace.x;
    const axis = values.axes[trace.axis];
    return kind === "seconds" ? seconds(axis) : axis.images;
  };
  const escaped = (words) => words.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function traceOf(trace, figure) {
    const isBar = trace.type === "bar";
    const name = escaped(isBar ? trace.name : `${trace.label}, seed ${trace.seed}${trace.of || ""}`);
    const place = figure.ranks ? "rank %{x}" : "%{x:.4~s} %{xaxis.title.text}";
    const common = { x: xOf(trace, "images"), y: trace.y, name, hovertemplate: `%{y:.4~g}<br>${place}<extra>${name}</extra>` };
    if (isBar) return { ...common, type: "bar", marker: { color: trace.colour } };
    return { ...common, type: "scatter", mode: figure.ranks && trace.y.length < 40 ? "lines+markers" : "lines", line: trace.line, marker: { size: 4 } };
  }

  function layoutOf(figure) {
    const line = figure.line === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: figure.line, y1: figure.line, line: { width: 1, dash: "dot" } }];
    const axis = { automargin: true, fixedrange: touch, zeroline: false, nticks: 6, tickfont: { size: 11 }, title: { font: { size: 11 }, standoff: 6 } };
    const kind = figure.axis === "log" ? logTicks(figure) : { tickformat: "~g" };
    return {
      margin: { l: 46, r: 10, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { size: 12 },
      showlegend: figure.stacked === true, legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 11 } },
      barmode: "stack", bargap: 0.15, dragmode: touch ? false : "zoom", hovermode: "closest", shapes: line,
      xaxis: { ...axis, title: { ...axis.title, text: figure.ranks || "images" }, tickformat: figure.ranks ? "d" : "~s" },
      yaxis: { ...axis, ...kind },
    };
  }

  // A logarithmic axis with plain numbers at 1, 2, 5 of each decade, or at powers of ten if long.
  function logTicks(figure) {
    const all = figure.traces.flatMap((trace) => trace.y).filter((value) => value > 0);
    if (figure.line) all.push(figure.line);
    const [low, high] = [Math.min, Math.max].map((of) => Math.log10(all.reduce((a, b) => of(a, b))));
    if (high - low < 0.3) return { tickformat: "~g" };
    const steps = high - low < 0.7 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 2.2 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil((high - low) / 6));
    const tickvals = [];
    for (let power = Math.floor(low); power <= high + 1; power += 1) {
      if (steps.length > 1 || power % every === 0) tickvals.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
    }
    const margin = Math.max(0.05 * (high - low), 0.02);
    const ticktext = tickvals.map((value) => (value >= 1e-4 && value < 1e5 ? String(value) : value.toExponential().replace(/e\+?(-?\d+)/, "·10<sup>$1</sup>")));
    return { type: "log", range: [low - margin, high + margin], tickmode: "array", tickvals, ticktext };
  }

  // In print, the browser scales the drawing to the paper. An SVG needs a view box for this.
  function keepShape(plot) {
    const { width, height } = plot._fullLayout;
    plot.style.setProperty("--shape", `${width} / ${height}`);
    for (const svg of plot.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }

  function draw(figure) {
    const plot = document.getElementById(figure.id);
    const traces = figure.traces.map((trace) => traceOf(trace, figure));
    Plotly.newPlot(plot, traces, layoutOf(figure), { responsive: true, displayModeBar: false, doubleClick: "reset" });
    plot.on("plotly_afterplot", () => keepShape(plot));
    keepShape(plot);
  }

  function choose(buttons, pressed) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
  }

  function setAxis(kind) {
    for (const figure of values.figures.filter((figure) => !figure.ranks)) {
      const title = kind === "seconds" ? `training time, ${unit}` : "images seen";
      const format = kind === "seconds" ? "~g" : "~s";
      Plotly.update(figure.id, { x: figure.traces.map((trace) => xOf(trace, kind)) }, { "xaxis.title.text": title, "xaxis.tickformat": format, "xaxis.autorange": true });
    }
  }

  function setShown(label, shown) {
    for (const key of document.querySelectorAll(".key")) if (key.dataset.label === label) key.setAttribute("aria-pressed", String(shown));
    for (const figure of values.figures) {
      const mine = figure.traces.flatMap((trace, number) => (trace.label === label ? [number] : []));
      if (mine.length) Plotly.restyle(figure.id, { visible: shown }, mine);
    }
  }

  values.figures.forEach(draw);
  const toggles = [...document.querySelectorAll("#axis button")];
  for (const button of toggles) button.addEventListener("click", () => { choose(toggles, button); setAxis(button.dataset.value); });
  if (toggles.length) setAxis("images");
  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => setShown(key.dataset.label, key.getAttribute("aria-pressed") === "false"));
  }
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => button.closest("figure").classList.toggle("large"));
  }
})();
