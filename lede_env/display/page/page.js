"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// ---------- making things. Everything a model or a prompt said goes through textContent: it cannot become markup.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

// Control codes as their symbols; line breaks stay where `breaks` allows them.
function visible(text, breaks = true) {
  return text.replace(/[\u0000-\u001f\u007f]/g, (c) => {
    if (breaks && (c === "\n" || c === "\t")) return c;
    return c === "\n"
      ? "↵"
      : c === "\t"
        ? "⇥"
        : String.fromCharCode(c === "\u007f" ? 0x2421 : 0x2400 + c.charCodeAt(0));
  });
}
const quoted = (item) => (item.raw ? `⟨${visible(item.raw, false)}⟩` : visible(item.text, false).replace(/ /g, "·"));
const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");

// ---------- the exit layers on one scale: 0 for the first candidate, 1 for the last

function place(layer) {
  const below = data.candidates.filter((candidate) => candidate <= layer).length - 1;
  return Math.max(0, below) / Math.max(1, data.candidates.length - 1);
}
const rank = (layer) => 1 + Math.round(3 * place(layer));
const LETTER = { corrected: "C", bonus: "B", plain: "P" };
const MEANING = {
  corrected: "corrected by the full model",
  bonus: "bonus: the full model's own, after all drafts were kept",
  plain: "plain step of the full model",
};

function tint(made, item) {
  if (item.kind === "draft") {
    made.classList.add("tint", `rank${rank(item.layer)}`);
    made.style.setProperty("--t", place(item.layer));
  } else made.classList.add(item.kind);
  return made;
}

// ---------- items: every token, and every rejected draft, in the order in which they were made

const items = [];
data.rounds.forEach((round, roundIndex) => {
  const tokens = data.tokens.filter((token) => token.round === roundIndex);
  round.drafts.forEach((draft, index) => {
    const kept = index < round.accepted;
    items.push({
      ...draft,
      kind: kept ? "draft" : "rejected",
      round: roundIndex,
      draft: index,
      token: kept ? data.tokens.indexOf(tokens[index]) : -1,
      raw: kept ? tokens[index].raw : "",
      text: kept && tokens[index].text ? tokens[index].text : draft.text,
    });
  });
  for (const token of tokens.slice(round.accepted))
    items.push({ ...token, draft: -1, token: data.tokens.indexOf(token) });
});
const itemOfToken = new Map(items.filter((item) => item.token >= 0).map((item) => [item.token, item]));

// ---------- header, figures, settings, time

function fill() {
  const setting = Object.fromEntries(data.settings);
  at("lead").textContent = `${setting.model.split(",")[0]} · ${setting.strategy} · ${setting.decoding}`;
  if (data.warning) Object.assign(at("warning"), { textContent: data.warning, hidden: false });
  for (const { name, value, note } of data.metrics)
    at("metrics").append(
      element(
        "div",
        {},
        element("dt", {}, name),
        element("dd", { class: "value" }, value),
        element("dd", { class: "note" }, note),
      ),
    );
  for (const [name, value] of data.settings)
    at("settings").append(element("dt", {}, name), element("dd", {}, visible(value)));
  at("prompt").textContent = visible(data.prompt);
  const total = data.profile.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) at("time-section").hidden = true;
  data.profile.forEach(([part, seconds], index) => {
    if (!seconds) return;
    const bar = element("div");
    bar.style.flexGrow = seconds / total;
    bar.style.setProperty("--n", index);
    at("time-bar").append(bar);
    const key = element("i");
    key.style.setProperty("--n", index);
    at("time-parts").append(
      element(
        "li",
        {},
        key,
        `${part} `,
        element("span", {}, `${Math.round((100 * seconds) / total)} %, ${(1000 * seconds).toFixed(0)} ms`),
      ),
    );
  });
}

function legend() {
  const list = at("legend");
  const seen = new Set(data.tokens.map((token) => token.kind));
  const key = (item, label) => list.append(element("li", {}, tint(element("span", { class: "token" }, label), item)));
  if (seen.has("draft")) data.candidates.forEach((layer) => key({ kind: "draft", layer }, `layer ${layer}`));
  for (const kind of ["corrected", "bonus", "plain"])
    if (seen.has(kind)) key({ kind }, kind === "plain" ? "plain step" : kind);
}

// ---------- the text

const spans = data.tokens.map((token, index) => {
  const span = element("span", {
    class: "token",
    role: "option",
    tabindex: index ? "-1" : "0",
    "aria-selected": "false",
  });
  span.textContent = token.text ? visible(token.text) : quoted(token);
  span.classList.toggle("breaks", token.text.includes("\n"));
  span.classList.toggle("raw", !token.text);
  span.classList.toggle("opens", index > 0 && data.tokens[index - 1].round !== token.round);
  span.setAttribute("aria-label", `${quoted(token)}, ${token.kind === "draft" ? `layer ${token.layer}` : token.kind}`);
  return tint(span, token);
});

// ---------- the details panel

const ROWS = [
  ["p", "probability", 3],
  ["confidence", "confidence", 2],
  ["entropy", "entropy", 2],
  ["margin", "margin", 2],
  ["trace", "trace", 2],
  ["match", "match", 2],
  ["echo", "echo", 2],
  ["doubt", "doubt", 2],
  ["drawn", "drawn", 2],
  ["peril", "peril", 2],
  ["risk", "risk", 2], // this and the next two: of models with an acceptance head
  ["odds", "odds", 2],
  ["ahead", "ahead", 2],
];

function looksTable(item) {
  const looks = item.looks;
  const row = (name, cells) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      ...cells.map((cell, i) => element("td", looks[i].left ? { class: "left" } : {}, cell)),
    );
  const table = element("table", {}, element("caption", {}, "What was seen, and what was chosen"));
  table.append(
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        element("th", { scope: "col" }, "layer"),
        ...looks.map((look) =>
          element("th", { scope: "col", ...(look.left ? { class: "left" } : {}) }, String(look.layer)),
        ),
      ),
    ),
  );
  const body = element("tbody");
  for (const [key, name, digits] of ROWS.filter(([key]) => key in looks[0]))
    body.append(
      row(
        name,
        looks.map((look) => number(look[key], digits)),
      ),
    );
  if (looks.some((look) => look.q)) {
    body.append(
      row(
        "Q(continue)",
        looks.map((look) => (look.q ? number(look.q[0]) : "–")),
      ),
    );
    body.append(
      row(
        "Q(exit)",
        looks.map((look) => (look.q ? number(look.q[1]) : "–")),
      ),
    );
  }
  body.append(
    row(
      "choice",
      looks.map((look) => (look.left ? "exit" : "continue")),
    ),
  );
  table.append(body);
  return table;
}

function after(item) {
  const values = item.q ? `: Q(verify) ${number(item.q[0])}, Q(draft on) ${number(item.q[1])}` : "";
  if (item.goesOn === null) return "Then the round was verified: no further draft was possible.";
  const without = item.goesOn || data.rounds[item.round].bonus ? "" : ", and to have no bonus token";
  return `Then it chose to ${item.goesOn ? "draft on" : "verify"}${values}${without}.`;
}

// A row's token: a button that shows it, the only way to rejected drafts without a pointer.
function opener(item) {
  const button = element("button", { type: "button" }, element("code", {}, quoted(item)));
  button.addEventListener("click", () => {
    show(item);
    at("details").querySelector(".here button").focus();
  });
  return button;
}

function roundList(item) {
  const round = data.rounds[item.round];
  const list = element("ol");
  for (const other of items.filter((one) => one.round === item.round)) {
    const mark = other.kind === "draft" ? "✓" : other.kind === "rejected" ? "✕" : LETTER[other.kind];
    const how = other.draft >= 0 ? `layer ${other.layer}` : "full depth";
    list.append(
      element(
        "li",
        other === item ? { class: "here" } : {},
        element("span", {}, mark),
        opener(other),
        element("span", {}, how),
      ),
    );
  }
  const drafts = round.drafts.length,
    kept = `${round.accepted} of ${drafts} drafts kept${round.bonus ? "" : ", bonus token given up"}`;
  return [
    element("h3", {}, `Round ${item.round + 1}: ${drafts ? kept : "no drafts"}`),
    list,
  ];
}

function show(item) {
  const round = data.rounds[item.round];
  const how =
    item.kind === "draft"
      ? `drafted at layer ${item.layer}, accepted`
      : item.kind === "rejected"
        ? `drafted at layer ${item.layer}, rejected`
        : MEANING[item.kind];
  const where = `${item.token >= 0 ? `token ${item.token + 1} of ${data.tokens.length}, ` : ""}id ${item.id}${item.draft >= 0 ? `, draft ${item.draft + 1} of ${round.drafts.length}` : ""}`;
  const parts = [
    element("p", { class: "what" }, quoted(item)),
    element("p", { class: "how" }, how),
    element("p", { class: "where" }, where),
  ];
  const replaced =
    item.kind === "corrected" ? items.find((one) => one.round === item.round && one.kind === "rejected") : null;
  if (replaced)
    parts.push(
      element(
        "p",
        { class: "after" },
        "It stands where the draft ",
        element("code", {}, quoted(replaced)),
        ` of layer ${replaced.layer} was rejected:`,
      ),
    );
  const source = item.looks ? item : replaced;
  if (source) parts.push(looksTable(source), element("p", { class: "after" }, after(source)));
  at("details").replaceChildren(...parts, ...roundList(item));
  for (const span of spans) span.classList.remove("shown");
  if (item.token >= 0) spans[item.token].classList.add("shown");
  for (const move of cursors) move(item);
}

// ---------- selection: one token is in the tab order, arrow keys move it

let selected = 0;

function select(index, focus = true) {
  spans[selected].tabIndex = -1;
  spans[selected].setAttribute("aria-selected", "false");
  selected = Math.max(0, Math.min(index, spans.length - 1));
  spans[selected].tabIndex = 0;
  spans[selected].setAttribute("aria-selected", "true");
  if (focus) spans[selected].focus();
  show(itemOfToken.get(selected));
  document.querySelectorAll(".chart .cursor").forEach(follow);
}

// Scrolls a chart so far that its cursor is in sight.
function follow(cursor) {
  const scroll = cursor.closest(".scroll"),
    x = Number(cursor.getAttribute("x")) - scroll.scrollLeft;
  if (x < 20 || x > scroll.clientWidth - 40) scroll.scrollLeft += x - scroll.clientWidth / 2;
}

// The token of the next line above or below that is nearest to the selected one.
function vertical(step) {
  const here = spans[selected].getClientRects()[0];
  let line = null,
    best = selected,
    distance = Infinity;
  for (let index = selected + step; spans[index]; index += step) {
    const box = spans[index].getClientRects()[0];
    if (Math.abs(box.top - here.top) < here.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > here.height / 2) break;
    if (Math.abs(box.left - here.left) < distance) [best, distance] = [index, Math.abs(box.left - here.left)];
  }
  return best;
}

function nextRound(step) {
  const wanted = data.tokens[selected].round + step;
  const found = data.tokens.findIndex((token) => token.round === wanted);
  return found >= 0 ? found : step < 0 ? 0 : spans.length - 1;
}

const KEYS = {
  ArrowRight: () => selected + 1,
  ArrowLeft: () => selected - 1,
  ArrowDown: () => vertical(1),
  ArrowUp: () => vertical(-1),
  PageDown: () => nextRound(1),
  PageUp: () => nextRound(-1),
  Home: () => 0,
  End: () => spans.length - 1,
};

function listen() {
  const text = at("text");
  text.append(...spans);
  const indexOf = (event) => spans.indexOf(event.target.closest(".token"));
  text.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    select(KEYS[event.key]());
  });
  text.addEventListener("focusin", (event) => {
    if (indexOf(event) !== selected) select(indexOf(event), false);
    else show(itemOfToken.get(selected));
  });
  text.addEventListener("click", (event) => {
    if (indexOf(event) >= 0) select(indexOf(event));
  });
  text.addEventListener("pointerover", (event) => {
    if (indexOf(event) >= 0) show(itemOfToken.get(indexOf(event)));
  });
  text.addEventListener("pointerleave", () => show(itemOfToken.get(selected)));
  at("details").addEventListener("keydown", (event) => {
    if (event.key === "Escape") spans[selected].focus();
  });
}
