// ---------- charts

const cursors = []; // each moves one chart's cursor to an item

function chart(id, axis, plot, label) {
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", label);
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label });
  scroll.append(plot);
  at(id).append(axis, scroll);
  plot.addEventListener("pointerleave", () => show(itemOfToken.get(selected)));
}

function active(plot, attributes, item) {
  const cell = shape("rect", { class: "column", ...attributes });
  cell.addEventListener("pointerenter", () => show(item));
  if (item.token >= 0) cell.addEventListener("click", () => select(item.token));
  plot.append(cell);
}

function cross(plot, x, y, size) {
  plot.append(shape("path", { class: "cross", d: `M${x} ${y}l${size} ${size}m0 ${-size}l${-size} ${size}` }));
}

function ownCell(plot, item, x, y, width, height) {
  plot.append(
    shape("rect", { class: `${item.kind}-cell`, x: x + 0.5, y: y + 0.5, width: width - 1, height: height - 1 }),
  );
  plot.append(shape("text", { class: "letter", x: x + width / 2, y: y + height / 2 + 3.2 }, LETTER[item.kind]));
}

function drawRounds() {
  const CELL = 14,
    STEP = 16,
    TOP = 4;
  const most = Math.max(...data.rounds.map((round) => round.drafts.length)) + 1;
  const height = TOP + most * STEP + 16;
  const axis = shape("svg", { width: 28, height, "aria-hidden": "true" });
  const plot = shape("svg", { width: data.rounds.length * STEP + 4, height });
  const up = (level) => TOP + (most - 1 - level) * STEP;
  for (let level = 0; level < most; level++)
    axis.append(shape("text", { x: 20, y: up(level) + 11, "text-anchor": "end" }, String(level + 1)));
  const boxes = new Map();
  const levels = data.rounds.map(() => 0);
  for (const item of items) {
    const x = item.round * STEP + 2,
      y = up(levels[item.round]++);
    if (item.kind === "draft") {
      const box = shape("rect", { class: "mark-layer", x, y, width: CELL, height: CELL, rx: 2 });
      box.style.setProperty("--t", place(item.layer));
      plot.append(box);
    } else if (item.kind === "rejected") {
      plot.append(
        shape("rect", { class: "rejected", x: x + 0.5, y: y + 0.5, width: CELL - 1, height: CELL - 1, rx: 2 }),
      );
      cross(plot, x + 4, y + 4, CELL - 8);
    } else ownCell(plot, item, x, y, CELL, CELL);
    boxes.set(item, [x, y]);
  }
  for (let index = 0; index < data.rounds.length; index++)
    if (index === 0 || index % 5 === 4)
      plot.append(
        shape("text", { x: index * STEP + 2 + CELL / 2, y: height - 4, "text-anchor": "middle" }, String(index + 1)),
      );
  for (const [item, [x, y]] of boxes) active(plot, { x: x - 1, y: y - 1, width: STEP, height: STEP }, item);
  const cursor = shape("rect", { class: "cursor", width: STEP, height: STEP, rx: 3 });
  plot.append(cursor);
  cursors.push((item) => {
    const [x, y] = boxes.get(item);
    cursor.setAttribute("x", x - 1);
    cursor.setAttribute("y", y - 1);
  });
  chart("rounds", axis, plot, `Timeline of ${data.rounds.length} rounds, with the drafts of each, kept or rejected`);
}

function drawHeat() {
  if (!items.some((item) => item.draft >= 0)) {
    at("layers-section").hidden = true;
    return;
  }
  const WIDTH = 13,
    L = data.layers,
    CELL = Math.max(6, Math.min(14, Math.round(240 / L))),
    TOP = 4;
  const height = TOP + L * CELL + 26;
  const axis = shape("svg", { width: 28, height, "aria-hidden": "true" });
  const plot = shape("svg", { width: items.length * WIDTH + 4, height });
  const up = (layer) => TOP + (L - layer) * CELL;
  for (const layer of new Set([...data.candidates, L]))
    axis.append(shape("text", { x: 20, y: up(layer) + CELL / 2 + 3.5, "text-anchor": "end" }, String(layer)));
  for (const layer of new Set([...data.candidates, L]))
    plot.append(shape("path", { class: "grid", d: `M0 ${up(layer) + CELL / 2}h${items.length * WIDTH + 4}` }));
  items.forEach((item, index) => {
    const x = 2 + index * WIDTH;
    if (item.draft < 0) ownCell(plot, item, x, TOP, WIDTH - 1, Math.max(CELL, 12));
    else {
      plot.append(shape("rect", { class: "run", x, y: up(item.layer), width: WIDTH - 1, height: item.layer * CELL }));
      for (const look of item.looks) {
        const cell = shape("rect", { class: "heat", x, y: up(look.layer), width: WIDTH - 1, height: CELL });
        cell.style.setProperty("--p", look.p);
        plot.append(cell);
      }
      plot.append(
        shape("circle", {
          class: "dot",
          cx: x + (WIDTH - 1) / 2,
          cy: up(item.layer) + CELL / 2,
          r: Math.min(3, CELL / 3),
        }),
      );
      if (item.kind === "rejected") cross(plot, x + 3, up(0) + 4, 6);
    }
    if (item.token >= 0 && (item.token === 0 || item.token % 10 === 9))
      plot.append(shape("text", { x: x + WIDTH / 2, y: height - 2, "text-anchor": "middle" }, String(item.token + 1)));
  });
  items.forEach((item, index) => active(plot, { x: 2 + index * WIDTH, y: 0, width: WIDTH, height }, item));
  const cursor = shape("rect", { class: "cursor", y: 1, width: WIDTH + 1, height: height - 14, rx: 3 });
  plot.append(cursor);
  cursors.push((item) => cursor.setAttribute("x", 1 + items.indexOf(item) * WIDTH));
  chart("heat", axis, plot, `Heat map of ${items.length} tokens and rejected drafts by ${L} layers`);
  const ramp = shape("svg", { viewBox: "0 0 20 1", preserveAspectRatio: "none" });
  for (let step = 0; step < 20; step++) {
    const cell = shape("rect", { class: "heat", x: step, y: 0, width: 1.1, height: 1 });
    cell.style.setProperty("--p", step / 19);
    ramp.append(cell);
  }
  at("ramp").append(ramp);
}

fill();
legend();
listen();
drawRounds();
drawHeat();
select(0, false);
