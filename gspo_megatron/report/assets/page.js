"use strict";
// The page of a run: everything is made from one object, which a live page asks for again.

const ROOT = document.getElementById("root");

const definitions = (kind, pairs) => make("dl", { class: kind }, ...pairs.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));

function makeTiles(tiles) {
  return make("dl", { class: "tiles" }, ...tiles.map(({ label, value, note }) => make("div", {}, make("dt", { text: label }),
    make("dd", { class: "value", text: value }), note ? make("dd", { class: "note", text: note }) : null)));
}

function makeHealth(health) {
  const items = (health ?? []).map(one => {
    const when = one.first === one.last ? `step ${one.first}` : `first at step ${one.first}, ${one.count} times, last at step ${one.last}`;
    return make("li", { class: one.severity }, make("p", {}, make("span", { class: "tag", text: `${one.severity}: ${one.code}` }), when),
      make("p", { text: one.message }), make("p", { class: "fix", text: `${one.key}: ${one.fix}` }));
  });
  if (!health) return [];
  return items.length ? items : [make("li", { class: "good", text: "No warning so far." })];
}

function makeExplorer(series) {
  const names = Object.keys(series).sort();
  const place = make("div");
  const show = () => {
    const name = choice.value;
    const panel = { title: name, unit: "", log: false, from_zero: false, limits: [], traces: [{ kind: "line", name, series: name, shade: null }], text: `The metric ${name} by step.` };
    place.replaceChildren(make("div", { class: "panels one" }, makePanel(panel, series)));
  };
  const choice = make("select", { onchange: show }, ...names.map(name => make("option", { value: name, text: name })));
  if (names.length) show();
  return make("section", { id: "metrics", "aria-labelledby": "metrics-title" }, make("h2", { id: "metrics-title", text: "Any metric" }),
    make("form", { onsubmit: event => event.preventDefault() }, make("label", { text: "Metric" }, choice)), place);
}

function makeSteps({ columns, rows, total }) {
  const about = rows.length < total ? `The last ${rows.length} of ${total.toLocaleString("en")} rows of metrics.jsonl.` : "The rows of metrics.jsonl.";
  return make("section", { id: "steps", "aria-labelledby": "steps-title" }, make("h2", { id: "steps-title", text: "Steps" }),
    make("p", { class: "about", text: about }), makeTable([columns, rows], "Steps"));
}

function makeEvaluated({ about, items }) {
  const shown = items.map(one => make("article", { class: "response" }, make("p", { class: "meta" }, make("span", {}, "reward ", make("b", { text: short(one.reward) }))),
    make("p", { class: "said question", text: one.question }), make("p", { class: "said", text: one.answer_text })));
  return make("section", { id: "evaluated", "aria-labelledby": "evaluated-title" }, make("h2", { id: "evaluated-title", text: "Responses of the last evaluation" }),
    make("p", { class: "about", text: about }), ...shown);
}

function render(run) {
  document.title = run.title;
  const state = make("span", { class: `state ${run.state.kind}`, text: run.state.text });
  const head = make("header", {}, make("h1", {}, make("span", { text: run.title }), state), make("p", { class: "sentence", text: run.objective }), makeTiles(run.tiles));
  const sections = [
    make("section", { id: "health", "aria-labelledby": "health-title" }, make("h2", { id: "health-title", text: "Health" }), make("ul", { class: "health" }, ...makeHealth(run.health)),
      ...run.notes.map(text => make("p", { class: "about", text }))),
    ...run.figures.map(figure => makeFigure(figure, run.series)),
    run.responses ? makeBrowser(run.live ? askServer : askPage(run.responses.items), run.responses.stated) : null,
    run.evaluated.items.length ? makeEvaluated(run.evaluated) : null,
    makeExplorer(run.series), makeSteps(run.steps),
    make("section", { id: "what", "aria-labelledby": "what-title" }, make("h2", { id: "what-title", text: "What ran" }), definitions("facts", run.facts),
      make("details", {}, make("summary", { text: "The recipe with every key" }), make("pre", { tabindex: 0, text: run.recipe }))),
  ].filter(section => section !== null);
  const links = sections.map(section => make("li", {}, make("a", { href: `#${section.id}`, text: section.querySelector("h2").textContent })));
  ROOT.replaceChildren(make("a", { class: "skip", href: "#main", text: "Skip to the content" }), head, make("nav", { "aria-label": "Sections" }, make("ul", {}, ...links)),
    make("main", { id: "main" }, ...sections), make("footer", { text: run.footer }));
}

const askPage = items => async (asked, offset) => {
  const found = select(items, asked);
  return { total: found.length, items: found.slice(offset, offset + PAGE), note: "" };
};

async function askServer(asked, offset) {
  const answer = await fetch(`responses?${new URLSearchParams({ ...asked, offset, limit: PAGE })}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

const held = JSON.parse(document.getElementById("run").textContent);
render(held);
if (held.live) keepCurrent(held);
