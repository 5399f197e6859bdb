// Puts the parts of the page together: the two views, the settings, and how the server is.

import { json, key } from "./api.js";
import * as chat from "./chat.js";
import { $ } from "./dom.js";
import * as live from "./live.js";
import * as settings from "./settings.js";

const HEALTH_EVERY = 10000;

function view(name, focus) {
  for (const tab of ["chat", "live"]) {
    const on = tab === name;
    $(tab).hidden = !on;
    $(`tab-${tab}`).setAttribute("aria-selected", String(on));
    $(`tab-${tab}`).tabIndex = on ? 0 : -1;
  }
  if (focus) $(`tab-${name}`).focus();
  history.replaceState(null, "", name === "live" ? "#live" : location.pathname + location.search);
  if (name === "chat" && $("banner-key").hidden) $("banner").hidden = true; // what kept the live view from working
  live.look(name === "live");
}

function status(kind, text) {
  $("status").className = kind;
  $("status").textContent = text;
}

/** Shows what keeps the page from working; null: nothing does. */
function refused(error) {
  const locked = error?.status === 401;
  $("banner").hidden = !error;
  $("banner-text").textContent = locked ? "This server wants a key." : (error?.message ?? "");
  $("banner-key").hidden = !locked;
}

async function models() {
  const asked = key.get(); // an answer to an older key says nothing of this one
  try {
    const { data } = await json("v1/models");
    if (key.get() !== asked) return;
    const names = data.map((m) => m.id).filter((name) => name !== "default" || data.length === 1);
    $("model").replaceChildren(...names.map((name) => new Option(name, name)));
    $("model").disabled = names.length < 2;
    document.title = `${names[0]} · dsv4`;
    refused(null);
  } catch (error) {
    if (key.get() === asked) refused(error);
  }
}

async function health() {
  try {
    await json("health");
    status("well", "ready");
  } catch (error) {
    status("unwell", error.message);
  }
  setTimeout(health, HEALTH_EVERY);
}

function keyChanged() {
  models();
  if (!$("live").hidden) live.look(true);
}

function tabs() {
  for (const name of ["chat", "live"]) $(`tab-${name}`).addEventListener("click", () => view(name));
  $("tabs").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") view($("live").hidden ? "live" : "chat", true);
  });
}

function dialog() {
  const open = () => $("settings").showModal();
  $("open-settings").addEventListener("click", open);
  $("summary").addEventListener("click", open);
  $("close-settings").addEventListener("click", () => $("settings").close());
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close();
  });
  $("banner-key").addEventListener("click", () => {
    open();
    $("key").focus();
  });
}

tabs();
dialog();
settings.setUp(keyChanged);
chat.setUp(refused, () => $("model").value || "default");
live.setUp(refused);
view(location.hash === "#live" ? "live" : "chat");
models();
health();
