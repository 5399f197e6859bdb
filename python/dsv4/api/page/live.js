// The live view: what the engine does now, from GET /stats once a second while it is looked at.

import { json } from "./api.js";
import { $, brief, bytes, count, figure, h, span, svg } from "./dom.js";

const EVERY = 1000;
const KEPT = 120; // samples
const KINDS = [
  ["requests", "Running requests"],
  ["pinned", "Pinned prefixes"],
  ["history", "Cached history"],
  ["snapshots", "Saved states"],
  ["leaving", "Being freed"],
  ["free", "Free"],
];
/** Why not more of a prompt was reused. */
const REASONS = {
  none: "all that was known",
  never_stored: "seen for the first time",
  below_block: "the rest is less than a block",
  disabled: "reuse is off",
  history_evicted: "history was evicted",
  snapshot_evicted: "the saved state was evicted",
  salt: "known under another salt only",
  declined_by_cost: "computing was cheaper",
};

let samples = [];
let timer = 0;
let onRefused = () => {};
let looking = false;

/** `refused(error)` is told when the figures cannot be had. */
export function setUp(refused) {
  onRefused = refused;
  document.addEventListener("visibilitychange", () => look(looking));
}

/** Begins or ends asking. */
export function look(on) {
  looking = on;
  clearTimeout(timer);
  if (on && !document.hidden) tick();
}

async function tick() {
  clearTimeout(timer);
  try {
    const stats = await json("stats");
    const last = samples.at(-1);
    if (last && stats.tokens.generated < last.stats.tokens.generated) samples = []; // another server
    samples = [...samples, { at: performance.now() / 1000, stats }].slice(-KEPT);
    draw();
    onRefused(null);
  } catch (error) {
    onRefused(error);
    if (error.status === 401 || error.status === 403) return;
  }
  if (looking && !document.hidden) timer = setTimeout(tick, EVERY);
}

/** Growth of `of(stats)` per second between two samples. */
function rate(of, from, to) {
  return to.at > from.at ? (of(to.stats) - of(from.stats)) / (to.at - from.at) : 0;
}

const rates = (of) => samples.slice(1).map((sample, i) => rate(of, samples[i], sample));

function draw() {
  const now = samples.at(-1).stats;
  const { requests: r, tokens: t, cache: c, steps: s } = now;
  const ten = samples.at(-11) ?? samples[0];
  const minute = samples.at(-61) ?? samples[0];
  const newest = samples.at(-1);
  const generated = (x) => x.tokens.generated;
  const prompt = (x) => x.tokens.prompt;
  const mean = (a, b) => (b.stats.steps.count > a.stats.steps.count ? (b.stats.steps.busy_s - a.stats.steps.busy_s) / (b.stats.steps.count - a.stats.steps.count) : 0);
  const looked = c.looked_up_tokens - minute.stats.cache.looked_up_tokens;
  const reused = c.reused_tokens - minute.stats.cache.reused_tokens;
  const hit = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)}%` : "–");
  const idle = samples.length > 1 ? Math.min(Math.max(1 - rate((x) => x.steps.busy_s, ten, newest), 0), 1) : null;
  $("cards").replaceChildren(
    card("Running", count(r.running), `of ${count(r.most_running)} places · ${count(r.waiting)} waiting${r.parked ? ` · ${count(r.parked)} parked` : ""}`, samples.map((x) => x.stats.requests.running), r.most_running),
    card("Generated", figure(rate(generated, ten, newest)), `tokens/s · ${count(t.generated)} in all`, rates(generated)),
    card("Prompts", figure(rate(prompt, ten, newest)), `tokens/s · ${count(t.prompt)} in all`, rates(prompt)),
    card("Cache hits", hit(c.reused_tokens, c.looked_up_tokens), `of prompt tokens · last minute ${hit(reused, looked)}`, samples.map((x) => x.stats.cache.reused_tokens / (x.stats.cache.looked_up_tokens || 1)), 1),
    card("Step", s.count ? brief(mean(ten, newest) || s.last_s) : "–", s.count ? `predicted ${brief(s.predicted_s)}${s.budget_s ? `, budget ${brief(s.budget_s)}` : ""} · ${count(s.count)} steps` : "no step yet", samples.slice(1).map((x, i) => mean(samples[i], x) || 0)),
    card("Idle", idle === null ? "–" : `${Math.round(100 * idle)}%`, "of the device's last 10 s", rates((x) => x.steps.busy_s).map((busy) => Math.min(Math.max(1 - busy, 0), 1)), 1),
  );
  memory(c);
  recent(now.recent);
  lost(c);
  facts(now);
}

function card(title, value, note, line, most) {
  return h("section", { class: "card" }, h("h3", {}, title), h("p", { class: "value" }, value), h("p", { class: "note" }, note), line && spark(line, most));
}

function spark(values, most) {
  const top = Math.max(...values, most ?? 0, 1e-9);
  const points = values.map((v, i) => `${((KEPT - values.length + i) * 100) / (KEPT - 1)},${30 - (28 * v) / top}`);
  const drawing = svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" });
  if (values.length > 1) drawing.append(svg("polyline", { points: points.join(" ") }));
  return drawing;
}

function memory(c) {
  const all = c.pages * c.page_bytes;
  $("memory-note").textContent = `${bytes(all)} in ${count(c.pages)} pages · states of running requests: ${bytes(c.state_bytes)} beside them`;
  const present = KINDS.filter(([kind]) => c.bytes[kind] > 0);
  const parts = present.map(([kind]) => {
    const part = h("span", { class: `part ${kind}` });
    part.style.flexGrow = String(c.bytes[kind] / Math.max(all, 1));
    return part;
  });
  $("memory").replaceChildren(...parts);
  $("legend").replaceChildren(
    ...present.map(([kind, name]) =>
      h("li", {}, h("span", { class: `dot ${kind}` }), `${name} `, h("b", {}, bytes(c.bytes[kind])), h("span", { class: "note" }, ` ${Math.round((100 * c.bytes[kind]) / Math.max(all, 1))}%`)),
    ),
  );
}

function recent(hits) {
  $("recent-none").hidden = hits.length > 0;
  $("recent-table").hidden = hits.length === 0;
  $("recent").replaceChildren(
    ...hits.map((hit) => {
      const bar = h("span", { class: "part history" });
      bar.style.width = `${(100 * hit.cached_tokens) / Math.max(hit.prompt_tokens, 1)}%`;
      const replayed = hit.replayed ? `, ${count(hit.replayed)} run again` : "";
      return h(
        "tr",
        {},
        h("td", { class: "note", title: hit.id }, `${span(hit.age_s)} ago`),
        h("td", { class: "right" }, count(hit.prompt_tokens)),
        h("td", {}, h("span", { class: "share", "aria-hidden": "true" }, bar), ` ${count(hit.cached_tokens)}${replayed}`),
        h("td", {}, hit.cached_tokens >= hit.prompt_tokens - 1 ? "–" : (REASONS[hit.reason] ?? hit.reason)),
        h("td", { class: "right" }, count(hit.output_tokens)),
        h("td", { class: "right" }, hit.first_s === null ? "–" : brief(hit.first_s)),
      );
    }),
  );
}

function lost(c) {
  const found = Object.entries(c.lost).filter(([, tokens]) => tokens > 0).sort((a, b) => b[1] - a[1]);
  const most = Math.max(...found.map(([, tokens]) => tokens), 1);
  $("lost-none").hidden = found.length > 0;
  $("lost").replaceChildren(
    ...found.map(([reason, tokens]) => {
      const bar = h("span", { class: "part requests" });
      bar.style.width = `${(100 * tokens) / most}%`;
      return h("li", {}, h("span", {}, REASONS[reason] ?? reason), h("span", { class: "share", "aria-hidden": "true" }, bar), h("b", {}, count(tokens)));
    }),
  );
}

function facts(now) {
  const rows = [
    ["Model", now.model],
    ["Context", `${count(now.max_model_len)} tokens`],
    ["Version", now.version],
    ["Up", span(now.uptime_s)],
    ["Connections", `${count(now.connections.open)} of ${count(now.connections.limit)}`],
    ["Answers", Object.entries(now.requests.ended).filter(([, n]) => n).map(([how, n]) => `${count(n)} ${how}`).join(", ") || "none yet"],
    ["Preemptions", count(now.requests.preemptions)],
    ["Blocks evicted", count(now.cache.evicted_blocks)],
    ["Tokens run again", count(now.cache.replayed_tokens)],
  ];
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
