"use strict";
// Draws figures (report/panels.py says what they are made of) with Plotly, and writes their numbers as tables.

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const rgb = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
const mix = (from, to, part) => {
  const [a, b] = [rgb(colour(from)), rgb(colour(to))];
  return `rgb(${a.map((one, at) => Math.round(one + part * (b[at] - one))).join(",")})`;
};
const faint = (name, alpha) => `rgba(${rgb(colour(name)).join(",")},${alpha})`;

/** An element: tag, attributes (`text` is its text), children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const short = value => value === null || value === undefined ? ""
  : Math.abs(value) >= 1e5 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : `${Number(value.toPrecision(5))}`;

/** Plotly's traces of one of ours. */
function drawTrace(trace, series, place, dense) {
  const name = trace.name, tint = `c${(trace.colour ?? place) % 8}`, plain = colour(tint);
  if (trace.kind === "line") {
    const { x, y } = series[trace.series];
    const shade = trace.shade === null ? plain : mix("first", "last", trace.shade);
    const group = trace.group ? { legendgroup: trace.group, showlegend: trace.first, opacity: 0.75 } : {};
    const mode = x.length < 3 ? "markers" : x.length <= 60 ? "lines+markers" : "lines";
    return [{ x, y, name, mode, ...group, line: { color: shade, width: x.length > 200 ? 1 : dense ? 1.4 : 2 }, marker: { color: shade, size: 5 } }];
  }
  if (trace.kind === "band") {
    const edge = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", legendgroup: name };
    return [
      { x: trace.x, y: trace.low, ...edge, showlegend: false },
      { x: trace.x, y: trace.high, name, ...edge, fill: "tonexty", fillcolor: faint(trace.colour === undefined ? "c0" : tint, trace.depth ? 0.3 : 0.16) },
    ];
  }
  if (trace.kind === "points") {
    const bars = {
      type: "data", symmetric: false, color: plain, thickness: 1.5, width: 3,
      array: trace.high.map((high, at) => high - trace.y[at]), arrayminus: trace.y.map((y, at) => y - trace.low[at]),
    };
    const mode = trace.x.length > 1 ? "lines+markers" : "markers";
    return [{ x: trace.x, y: trace.y, name, mode, line: { color: plain, dash: "dot", width: 1.5 },
      marker: { color: plain, size: trace.x.length > 20 ? 5 : 8, symbol: "diamond" }, error_y: bars }];
  }
  if (trace.kind === "area")
    return [{ x: trace.x, y: trace.y, name, mode: "lines", stackgroup: "all", line: { width: 0.6, color: plain }, fillcolor: faint(tint, 0.6) }];
  const scale = [[0, colour("heat0")], [0.5, colour("heat1")], [1, colour("heat2")]];
  return [{ type: "heatmap", x: trace.x, y: trace.y, z: trace.z, colorscale: scale, hovertemplate: "step %{x}, layer %{y}: %{z:.3g}<extra></extra>",
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 } } }];
}

/** Layout of a panel: limits as dashed lines with their text. */
function layOut(panel) {
  const isHeat = panel.traces[0].kind === "heat", hasSteps = typeof panel.traces[0].x?.[0] !== "string";
  const axis = { gridcolor: colour("grid"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  const level = (y, dash) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: colour("soft"), width: 1.2, dash } });
  const shapes = panel.limits.flatMap(({ y, to }) => to === undefined ? [level(y, "dash")] : [level(y, "dot"), level(to, "dot"),
    { type: "rect", xref: "paper", x0: 0, x1: 1, y0: y, y1: to, line: { width: 0 }, fillcolor: faint("c2", 0.22), layer: "below" }]);
  const annotations = panel.limits.map(({ y, to, text }) => ({ xref: "paper", x: 1, xanchor: "right", y: panel.log ? Math.log10(y) : to ?? y,
    yanchor: "bottom", text, showarrow: false, font: { size: 11, color: colour("soft") } }));
  return {
    margin: { l: 8, r: 8, t: 10, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("text") },
    hovermode: isHeat ? "closest" : hasSteps ? "x unified" : "closest",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") } },
    xaxis: { ...axis, title: hasSteps ? { text: "step", standoff: 4 } : undefined, showgrid: false, zeroline: false, type: hasSteps ? "linear" : "category" },
    yaxis: { ...axis, type: panel.log ? "log" : "linear", zeroline: false, rangemode: panel.from_zero && !isHeat ? "tozero" : "normal", title: { text: isHeat ? "layer" : panel.unit, standoff: 6 },
      dtick: isHeat && panel.traces[0].y.length <= 12 ? 1 : undefined, exponentformat: "e", minexponent: 4 },
    showlegend: !isHeat && hasSteps && panel.traces.length > 1, legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, font: { size: 11.5 } },
    shapes, annotations, dragmode: false,
  };
}

/** The numbers of a panel: header and rows, one row a step. */
function tabulate(panel, series) {
  const columns = [], rows = new Map();
  const put = (x, name, value) => {
    if (!rows.has(x)) rows.set(x, {});
    rows.get(x)[name] = value;
  };
  for (const trace of panel.traces) {
    const { x, y } = trace.kind === "line" ? series[trace.series] : trace;
    const parts = trace.kind === "heat" ? trace.y.map((layer, at) => [`layer ${layer}`, trace.z[at]])
      : trace.kind === "band" ? [[`${trace.name}, low`, trace.low], [`${trace.name}, high`, trace.high]]
      : trace.kind === "points" ? [[trace.name, y], [`${trace.name}, low`, trace.low], [`${trace.name}, high`, trace.high]] : [[trace.name, y]];
    for (const [name, values] of parts) {
      columns.push(name);
      x.forEach((one, at) => put(one, name, values[at]));
    }
  }
  const order = [...rows.keys()].sort((a, b) => typeof a === "number" ? a - b : 0);
  return [[typeof order[0] === "number" ? "step" : "", ...columns], order.map(x => [x, ...columns.map(name => rows.get(x)[name])])];
}

function makeTable([head, rows], caption) {
  const body = rows.map(row => make("tr", {}, ...row.map(value => make("td", { text: typeof value === "string" ? value : short(value) }))));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${caption}, table` },
    make("table", {}, make("thead", {}, make("tr", {}, ...head.map(text => make("th", { scope: "col", text })))), make("tbody", {}, ...body)));
}

/** One panel with its title, its plot, its words for those who do not see it, and its numbers. */
function makePanel(panel, series) {
  const plot = make("div", { class: "plot", role: "img", "aria-label": panel.text });
  const numbers = make("details", { ontoggle: () => {
    if (numbers.open && numbers.children.length === 1) numbers.append(make("p", { class: "about", text: panel.text }), makeTable(tabulate(panel, series), panel.title));
  } }, make("summary", { text: "In words and numbers", "aria-label": `In words and numbers: ${panel.title}` }));
  plot.draw = () => {
    plot.drawn = true;
    if (typeof Plotly === "undefined") {
      plot.replaceWith(make("p", { class: "about", text: "Not drawn: the package plotly is not installed where this page was written (make setup installs it)." }));
      numbers.open = true;
      return;
    }
    const dense = panel.traces.length > 6;
    const named = Math.ceil(panel.traces.length / 6);  // of many lines in an order, some are named
    const traces = panel.traces.flatMap((trace, place) => drawTrace(trace, series, place, dense).map(one =>
      dense && trace.shade > 0 && trace.shade < 1 && place % named ? { ...one, showlegend: false } : one));
    Plotly.react(plot, traces, layOut(panel), { responsive: true, displayModeBar: false });
  };
  whenNear.observe(plot);
  return make("figure", {}, make("h3", { text: panel.title }), plot, numbers);
}

// Plots are drawn when they come near the window, and again when the colours change.
const whenNear = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries)
    if (isIntersecting && !target.drawn) target.draw();
}, { rootMargin: "600px" });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.querySelectorAll(".plot").forEach(plot => plot.drawn && plot.draw()));

function makeFigure(figure, series) {
  return make("section", { id: figure.id, "aria-labelledby": `${figure.id}-title` },
    make("h2", { id: `${figure.id}-title`, text: figure.title }), make("p", { class: "about", text: figure.about }),
    make("div", { class: `panels ${{ 1: "one", 3: "three", 5: "three", 6: "three" }[figure.panels.length] ?? "two"}` }, ...figure.panels.map(panel => makePanel(panel, series))));
}
