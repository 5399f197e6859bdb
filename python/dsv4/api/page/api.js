// Calls of the server this page came from, with the key of this tab.

const KEY = "dsv4.key";

/** What the server said no with, or why it could not be asked. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// Memory of the browser may be switched off; then the key lives as long as the page.
let own = "";
export const key = {
  get: () => own || read(sessionStorage, KEY) || read(localStorage, KEY) || "",
  set(value, keep) {
    own = value;
    write(sessionStorage, KEY, value);
    write(localStorage, KEY, keep ? value : "");
  },
};

export function read(storage, name) {
  try {
    return storage.getItem(name);
  } catch {
    return null;
  }
}

export function write(storage, name, value) {
  try {
    if (value) storage.setItem(name, value);
    else storage.removeItem(name);
  } catch {
    // nothing is kept
  }
}

/** A response that is there, or Refused. Paths are relative, so that a proxy may serve this under any prefix. */
export async function ask(path, body, signal) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Refused(said.error?.message ?? said.status ?? `${response.status} ${response.statusText}`, response.status);
}

export const json = async (path) => (await ask(path)).json();

/** Events of a stream: `{data}` as JSON, `{comment}` of what is sent while nothing comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield { data: JSON.parse(data) };
    }
  }
}
