// @ts-check
"use strict";
// Plots as SVG. Colours never stand alone: series differ in dash or shape too, and every plot has its table.

/**
 * @typedef {object} Figures Of one training step, one tool, or all. Counts, but for the means and shares.
 * @property {number} [step]
 * @property {number} prompts
 * @property {number} trajectories
 * @property {number} failing_trajectories
 * @property {number} correctable_trajectories
 * @property {number} calls
 * @property {number} failing_steps
 * @property {number} misassigned_steps
 * @property {number} corrected_steps
 * @property {number | null} token_share
 * @property {number | null} success_rate
 * @property {number | null} similarity
 * @property {number | null} support
 * @property {number | null} alpha
 * @property {number | null} transfer
 * @property {number | null} lift
 * @property {number} failed_calls
 * @property {number} malformed_calls
 * @property {number} [told_answers]
 * @property {number} [found_answers]
 *
 * @typedef {{ name: string, part: string, whole: string, unit: "share" | "number" | "points", column: string, meaning: string }} Column
 *   a figure, see `verl_tapo.rule.figures.Figure`
 *
 * @typedef {{ beta: number, theta: number, alpha_min: number, corrected_steps: number, token_share: number | null,
 *   mean_lifted_advantage: number | null }} Sweep
 * @typedef {"corrected" | "below_alpha" | "below_theta"} PlottedGate
 *
 * @typedef {object} Summary What is not drawn as HTML already.
 * @property {Record<string, unknown> & { beta: number, theta: number, alpha_min: number, token_scope: string, scope?: string }} settings
 * @property {Figures[]} steps
 * @property {Figures} totals
 * @property {Record<string, Figures>} tools
 * @property {{ edges: number[] } & Record<PlottedGate, number[]>} similarity_histogram
 * @property {[number, number, string][]} support_alpha support, similarity, gate
 * @property {Sweep[]} sweeps
 * @property {{ file: string, line: number | null, reason: string }[]} problems
 * @property {number} skipped
 */

/**
 * @typedef {object} Series
 * @property {string} name
 * @property {string} style classes: a colour, `s1` to `s3`, and `wide` for a line that another may lie on
 * @property {[number, number | null][]} points
 * @property {(value: number | null) => string} format
 */

/** @type {[PlottedGate, string][]} */
const PLOTTED_GATES = [
  ["corrected", "corrected"],
  ["below_alpha", "below alpha_min"],
  ["below_theta", "below theta"],
];

const NARROW = 360;
const WIDTH = innerWidth < 640 ? NARROW : 560; // so that the labels keep their size
const HEIGHT = 270;
const INNER = { left: 46, top: 28, bottom: HEIGHT - 40 };
const UNIT = [0, 0.2, 0.4, 0.6, 0.8, 1];

/**
 * Round values that cover `low` to `high`.
 * @param {number} low
 * @param {number} high
 * @param {number} [least] the smallest step
 */
function ticks(low, high, least = 0) {
  if (high <= low) high = low + 1;
  const rough = Math.max((high - low) / 5, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (/** @type {number} */ ([1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999)));
  const result = [];
  for (let k = Math.floor(low / step + 1e-9); k * step < high + step * 0.999; k++) result.push(Number((k * step).toPrecision(12)));
  return result;
}

/**
 * @param {number} low
 * @param {number} high
 * @param {number} from
 * @param {number} to
 * @returns {(value: number) => number}
 */
function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

/**
 * What stands at ticks: as many decimals as tell them apart.
 * @param {number[]} values
 * @param {number} factor
 * @param {string} unit
 */
function tickText(values, factor, unit) {
  const digits = Math.max(0, -Math.floor(Math.log10((values[1] - values[0]) * factor) + 1e-9));
  return (/** @type {number} */ value) => decimal(value * factor, digits) + unit;
}

/**
 * The frame of a plot: grid, axes and their labels.
 * @param {{ x: number[], span?: [number, number], y: number[], xLabel: string, yLabel: string, width?: number,
 *   format: (value: number) => string, about: string, empty?: string }} axes
 *   x, y: ticks; span: the ends of x, where they are no ticks; format: of y; empty: why there is nothing to see
 */
function frame({ x, span = [x[0], x[x.length - 1]], y, xLabel, yLabel, width = WIDTH, format, about, empty = "" }) {
  const right = width - 12;
  const toX = scale(...span, INNER.left, right);
  const toY = scale(y[0], y[y.length - 1], INNER.bottom, INNER.top);
  const node = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": empty ? `${about} ${empty}.` : about });
  for (const value of y) {
    node.append(
      svg("line", { class: value === 0 ? "axis" : "grid", x1: INNER.left, x2: right, y1: toY(value), y2: toY(value) }),
      svg("text", { class: "tick", x: INNER.left - 7, y: toY(value) + 4, "text-anchor": "end" }, format(value)),
    );
  }
  for (const value of x) {
    const text = Number.isInteger(value) ? count(value) : String(value);
    node.append(svg("text", { class: "tick", x: toX(value), y: INNER.bottom + 17, "text-anchor": "middle" }, text));
  }
  node.append(
    svg("text", { class: "label", x: (INNER.left + right) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, xLabel),
    svg("text", { class: "label", x: 2, y: 12 }, yLabel),
  );
  if (empty) node.append(svg("text", { class: "empty", x: (INNER.left + right) / 2, y: INNER.bottom - 14, "text-anchor": "middle" }, empty));
  return { node, toX, toY };
}

/**
 * @param {string} title
 * @param {string} text what to look for
 * @param {Node} plot
 * @param {Node[]} legend
 * @param {(() => Node) | null} [data] the figures as a table
 */
function figure(title, text, plot, legend, data = null) {
  return html(
    "figure",
    {},
    html("h3", {}, title),
    html("figcaption", {}, text),
    legend.length > 0 && html("ul", { class: "legend", "aria-hidden": "true" }, ...legend.map((entry) => html("li", {}, entry))),
    plot,
    data && folded("As a table", data),
  );
}

/**
 * @param {string} style
 * @param {string} name
 * @param {"line" | "bar" | "dot"} kind
 */
function legendEntry(style, name, kind) {
  const swatch = svg("svg", { viewBox: "0 0 26 12", class: "swatch" });
  if (kind === "line") swatch.append(svg("path", { class: `line ${style}`, d: "M1 6H25" }));
  else if (kind === "bar") swatch.append(svg("rect", { class: `bar ${style}`, x: 6, y: 0.5, width: 14, height: 11 }));
  else swatch.append(svg("path", { class: `dot ${style}`, d: dot(style, 13, 6, 4.5) }));
  return html("span", {}, swatch, name);
}

/**
 * Lines over `x`; a gap where a series has no value. Later series lie on earlier ones.
 * @param {Series[]} series
 * @param {{ xLabel: string, yLabel: string, unit?: [number, string], about: string, empty?: string, current?: number, width?: number }} options
 *   unit: what a value is multiplied by on the axis, and its sign there; current: the value of x in use
 */
function linePlot(series, { xLabel, yLabel, unit = [100, " %"], about, empty, current, width }) {
  const points = series.flatMap((one) => one.points);
  const xs = points.map(([x]) => x);
  const ys = /** @type {number[]} */ (points.map(([, y]) => y).filter(isNumber));
  const low = xs.reduce((a, b) => Math.min(a, b), Infinity);
  const high = xs.reduce((a, b) => Math.max(a, b), -Infinity);
  const x = ticks(low, high, xs.every(Number.isInteger) ? 1 : 0).filter((value) => value >= low && value <= high);
  const y = ticks(ys.reduce((a, b) => Math.min(a, b), 0), ys.reduce((a, b) => Math.max(a, b), 0));
  /** @type {[number, number]} one point stands in the middle */
  const span = low === high ? [low - 1, high + 1] : [low, high];
  const format = tickText(y, ...unit);
  const { node, toX, toY } = frame({ x, span, y, xLabel, yLabel, width, format, about, empty: ys.length ? "" : empty });
  if (current !== undefined && current >= low && current <= high) {
    node.append(svg("line", { class: "gate", x1: toX(current), x2: toX(current), y1: INNER.top, y2: INNER.bottom }));
  }
  for (const { name, style, points, format } of series) {
    let path = "";
    let broken = true;
    const dots = svg("g", {});
    for (const [px, py] of points) {
      if (!isNumber(py)) {
        broken = true;
        continue;
      }
      const at = `${toX(px).toFixed(1)} ${toY(/** @type {number} */ (py)).toFixed(1)}`;
      path += `${broken ? "M" : "L"}${at}`;
      broken = false;
      if (points.length <= 40) {
        const [cx, cy] = at.split(" ");
        const r = style.includes("wide") ? 5.5 : 3;
        dots.append(svg("circle", { class: `point ${style}`, cx, cy, r }, svg("title", {}, `${name}, ${xLabel} ${px}: ${format(py)}`)));
      }
    }
    node.append(svg("path", { class: `line ${style}`, d: path }), dots);
  }
  return node;
}

/**
 * @param {{ edges: number[] } & Record<PlottedGate, number[]>} histogram
 * @param {number} theta
 */
function histogramPlot(histogram, theta) {
  const { edges } = histogram;
  const bins = edges.length - 1;
  const sums = Array.from({ length: bins }, (_, bin) => PLOTTED_GATES.reduce((sum, [gate]) => sum + histogram[gate][bin], 0));
  const { node, toX, toY } = frame({
    x: UNIT,
    y: ticks(0, Math.max(1, ...sums), 1),
    xLabel: "similarity to the best witness",
    yLabel: "failing calls",
    format: count,
    about: `Histogram of the similarity of failing calls to their best witness; theta is ${theta}.`,
    empty: sums.some(Boolean) ? "" : "no failing call has a witness of its tool",
  });
  for (let bin = 0; bin < bins; bin++) {
    let base = 0;
    for (const [gate, name] of PLOTTED_GATES) {
      const number = histogram[gate][bin];
      if (!number) continue;
      const left = toX(edges[bin]) + 0.75;
      node.append(
        svg(
          "rect",
          { class: `bar ${gate}`, x: left, width: toX(edges[bin + 1]) - 0.75 - left, y: toY(base + number), height: toY(base) - toY(base + number) },
          svg("title", {}, `${decimal(edges[bin])} to ${decimal(edges[bin + 1])}, ${name}: ${count(number)}`),
        ),
      );
      base += number;
    }
  }
  node.append(
    svg("line", { class: "gate", x1: toX(theta), x2: toX(theta), y1: INNER.top, y2: INNER.bottom }),
    svg("text", { class: "gate-label", x: toX(theta) - 5, y: INNER.top + 10, "text-anchor": "end" }, `theta ${theta}`),
  );
  return node;
}

/**
 * The outline of a mark: a disc, a triangle or a cross, by gate.
 * @param {string} gate
 * @param {number} x
 * @param {number} y
 * @param {number} r
 */
function dot(gate, x, y, r) {
  const f = (/** @type {number} */ value) => value.toFixed(1);
  if (gate === "corrected") return `M${f(x - r)} ${f(y)}a${f(r)} ${f(r)} 0 1 0 ${f(2 * r)} 0a${f(r)} ${f(r)} 0 1 0 ${f(-2 * r)} 0Z`;
  if (gate === "below_alpha") return `M${f(x)} ${f(y - r)}L${f(x + r)} ${f(y + r)}H${f(x - r)}Z`;
  return `M${f(x - r)} ${f(y - r)}L${f(x + r)} ${f(y + r)}M${f(x - r)} ${f(y + r)}L${f(x + r)} ${f(y - r)}`;
}

const GRID = 50;

/**
 * Calls near each other, counted together.
 * @param {[number, number, string][]} calls support, similarity, gate
 * @returns {{ gate: string, similarity: number, support: number, calls: number }[]} the most calls first
 */
function cellsOf(calls) {
  /** @type {Map<string, { gate: string, similarity: number, support: number, calls: number }>} */
  const cells = new Map();
  for (const [support, similarity, gate] of calls) {
    const [x, y] = [Math.round(similarity * GRID), Math.round(support * GRID)];
    const key = `${gate} ${x} ${y}`;
    const cell = cells.get(key) ?? { gate, similarity: x / GRID, support: y / GRID, calls: 0 };
    cells.set(key, { ...cell, calls: cell.calls + 1 });
  }
  return [...cells.values()].sort((a, b) => b.calls - a.calls);
}

/**
 * One mark for each cell, whose area is the number of its calls.
 * @param {ReturnType<typeof cellsOf>} cells
 * @param {{ theta: number, alpha_min: number }} settings
 */
function gatePlot(cells, { theta, alpha_min }) {
  const about = `Support of the matched reference group against similarity. Calls right of theta ${theta} and above the curve similarity times support = ${alpha_min} are corrected.`;
  const { node, toX, toY } = frame({ x: UNIT, y: UNIT, xLabel: "similarity", yLabel: "support", format: String, about, empty: cells.length ? "" : "no failing call matches a witness" });
  const most = cells[0]?.calls ?? 1;
  const curve = [];
  for (let s = Math.max(alpha_min, 0.01); s <= 1.0001; s += 0.01) curve.push(`${toX(Math.min(s, 1)).toFixed(1)} ${toY(Math.min(1, alpha_min / s)).toFixed(1)}`);
  node.append(svg("path", { class: "gate", d: `M${curve.join("L")}` }));
  node.append(svg("line", { class: "gate", x1: toX(theta), x2: toX(theta), y1: INNER.top, y2: INNER.bottom }));
  for (const [gate] of PLOTTED_GATES) {
    const marks = cells.filter((cell) => cell.gate === gate);
    const path = marks.map(({ similarity, support, calls }) => dot(gate, toX(similarity), toY(support), 3 + 7 * Math.sqrt(calls / most))).join("");
    node.append(svg("path", { class: `dot ${gate}`, d: path }));
  }
  node.append(
    svg("text", { class: "gate-label", x: toX(theta) - 5, y: INNER.top + 10, "text-anchor": "end" }, `theta ${theta}`),
    svg("text", { class: "gate-label", x: toX(0.4) + 5, y: toY(Math.min(1, alpha_min / 0.4)) - 4 }, `alpha_min ${alpha_min}`),
  );
  return node;
}

/** @param {Summary} summary */
function drawPlots({ steps, settings, similarity_histogram: histogram, support_alpha: calls }) {
  const place = byId("plots");
  /** @type {(style: string, name: string, value: (figures: Figures) => number | null, format?: Series["format"]) => Series} */
  const series = (style, name, value, format = percent) => ({ style, name, format, points: steps.map((figures) => [figures.step ?? 0, value(figures)]) });
  const credit = [
    series("s1 wide", "misassigned", (f) => share(f.misassigned_steps, f.failing_steps)),
    series("s2", "corrected", (f) => share(f.corrected_steps, f.failing_steps)),
    series("s3", "failing rollouts with a correctable call", (f) => share(f.correctable_trajectories, f.failing_trajectories)),
  ];
  const same = steps.some((f) => f.misassigned_steps) && steps.every((f) => f.misassigned_steps === f.corrected_steps);
  const outcome = [series("s1", "success rate", (f) => f.success_rate), series("s2", "lift of the witnesses", (f) => f.lift, points)];
  /** @type {(caption: string, all: Series[]) => () => Node} */
  const asTable = (caption, all) => () =>
    table(
      caption,
      ["Training step", ...all.map(({ name }) => name)],
      steps.map((figures, row) => [figures.step ?? 0, ...all.map(({ points, format }) => format(points[row][1]))]),
    );
  /** @type {(all: Series[]) => Node[]} */
  const lines = (all) => all.map(({ style, name }) => legendEntry(style, name, "line"));
  const xLabel = "training step";
  if (steps.length) {
    place.append(
      figure(
        "Misassigned and corrected",
        `Of the failing calls: those that match a call of a successful sibling, and those TAPO corrects.${same ? " Here they are the same: alpha_min stops none." : ""}`,
        linePlot(credit, { xLabel, yLabel: "share", empty: "no failing calls", about: "Share of failing calls that are misassigned and that are corrected, over training steps. The table has the figures." }),
        lines(credit),
        asTable("Misassigned and corrected over training", credit),
      ),
      figure(
        "Success and lift",
        "Lift: how much more often rollouts that hold a witness succeed than their prompt group. At or below 0 the witnesses are lucky, and TAPO may lift wrong calls.",
        linePlot(outcome, { xLabel, yLabel: "success in percent, lift in points", unit: [100, ""], empty: "no rollouts", about: "Success rate and lift of the witnesses over training steps. The table has the figures." }),
        lines(outcome),
        asTable("Success and lift over training", outcome),
      ),
    );
  }
  const cells = cellsOf(calls);
  const names = new Map(/** @type {[string, string][]} */ (PLOTTED_GATES));
  const drawn = PLOTTED_GATES.filter(([gate]) => cells.some((cell) => cell.gate === gate));
  place.append(
    figure(
      "Similarity",
      "Failing calls by their best witness. A heap just left of theta is what a lower theta would let through.",
      histogramPlot(histogram, settings.theta),
      PLOTTED_GATES.map(([gate, name]) => legendEntry(gate, name, "bar")),
      () =>
        table(
          "Failing calls by similarity",
          ["Similarity", ...PLOTTED_GATES.map(([, name]) => name)],
          histogram.edges.slice(1).map((edge, bin) => [
            `${decimal(histogram.edges[bin])} to ${decimal(edge)}`,
            ...PLOTTED_GATES.map(([gate]) => count(histogram[gate][bin])),
          ]),
        ),
    ),
    figure(
      "The two gates",
      `A call is corrected right of theta and above the curve, where similarity × support reaches alpha_min. The larger the mark, the more calls; ${counted(calls.length, "call")} drawn.`,
      gatePlot(cells, settings),
      drawn.map(([gate, name]) => legendEntry(gate, name, "dot")),
      () =>
        table(
          "Matched failing calls, the most frequent first",
          ["Similarity", "Support", "Outcome", "Calls"],
          cells.map((cell) => [decimal(cell.similarity), decimal(cell.support), names.get(cell.gate) ?? "", count(cell.calls)]),
        ),
    ),
  );
}

/**
 * A figure as it is written.
 * @param {Figures} figures
 * @param {Column} column
 */
function written(figures, { name, part, whole, unit }) {
  const known = /** @type {Record<string, number | null | undefined>} */ (/** @type {unknown} */ (figures));
  if (unit !== "share") return (unit === "points" ? points : decimal)(known[name]);
  return percent(part in known ? share(known[part], known[whole]) : known[name]);
}

/**
 * @param {Summary} summary
 * @param {Column[]} columns of the table
 */
function drawTools({ tools }, columns) {
  const rows = Object.entries(tools).sort(([, a], [, b]) => b.calls - a.calls);
  const heading = (/** @type {string} */ text) => text.charAt(0).toUpperCase() + text.slice(1);
  byId("tools").append(
    !rows.length ? html("p", { class: "lead" }, "No rollout calls a tool.") : table(
      "Calls by tool, most used first",
      ["Tool", "Calls", "In failing rollouts", ...columns.map(({ column }) => heading(column))],
      rows.map(([tool, f]) => [cut(tool, 120), count(f.calls), count(f.failing_steps), ...columns.map((column) => written(f, column))]),
    ),
  );
}

/** @param {Summary} summary */
function drawSweeps({ sweeps, settings, totals }) {
  byId("sweeps-section").hidden = !sweeps.length;
  const corrected = (/** @type {Sweep} */ sweep) => share(sweep.corrected_steps, totals.failing_steps);
  /** @type {[keyof Sweep & string, string, (sweep: Sweep) => number | null, Series["format"], [number, string]][]} */
  const plots = [
    ["beta", "mean advantage of corrected calls", (sweep) => sweep.mean_lifted_advantage, decimal, [1, ""]],
    ["theta", "failing calls corrected", corrected, percent, [100, " %"]],
    ["alpha_min", "failing calls corrected", corrected, percent, [100, " %"]],
  ];
  const swept = /** @type {const} */ (["beta", "theta", "alpha_min"]);
  /** @type {(sweep: Sweep, but?: string) => boolean} whether a sweep has the settings in use, but for one */
  const inUse = (sweep, but) => swept.every((name) => name === but || Math.abs(sweep[name] - settings[name]) < 1e-9);
  if (!sweeps.some((sweep) => sweep.corrected_steps)) {
    byId("sweep-plots").append(html("p", { class: "lead" }, "No call is corrected under any of the settings tried."));
    return;
  }
  for (const [name, yLabel, value, format, unit] of plots) {
    const rows = sweeps.filter((sweep) => inUse(sweep, name)).sort((a, b) => Number(a[name]) - Number(b[name]));
    if (rows.length < 2) continue;
    const current = Number(settings[name]);
    /** @type {Series} */
    const series = { name: yLabel, style: "s1", format, points: rows.map((sweep) => [Number(sweep[name]), value(sweep)]) };
    const about = `${yLabel} for ${name} from ${rows[0][name]} to ${rows[rows.length - 1][name]}; ${current} is in use. The table below has the figures.`;
    const plot = linePlot([series], { xLabel: name, yLabel, unit, about, current, width: NARROW });
    byId("sweep-plots").append(figure(name, `In use: ${current} (dashed).`, plot, []));
  }
  byId("sweeps").append(
    folded("All settings tried, as a table", () =>
      table(
        "Other settings on the same rollouts; the row in use is marked",
        ["beta", "theta", "alpha_min", "Corrected calls", "Of failing calls", "Of tokens", "Advantage after"],
        sweeps.map((s) => [
          `${decimal(s.beta)}${inUse(s) ? " (in use)" : ""}`,
          decimal(s.theta),
          decimal(s.alpha_min),
          count(s.corrected_steps),
          percent(corrected(s)),
          percent(s.token_share),
          decimal(s.mean_lifted_advantage),
        ]),
        (row) => inUse(sweeps[row]),
      ),
    ),
  );
}
