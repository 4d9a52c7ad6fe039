"use strict";
// The browser of sampled responses: a sample that the page holds, or all of them through the server of `gspo watch --web`.

const PAGE = 10;
const STRONGEST = 5;  // nats below 0 at which a token has the full colour

/** How strong a token is coloured, 0 to 1; null = it was not sampled. */
const strength = logprob => logprob === null ? 0 : Math.min(1, Math.max(0, -logprob / STRONGEST));

const FARTHEST = 0.5;  // nats between trainer and sampler at which a token has the full colour; the root shows small ones

function makeToken([text, logprob], ratio) {
  const passed = ratio === undefined || ratio === null ? "" : `, log-ratio ${ratio.toFixed(4)}`;
  const title = logprob === null ? "inserted, not sampled" : `log-prob ${logprob.toFixed(4)}, probability ${Math.exp(logprob).toPrecision(3)}${passed}`;
  const span = make("span", { title, text, class: text.includes("\n") ? "end" : null, "data-logprob": logprob, "data-logratio": passed ? ratio : null });
  if (logprob === null) return span;
  const [tint, depth] = passed ? [ratio < 0 ? "--unlikely" : "--likelier", Math.sqrt(Math.min(1, Math.abs(ratio) / FARTHEST))] : ["--unlikely", strength(logprob)];
  span.style.backgroundColor = `rgba(var(${tint}), ${(0.75 * depth).toFixed(3)})`;
  return span;
}

function makeResponse(one) {
  const fact = (name, value) => make("span", {}, `${name} `, make("b", { text: value }));
  const versions = [...new Set(one.versions)].join(" to ");
  const least = one.tokens.filter(([, logprob]) => logprob !== null && logprob < -0.7).sort((a, b) => a[1] - b[1]).slice(0, 3);
  const words = least.map(([text, logprob]) => `${JSON.stringify(text)} (${Math.exp(logprob).toPrecision(2)})`).join(", ");
  const said = make("div", { class: "said", tabindex: 0, role: "group", "aria-label": "Response" }, ...one.tokens.slice(0, one.head).map((token, at) => makeToken(token, one.log_ratios[at])));
  if (one.left_out) said.append(make("span", { class: "cut", text: ` [${one.left_out} tokens left out] ` }), ...one.tokens.slice(one.head).map((token, at) => makeToken(token, one.log_ratios[one.head + at])));
  return make("article", { class: "response" },
    make("p", { class: "meta" }, fact("step", one.step), fact("prompt", one.prompt), fact("sample", one.sample), fact("reward", short(one.reward)),
      fact("tokens", one.length), fact("ended by", one.stop_reason), fact("weights", versions), one.gold === null ? null : fact("gold answer", one.gold),
      one.clipped && one.clipped.left + one.clipped.right ? fact("clipped", `${short(100 * one.clipped.left)} % left, ${short(100 * one.clipped.right)} % right`) : null,
      one.unscored ? fact("no score", one.unscored) : null),
    make("p", { class: "said question", text: one.question }), said,
    words ? make("p", { class: "meta" }, fact("least likely (probability)", words)) : null);
}

const FILTERS = [
  ["step_low", "Step from", "number"], ["step_high", "to", "number"], ["reward_low", "Reward from", "number"], ["reward_high", "to", "number"],
  ["length_low", "Tokens from", "number"], ["length_high", "to", "number"], ["prompt", "Prompt number", "number"], ["contains", "Prompt holds", "search"],
];
const SIDES = { "": "all responses", left: "clipped left", right: "clipped right", either: "clipped" };
const ORDERS = { stored: "as sampled", newest: "newest first", longest: "longest first", shortest: "shortest first", lowest: "lowest reward first", highest: "highest reward first" };

/** What the page holds, filtered as the server does it (report/response_pages.py). */
function select(items, asked) {
  const within = (value, name) => (asked[`${name}_low`] === "" || value >= +asked[`${name}_low`]) && (asked[`${name}_high`] === "" || value <= +asked[`${name}_high`]);
  const kept = items.filter(one => within(one.step, "step") && within(one.reward, "reward") && within(one.length, "length")
    && (asked.prompt === "" || one.prompt === +asked.prompt) && (!asked.clipped || one.stop_reason === "length")
    && (!asked.lost || (one.clipped !== null && (asked.lost === "either" ? one.clipped.left + one.clipped.right : one.clipped[asked.lost]) > 0))
    && one.question.toLowerCase().includes(asked.contains.toLowerCase()));
  const keys = { newest: one => -one.step, longest: one => -one.length, shortest: one => one.length, lowest: one => one.reward, highest: one => -one.reward };
  const key = keys[asked.order];
  return key ? kept.sort((a, b) => key(a) - key(b)) : kept;
}

/** The section; `source(asked, offset)` gives {total, items, note}. */
function makeBrowser(source, stated) {
  let offset = 0;
  const list = make("div", { "aria-live": "polite" }), count = make("span", { role: "status" });
  const fields = FILTERS.map(([name, label, type]) => make("label", { text: label }, make("input", { name, type, step: "any", autocomplete: "off" })));
  const order = make("select", { name: "order" }, ...Object.entries(ORDERS).map(([value, text]) => make("option", { value, text })));
  const lost = make("select", { name: "lost" }, ...Object.entries(SIDES).map(([value, text]) => make("option", { value, text })));
  const form = make("form", { "aria-label": "Filter responses", onsubmit: event => event.preventDefault(), oninput: () => { offset = 0; show(); } }, ...fields,
    make("label", { class: "check" }, make("input", { type: "checkbox", name: "clipped" }), "cut at the limit"), make("label", { text: "Objective" }, lost), make("label", { text: "Order" }, order));
  const back = make("button", { type: "button", text: "Previous", onclick: () => { offset -= PAGE; show(); } });
  const next = make("button", { type: "button", text: "Next", onclick: () => { offset += PAGE; show(); } });
  let asking = 0;
  async function show() {
    const asked = Object.fromEntries(new FormData(form)), mine = ++asking;
    try {
      const { total, items, note } = await source(asked, offset);
      if (mine !== asking) return;
      list.replaceChildren(...items.map(makeResponse));
      count.textContent = total ? `${offset + 1} to ${offset + items.length} of ${total.toLocaleString("en")}${note ? `; ${note}` : ""}` : note || "none fits";
      back.disabled = offset === 0;
      next.disabled = offset + PAGE >= total;
    } catch (error) {
      count.textContent = `cannot be read: ${error.message}`;
    }
  }
  const scale = make("span", { class: "scale" }, "trainer less likely than sampler", make("i", { "aria-hidden": "true" }), `more likely; full colour at ${FARTHEST} nats. Without a stored pass: the darker the less likely under the sampler`);
  const section = make("section", { id: "responses", "aria-labelledby": "responses-title" }, make("h2", { id: "responses-title", text: "Sampled responses" }),
    make("p", { class: "about", text: stated }), form, make("p", { class: "pager" }, back, next, count), scale, list);
  show();
  return section;
}
