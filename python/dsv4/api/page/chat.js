// The conversation: what was said, how it is shown, and the answer under way.

import { ask, events, read, write } from "./api.js";
import { $, copyButton, count, figure, h } from "./dom.js";
import { show } from "./markdown.js";
import { wanted } from "./settings.js";

const STORE = "dsv4.chat";
const REFRESH = 50; // ms between two renderings of a stream

let turns = []; // as the API has them, with `shown` (figures), `error` and `stopped` beside
let running = null; // AbortController of the answer under way
let onRefused = () => {};
let model = () => "default";

/** `refused(error)` is told of a missing key; `modelName()` says whom to ask. */
export function setUp(refused, modelName) {
  onRefused = refused;
  model = modelName;
  try {
    turns = JSON.parse(read(sessionStorage, STORE) ?? "[]");
  } catch {
    turns = [];
  }
  const say = $("say");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) stop();
    else send();
  });
  say.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
      event.preventDefault();
      if (!running) send();
    }
  });
  say.addEventListener("input", grow);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  $("new").addEventListener("click", () => {
    stop();
    change(() => (turns = []));
    say.focus();
  });
  for (const button of document.querySelectorAll("#try button")) {
    button.addEventListener("click", () => {
      say.value = button.textContent;
      send();
    });
  }
  render();
}

const stop = () => running?.abort();

function grow() {
  const say = $("say");
  say.style.height = "auto";
  say.style.height = `${Math.min(say.scrollHeight, innerHeight / 3)}px`;
}

function change(edit) {
  edit();
  save();
  render();
}

const save = () => write(sessionStorage, STORE, turns.length ? JSON.stringify(turns) : "");

function send() {
  const text = $("say").value.trim();
  if (!text) return;
  $("say").value = "";
  grow();
  change(() => turns.push({ role: "user", content: text }));
  answer();
}

function render() {
  $("turns").replaceChildren(...turns.map((turn, at) => shown(turn, at)));
  $("try").hidden = turns.length > 0;
  toEnd(true);
}

function toEnd(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function shown(turn, at) {
  if (turn.role === "user") return userTurn(turn, at);
  if (turn.role === "tool") return h("article", { class: "tool" }, h("h2", {}, `${turn.name} gave`), h("pre", {}, turn.content));
  const view = new View();
  view.update(turn);
  view.finish(turn, at);
  return view.element;
}

function userTurn(turn, at) {
  const edit = () => {
    stop();
    $("say").value = turn.content;
    change(() => turns.splice(at));
    grow();
    $("say").focus();
  };
  const actions = h("div", { class: "actions" }, h("button", { type: "button", class: "quiet", click: edit }, "Edit"), copyButton(() => turn.content));
  return h("article", { class: "user" }, h("h2", { class: "unseen" }, "You"), h("p", {}, turn.content), actions);
}

/** One answer on the page. */
class View {
  constructor() {
    this.thought = h("div", { class: "markdown" });
    this.summary = h("summary", {}, "Thinking");
    this.thinking = h("details", { class: "thinking", hidden: true }, this.summary, this.thought);
    this.text = h("div", { class: "markdown" });
    this.calls = h("div", { class: "calls" });
    this.foot = h("footer", {});
    this.element = h("article", { class: "answer" }, h("h2", { class: "unseen" }, "Answer"), this.thinking, this.text, this.calls, this.foot);
  }

  wait(text) {
    this.foot.replaceChildren(h("span", { class: "dots" }), ` ${text}`);
  }

  update(turn) {
    if (turn.reasoning_content) {
      this.thinking.hidden = false;
      show(this.thought, turn.reasoning_content);
    }
    show(this.text, turn.content ?? "");
    const calls = turn.tool_calls ?? [];
    while (this.calls.childNodes.length < calls.length) this.calls.append(new Call().element);
    calls.forEach((call, i) => this.calls.childNodes[i].update(call));
  }

  /** `at`: its place among the turns; only the last one can be tried again or wants results. */
  finish(turn, at) {
    const thought = turn.shown?.thought;
    if (turn.reasoning_content) this.summary.textContent = thought ? `Thought for ${figure(thought)} s` : "Thoughts";
    const last = at === turns.length - 1;
    const calls = turn.tool_calls ?? [];
    if (last && calls.length) this.calls.append(results(turn, calls));
    const again = () => {
      stop();
      change(() => turns.splice(at));
      answer();
    };
    const parts = [];
    if (turn.error) parts.push(h("p", { class: "error", role: "alert" }, turn.error));
    if (turn.content) parts.push(copyButton(() => turn.content));
    if (last) parts.push(h("button", { type: "button", class: "quiet", click: again }, "Try again"));
    if (turn.shown) parts.push(h("span", { class: "figures" }, figures(turn)));
    this.foot.replaceChildren(...parts);
  }
}

class Call {
  constructor() {
    this.name = h("h3", {});
    this.body = h("pre", { tabindex: "0" });
    this.element = h("section", { class: "call" }, this.name, this.body);
    this.element.update = (call) => this.update(call);
  }

  update(call) {
    this.name.textContent = `calls ${call.function.name}`;
    let text = call.function.arguments;
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // it is not whole yet
    }
    this.body.textContent = text;
  }
}

/** Fields for what the calls give back. */
function results(turn, calls) {
  const fields = calls.map((call) => h("textarea", { rows: "2", "aria-label": `Result of ${call.function.name}`, placeholder: `What ${call.function.name} gives back` }));
  const submit = (event) => {
    event.preventDefault();
    const given = calls.map((call, i) => ({ role: "tool", tool_call_id: call.id, name: call.function.name, content: fields[i].value }));
    change(() => turns.push(...given));
    answer();
  };
  return h("form", { class: "results", submit }, fields, h("button", { type: "submit", class: "main" }, "Give back"));
}

function figures(turn) {
  const { usage, first, rate } = turn.shown;
  const said = [];
  if (turn.stopped) said.push("stopped");
  if (turn.finish === "length") said.push("cut by max_tokens or the context");
  if (usage) said.push(`${count(usage.completion_tokens)} tokens`);
  if (rate) said.push(`${figure(rate)} tokens/s`);
  if (first !== undefined) said.push(`first after ${figure(first)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    said.push(`${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens from the cache`);
  }
  return said.join(" · ");
}

function body() {
  const { fields, system } = wanted();
  const messages = turns.filter((turn) => !turn.error || turn.content || turn.tool_calls).map(message);
  if (system) messages.unshift({ role: "system", content: system });
  return { ...fields, model: model(), messages, stream: true, stream_options: { include_usage: true } };
}

function message({ role, content, reasoning_content, tool_calls, tool_call_id }) {
  return Object.fromEntries(Object.entries({ role, content, reasoning_content, tool_calls, tool_call_id }).filter(([, v]) => v !== undefined && v !== ""));
}

async function answer() {
  const asked = body();
  const turn = { role: "assistant", content: "" };
  const at = turns.push(turn) - 1;
  const view = new View();
  $("turns").append(view.element);
  view.wait("waiting");
  view.thinking.open = true;
  busy(new AbortController());
  toEnd(true);
  const began = performance.now();
  const times = { began, first: 0, last: 0, spoke: 0 };
  try {
    await receive(await ask("v1/chat/completions", asked, running.signal), turn, view, times);
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = error.message;
    if (error.status === 401) onRefused(error);
  }
  measure(turn, times);
  view.thinking.open = false;
  view.update(turn);
  busy(null);
  save();
  if (turns[at] === turn) view.finish(turn, at);
  toEnd(false);
}

function busy(controller) {
  running = controller;
  $("turns").setAttribute("aria-busy", String(Boolean(controller)));
  $("send").textContent = controller ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(controller));
}

async function receive(response, turn, view, times) {
  let drawn = 0;
  for await (const event of events(response)) {
    const now = performance.now();
    if (event.comment) {
      const [, done, all] = /^prefill (\d+)\/(\d+)/.exec(event.comment) ?? [];
      if (all) view.wait(`reading the prompt: ${count(done)} of ${count(all)} tokens`);
      continue;
    }
    if (event.data.error) throw new Error(event.data.error.message);
    add(turn, event.data, times, now);
    if (now - drawn < REFRESH) continue;
    drawn = now;
    view.update(turn);
    view.wait(times.spoke || !turn.reasoning_content ? "answering" : "thinking");
    toEnd(false);
  }
}

function add(turn, chunk, times, now) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta;
  if (choice.finish_reason) turn.finish = choice.finish_reason;
  if (delta.reasoning_content || delta.content || delta.tool_calls) {
    times.first ||= now;
    times.last = now;
  }
  if (delta.reasoning_content) turn.reasoning_content = (turn.reasoning_content ?? "") + delta.reasoning_content;
  if (delta.content || delta.tool_calls) times.spoke ||= now;
  if (delta.content) turn.content += delta.content;
  for (const call of delta.tool_calls ?? []) {
    turn.tool_calls ??= [];
    const own = (turn.tool_calls[call.index] ??= { id: call.id, type: "function", function: { name: "", arguments: "" } });
    own.function.name += call.function?.name ?? "";
    own.function.arguments += call.function?.arguments ?? "";
  }
}

function measure(turn, { began, first, last, spoke }) {
  const seconds = (last - first) / 1000;
  const later = (turn.usage?.completion_tokens ?? 0) - 1;
  turn.shown = {
    usage: turn.usage,
    first: first ? (first - began) / 1000 : undefined,
    rate: later > 0 && seconds > 0 ? later / seconds : 0,
    thought: turn.reasoning_content ? ((spoke || last) - first) / 1000 : 0,
  };
  delete turn.usage;
}
