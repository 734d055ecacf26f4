"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const decode = async text => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
};
const percent = x => x > 0 && x < .01 ? "<1%" : `${Math.round(100 * x)}%`;
const state = {method: 0, token: -1, map: "sources", tap: -1, piece: -1, use: "dependence", layer: 0};
let methods = [];

const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};

async function setUp() {
  find("question").textContent = data.question;
  find("image").textContent = data.image;
  methods = await Promise.all(data.methods.map(async (method, index) => {
    const bitmap = new Image();
    bitmap.src = method.pixels;
    await bitmap.decode();
    const [rows, columns] = method.grid, maps = {};
    for (const key of ["sources", "movement", "attention", "dependence"]) maps[key] = await decode(method[key]);
    maps.sources = new Uint16Array(maps.sources.buffer);
    return {...method, ...maps, index, bitmap, patches: rows * columns, mostRead: Math.max(...method.layersRead)};
  }));
  for (const method of methods) {
    const card = make("button");
    card.setAttribute("role", "radio");
    const meter = make("div", undefined, "meter"), level = make("i");
    level.style.width = `${100 * method.probability}%`;
    meter.append(level);
    card.append(make("span", method.name, "name"), make("b", method.answer || "(empty)"), meter,
      make("span", `${percent(method.probability)} sure`),
      make("span", `${method.tokens} tokens: ${method.reduction}`),
      make("span", `${method.milliseconds.toPrecision(3)} ms`),
      make("span", `blank image: ${method.blankAnswer || "(empty)"}; this answer ${percent(method.blankProbability)}`));
    card.addEventListener("click", () => choose(method.index));
    find("methods").append(card);
  }
  find("methods").addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    choose((state.method + step + methods.length) % methods.length);
    find("methods").children[state.method].focus();
  });
  listen();
  choose(0);
}

function choose(index) {
  const method = methods[index], before = methods[state.method], place = before.owners.indexOf(state.token);
  Object.assign(state, {method: index, tap: -1, piece: -1, layer: Math.min(state.layer, method.layers), token: -1});
  if (place >= 0) {  // the token at the same place as before
    const x = Math.floor((place % before.grid[1]) / before.grid[1] * method.grid[1]);
    const y = Math.floor(Math.floor(place / before.grid[1]) / before.grid[0] * method.grid[0]);
    state.token = method.owners[y * method.grid[1] + x];
  }
  if (state.token < 0) {  // or the one that the answer depends on most
    const values = answerValues(method, false);
    state.token = values.indexOf(Math.max(...values));
  }
  [...find("methods").children].forEach((card, i) => {
    card.setAttribute("aria-checked", i === index);
    card.tabIndex = i === index ? 0 : -1;
  });
  find("layer").max = method.layers;
  find("layer").value = state.layer;
  find("pieces").replaceChildren(...[-1, ...method.pieces.keys()].map(piece => {
    const text = piece < 0 ? "whole answer" : method.pieces[piece].trim() ||
      (piece === method.pieces.length - 1 ? "(end)" : "(no text)");
    const button = make("button", text, "piece");
    if (piece >= 0) button.append(make("small", percent(method.probabilities[piece])));
    button.dataset.piece = piece;
    button.addEventListener("click", () => { state.piece = piece; draw(); });
    return button;
  }));
  draw();
}

// Values of the selected token at each patch, in shares of the largest.
function tokenMap(method) {
  const {patches} = method, taps = method.taps.length, out = new Float64Array(patches);
  if (state.map === "sources") {
    for (let p = 0; p < patches; p++) out[p] = method.sources[state.token * patches + p];
  } else {
    const start = state.token * taps * patches;
    for (let tap = 0; tap < taps; tap++) if (state.tap < 0 || state.tap === tap)
      for (let p = 0; p < patches; p++) out[p] += method.movement[start + tap * patches + p];
  }
  return scale(out);
}

function scale(values) {
  const largest = Math.max(...values) || 1;
  return values.map(x => x / largest);
}

// The tokens of the answer that are shown: one, or all that have text.
function shownPieces({pieces}) {
  if (state.piece >= 0) return [state.piece];
  const all = [...pieces.keys()], withText = all.filter(piece => pieces[piece].trim());
  return withText.length ? withText : all;
}

// The sum of the shown pieces' maps, of each image token.
function answerValues(method, attends) {
  const {tokens} = method, values = new Float64Array(tokens);
  const [source, scales] = attends ? [method.attention, method.attentionScales[state.layer]]
    : [method.dependence, method.dependenceScales];
  const first = attends ? state.layer * method.pieces.length : 0;
  for (const piece of shownPieces(method))
    for (let s = 0; s < tokens; s++) values[s] += scales[piece] * source[(first + piece) * tokens + s];
  return values;
}

// The same, spread over the patches that each token is made of.
function answerMap(method) {
  const {tokens, patches} = method, out = new Float64Array(patches);
  const values = answerValues(method, state.use === "attention");
  for (let s = 0; s < tokens; s++) {
    let total = 0;
    const row = s * patches;
    for (let p = 0; p < patches; p++) total += method.sources[row + p];
    if (total) for (let p = 0; p < patches; p++) out[p] += values[s] * method.sources[row + p] / total;
  }
  return scale(out);
}

function paint(canvas, method, values, selected) {
  const [rows, columns] = method.grid, width = canvas.clientWidth, ratio = devicePixelRatio || 1;
  canvas.style.aspectRatio = `${columns} / ${rows}`;
  const cell = width * ratio / columns, accent = resolve("var(--accent)");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(cell * rows);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.filter = "grayscale(1)";
  context.globalAlpha = .6;
  const size = [method.bitmap.naturalWidth / columns, method.bitmap.naturalHeight / rows].map(Math.floor);
  context.drawImage(method.bitmap, 0, 0, size[0] * columns, size[1] * rows, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  for (let p = 0; p < values.length; p++) {
    const x = p % columns, y = Math.floor(p / columns), owner = method.owners[p];
    const box = [Math.round(x * cell), Math.round(y * cell)];
    box.push(Math.round((x + 1) * cell) - box[0], Math.round((y + 1) * cell) - box[1]);
    if (selected && owner >= 0 && method.layersRead[owner] === method.mostRead) {
      context.globalAlpha = 1;  // what most layers read keeps its colors
      context.drawImage(method.bitmap, x * size[0], y * size[1], size[0], size[1], ...box);
    }
    context.globalAlpha = (selected ? .45 : .5) * values[p];
    context.fillStyle = accent;
    context.fillRect(...box);
  }
  context.globalAlpha = 1;
  const lines = (differs, color, thickness) => {
    context.beginPath();
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
      const p = y * columns + x;
      if (x + 1 < columns && differs(p, p + 1)) {
        context.moveTo((x + 1) * cell, y * cell);
        context.lineTo((x + 1) * cell, (y + 1) * cell);
      }
      if (y + 1 < rows && differs(p, p + columns)) {
        context.moveTo(x * cell, (y + 1) * cell);
        context.lineTo((x + 1) * cell, (y + 1) * cell);
      }
    }
    context.strokeStyle = color;
    context.lineWidth = thickness * ratio;
    context.stroke();
  };
  if (!selected) return;
  lines((a, b) => method.owners[a] !== method.owners[b], "rgba(255, 255, 255, .75)", 1);
  const own = p => method.owners[p] === state.token;
  for (const [color, thickness] of [["#000", 4], ["#fff", 2]]) {
    lines((a, b) => own(a) !== own(b), color, thickness);
    context.beginPath();  // and at the border of the image
    for (let p = 0; p < values.length; p++) if (own(p)) {
      const x = p % columns, y = Math.floor(p / columns), inset = 1.5 * ratio;
      if (!x) { context.moveTo(inset, y * cell); context.lineTo(inset, (y + 1) * cell); }
      if (!y) { context.moveTo(x * cell, inset); context.lineTo((x + 1) * cell, inset); }
      if (x === columns - 1) {
        context.moveTo(canvas.width - inset, y * cell);
        context.lineTo(canvas.width - inset, (y + 1) * cell);
      }
      if (y === rows - 1) {
        context.moveTo(x * cell, canvas.height - inset);
        context.lineTo((x + 1) * cell, canvas.height - inset);
      }
    }
    context.stroke();
  }
}

const probe = document.createElement("span");
function resolve(color) {  // light-dark(…) as a color that a canvas understands
  if (!probe.isConnected) { probe.hidden = true; document.body.append(probe); }
  probe.style.color = color;
  return getComputedStyle(probe).color;
}

// The patches in the rows around the selected token, with gaps between tokens.
function paintStrip(canvas, method, zoom) {
  const [rows, columns] = method.grid, {bitmap} = method, gap = 2;
  const [width, height] = [Math.floor(bitmap.naturalWidth / columns), Math.floor(bitmap.naturalHeight / rows)];
  const own = [...method.owners.keys()].filter(p => method.owners[p] === state.token);
  const lines = own.map(p => Math.floor(p / columns));
  const top = lines.length ? Math.min(...lines) : 0, bottom = lines.length ? Math.max(...lines) : 0;
  const around = Math.min(bottom - top + 1, 2);
  const first = Math.max(0, top - around), last = Math.min(rows - 1, Math.min(bottom, top + 1) + around);
  // Places of the patches along an axis, with a gap where tokens differ anywhere across it.
  const findPlaces = (start, end, size, owner) => {
    const places = {[start]: 0};
    for (let i = start + 1; i <= end; i++)
      places[i] = places[i - 1] + size + (owner(i).some((o, j) => o !== owner(i - 1)[j]) ? gap / zoom : 0);
    return places;
  };
  const all = Array.from({length: last - first + 1}, (_, y) =>
    method.owners.slice((first + y) * columns, (first + y + 1) * columns));
  const across = findPlaces(0, columns - 1, width, x => all.map(row => row[x]));
  const down = findPlaces(first, last, height, y => all[y - first]);
  const ratio = devicePixelRatio || 1;
  const size = [(across[columns - 1] + width) * zoom, (down[last] + height) * zoom];
  [canvas.width, canvas.height] = size.map(x => Math.round(x * ratio));
  [canvas.style.width, canvas.style.height] = size.map(x => `${x}px`);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#8c959f";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.scale(ratio * zoom, ratio * zoom);
  for (let y = first; y <= last; y++) for (let x = 0; x < columns; x++) {
    context.drawImage(bitmap, x * width, y * height, width, height, across[x], down[y], width, height);
    const [here, below] = [y, y + 1].map(line => method.owners[line * columns + x] === state.token);
    if (zoom === 1 || !here || below && y < last) continue;
    context.fillStyle = resolve("var(--accent)");
    context.fillRect(across[x], down[y] + height - 3 / zoom, width, 3 / zoom);
  }
}

function describeToken(method) {
  const {patches, taps} = method, start = state.token * patches;
  let largest = 0, used = 0, sum = 0;
  for (let p = 0; p < patches; p++) {
    const value = method.sources[start + p];
    sum += value;
    used += value > 0;
    largest = Math.max(largest, value);
  }
  const readBy = method.readBy[state.token];
  const made = !used ? "the end of a row of tiles, made of no patch" : used === 1 ? "made of one patch" : `made of ${used} patches` +
    (used * largest > 1.01 * sum ? `, up to ${percent(largest / sum)} from one` : " in equal shares");
  const how = method.stated || !used ? "" : " (by gradient)", read = readBy && `; read by ${readBy} of ${method.layers}`;
  return `Token ${state.token + 1} of ${method.tokens}: ${made}${how}${read}.`;
}

function draw() {
  const method = methods[state.method];
  for (const key of ["map", "use", "piece"]) for (const button of document.querySelectorAll(`[data-${key}]`))
    button.setAttribute("aria-pressed", button.dataset[key] === String(state[key]));
  paint(find("tokens"), method, tokenMap(method), true);
  paint(find("answer"), method, answerMap(method), false);
  find("token-text").textContent = describeToken(method);
  const shares = method.tapShares[state.token];
  find("taps").hidden = method.taps.length < 2;
  if (method.taps.length > 1) {
    const order = [...method.taps.keys()].sort((a, b) => method.taps[a] - method.taps[b]);
    const focused = document.activeElement?.dataset?.tap;
    find("taps").replaceChildren(...order.map(tap => {
      const button = make("button"), bar = make("span", undefined, "bar"), level = make("i");
      level.style.width = `${100 * shares[tap]}%`;
      bar.append(level);
      button.dataset.tap = tap;
      button.setAttribute("aria-pressed", state.tap === tap);
      button.append(make("span", `block ${method.taps[tap]}`), bar, make("span", percent(shares[tap]), "number"));
      button.addEventListener("click", () => {
        Object.assign(state, {map: "movement", tap: state.tap === tap ? -1 : tap});
        draw();
      });
      return button;
    }));
    if (focused !== undefined) find("taps").querySelector(`[data-tap="${focused}"]`)?.focus();
  }
  const attends = state.use === "attention";
  find("layer-row").hidden = !attends;
  find("layer-text").textContent = state.layer ? `layer ${state.layer} of ${method.layers}` : "all layers, on average";
  const what = state.piece < 0 ? "The answer" : `“${method.pieces[state.piece].trim() || "…"}”`;
  const shown = shownPieces(method);
  const share = shown.reduce((sum, piece) => sum + method.toImage[state.layer][piece], 0) / shown.length;
  find("answer-text").textContent = attends
    ? `${what} gives ${percent(share)} of its attention to the image, the rest to text.`
    : `${what} depends most on the tokens with the strongest color.`;
  const [rows, columns] = method.grid, [width, height] = [method.bitmap.naturalWidth, method.bitmap.naturalHeight];
  find("strip-text").textContent = `The rows around the selected token, as the tower reads them, cut where one ` +
    `token ends and the next begins (${width}×${height} pixels, patches of ${Math.floor(width / columns)}×` +
    `${Math.floor(height / rows)}): at true size, and four times as large. The selected token is underlined.`;
  paintStrip(find("strip-true"), method, 1);
  paintStrip(find("strip-large"), method, 4);
}

function move(dx, dy) {  // to the next token in that direction
  const {owners, grid: [rows, columns]} = methods[state.method];
  const own = [...owners.keys()].filter(p => owners[p] === state.token);
  if (!own.length) return step(dx + dy);
  const p = own[dx + dy > 0 ? own.length - 1 : 0];
  let x = p % columns + dx, y = Math.floor(p / columns) + dy;
  for (; x >= 0 && y >= 0 && x < columns && y < rows; x += dx, y += dy) {
    const owner = owners[y * columns + x];
    if (owner >= 0 && owner !== state.token) { state.token = owner; break; }
  }
  draw();
}

function step(by) {
  const {tokens} = methods[state.method];
  state.token = (state.token + by + tokens) % tokens;
  draw();
}

function listen() {
  find("tokens").addEventListener("click", event => {
    const {grid: [rows, columns], owners} = methods[state.method], box = event.target.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * columns);
    const y = Math.floor((event.clientY - box.top) / box.height * rows);
    const owner = owners[Math.min(rows - 1, Math.max(0, y)) * columns + Math.min(columns - 1, Math.max(0, x))];
    if (owner < 0) { find("token-text").textContent = "No token is made of this patch."; return; }
    state.token = owner;
    draw();
  });
  find("tokens").addEventListener("keydown", event => {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way) return;
    event.preventDefault();
    move(...way);
  });
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  document.querySelectorAll("[data-map]").forEach(button => button.addEventListener("click", () => {
    Object.assign(state, {map: button.dataset.map, tap: -1});
    draw();
  }));
  document.querySelectorAll("[data-use]").forEach(button => button.addEventListener("click", () => {
    state.use = button.dataset.use;
    draw();
  }));
  find("layer").addEventListener("input", event => { state.layer = Number(event.target.value); draw(); });
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

setUp();
