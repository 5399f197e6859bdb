// Markdown as DOM nodes: what a model writes becomes text and a fixed set of elements, never HTML. Links lead to http, https and
// mailto alone; an image is a link to it, so that nothing is fetched. Time is linear in the text but for a small factor.

import { copyButton, h } from "./dom.js";

const DEEPEST = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)| +|$)/;
const URL_HERE = /https?:\/\/[^\s<>"'`|]{1,2000}/y;
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const LINK_REACH = 1000; // characters in which a link has to end

/** Shows `text` in `node`. Blocks that are as they were stay, so a stream costs what is new. */
export function show(node, text) {
  const sources = split(text);
  const before = node.sources ?? [];
  let same = 0;
  while (same < before.length && before[same] === sources[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const source of sources.slice(same)) node.append(block(source.split("\n"), 0));
  node.sources = sources;
}

function split(text) {
  const lines = text.replaceAll("\r", "").replaceAll("\t", "    ").split("\n");
  return ranges(lines).map(([start, end]) => lines.slice(start, end).join("\n"));
}

/** [start, end) of each block. */
function ranges(lines) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i++;
      continue;
    }
    const end = endOf(lines, i);
    found.push([i, end]);
    i = end;
  }
  return found;
}

const isBlank = (line) => line.trim() === "";
const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function endOf(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) {
    let end = at + 1;
    while (end < lines.length && !closes(lines[end], fence[1])) end++;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(line) || RULE.test(line)) return at + 1;
  let end = at + 1;
  if (QUOTE.test(line)) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
  } else if (ITEM.test(line)) {
    end = endOfList(lines, at);
  } else if (isTable(lines, at)) {
    while (end < lines.length && lines[end].includes("|")) end++;
  } else {
    while (end < lines.length && !isBlank(lines[end]) && !starts(lines[end]) && !isTable(lines, end)) end++;
  }
  return end;
}

function closes(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === fence[0].repeat(trimmed.length);
}

function endOfList(lines, at) {
  const ordered = isOrdered(lines[at]);
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (isBlank(line)) {
      const next = lines[end + 1] ?? "";
      if (/^ {2,}\S/.test(next) || (ITEM.test(next) && isOrdered(next) === ordered && !RULE.test(next))) continue;
      break;
    }
    if (line.startsWith("  ")) continue;
    if (ITEM.test(line) ? isOrdered(line) !== ordered || RULE.test(line) : starts(line)) break;
  }
  return end;
}

const isOrdered = (line) => /^ *\d/.test(line);

function isTable(lines, at) {
  const under = lines[at + 1];
  return lines[at].includes("|") && under !== undefined && /^[\s|:-]+$/.test(under) && cells(under).every((c) => /^:?-+:?$/.test(c));
}

function cells(line) {
  const found = [];
  let from = 0;
  for (let i = 0; i <= line.length; i++) {
    if (i === line.length || (line[i] === "|" && line[i - 1] !== "\\")) {
      found.push(line.slice(from, i).trim());
      from = i + 1;
    }
  }
  if (found[0] === "") found.shift();
  if (found.at(-1) === "") found.pop();
  return found;
}

function blocks(lines, depth) {
  return ranges(lines).map(([start, end]) => block(lines.slice(start, end), depth));
}

function block(lines, depth) {
  const line = lines[0];
  const fence = FENCE.exec(line);
  if (depth > DEEPEST) return h("p", {}, lines.join("\n"));
  if (fence) return code(lines, fence);
  const heading = HEADING.exec(line);
  // The page has headings of its own above these.
  if (heading) return h(`h${Math.min(heading[1].length + 2, 6)}`, {}, inline(headingText(line, heading[0].length)));
  if (RULE.test(line)) return h("hr");
  if (QUOTE.test(line)) return h("blockquote", {}, blocks(lines.map((l) => l.replace(QUOTE, "")), depth + 1));
  if (ITEM.test(line)) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return h("p", {}, inline(lines.join("\n")));
}

function headingText(line, from) {
  const text = line.slice(from).trim();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end--;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trim() : text;
}

function code(lines, fence) {
  const closed = lines.length > 1 && closes(lines.at(-1), fence[1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = fence[2].trim().split(/\s/)[0].slice(0, 30);
  const bar = h("figcaption", {}, h("span", {}, language), copyButton(() => text));
  return h("figure", { class: "code" }, bar, h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function list(lines, depth) {
  const items = [];
  let loose = false;
  let indent = 0;
  const deeper = ITEM.exec(lines[0])[1].length + 2; // spaces that make an item one of the last item's
  for (const [at, line] of lines.entries()) {
    const item = ITEM.exec(line);
    if (item && item[1].length < deeper) {
      if (at > 0 && isBlank(lines[at - 1])) loose = true;
      indent = item[1].length + item[2].length + (item[3]?.length ?? 1);
      items.push([line.slice(Math.min(indent, line.length))]);
    } else {
      const spaces = line.length - line.trimStart().length;
      if (isBlank(line) === false && isBlank(lines[at - 1]) && spaces >= 2) loose = true;
      items.at(-1).push(line.slice(Math.min(spaces, indent)));
    }
  }
  const start = Number.parseInt(lines[0].trim(), 10);
  const props = Number.isNaN(start) || start === 1 ? {} : { start: String(start) };
  return h(isOrdered(lines[0]) ? "ol" : "ul", props, items.map((item) => listItem(item, loose, depth)));
}

function listItem(lines, loose, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(4);
  const content = blocks(lines, depth + 1).flatMap((b) => (b.tagName === "P" && !loose ? [...b.childNodes] : [b]));
  const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "done" });
  return h("li", { class: task && "task" }, box, content);
}

function table(lines) {
  const sides = cells(lines[1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "middle" : "right") : null));
  const row = (line, tag) => h("tr", {}, cells(line).map((c, i) => h(tag, { class: sides[i] }, inline(c.replaceAll("\\|", "|")))));
  const body = h("tbody", {}, lines.slice(2).map((line) => row(line, "td")));
  return h("div", { class: "table", tabindex: "0" }, h("table", {}, h("thead", {}, row(lines[0], "th")), body));
}

const EMPHASIS = [["***", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;

/** Nodes of text without blocks. */
function inline(text, depth = 0) {
  const nodes = [];
  const never = new Map(); // marker: from here on nothing closes it
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    if (node) nodes.push(node);
  };
  for (let i = 0; i < text.length; ) {
    const found = depth > DEEPEST ? null : special(text, i, never, depth);
    if (found === null) {
      plain += text[i++];
    } else {
      if (typeof found.node === "string") plain += found.node;
      else put(found.node);
      i = found.end;
    }
  }
  put(null);
  return nodes;
}

/** What begins at `i` if it is not plain: a node or text, and where it ends. */
function special(text, i, never, depth) {
  switch (text[i]) {
    case "\\":
      if (text[i + 1] === "\n") return { node: h("br"), end: i + 2 };
      return PUNCTUATION.test(text[i + 1] ?? "") ? { node: text[i + 1], end: i + 2 } : null;
    case "\n":
      return { node: h("br"), end: i + 1 };
    case "`":
      return codeSpan(text, i, never);
    case "!":
      return text[i + 1] === "[" ? link(text, i + 1, depth) : null;
    case "[":
      return link(text, i, depth);
    case "<": {
      const line = /^<br ?\/?>/i.exec(text.slice(i, i + 6));
      if (line) return { node: h("br"), end: i + line[0].length };
      const address = bare(text, i + 1);
      return address && text[address.full] === ">" ? { node: address.node, end: address.full + 1 } : null;
    }
    case "h":
      return WORD.test(text[i - 1] ?? "") ? null : bare(text, i);
    case "&":
      ENTITY.lastIndex = i;
      return ((m) => m && { node: ENTITIES[m[1]], end: i + m[0].length })(ENTITY.exec(text));
    case "*":
    case "_":
    case "~":
      return emphasis(text, i, never, depth);
    default:
      return null;
  }
}

function runOf(text, i) {
  let end = i;
  while (text[end] === text[i]) end++;
  return end - i;
}

function codeSpan(text, i, never) {
  const length = runOf(text, i);
  const fence = "`".repeat(length);
  let end = never.has(fence) ? -1 : text.indexOf(fence, i + length);
  while (end >= 0 && runOf(text, end) !== length) end = text.indexOf(fence, end + runOf(text, end));
  if (end < 0) {
    never.set(fence, i);
    return { node: fence, end: i + length };
  }
  let inner = text.slice(i + length, end).replaceAll("\n", " ");
  if (inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ")) inner = inner.slice(1, -1);
  return { node: h("code", {}, inner), end: end + length };
}

function emphasis(text, i, never, depth) {
  const [marker, tag] = EMPHASIS.find(([m]) => text.startsWith(m, i)) ?? [];
  if (!marker || never.has(marker) || /\s|^$/.test(text[i + marker.length] ?? "")) return null;
  const inWord = marker[0] === "_";
  if (inWord && WORD.test(text[i - 1] ?? "")) return null;
  let end = i + marker.length;
  for (; ; end += 1) {
    end = text.indexOf(marker, end);
    if (end < 0) {
      never.set(marker, i);
      return null;
    }
    const single = marker.length > 1 || (text[end + 1] !== marker && text[end - 1] !== marker);
    if (end > i + marker.length && single && !/[\s\\]/.test(text[end - 1]) && !(inWord && WORD.test(text[end + marker.length] ?? ""))) break;
  }
  while (marker === "**" && text[end + 2] === "*") end++; // **a *b***
  const inner = inline(text.slice(i + marker.length, end), depth + 1);
  return { node: h(tag, {}, marker === "***" ? h("em", {}, inner) : inner), end: end + marker.length };
}

function bare(text, i) {
  URL_HERE.lastIndex = i;
  const match = URL_HERE.exec(text);
  if (!match) return null;
  let url = match[0].replace(/[.,;:!?*_~]+$/, "");
  if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
  return { node: anchor(url, [url]), end: i + url.length, full: i + match[0].length };
}

function link(text, i, depth) {
  const close = matching(text, i, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = matching(text, close + 1, "(", ")");
  if (end < 0) return null;
  const target = text.slice(close + 2, end).trim().replace(/\s+["'(][^]*$/, "").replace(/^<([^]*)>$/, "$1");
  return { node: anchor(target, inline(text.slice(i + 1, close), depth + 1)), end: end + 1 };
}

function matching(text, i, open, close) {
  let level = 0;
  for (let at = i; at < Math.min(text.length, i + LINK_REACH); at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === open) level++;
    else if (text[at] === close && --level === 0) return at;
  }
  return -1;
}

function anchor(target, content) {
  let url = null;
  try {
    url = new URL(target);
  } catch {
    // relative, or nothing: it would lead somewhere on this server
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", { title: target.slice(0, 200) }, content);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, content.length ? content : url.href);
}
