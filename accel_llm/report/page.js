"use strict";
// Draws the charts of a page with uPlot, from the JSON in the element #charts; see page_curves.py.
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const byId = (id) => document.getElementById(id);
  const several = data.runs !== undefined;
  const HEIGHT = 260, WIDE_HEIGHT = 320, RUN_COLORS = 8, MAX_POINTS_WITH_DOTS = 60;
  const longest = Math.max(0, ...data.charts.flatMap((chart) => chart.curves.map((curve) => curve.steps.length)));
  const steps = data.charts.flatMap((chart) => chart.curves.flatMap((curve) => [curve.steps[0], curve.steps.at(-1)]));
  const full = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  if (full[0] === full[1]) { full[0] -= 1; full[1] += 1; }
  const state = { smoothing: longest > 100 ? 0.9 : 0, log: false, range: full, hidden: new Set(), hiddenRuns: new Set() };
  const plots = new Map();  // chart number -> uPlot

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function faint(hex) {
    const digits = hex.length === 4 ? [...hex.slice(1)].map((digit) => digit + digit).join("") : hex.slice(1);
    return `#${digits}55`;
  }

  function text(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
    return size !== 0 && (size < 1e-3 || size >= 1e7) ? value.toExponential(3).replace(/\.?0+e/, "e") : String(+value.toPrecision(5));
  }

  // An exponential moving average, divided by the weights so far, so that its beginning is not drawn to zero. Of means
  // of several points each counts as so many points.
  function smooth(curve) {
    const { steps, values } = curve.means ?? curve;
    const weight = state.smoothing ** (curve.points_in_mean ?? 1);
    let sum = 0, weights = 0;
    const smoothed = values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      weights = weight * weights + 1 - weight;
      return sum / weights;
    });
    return [steps, smoothed];
  }

  function onLogAxis(values, log) {
    return log ? values.map((value) => (value !== null && value > 0 ? value : null)) : values;
  }

  function curveColor(curve) {
    return color(several ? `--run${curve.run % RUN_COLORS}` : `--${curve.kind}`);
  }

  // The lines of a chart: for each its columns of steps and values, and its settings for uPlot.
  function linesOf(chart, log) {
    const lines = [];
    for (const curve of chart.curves) {
      const own = curveColor(curve);
      const smoothed = chart.noise && state.smoothing > 0 && curve.kind === "train" && curve.values.length > 2;
      const base = { label: curve.label, stroke: own, width: 1.5, scale: curve.kind === "rate" ? "rate" : "y", run: curve.run };
      if (several && (curve.kind === "eval" || curve.run >= RUN_COLORS)) base.dash = [6, 3];
      if (curve.kind === "rate") Object.assign(base, { dash: [2, 3], width: 1 });
      const few = curve.steps.length <= MAX_POINTS_WITH_DOTS;
      base.points = { show: curve.steps.length === 1 || (few && curve.kind !== "rate"), size: curve.kind === "eval" ? 7 : 5, fill: own };
      const columns = [curve.steps, curve.kind === "rate" ? curve.values : onLogAxis(curve.values, log)];
      if (!smoothed) {
        lines.push({ columns, settings: base });
        continue;
      }
      // Of several runs only the smoothed curves are shown, so that they can be told apart.
      if (!several) lines.push({ columns, settings: { ...base, stroke: faint(own), width: 1, points: { show: false } } });
      const [at, values] = smooth(curve);
      const label = several ? curve.label : `${curve.label}, smoothed`;
      lines.push({ columns: [at, onLogAxis(values, log)], settings: { ...base, label, width: 2, points: { show: false } } });
    }
    return lines;
  }

  // The place nearest to `place` at which a line has a value: lines have values at different steps.
  function nearest(plot, line, place) {
    const values = plot.data[line];
    for (let distance = 0; distance < values.length; distance++) {
      if (values[place - distance] != null) return place - distance;
      if (values[place + distance] != null) return place + distance;
    }
    return place;
  }

  function legendValue(plot, value, line, place) {
    if (value === null || value === undefined || place === null) return "–";
    const here = plot.data[0][place], hovered = plot.data[0][plot.cursor.idx];
    return hovered === undefined || here === hovered ? text(value) : `${text(value)} (at ${text(here)})`;
  }

  function axis(scale, side, more) {
    const line = { stroke: color("--faint"), width: 1 };
    return {
      scale, side, stroke: color("--ink"), grid: line, ticks: line, font: "12px system-ui, sans-serif", size: 64,
      values: (_, splits) => splits.map(text), ...more,
    };
  }

  // The ends of a value axis; where all values are 0, uPlot's own would be 0 and 100.
  function rangeOf(low, high) {
    return low === null || (low === 0 && high === 0) ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
  }

  function drawMarks(plot) {
    const { left, top, width, height } = plot.bbox;
    plot.ctx.save();
    plot.ctx.strokeStyle = color("--rate");
    plot.ctx.setLineDash([2, 4]);
    for (const step of data.marks ?? []) {
      const x = plot.valToPos(step, "x", true);
      if (x < left || x > left + width) continue;
      plot.ctx.beginPath();
      plot.ctx.moveTo(x, top);
      plot.ctx.lineTo(x, top + height);
      plot.ctx.stroke();
    }
    plot.ctx.restore();
  }

  function draw(number) {
    const chart = data.charts[number];
    const box = document.querySelector(`[data-chart="${number}"]`);
    if (!box) return;
    plots.get(number)?.destroy();
    const drawable = chart.curves.some((curve) => curve.kind !== "rate" && curve.values.some((value) => value > 0));
    const log = state.log && drawable;
    const lines = linesOf(chart, log);
    const hasRate = chart.curves.some((curve) => curve.kind === "rate");
    const rangeFromZero = (_, low, high) => rangeOf(low === null ? null : Math.min(0, low), high);
    const scales = {
      x: { time: false, min: state.range[0], max: state.range[1] },
      y: log ? { distr: 3 } : { range: chart.from_zero ? rangeFromZero : (_, low, high) => rangeOf(low, high) },
      rate: { range: rangeFromZero },
    };
    const right = axis("rate", 1, { grid: { show: false }, size: 70, stroke: color("--rate") });
    const options = {
      width: Math.max(box.clientWidth, 200), height: box.parentElement.classList.contains("wide") ? WIDE_HEIGHT : HEIGHT,
      scales,
      axes: [axis("x", 2, { size: 34 }), axis("y", 3), ...(hasRate ? [right] : [])],
      series: [
        { label: "step", value: (_, step) => (step === null ? "–" : text(step)) },
        ...lines.map(({ settings }) => ({
          ...settings, value: legendValue,
          show: !state.hidden.has(`${number} ${settings.label}`) && !state.hiddenRuns.has(settings.run),
        })),
      ],
      cursor: {
        dataIdx: (plot, line, place) => (line === 0 || place === null ? place : nearest(plot, line, place)),
        drag: { x: true, y: false },
        bind: { dblclick: () => () => zoom(full) },
      },
      hooks: {
        drawAxes: [drawMarks],
        setScale: [(plot, key) => key === "x" && zoom([plot.scales.x.min, plot.scales.x.max])],
        setSeries: [(plot, line, change) => {
          if (line === null || change.show === undefined) return;
          const key = `${number} ${plot.series[line].label}`;
          change.show ? state.hidden.delete(key) : state.hidden.add(key);
        }],
      },
    };
    plots.set(number, new uPlot(options, uPlot.join([...lines.map(({ columns }) => columns)]), box));
  }

  // All charts show the same steps. A chart that is set to the steps that it has already changes nothing, so this ends.
  function zoom([low, high]) {
    if (!(low < high)) return;
    state.range = [low, high];
    for (const plot of plots.values()) {
      if (plot.scales.x.min !== low || plot.scales.x.max !== high) plot.setScale("x", { min: low, max: high });
    }
    byId("first").value = Math.round(low);
    byId("last").value = Math.round(high);
  }

  function drawAll() {
    data.charts.forEach((_, number) => draw(number));
    drawLengths();
  }

  // The histogram of the lengths of rows: a bar for each bin.
  let histogram = null;
  function drawLengths() {
    const box = byId("lengths"), lengths = data.lengths;
    if (!box || !lengths) return;
    histogram?.destroy();
    const { edges, counts } = lengths;
    const middles = counts.map((_, bin) => (edges[bin] + edges[bin + 1]) / 2);
    const range = (_, bin) => (bin === null ? "–" : edges[bin + 1] - edges[bin] === 1 ? text(edges[bin]) : `${text(edges[bin])} to ${text(edges[bin + 1] - 1)}`);
    histogram = new uPlot({
      width: Math.max(box.clientWidth, 200), height: 200,
      scales: { x: { time: false, range: () => [edges[0], edges.at(-1)] }, y: { range: (_, low, high) => [0, Math.max(high, 1) * 1.05] } },
      axes: [axis("x", 2, { size: 34 }), axis("y", 3)],
      series: [
        { label: "tokens", value: (plot, _, line, bin) => range(plot, bin) },
        { label: "count", fill: faint(color("--train")), stroke: color("--train"), value: (_, value) => (value === null ? "–" : text(value)),
          paths: uPlot.paths.bars({ size: [0.95, 60] }), points: { show: false } },
      ],
      cursor: { drag: { x: false, y: false } },
    }, [middles, counts], box);
  }

  function listenToControls() {
    const controls = byId("controls");
    controls.hidden = false;
    controls.addEventListener("submit", (event) => event.preventDefault());
    byId("smoothing").value = String(state.smoothing);
    byId("smoothing").addEventListener("change", (event) => { state.smoothing = Number(event.target.value); drawAll(); });
    byId("log").checked = false;
    byId("log").addEventListener("change", (event) => { state.log = event.target.checked; drawAll(); });
    for (const id of ["first", "last"]) {
      byId(id).addEventListener("change", () => zoom([byId("first").valueAsNumber, byId("last").valueAsNumber]));
    }
    byId("all").addEventListener("click", () => zoom(full));
    for (const box of document.querySelectorAll("[data-run]")) {
      box.checked = true;
      box.addEventListener("change", () => {
        const run = Number(box.dataset.run);
        box.checked ? state.hiddenRuns.delete(run) : state.hiddenRuns.add(run);
        drawAll();
      });
    }
  }

  function showAge() {
    const written = byId("written");
    const minutes = Math.floor((Date.now() - Date.parse(written.dateTime)) / 60000);
    if (minutes >= 2) written.textContent = `${state.written} (${minutes.toLocaleString("en")} minutes ago)`;
  }

  listenToControls();
  drawAll();
  zoom(state.range);
  if (byId("written")) { state.written = byId("written").textContent; showAge(); setInterval(showAge, 30000); }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth !== width) { width = document.documentElement.clientWidth; drawAll(); }
  });
})();
