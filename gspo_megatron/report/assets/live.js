"use strict";
// A live page asks for the run again and redraws what changed; the browser of responses keeps its filters and its place.

const ASK_SECONDS = 3;

/** Redraw the figures that are shown, and the head; the rest of the page stays as it is. */
function refresh(run) {
  const fresh = document.querySelector("header");
  fresh.querySelector(".state").className = `state ${run.state.kind}`;
  fresh.querySelector(".state").textContent = run.state.text;
  fresh.querySelector(".tiles").replaceWith(makeTiles(run.tiles));
  document.querySelector(".health").replaceChildren(...makeHealth(run.health));
  for (const figure of run.figures) {
    const old = document.getElementById(figure.id), made = makeFigure(figure, run.series);
    if (old) {
      const open = [...old.querySelectorAll("details")].map(one => one.open);
      old.replaceWith(made);
      made.querySelectorAll("details").forEach((one, at) => { one.open = open[at] ?? false; });
    } else document.querySelector("main").insertBefore(made, document.getElementById("metrics"));
  }
  const steps = document.getElementById("steps");
  steps.replaceWith(makeSteps(run.steps));
  document.querySelector("footer").textContent = run.footer;
}

function keepCurrent(run) {
  let mark = run.mark;
  setInterval(async () => {
    try {
      const answer = await fetch(`run?mark=${encodeURIComponent(mark)}`);
      if (answer.status === 304) return;
      if (!answer.ok) throw new Error(await answer.text());
      const now = await answer.json();
      mark = now.mark;
      refresh(now);
    } catch (error) {
      document.querySelector("footer").textContent = `The server of gspo watch does not answer: ${error.message}`;
    }
  }, 1000 * ASK_SECONDS);
}
