// What is asked for beside the text: kept in this browser, but for the key.

import { key, read, write } from "./api.js";
import { $ } from "./dom.js";

const STORE = "dsv4.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const FIELDS = ["system", "effort", ...NUMBERS, "tools", "theme"];
const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

/** Fills the form, keeps what is changed in it, and calls `onKey` when the key has changed. */
export function setUp(onKey) {
  let kept = {};
  try {
    kept = JSON.parse(read(localStorage, STORE) ?? "{}");
  } catch {
    // of an older page
  }
  for (const name of FIELDS) if (typeof kept[name] === "string") $(name).value = kept[name];
  $("key").value = key.get();
  $("keep").checked = Boolean(read(localStorage, "dsv4.key"));
  document.addEventListener("input", (event) => {
    if (!FIELDS.includes(event.target.id)) return;
    write(localStorage, STORE, JSON.stringify(Object.fromEntries(FIELDS.map((name) => [name, $(name).value]))));
    applied();
  });
  for (const id of ["key", "keep"]) {
    $(id).addEventListener("change", () => {
      key.set($("key").value.trim(), $("keep").checked);
      onKey();
    });
  }
  $("form").addEventListener("submit", (event) => event.preventDefault());
  $("example").addEventListener("click", () => {
    $("tools").value = JSON.stringify(EXAMPLE, null, 2);
    $("tools").dispatchEvent(new Event("input", { bubbles: true }));
  });
  applied();
}

function applied() {
  document.documentElement.dataset.theme = $("theme").value;
  const [tools, why] = toolsGiven();
  $("tools").setAttribute("aria-invalid", String(Boolean(why)));
  $("tools-note").textContent = why ?? (tools.length ? tools.map((t) => t.function.name).join(", ") : "");
  const said = [
    $("system").value.trim() && "system text",
    tools.length && `${tools.length} tool${tools.length > 1 ? "s" : ""}`,
    ...NUMBERS.map((name) => $(name).value && `${name} ${$(name).value}`),
  ].filter(Boolean);
  $("summary").textContent = said.join(" · ") || "the model's own sampling";
}

function toolsGiven() {
  const text = $("tools").value.trim();
  if (!text) return [[], null];
  try {
    const tools = JSON.parse(text);
    if (Array.isArray(tools) && tools.every((t) => typeof t?.function?.name === "string")) return [tools, null];
    return [[], 'Not used: it takes a list of {"type": "function", "function": {"name": …}}'];
  } catch (error) {
    return [[], `Not used: no JSON (${error.message})`];
  }
}

/** The fields of a request but for its model and messages, and the system text. */
export function wanted() {
  const effort = $("effort").value;
  const fields = { thinking: { type: effort === "off" ? "disabled" : "enabled" } };
  if (effort !== "off") fields.reasoning_effort = effort;
  for (const name of NUMBERS) if ($(name).value !== "") fields[name] = Number($(name).value);
  const [tools] = toolsGiven();
  if (tools.length) fields.tools = tools;
  return { fields, system: $("system").value.trim() };
}
