"use strict";
// The page of gspo compare.

const OUTCOME_HEAD = ["metric", "group", "runs", "mean", "95 %", "difference", "95 % of it", "each run"];
const section = (id, title, ...children) => make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title`, text: title }), ...children);

function renderComparison(data) {
  const differences = data.differences.length ? makeTable([["key", ...data.runs_in_order], data.differences], "Differences of the recipes")
    : make("p", { class: "about", text: "The recipes differ in nothing but name, directory and seed." });
  const sections = [
    section("outcomes", "Outcomes", makeTable([OUTCOME_HEAD, data.outcomes], "Outcomes")), section("recipes", "Differences of the recipes", differences),
    ...data.figures.map(figure => makeFigure(figure, data.series)),
    section("runs", "Runs", makeTable([["group", "run", "seed", "recipe"], data.runs], "Runs")),
  ];
  const links = sections.map(one => make("li", {}, make("a", { href: `#${one.id}`, text: one.querySelector("h2").textContent })));
  document.getElementById("root").replaceChildren(make("a", { class: "skip", href: "#main", text: "Skip to the content" }),
    make("header", {}, make("h1", { text: data.title }), make("p", { class: "sentence", text: data.objective })),
    make("nav", { "aria-label": "Sections" }, make("ul", {}, ...links)), make("main", { id: "main", class: "comparison" }, ...sections));
}

renderComparison(JSON.parse(document.getElementById("run").textContent));
