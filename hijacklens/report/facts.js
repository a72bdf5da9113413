"use strict";

// Facts before and after hijacking: two rows each, the bare and the hijacked prompt.
// Scores as in hijacklens/scoring/efficacy.py: first, sum, or mean = sum / tokens, in nats.
const RULES = {
  first: (items, side, i) => items.named[`first_${side}`].at(i),
  sum: (items, side, i) => items.named[`sum_${side}`].at(i),
  mean: (items, side, i) => items.named[`sum_${side}`].at(i) / items.named[`n_tokens_${side}`].at(i),
};

const FLIPS = [
  ["to-false", "true target won, now the false one", (bare, now) => bare < 0 && now > 0],
  ["to-true", "false target won, now the true one", (bare, now) => bare > 0 && now < 0],
  ["tie", "a tie, before or now", (bare, now) => (bare === 0) !== (now === 0)],
  ["", "any fact", () => true],
];

async function startFacts(element) {
  const [items, prompts, links] = await Promise.all(
    ["items", "prompts", "links"].map((name) => unpack(`${element.id}-${name}`)),
  );
  const { model, scheme, dose, subject, case_id: number } = items.named;
  const { relation } = links.named; // id and name
  const bareOf = (i) => links.named.bare.at(i);
  const textOf = (i, name) => {
    const at = links.named.prompt.at(i);
    return at < 0 ? null : prompts.named[name].at(at);
  };
  let rule = "first";
  const score = (side, i) => RULES[rule](items, side, i);
  const margin = (i) => score("false", i) - score("true", i);
  const shift = (i) => margin(i) - margin(bareOf(i));

  const rows = [];
  for (let i = 0; i < items.rows; i += 1) if (dose.at(i) > 0 && bareOf(i) >= 0) rows.push(i);

  const answer = (i) => {
    const { top_token: token, top_logprob: logprob } = items.named;
    return make(
      "td",
      {},
      make("bdi", { className: "token" }, `“${visible(token.at(i))}”`),
      make("small", {}, ` ${written(logprob.at(i), 2)}`),
    );
  };
  const target = (side, i) => {
    const wins = side === "false" ? margin(i) > 0 : margin(i) < 0;
    const text = written(score(side, i), 2);
    return make(
      "td",
      { className: "number", title: String(score(side, i)) },
      wins ? make("strong", {}, text) : text,
      ...(wins ? [make("span", { className: "unseen" }, " wins")] : []),
    );
  };
  const prompt = (i) => {
    const query = textOf(i, "query");
    if (query === null) return make("td", {}, make("em", {}, "not saved with this result"));
    const parts = [];
    if (dose.at(i)) {
      const sentences = Array(dose.at(i)).fill(textOf(i, "sentence")).join(" ");
      parts.push(make("mark", {}, visible(sentences)), " ");
    }
    return make("td", { className: "prompt" }, make("bdi", {}, ...parts, visible(query)));
  };
  const named = (side, i) => {
    const text = textOf(i, `target_${side}`);
    return text === null ? [] : [make("br"), `${side}: `, make("bdi", {}, visible(text))];
  };
  const draw = (i) => {
    const bare = bareOf(i);
    const fact = make(
      "th",
      { scope: "rowgroup", rowSpan: 2 },
      make("bdi", {}, visible(subject.at(i))),
      make(
        "small",
        {},
        make("br"),
        make("bdi", {}, visible(relation.at(i))),
        ` · case ${number.at(i)}`,
        ...named("true", i),
        ...named("false", i),
      ),
    );
    const run = make(
      "td",
      { rowSpan: 2 },
      make("bdi", {}, visible(model.at(i))),
      make("br"),
      make("bdi", {}, visible(scheme.at(i))),
    );
    const moved = make("td", { className: "number", rowSpan: 2 }, signed(shift(i), 2));
    const line = (title, at) => [
      make("th", { scope: "row" }, title),
      prompt(at),
      target("true", at),
      target("false", at),
      answer(at),
    ];
    return [
      make("tr", {}, fact, run, ...line("0", bare), moved),
      make("tr", {}, ...line(String(dose.at(i)), i)),
    ];
  };

  const ruled = Object.keys(RULES).map((name) => [name, name]);
  const flip = new Map(FLIPS.map(([value, , test]) => [value, test]));
  // A fact that flips at one dose mostly flips at the next, so the page opens with the lowest dose.
  const doses = filterBy(dose, "dose");
  doses.options = doses.options.filter(([value]) => value !== "0");
  doses.value = doses.options[1]?.[0] ?? "";
  const filters = [
    { label: "rule", options: ruled, value: "first", change: (value) => { rule = value; } },
    {
      label: "which",
      options: FLIPS.map(([value, text]) => [value, text]),
      value: "to-false",
      keep: (i, value) => flip.get(value)(margin(bareOf(i)), margin(i)),
    },
    filterBy(model, "model"),
    filterBy(scheme, "scheme"),
    doses,
    filterBy(relation, "relation"),
  ];
  const keys = {
    fact: keysOf(subject),
    dose: (i) => dose.at(i),
    true: (i) => score("true", i),
    false: (i) => score("false", i),
    answer: keysOf(items.named.top_token),
    shift,
  };
  const heads = [...element.querySelectorAll("thead th")];
  const sheet = new Sheet({
    element,
    title: "Facts before and after hijacking",
    rows,
    columns: heads.map((head) => ({
      label: head.textContent,
      number: head.classList.contains("number"),
      key: keys[head.dataset.key],
    })),
    draw,
    filters,
    search: (needle) => {
      const texts = prompts.columns.filter((column) => column.kind === "text");
      const inPrompt = searchIn(texts)(needle);
      const inItem = searchIn([subject, relation, items.named.top_token])(needle);
      return (i) => {
        const at = links.named.prompt.at(i);
        const said = inItem(i) || inItem(bareOf(i)) || String(number.at(i)) === needle;
        return said || (at >= 0 && inPrompt(at));
      };
    },
    file: "items.csv",
    contents: () => csv(items),
    size: 20,
  });
  const more = make("button", { type: "button" }, "Download prompts.csv");
  more.addEventListener("click", () => download("prompts.csv", csv(prompts), "text/csv"));
  if (prompts.rows) element.querySelector(".bar").append(more);
  sheet.show();
  return sheet;
}
