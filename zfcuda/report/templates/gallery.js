// The gallery. One classic script, as pages opened from a disk may not import modules.
//
//   what is shown follows from the address alone: #layer/map/rank?q=…&show=…&class=…&sort=…&in=all
//   data of a layer arrive when they are needed, as scripts that call zfcuda.receive
//   of the maps, only those near the window are in the document
//
// Names of files and classes come from anywhere: they only ever become text, never markup.
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const summary = JSON.parse($("summary").textContent);
const layers = summary.layers;
const layerOf = new Map(layers.map((layer) => [layer.name, layer]));

// ---------------------------------------------------------------------------------------------- small helpers

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node && key !== "style") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const number = (value) => value === null ? "–" : value === 0 ? "0" : Math.abs(value) >= 1000 || Math.abs(value) < 0.001
  ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const share = (value) => `${value > 0 && value < 0.001 ? "< 0.1" : Number((100 * value).toPrecision(value < 0.1 ? 2 : 3))} %`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const maps = (count, layer) => `${count.toLocaleString("en")} ${layer && !layer.field ? "unit" : "map"}${count === 1 ? "" : "s"}`;

// ---------------------------------------------------------------------------------------------- data

const data = new Map();  // by the name of a layer, and "sources"
const waiting = new Map();

window.zfcuda = { receive(name, value) { data.set(name, value); } };

/** Resolves when the data of a layer, or the sources, have arrived. */
function need(name) {
  if (!waiting.has(name)) {
    waiting.set(name, new Promise((resolve, reject) => {
      const file = name === "sources" ? "sources" : layerOf.get(name).slug;
      document.head.append(element("script", {
        src: `data/${encodeURIComponent(file)}.js`,
        onload: resolve,
        onerror: () => reject(new Error(`data/${file}.js is missing: copy the whole folder`)),
      }));
    }));
  }
  return waiting.get(name);
}

const countOf = (item) => data.get(item.layer.name).values[item.unit].length;

/** The source of an entry, by its place in the list. */
const sourceOf = (item, rank) => data.get("sources")[data.get(item.layer.name).images[item.unit][rank]];

/** The entry's box in the network's input: top, left, bottom, right. It may reach beyond it. */
function boxOf(item, rank) {
  const { positions } = data.get(item.layer.name);
  if (!positions) return [0, 0, ...summary.input];
  const { start, jump, field } = item.layer;
  const [top, left] = [0, 1].map((axis) => start[axis] + positions[item.unit][rank][axis] * jump[axis]);
  return [top, left, top + field[0], left + field[1]];
}

/** The part of a box that lies in the network's input. */
const clip = ([top, left, bottom, right]) =>
  [Math.max(top, 0), Math.max(left, 0), Math.min(bottom, summary.input[0]), Math.min(right, summary.input[1])];

/** A box of the network's input in pixels of the source image, or null where the transform is not known. */
function inSource(box, source) {
  if (!source.box) return null;
  const [top, left, bottom, right] = source.box;
  const scale = [(bottom - top) / summary.input[0], (right - left) / summary.input[1]];
  return [top + box[0] * scale[0], left + box[1] * scale[1], top + box[2] * scale[0], left + box[3] * scale[1]];
}

// ---------------------------------------------------------------------------------------------- pictures

/** Makes a node show one cell of a sheet. */
function showCell(node, { layer, unit }, rank, kind) {
  const { pitch, cell, across, columns, perSheet, sheet, slug, suffix } = layer;
  const place = unit % perSheet;
  const y = (Math.floor(place / columns) * across + Math.floor(rank / across)) * pitch[0];
  const x = ((place % columns) * across + rank % across) * pitch[1];
  const percent = (at, whole, part) => whole === part ? 0 : 100 * at / (whole - part);
  node.style.backgroundImage = `url("sheets/${encodeURIComponent(slug)}-${kind}-${Math.floor(unit / perSheet)}.${suffix}")`;
  node.style.backgroundSize = `${100 * sheet[1] / cell[1]}% ${100 * sheet[0] / cell[0]}%`;
  node.style.backgroundPosition = `${percent(x, sheet[1], cell[1])}% ${percent(y, sheet[0], cell[0])}%`;
  return node;
}

/** The pictures of a map, across by across. */
function block(item, kind, label) {
  const { across, cell } = item.layer;
  const count = countOf(item);
  const node = element("div", { className: "block", role: "img", ariaLabel: label });
  node.style.gridTemplateColumns = `repeat(${across}, 1fr)`;
  for (let rank = 0; rank < Math.max(summary.top, 1); rank++) {
    const picture = element("i", { className: "cell" });
    picture.style.aspectRatio = `${cell[1]} / ${cell[0]}`;
    if (rank < count) showCell(picture, item, rank, kind);
    else picture.classList.add("none");
    picture.classList.toggle("hit", kind === "patches" && hits.has(data.get(item.layer.name).images[item.unit][rank]));
    node.append(picture);
  }
  node.classList.toggle("pixels", Math.max(...cell) < 40);
  return node;
}

const KINDS = { projections: "Projections", control: "Random weights", patches: "Patches" };
const kinds = () => state.control ? ["projections", "control", "patches"] : ["projections", "patches"];

/** The side of a picture on a plate of so many. */
const sideOf = (count) => count > 600 ? 26 : count > 200 ? 36 : 50;

/** A plate of many small pictures from one file; a click on one opens its map. */
function plate(canvas, { src, count, columns, cell, layer, side }) {
  const image = new Image();
  const dead = new Set();
  const ratio = cell[0] / cell[1];
  const gap = 2;
  let across = 1;
  let size = side;
  function layout() {
    across = clamp(Math.floor((canvas.clientWidth + gap) / (side + gap)), 1, count);
    size = Math.min((canvas.clientWidth + gap) / across - gap, side * 1.25);
    canvas.style.height = `${Math.ceil(count / across) * (size * ratio + gap)}px`;
  }
  function draw() {
    if (!image.complete || !canvas.clientWidth) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingEnabled = Math.max(...cell) >= size / 2;
    context.imageSmoothingQuality = "high";
    context.strokeStyle = getComputedStyle(canvas).getPropertyValue("--line");
    for (let unit = 0; unit < count; unit++) {
      const x = (unit % across) * (size + gap), y = Math.floor(unit / across) * (size * ratio + gap);
      if (dead.has(unit)) {
        context.strokeRect(x + 1, y + 1, size - 2, size * ratio - 2);
        continue;
      }
      context.drawImage(image, (unit % columns) * cell[1], Math.floor(unit / columns) * cell[0], cell[1], cell[0],
        x, y, size, size * ratio);
    }
  }
  const at = (event) => {
    const column = Math.floor(event.offsetX / (size + gap)), row = Math.floor(event.offsetY / (size * ratio + gap));
    const unit = row * across + column;
    return column < across && unit < count ? unit : null;
  };
  canvas.addEventListener("click", (event) => { if (layer && at(event) !== null) go({ layer: layer.name, map: at(event), in: "all" }); });
  canvas.addEventListener("mousemove", (event) => { canvas.title = at(event) === null ? "" : `${layer ? layer.name : "filter"} ${at(event)}`; });
  new ResizeObserver(() => { layout(); draw(); }).observe(canvas);
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    image.onload = draw;
    image.src = src;
    if (layer && layer.dead) {
      need(layer.name).then(() => {
        data.get(layer.name).values.forEach((row, unit) => { if (!row.length) dead.add(unit); });
        draw();
      }, complain);
    }
  }, { rootMargin: "100px" }).observe(canvas);
  window.addEventListener("themechange", draw);
}

// ---------------------------------------------------------------------------------------------- the address

const EMPTY = { layer: null, map: null, rank: 0, q: "", show: "", class: "", sort: "", in: "" };
const FILTERS = ["q", "show", "class", "sort"];
const OPTIONS = [...FILTERS, "in"];  // in=all: a map was opened from among all layers, and closing it leads back there
const state = { ...EMPTY, control: false };

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#/, "").split(/\?(.*)/s);
  const [layer, map, rank] = path.split("/").map(decode);
  const found = { ...EMPTY };
  const options = new URLSearchParams(query);
  for (const key of OPTIONS) found[key] = options.get(key) || "";
  if (layerOf.has(layer)) {
    found.layer = layer;
    if (/^\d+$/.test(map) && Number(map) < layerOf.get(layer).count) {
      found.map = Number(map);
      if (/^[1-9]\d*$/.test(rank)) found.rank = Number(rank) - 1;
    }
  }
  return found;
}

function decode(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

function format(to) {
  const path = [to.layer, to.map, to.map !== null && to.rank ? to.rank + 1 : null].filter((part) => part !== null);
  const query = new URLSearchParams(OPTIONS.filter((key) => to[key]).map((key) => [key, to[key]])).toString();
  return `#${path.map(encodeURIComponent).join("/")}${query ? `?${query}` : ""}`;
}

/** Change what is shown; `replace` leaves no step for the back button. */
function go(change, replace = false) {
  const hash = format({ ...state, ...change });
  if (hash === (location.hash || "#")) return;
  if (replace) {
    history.replaceState(null, "", hash);
    follow();
  } else {
    location.hash = hash;
  }
}

function follow() {
  const before = { ...state };
  Object.assign(state, parse(location.hash));
  render(before).catch(complain);
}

// ---------------------------------------------------------------------------------------------- which maps

const STATUS = {
  alive: (count) => count > 0,
  few: (count) => count > 0 && count < summary.top,
  dead: (count) => count === 0,
};
// What a map is sorted by, and how the captions say it.
const SORT = {
  max: { key: (d, u) => -(d.values[u][0] ?? 0), caption: (d, u) => `max ${number(d.values[u][0] ?? 0)}` },
  mean: { key: (d, u) => -d.mean[u], caption: (d, u) => `mean ${number(d.mean[u])}` },
  active: { key: (d, u) => d.sparsity[u], caption: (d, u) => `active in ${share(1 - d.sparsity[u])}` },
  rare: { key: (d, u) => d.values[u].length ? -d.sparsity[u] : 1, caption: (d, u) => `active in ${share(1 - d.sparsity[u])}` },
  similarity: { key: (d, u) => -(similarityOf(d, u) ?? -2), caption: (d, u) => `similarity ${number(similarityOf(d, u))}` },
};

/** The mean over a map's pictures. */
function similarityOf(d, unit) {
  const known = d.similarity ? d.similarity[unit].filter((value) => value !== null) : [];
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** `conv3 17 image:"a cat"` as [{key, text}]. */
function terms(query) {
  return [...query.toLowerCase().matchAll(/(?:(layer|map|image|class):)?(?:"([^"]*)"?|(\S+))/g)]
    .map(([, key, quoted, word]) => ({ key: key || "", text: quoted ?? word }))
    .filter(({ text }) => text !== "");
}

let hits = new Set();  // indices of the images that the search names

/** A function that says whether a map fulfils all terms. */
function matcher() {
  hits = new Set();
  const sources = data.get("sources");
  const images = (test) => new Set(Object.keys(sources).filter((id) => test(sources[id])).map(Number));
  const has = (text) => (value) => value !== null && value.toLowerCase().includes(text);
  const tests = terms(state.q).map(({ key, text }) => {
    const named = images((s) => ((key === "" || key === "image") && has(text)(s.name))
      || ((key === "" || key === "class") && has(text)(s.label)));
    named.forEach((id) => hits.add(id));
    return (layer, unit, shown) => {
      if ((key === "" || key === "layer") && has(text)(layer.name)) return true;
      if ((key === "" || key === "map") && text.replace(/^#/, "") === String(unit)) return true;
      return shown.some((id) => named.has(id));
    };
  });
  if (state.class) {
    const named = images((s) => s.label === state.class);
    named.forEach((id) => hits.add(id));
    tests.push((layer, unit, shown) => shown.some((id) => named.has(id)));
  }
  return (layer, unit) => {
    const shown = data.get(layer.name).images[unit];
    return (!STATUS[state.show] || STATUS[state.show](shown.length)) && tests.every((test) => test(layer, unit, shown));
  };
}

/** The maps to show, in order. */
function choose(scope) {
  const fits = matcher();
  const chosen = scope.flatMap((layer) => data.get(layer.name).mean.map((_, unit) => ({ layer, unit })))
    .filter(({ layer, unit }) => fits(layer, unit));
  const sort = SORT[state.sort];
  if (sort) {
    const keys = new Map(chosen.map((item) => [item, sort.key(data.get(item.layer.name), item.unit)]));
    chosen.sort((a, b) => keys.get(a) - keys.get(b));
  }
  return chosen;
}

// ---------------------------------------------------------------------------------------------- the maps' grid

/** Shows the cards near the window; the others are but height. */
const grid = {
  node: $("maps"),
  items: [],
  cards: new Map(),
  active: 0,

  show(items) {
    this.items = items;
    this.active = clamp(this.active, 0, Math.max(items.length - 1, 0));
    this.clear();
    this.layout();
  },

  clear() {
    this.cards.forEach((card) => card.remove());
    this.cards.clear();
  },

  layout() {
    const width = this.node.clientWidth;
    if (!width) return;
    const blocks = kinds().length, gap = 28, least = Math.min(blocks === 3 ? 400 : 270, width);
    this.columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
    this.width = (width - gap * (this.columns - 1)) / this.columns;
    const ratio = Math.max(...this.items.map(({ layer }) => layer.cell[0] / layer.cell[1]), 0);
    this.block = ((this.width - 8 * (blocks - 1)) / blocks) * ratio;
    this.height = this.block + 32 + 26;
    this.gap = gap;
    this.node.style.height = `${Math.ceil(this.items.length / this.columns) * this.height}px`;
    this.clear();
    this.update();
  },

  update() {
    if (!this.columns) return;
    const top = -this.node.getBoundingClientRect().top, screen = window.innerHeight;
    const rows = Math.ceil(this.items.length / this.columns);
    const first = clamp(Math.floor((top - screen / 2) / this.height), 0, rows) * this.columns;
    const last = Math.min(clamp(Math.ceil((top + 1.5 * screen) / this.height), 0, rows) * this.columns, this.items.length);
    for (const [index, card] of this.cards) {
      if ((index < first || index >= last) && index !== this.active) {
        card.remove();
        this.cards.delete(index);
      }
    }
    for (let index = first; index < last; index++) this.add(index);
    if (this.items.length) this.add(this.active);
  },

  add(index) {
    if (this.cards.has(index)) return;
    const item = this.items[index];
    const card = cardOf(item);
    card.style.width = `${this.width}px`;
    card.style.transform = `translate(${(index % this.columns) * (this.width + this.gap)}px, ${Math.floor(index / this.columns) * this.height}px)`;
    card.tabIndex = index === this.active ? 0 : -1;
    card.setAttribute("aria-posinset", index + 1);
    card.setAttribute("aria-setsize", this.items.length);
    card.addEventListener("focus", () => this.activate(index));
    if (card.firstChild.className === "grave") card.firstChild.style.height = `${this.block}px`, card.style.paddingTop = `${this.block}px`;
    this.cards.set(index, card);
    // In the order of the maps, whatever the order of arrival: for screen readers and for focus.
    const after = [...this.cards.keys()].filter((other) => other > index).sort((a, b) => a - b)[0];
    this.node.insertBefore(card, after === undefined ? null : this.cards.get(after));
  },

  activate(index) {
    this.cards.get(this.active)?.setAttribute("tabindex", "-1");
    this.active = index;
    this.cards.get(index)?.setAttribute("tabindex", "0");
  },

  /** Move the focus by so many maps. */
  move(step) {
    const to = this.active + step;
    if (to < 0 || to >= this.items.length) return;
    this.add(to);
    const card = this.cards.get(to);
    card.focus({ preventScroll: true });
    const bar = document.querySelector(".bar").offsetHeight + 12, place = card.getBoundingClientRect();
    if (place.top < bar) window.scrollBy(0, place.top - bar);
    else if (place.bottom > window.innerHeight) window.scrollBy(0, place.bottom - window.innerHeight + 12);
  },
};

function cardOf(item) {
  const { layer, unit } = item;
  const d = data.get(layer.name);
  const count = d.values[unit].length;
  const name = state.layer && !state.in ? String(unit) : `${layer.name} ${unit}`;
  const said = SORT[state.sort] && state.sort !== "max" ? SORT[state.sort].caption(d, unit)
    : count ? `max ${number(d.values[unit][0])} · active in ${share(1 - d.sparsity[unit])}` : "";
  const card = element("a", {
    className: "card",
    href: format({ ...state, layer: layer.name, map: unit, rank: 0, in: state.layer === null || state.in ? "all" : "" }),
    ariaLabel: `${layer.name} map ${unit}, ${count ? `strongest ${number(d.values[unit][0])}, active in ${share(1 - d.sparsity[unit])} of the images` : "dead"}`,
  });
  card.setAttribute("role", "listitem");
  if (count) {
    card.append(element("div", { className: "pair" }, ...kinds().map((kind) => block(item, kind, `${KINDS[kind]} of ${layer.name} ${unit}`))));
  } else {
    card.append(element("div", { className: "grave" }, element("span", {}, "dead: positive in no image")));
  }
  card.title = count ? [...new Set(d.images[unit].map((id) => data.get("sources")[id].name))].join("\n") : "";
  card.append(element("div", { className: "caption" }, element("b", {}, name),
    element("span", {}, count && count < summary.top ? `${count} only · ${said}` : said)));
  return card;
}

// ---------------------------------------------------------------------------------------------- one map

const view = { mode: "image", scale: 1, x: 0, y: 0, box: null };

function currentItem() {
  return { layer: layerOf.get(state.layer), unit: state.map };
}

function showMap(changed) {
  const item = currentItem();
  const d = data.get(item.layer.name);
  const count = countOf(item);
  state.rank = clamp(state.rank, 0, Math.max(count - 1, 0));
  if (changed) {
    $("map-title").textContent = `${item.layer.name} ${item.unit}`;
    const similar = similarityOf(d, item.unit);
    $("map-facts").textContent = count
      ? [`mean ${number(d.mean[item.unit])}`, `active in ${share(1 - d.sparsity[item.unit])} of the images`,
        count < summary.top ? `positive in ${count} place${count === 1 ? "" : "s"} only` : "",
        similar === null ? "" : `similarity with random weights ${number(similar)}`].filter(Boolean).join(" · ")
      : `dead: positive in none of ${summary.images.toLocaleString("en")} images`;
    $("blocks").replaceChildren(...(count ? kinds() : []).map((kind) => {
      const node = block(item, kind, `${KINDS[kind]} of ${item.layer.name} ${item.unit}, the strongest first`);
      [...node.children].slice(0, count).forEach((cell, rank) => cell.addEventListener("click", () => go({ rank }, true)));
      return element("div", {}, element("h3", {}, KINDS[kind]), node);
    }));
    $("blocks").classList.toggle("three", kinds().length === 3);
    $("entries").replaceChildren(...d.values[item.unit].map((value, rank) => entry(item, rank, value / d.values[item.unit][0])));
  }
  $("source").hidden = !count;
  [...$("entries").children].forEach((line, rank) => {
    if (rank === state.rank) line.firstChild.setAttribute("aria-current", "true");
    else line.firstChild.removeAttribute("aria-current");
  });
  for (const node of $("blocks").querySelectorAll(".block")) {
    [...node.children].forEach((cell, rank) => cell.classList.toggle("chosen", rank === state.rank));
  }
  if (count) showSource(item);
}

function entry(item, rank, part) {
  const source = sourceOf(item, rank);
  const bar = element("i");
  bar.style.width = `${100 * part}%`;
  return element("li", {}, element("button", { type: "button", onclick: () => go({ rank }, true) },
    element("span", { className: "rank" }, String(rank + 1)),
    element("span", { className: "value" }, number(data.get(item.layer.name).values[item.unit][rank])),
    element("span", { className: "value-bar", ariaHidden: "true" }, bar),
    element("span", { className: "where", title: source.name }, source.label === null ? source.name : `${source.label} · ${source.name}`)));
}

/** The image of the chosen entry with its box, in the frame of the file where there is one, else of the network's input. */
function showSource(item) {
  const { rank } = state;
  const source = sourceOf(item, rank);
  const id = data.get(item.layer.name).images[item.unit][rank];
  const whole = boxOf(item, rank);
  const box = clip(whole);
  const inFile = inSource(box, source);
  const size = source.size || summary.input;
  view.box = inFile || box;
  view.size = size;
  const placed = (node, [top, left, bottom, right]) => {
    Object.assign(node.style, {
      top: `${100 * top / size[0]}%`, left: `${100 * left / size[1]}%`,
      height: `${100 * (bottom - top) / size[0]}%`, width: `${100 * (right - left) / size[1]}%`,
    });
    return node;
  };
  const nodes = [];
  if (source.shown) nodes.push(element("img", { src: source.shown, alt: "", draggable: false }));
  const pixels = item.layer.cell[0] < 40 ? " pixels" : "";
  if (view.mode === "place" || !source.shown) {
    const kind = view.mode !== "place" ? "patches" : state.control ? "control" : "projections";
    nodes.push(element("div", { className: pixels }, placed(showCell(element("i", { className: "cell" }), item, rank, kind), inSource(whole, source) || whole)));
  }
  if (source.box) nodes.push(placed(element("i", { className: "field" }), source.box));
  nodes.push(placed(element("i", { className: "box" }), view.box));
  $("canvas").replaceChildren(...nodes);
  const stage = $("stage");
  stage.classList.toggle("place", view.mode === "place");
  stage.style.aspectRatio = `${size[1]} / ${size[0]}`;
  stage.setAttribute("aria-label", `${source.name} with the part that the map sees`);
  const rounded = (sides) => { const [t, l, b, r] = sides.map(Math.round); return `rows ${t} to ${b}, columns ${l} to ${r}`; };
  const facts = [["Activation", number(data.get(item.layer.name).values[item.unit][rank])]];
  if (source.label !== null) facts.push(["Class", source.label]);
  facts.push(["In the input", rounded(box)]);
  if (inFile) facts.push(["In the image", rounded(inFile)]);
  const similar = data.get(item.layer.name).similarity;
  if (similar) facts.push(["Similarity", number(similar[item.unit][rank])]);
  $("caption").replaceChildren(element("strong", {}, source.name),
    source.shown ? "" : " (the image itself is not known)",
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  $("open").hidden = !source.file;
  if (source.file) $("open").href = source.file;
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === view.mode));
  setZoom(1, 0, 0);
}

/** Scale the stage; x and y are where its top left corner goes, in its pixels. */
function setZoom(scale, x, y) {
  const { clientWidth: width, clientHeight: height } = $("stage");
  view.scale = clamp(scale, 1, 40);
  view.x = clamp(x, width * (1 - view.scale), 0);
  view.y = clamp(y, height * (1 - view.scale), 0);
  $("canvas").style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  $("canvas").style.setProperty("--scale", view.scale);
  $("zoom").setAttribute("aria-pressed", String(view.scale > 1));
  $("stage").classList.toggle("zoomed", view.scale > 1);
}

function zoomAt(factor, x, y) {
  const scale = clamp(view.scale * factor, 1, 40), change = scale / view.scale;
  setZoom(scale, x - (x - view.x) * change, y - (y - view.y) * change);
}

/** To the box, or back. */
function toggleZoom() {
  if (view.scale > 1) return setZoom(1, 0, 0);
  const { clientWidth: width, clientHeight: height } = $("stage");
  const [top, left, bottom, right] = view.box.map((side, i) => side / view.size[i % 2] * (i % 2 ? width : height));
  const scale = clamp(0.7 * Math.min(width / (right - left), height / (bottom - top)), 1, 40);
  setZoom(scale, width / 2 - scale * (left + right) / 2, height / 2 - scale * (top + bottom) / 2);
}

function setView(mode) {
  view.mode = mode;
  if (state.map !== null) showSource(currentItem());
}

/** The map before or after, in the order of the grid. */
function neighbour(step) {
  const at = grid.items.findIndex(({ layer, unit }) => layer.name === state.layer && unit === state.map);
  const to = at < 0 ? { layer: layerOf.get(state.layer), unit: state.map + step } : grid.items[at + step];
  if (to && to.unit >= 0 && to.unit < to.layer.count) go({ layer: to.layer.name, map: to.unit, rank: 0 }, true);
}

// ---------------------------------------------------------------------------------------------- the whole page

let rendering = 0;
let shown = null;  // what the grid shows: scope and filters

async function render(before) {
  const run = ++rendering;
  const filtered = FILTERS.some((key) => state[key]);
  const everywhere = state.layer === null || state.in === "all";
  const browsing = filtered || !everywhere;
  const scope = everywhere ? layers : [layerOf.get(state.layer)];
  for (const tab of document.querySelectorAll("[data-layer]")) {
    if (layers[tab.dataset.layer].name === state.layer) {
      tab.setAttribute("aria-current", "page");
      tab.scrollIntoView({ block: "nearest", inline: "center" });
    } else tab.removeAttribute("aria-current");
  }
  document.title = [state.layer && `${state.layer}${state.map === null ? "" : ` ${state.map}`}`, summary.title].filter(Boolean).join(" · ");
  if ($("search").value !== state.q && document.activeElement !== $("search")) $("search").value = state.q;
  for (const key of ["show", "class", "sort"]) $(key).value = state[key];
  $("home").hidden = browsing;
  $("browse").hidden = !browsing;
  const wanted = new Set([...(browsing ? scope : []), ...(state.map === null ? [] : [layerOf.get(state.layer)])]);
  if (wanted.size) await Promise.all(["sources", ...[...wanted].map((layer) => layer.name)].map(need));
  if (run !== rendering) return;
  if (browsing) {
    showScope(everywhere ? null : scope[0]);
  } else {
    grid.items = [];
    shown = null;
    hits.clear();
  }
  if (state.map === null) {
    if ($("map").open) leaveMap(before);
    return;
  }
  if (!$("map").open) {
    $("map").showModal();
    $("map-title").focus();
  }
  showMap(before.map !== state.map || before.layer !== state.layer || before.control !== state.control);
}

function showScope(layer) {
  const key = JSON.stringify([layer && layer.name, FILTERS.map((name) => state[name]), state.control]);
  if (key === shown) return;
  const moved = shown === null || JSON.parse(shown)[0] !== JSON.parse(key)[0];
  shown = key;
  $("heading").textContent = layer ? layer.name : "All layers";
  $("facts").textContent = !layer ? summary.title
    : [layer.field ? `Each position sees ${layer.field[0]} × ${layer.field[1]} pixels` : "Each unit sees the whole image",
      layer.size ? `maps of ${layer.size[0]} × ${layer.size[1]}` : "",
      `active in ${share(1 - layer.sparsity)} of the images on average`,
      layer.similarity === null ? "" : `similarity with random weights ${number(layer.similarity)}`].filter(Boolean).join(" · ");
  const items = choose(layer ? [layer] : layers);
  const all = (layer ? [layer] : layers).reduce((sum, each) => sum + each.count, 0);
  $("count").textContent = items.length === all ? maps(all, layer) : items.length ? `${items.length.toLocaleString("en")} of ${maps(all, layer)}` : "No map fits.";
  if (moved) {
    grid.active = 0;
    window.scrollTo(0, 0);
  }
  grid.show(items);
}

function complain(error) {
  $("count").textContent = error.message;
  $("browse").hidden = false;
}

function setControl(on) {
  if (!summary.control) return;
  const before = { ...state };
  state.control = on;
  $("control").checked = $("map-control").checked = on;
  render(before).catch(complain);
}

/** Close the map and go on from its card. */
function leaveMap({ layer, map }) {
  $("map").close();
  const at = grid.items.findIndex((item) => item.layer.name === layer && item.unit === map);
  if (at < 0) return;
  grid.add(at);
  grid.activate(at);
  grid.move(0);
}

const closeMap = () => go({ map: null, rank: 0, in: "", layer: state.in === "all" ? null : state.layer });

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("zfcuda-theme", theme); } catch { /* a browser that keeps nothing for files */ }
  window.dispatchEvent(new Event("themechange"));
}

function toggleTheme() {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

// ---------------------------------------------------------------------------------------------- keys and events

const step = (by) => {
  const at = layers.findIndex((layer) => layer.name === state.layer) + by;
  if (layers[at]) go({ ...EMPTY, layer: layers[at].name });
};
const chooseRank = (rank) => go({ rank: clamp(rank, 0, countOf(currentItem()) - 1) }, true);
const middle = () => [$("stage").clientWidth / 2, $("stage").clientHeight / 2];

const EVERYWHERE = {
  "?": () => { $("help").showModal(); $("help-title").focus(); },
  d: toggleTheme,
  c: () => setControl(!state.control),
};
const IN_MAP = {
  ArrowLeft: () => neighbour(-1),
  ArrowRight: () => neighbour(1),
  ArrowUp: () => chooseRank(state.rank - 1),
  ArrowDown: () => chooseRank(state.rank + 1),
  z: toggleZoom,
  "+": () => zoomAt(1.5, ...middle()),
  "-": () => zoomAt(1 / 1.5, ...middle()),
  0: () => setZoom(1, 0, 0),
  p: () => setView(view.mode === "place" ? "image" : "place"),
};
const IN_GRID = {
  "/": () => $("search").focus(),
  "[": () => step(-1),
  "]": () => step(1),
  Escape: () => { if (state.q) { $("search").value = ""; go({ q: "" }); } },
};
const ARROWS = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -grid.columns, ArrowDown: () => grid.columns };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select");
  if (typing && event.key !== "Escape") return;
  if ($("help").open) return;
  const inMap = $("map").open;
  let action = EVERYWHERE[event.key] || (inMap ? IN_MAP : IN_GRID)[event.key];
  if (inMap && /^[1-9]$/.test(event.key)) action = () => chooseRank(Number(event.key) - 1);
  if (!inMap && !$("browse").hidden && ARROWS[event.key] && grid.node.contains(event.target)) action = () => grid.move(ARROWS[event.key]());
  if (!action) return;
  event.preventDefault();
  action();
});

$("search").addEventListener("input", () => go({ q: $("search").value.trim(), map: null, rank: 0, in: "" }, true));
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("search").blur();
  if (event.key === "Enter" || event.key === "ArrowDown") {
    event.preventDefault();
    grid.cards.get(grid.active)?.focus();
  }
});
for (const key of ["show", "class", "sort"]) $(key).addEventListener("change", (event) => go({ [key]: event.target.value }));
for (const id of ["control", "map-control"]) $(id).addEventListener("change", (event) => setControl(event.target.checked));
for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => setView(button.dataset.view));
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("skip").addEventListener("click", (event) => { event.preventDefault(); ($("browse").hidden ? $("main").querySelector("h2 a") : grid.cards.get(grid.active) || grid.node).focus(); });
$("theme").addEventListener("click", toggleTheme);
$("help-button").addEventListener("click", EVERYWHERE["?"]);
$("previous").addEventListener("click", () => neighbour(-1));
$("next").addEventListener("click", () => neighbour(1));
$("zoom").addEventListener("click", toggleZoom);
$("close").addEventListener("click", closeMap);
$("map").addEventListener("cancel", (event) => { event.preventDefault(); closeMap(); });
$("map").addEventListener("click", (event) => { if (event.target === $("map")) closeMap(); });

$("stage").addEventListener("wheel", (event) => {
  event.preventDefault();
  const place = $("stage").getBoundingClientRect();
  zoomAt(Math.exp(-event.deltaY / 300), event.clientX - place.left, event.clientY - place.top);
}, { passive: false });
$("stage").addEventListener("dblclick", toggleZoom);
$("stage").addEventListener("pointerdown", (event) => {
  if (view.scale === 1) return;
  $("stage").setPointerCapture(event.pointerId);
  $("stage").classList.add("moving");
});
$("stage").addEventListener("pointermove", (event) => {
  if ($("stage").hasPointerCapture(event.pointerId)) setZoom(view.scale, view.x + event.movementX, view.y + event.movementY);
});
for (const name of ["pointerup", "pointercancel"]) $("stage").addEventListener(name, () => $("stage").classList.remove("moving"));

let queued = false;
window.addEventListener("scroll", () => {
  if (queued || $("browse").hidden) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; grid.update(); });
}, { passive: true });
new ResizeObserver(() => grid.layout()).observe(grid.node.parentElement);
window.addEventListener("hashchange", follow);

// ---------------------------------------------------------------------------------------------- start

try {
  const kept = localStorage.getItem("zfcuda-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch { /* as above */ }
for (const name of summary.classes) $("class").append(element("option", { value: name }, name));
$("class-label").hidden = !summary.classes.length;
$("control-label").hidden = $("map-control-label").hidden = !summary.control;
$("sort").querySelector("[value=similarity]").hidden = !summary.control;
for (const canvas of document.querySelectorAll("[data-overview]")) {
  const layer = layers[canvas.dataset.overview];
  plate(canvas, { ...layer.overview, count: layer.count, layer, side: sideOf(layer.count) });
}
const filters = document.querySelector("[data-filters]");
if (filters) plate(filters, { ...summary.filters, layer: layerOf.get(summary.filters.layer), side: sideOf(summary.filters.count) });
follow();
})();
