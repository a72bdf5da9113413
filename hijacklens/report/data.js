"use strict";

// The table that tables.py packed, as columns: {name, kind, length, at(i)}; text has values and codes, too.
async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let start = up(4 + length);
  const columns = header.columns.map(({ name, kind, values = [] }) => {
    const Kind = kind === "float" ? Float64Array : Int32Array;
    const array = new Kind(buffer, start, header.rows);
    start = up(start + array.byteLength);
    if (kind === "text") {
      const at = (i) => values[array[i]] ?? null;
      return { name, kind, length: header.rows, at, values, codes: array };
    }
    const at = (i) => (Number.isNaN(array[i]) ? null : array[i]);
    return { name, kind, length: header.rows, at };
  });
  const named = Object.fromEntries(columns.map((column) => [column.name, column]));
  return { rows: header.rows, columns, named };
}

function up(n) {
  return Math.ceil(n / 8) * 8;
}

// As `visible` of hijacklens/views/page.py, for text nodes: hidden characters are written out.
const HIDDEN =
  /[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;

function visible(text) {
  return String(text).replace(HIDDEN, (found) => {
    const code = found.codePointAt(0);
    if (code === 10) return "↵";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// As `number` of tables.py.
function written(value, digits) {
  if (value === null) return "";
  if (digits === null || digits === undefined) return String(value);
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  if (Math.abs(value) >= 1e15) return value.toExponential(3);
  const text = value.toFixed(digits);
  if (Number(text) !== 0) return text;
  return value === 0 ? text.replace("-", "") : value.toExponential(1);
}

function signed(value, digits) {
  return (value > 0 ? "+" : "") + written(value, digits);
}

// An element with properties, attributes (those with a dash) and children; text stays text.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function csv(table, order = null) {
  const quoted = (value) => {
    // A spreadsheet must not take a text for a formula (see `FORMULA` of results/stored.py).
    const formula = typeof value === "string" && /^'*[=+\-@\t\r]/.test(value);
    const text = value === null ? "" : `${formula ? "'" : ""}${value}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [table.columns.map((column) => quoted(column.name)).join(",")];
  for (let at = 0; at < (order ?? { length: table.rows }).length; at += 1) {
    const row = order ? order[at] : at;
    lines.push(table.columns.map((column) => quoted(column.at(row))).join(","));
  }
  return `${lines.join("\n")}\n`;
}

function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
