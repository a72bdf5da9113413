"use strict";

// A table that shows one page of rows at a time.
//   element   holds .controls and a <table>
//   columns   {label, number, key(i) -> sort key or null (not sortable if absent)}
//   draw(i)   the <tr> elements of row i
//   filters   {label, options: [[value, text]], value}, and keep(i, value) ("" keeps all rows) or
//             change(value)
//   search    (needle) -> (i) -> whether row i contains it; null for a table without text
class Sheet {
  constructor({ element, title, rows, columns, draw, filters, search, file, contents, size }) {
    Object.assign(this, { element, title, rows, columns, draw, filters, search, size });
    this.page = 0;
    this.order = { column: null, step: 1 };
    this.needle = "";
    this.table = element.querySelector("table");
    this.heads = [...this.table.tHead.rows[0].cells];
    this.caption = this.table.caption;
    this.controls(file, contents);
    this.headers();
    this.select();
  }

  controls(file, contents) {
    const place = this.element.querySelector(".controls");
    const label = (text, control) => {
      control.id = `${this.element.id}-${text}`;
      return make("div", {}, make("label", { for: control.id }, text), control);
    };
    for (const filter of this.filters) {
      const options = filter.options.map(([value, text]) =>
        make("option", { value, selected: value === filter.value }, visible(text)),
      );
      const control = make("select", {}, ...options);
      control.addEventListener("change", () => {
        filter.value = control.value;
        filter.change?.(filter.value);
        this.update();
      });
      place.append(label(filter.label, control));
    }
    if (this.search) {
      const control = make("input", { type: "search", spellcheck: false });
      let waiting;
      control.addEventListener("input", () => {
        clearTimeout(waiting);
        waiting = setTimeout(() => {
          this.needle = control.value.trim().toLowerCase();
          this.update();
        }, 150);
      });
      place.append(label("search", control));
    }
    const button = (text, act) => {
      const control = make("button", { type: "button" }, text);
      control.addEventListener("click", act);
      return control;
    };
    this.status = make("p", { className: "status", role: "status" });
    this.back = button("Previous", () => this.turn(-1));
    this.next = button("Next", () => this.turn(1));
    this.turning = make("span", { className: "turning" }, this.back, this.next);
    const save = button(`Download ${file}`, () => download(file, contents(), "text/csv"));
    place.append(make("div", { className: "bar" }, this.status, this.turning, save));
  }

  headers() {
    this.columns.forEach((column, at) => {
      if (!column.key) return;
      const control = make("button", { type: "button", className: "sort" }, column.label);
      control.addEventListener("click", () => this.sort(at));
      this.heads[at].replaceChildren(control);
      this.heads[at].setAttribute("aria-sort", "none");
    });
  }

  sort(at) {
    const same = this.order.column === at;
    this.order = { column: at, step: same ? -this.order.step : this.columns[at].number ? -1 : 1 };
    this.heads.forEach((head, i) => {
      if (!this.columns[i].key) return;
      const word = this.order.step > 0 ? "ascending" : "descending";
      head.setAttribute("aria-sort", i === at ? word : "none");
    });
    this.update();
  }

  // Apply filters, search and order.
  select() {
    const active = this.filters.filter((filter) => filter.keep && filter.value !== "");
    const has = this.needle && this.search ? this.search(this.needle) : () => true;
    this.kept = this.rows.filter(
      (i) => active.every((filter) => filter.keep(i, filter.value)) && has(i),
    );
    const { column, step } = this.order;
    if (column !== null) {
      const keyed = this.kept.map((i) => [this.columns[column].key(i), i]);
      keyed.sort(([a, i], [b, j]) => step * compare(a, b, step) || i - j);
      this.kept = keyed.map(([, i]) => i);
    }
    this.tell();
  }

  update() {
    this.page = 0;
    this.select();
    this.show();
  }

  turn(step) {
    this.page += step;
    this.show();
    this.table.parentElement.scrollTop = 0;
    // A disabled button loses the focus.
    if (this.back.disabled) this.next.focus();
    else if (this.next.disabled) this.back.focus();
  }

  show(size = this.size) {
    const shown = this.kept.slice(this.page * size, (this.page + 1) * size);
    for (const body of [...this.table.tBodies]) body.remove();
    this.table.append(...groups(shown.map((i) => this.draw(i))));
    this.tell(size);
  }

  tell(size = this.size) {
    const total = this.kept.length;
    const first = Math.min(this.page * size + 1, total);
    const last = Math.min((this.page + 1) * size, total);
    const of = total === this.rows.length ? "" : ` (of ${count(this.rows.length)} in all)`;
    const text = total ? `Rows ${count(first)} to ${count(last)} of ${count(total)}${of}` : `No row${of}`;
    this.status.textContent = text;
    this.caption.textContent = `${visible(this.title)}. ${text}`;
    this.back.disabled = this.page === 0;
    this.next.disabled = last >= total;
    this.turning.hidden = total <= size;
  }
}

// Rows of one entry share a <tbody>.
function groups(drawn) {
  if (drawn.every((rows) => rows.length === 1)) {
    return [make("tbody", {}, ...drawn.flat())];
  }
  return drawn.map((rows) => make("tbody", {}, ...rows));
}

// Missing values come last in either order.
function compare(a, b, step) {
  if (a === null || b === null) return a === b ? 0 : a === null ? step : -step;
  return a - b;
}

// Sort keys of a column. Each text is compared once, which matters for a hundred thousand rows.
function keysOf(column) {
  if (column.kind !== "text") return (i) => column.at(i);
  let places = null;
  return (i) => {
    if (places === null) {
      const { compare: before } = new Intl.Collator("en", { numeric: true });
      const order = column.values.map((_, code) => code);
      order.sort((a, b) => before(column.values[a], column.values[b]));
      places = new Int32Array(order.length);
      order.forEach((code, place) => (places[code] = place));
    }
    return column.codes[i] < 0 ? null : places[column.codes[i]];
  };
}

function count(n) {
  return n.toLocaleString("en");
}

// A filter by the values of a text column, in the order of the data.
function filterBy(column, label, value = "") {
  const all = [["", "all"], ...valuesOf(column).map((text) => [text, text])];
  // The column may already have a value "all".
  const options = all.some(([text]) => text === "all") ? all.slice(1) : all;
  if (options !== all) options.push(["", "(any)"]);
  return { label, options, value, keep: (i, value) => String(column.at(i)) === value };
}

function valuesOf(column) {
  if (column.kind === "text") return column.values;
  const values = new Set();
  for (let i = 0; i < column.length; i += 1) if (column.at(i) !== null) values.add(column.at(i));
  return [...values].sort((a, b) => a - b).map(String);
}

// Rows whose text columns contain a needle; each text is searched once.
function searchIn(columns) {
  return (needle) => {
    const hits = columns.map((column) => ({
      column,
      found: column.values.map((text) => text.toLowerCase().includes(needle)),
    }));
    return (i) => hits.some(({ column, found }) => found[column.codes[i]]);
  };
}

async function startTable(element) {
  const settings = JSON.parse(element.dataset.settings);
  const data = await unpack(`${element.id}-data`);
  const columns = data.columns.map((column) => ({
    ...settings.columns[column.name],
    number: column.kind !== "text",
    key: keysOf(column),
  }));
  const texts = data.columns.filter((column) => column.kind === "text");
  return new Sheet({
    element,
    title: settings.title,
    rows: Array.from({ length: data.rows }, (_, i) => i),
    columns: columns.map((column) => ({ ...column, label: visible(column.label) })),
    draw: (i) => [
      make("tr", {}, ...data.columns.map((column, at) => cell(column, i, at, columns[at].digits))),
    ],
    filters: settings.filters.map((name) =>
      filterBy(data.named[name], settings.columns[name].label, settings.chosen[name] ?? ""),
    ),
    search: texts.length ? searchIn(texts) : null,
    file: settings.file,
    contents: () => csv(data),
    size: settings.rows,
  });
}

function cell(column, i, at, digits) {
  const value = column.at(i);
  if (column.kind !== "text") {
    const title = value !== null && digits !== null ? String(value) : "";
    return make("td", { className: "number", title }, written(value, digits));
  }
  const text = make("bdi", {}, value === null ? "" : visible(value));
  return at === 0 ? make("th", { scope: "row" }, text) : make("td", {}, text);
}
