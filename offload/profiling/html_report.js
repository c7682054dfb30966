"use strict";
window.onerror = (message, _source, line) => { document.documentElement.setAttribute("data-error", message + " (line " + line + ")"); };
const data = JSON.parse(document.getElementById("data").textContent), summary = data.summary, plain = summary.plain, elapsed = summary.elapsed_s;
const byId = (id) => document.getElementById(id);
const TIERS = { host: "RAM", device: "Device memory", ssd: "SSD" };
const tierName = (name) => TIERS[name] || name;

// ---- how quantities are written ----

function scaled(n, base, units, digits) {
  let i = 0;
  while (i < units.length - 1 && Math.abs(n) >= base) { n /= base; i += 1; }
  return (i ? n.toFixed(digits) : n.toFixed(0)) + " " + units[i];
}
const bytesTo = (digits) => (n) => n === null || n === undefined ? "-" : scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB"], digits);
const rateTo = (digits) => (n) => n === null ? "-" : scaled(n, 1000, ["B/s", "kB/s", "MB/s", "GB/s"], digits);
const bytes = bytesTo(1), rate = rateTo(1);
const percent = (share, digits = 1) => (share * 100).toFixed(digits) + " %";
const count = (n) => n.toLocaleString("en");
function seconds(s) {
  if (s === null || s === undefined) return "-";
  return s >= 1 ? s.toFixed(2) + " s" : s >= 1e-3 ? (s * 1e3).toFixed(1) + " ms" : (s * 1e6).toFixed(0) + " \u00b5s";
}

/** About n round numbers from 0 up to most: 1, 2 or 5 times a power of ten of the unit that most is read in. */
function ticks(most, n, base) {
  let unit = 1;
  while (base && most / unit >= base) unit *= base;
  const rough = most / unit / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999) * unit;
  return Array.from({ length: Math.floor(most / step * 1.0001) + 1 }, (_, i) => i * step);
}
const digitsOf = (values, base) => {
  let step = values.length > 1 ? values[1] : 0, top = values[values.length - 1];
  while (base && top >= base) { step /= base; top /= base; }
  return step % 1 ? 1 : 0;
};

// ---- elements ----

function node(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
const ofTag = (tag) => "var(--" + tag + ", var(--staging))";
const ofPart = (part) => "var(--" + (part === "gradient" ? "compute-gradient" : part) + ", var(--update))";
const chip = (color, text) => node("span", {}, node("i", { class: "chip", style: "background:" + color }), text);

// ---- tables: columns are [title, value of a row, how to show it]; a number column is aligned right and sorted downwards first ----

function table(id, title, gist, columns, rows, note) {
  const box = node("details", {}, node("summary", {}, node("h2", {}, title), node("span", { class: "soft" }, gist)));
  const scroll = node("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title });
  if (rows.length) {
    const made = node("table", { id: id }), body = node("tbody");
    const show = (sorted) => body.replaceChildren(...sorted.map((row) => node("tr", {}, ...columns.map(([, value, form]) =>
      node("td", form ? { class: "number" } : {}, form ? form(value(row), row) : value(row))))));
    const heads = columns.map(([name, value, form]) => {
      const button = node("button", { type: "button" }, name), head = node("th", form ? { class: "number" } : {}, button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : Boolean(form), key = (row) => { const v = value(row); return v instanceof Node ? v.textContent : v ?? -1; };
        const sorted = [...rows].sort((a, b) => form ? key(a) - key(b) : String(key(a)).localeCompare(String(key(b))));
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        show(down ? sorted.reverse() : sorted);
      });
      return head;
    });
    made.append(node("thead", {}, node("tr", {}, ...heads)), body);
    show(rows);
    scroll.append(made);
  }
  if (note) scroll.append(node("p", { class: "soft" }, note));
  box.append(scroll);
  byId("tables").append(box);
}

const share = (part, whole) => whole ? part / whole : 0;
const most = (rows, value) => rows.length ? [...rows].sort((a, b) => value(b) - value(a))[0] : null;

function peakTables() {
  const tiers = Object.entries(summary.tiers), page = summary.page_bytes;
  const pages = (n) => count(n) + " (" + bytes(n * page) + ")";
  const budget = [
    ["budget", ([, t]) => t.budget_bytes, (n) => n === null ? "no limit" : bytes(n)],
    ["of budget", ([, t]) => t.budget_bytes ? t.peak_bytes / t.budget_bytes : null, (s) => s === null ? "-" : percent(s)],
    ["planned pages", ([, t]) => t.planned_pages, (n, [, t]) => n === null ? "no plan" : (t.planned_at_most ? "at most " : "") + pages(n)],
    ["pages touched", ([, t]) => t.pages_touched, pages],
  ];
  table("peaks", "Peaks", tiers.map(([name, t]) => tierName(name) + " " + bytes(t.peak_bytes)).join(", "), [
    ["memory", ([name]) => tierName(name)], ["peak", ([, t]) => t.peak_bytes, bytes], ["at", ([, t]) => t.peak_at_s, seconds], ["mean", ([, t]) => t.mean_bytes, bytes],
    ...(plain ? [] : budget),
  ], tiers, tiers.length ? "" : "Nothing was held.");
  const tags = tiers.flatMap(([tier, t]) => Object.entries(t.tag_peaks).sort((a, b) => b[1] - a[1])
    .map(([tag, own]) => ({ tier: tierName(tier), tag: tag, then: t.peak_by_tag[tag] || 0, own: own })));
  const first = most(tags.filter((r) => r.tier !== TIERS.ssd), (r) => r.own);
  table("tags", "Peaks by use", first ? "most of " + first.tier + ": " + first.tag + ", " + bytes(first.own) : "", [
    ["memory", (r) => r.tier], ["use", (r) => chip(ofTag(r.tag), r.tag)], ["at the memory's peak", (r) => r.then, bytes], ["own peak", (r) => r.own, bytes],
  ], tags, "");
}

function plainTables() {
  const all = (m) => m.parameter + m.gradient + m.moment + m.activation, first = most(plain.modules, all), least = most(plain.engine, (c) => -c.peak_bytes);
  table("engine", "With the engine", least ? "peak " + bytes(least.peak_bytes) + " instead of " + bytes(least.plain_bytes) : "cannot train this as it is", [
    ["memory.ram", (c) => c.ram_bytes, bytes], ["memory.activations", (c) => c.activations_bytes, (n) => n === null ? "not set" : bytes(n)],
    ["peak", (c) => c.peak_bytes, bytes], ["less than now", (c) => 1 - c.peak_bytes / c.plain_bytes, (s) => percent(s, 0)],
    ["in page files", (c) => c.ssd_bytes, bytes], ["read a step, at most", (c) => c.read_bytes, bytes], ["written", (c) => c.written_bytes, bytes],
  ], plain.engine, plain.engine.length ? "Estimated from the tensors watched, not run: parameters and states within memory.ram, gradients of one " +
    "module at a time, everything else as it is. The first budget is the smallest that works." : "The engine cannot train this as it is: " + plain.engine_cannot);
  table("modules", "Bytes by module", first ? "most: " + first.name + ", " + bytes(all(first)) : "", [
    ["module", (m) => m.name], ["parameters", (m) => m.parameter, bytes], ["gradients", (m) => m.gradient, bytes],
    ["moments", (m) => m.moment, bytes], ["activations", (m) => m.activation, bytes], ["total", all, bytes],
  ], plain.modules, "");
  const watched = seconds(summary.plan.step_s.measured), before = seconds(plain.unwatched_step_s);
  table("overhead", "Cost of recording", watched + " a step instead of " + before, [], [],
    "A step took " + watched + " while it was watched and " + before + " before, since every op of torch is looked at. Times of modules are longer by that; bytes are the same.");
}

function engineTables() {
  const plan = summary.plan, over = summary.overhead, lanes = Object.entries(summary.lanes);
  const ratio = (p) => p.planned && p.measured !== null ? p.measured / p.planned : null;
  const cause = summary.wait_causes[0], wait = summary.waits[0], module = summary.modules[0];
  table("causes", "Waits of the training thread by cause", cause ? cause.reason + ": " + percent(share(cause.total_s, elapsed)) + " of the time" : "none", [
    ["the tensor could not be used because", (c) => c.reason], ["lane", (c) => c.lane], ["total", (c) => c.total_s, seconds],
    ["of the time", (c) => share(c.total_s, elapsed), (s) => percent(s)], ["waits", (c) => c.count, count], ["longest", (c) => c.longest_s, seconds],
  ], summary.wait_causes, summary.wait_causes.length ? "" : "The training thread never waited.");
  table("waits", "Waits by tensor", wait ? "longest for " + wait.name + ": " + seconds(wait.total_s) : "none", [
    ["waited for", (w) => w.name], ["total", (w) => w.total_s, seconds], ["of the time", (w) => share(w.total_s, elapsed), (s) => percent(s, 2)],
    ["waits", (w) => w.count, count], ["longest", (w) => w.longest_s, seconds], ["thread", (w) => w.thread], ["lane", (w) => w.lane],
    ["because", (w) => w.reason + (w.blocker ? " (" + w.blocker + ")" : "")],
  ], summary.waits, summary.waits.length ? "" : "Nobody waited.");
  table("lanes", "Lanes", lanes.map(([name, l]) => name + " " + percent(l.share, 0)).join(", "), [
    ["lane", ([name]) => name], ["busy", ([, l]) => l.busy_s, seconds], ["of the time", ([, l]) => l.share, (s) => percent(s)],
    ["times", ([, l]) => l.count, count], ["moved", ([, l]) => l.bytes, bytes], ["while busy", ([, l]) => l.bytes_per_s, rate],
  ], lanes, "");
  const planRows = [["time", plan.step_s, seconds], ["bytes read", plan.read_bytes, bytes], ["bytes written", plan.written_bytes, bytes]];
  table("plan", "Plan and measurement", "step " + seconds(plan.step_s.measured) + ", planned " + seconds(plan.step_s.planned), [
    ["of a step", (r) => r[0]], ["planned", (r) => r[1].planned, (v, r) => r[2](v)], ["measured", (r) => r[1].measured, (v, r) => r[2](v)],
    ["measured / planned", (r) => ratio(r[1]), (v) => v === null ? "-" : v.toFixed(2)],
  ], planRows, summary.planned_steps + " of " + summary.steps + " steps followed the plan, with " + summary.deviations + " deviations from it." +
    (summary.mode === "lock-free" ? " Bytes that the updater moves are measured, but not in the plan." : ""));
  table("modules", "Bytes by module", module ? "most moved: " + module.name + ", " + bytes(module.read_bytes + module.written_bytes) : "", [
    ["module", (m) => m.name], ["parameters", (m) => m.parameter_bytes, bytes], ["masters", (m) => m.master_bytes, bytes],
    ["moments", (m) => m.moment_bytes, bytes], ["read", (m) => m.read_bytes, bytes], ["written", (m) => m.written_bytes, bytes],
    ["compute", (m) => m.compute_s, seconds], ["waits for it", (m) => m.wait_s, seconds],
  ], summary.modules, "");
  table("overhead", "Cost of recording", percent(over.training_share, 2) + " of the training thread's time", [], [],
    count(over.calls) + " calls of the recorder took " + seconds(over.spent_s) + " on all threads, " + seconds(over.training_spent_s) +
    " of it on the training thread. Not counted: the look at an attribute that each call begins with, and writing these files after the end.");
}

// ---- heading ----

function heading() {
  const made = new Date(summary.made_at), step = summary.plan.step_s, plan = summary.plan;
  const date = made.toLocaleString("en-GB", { day: "numeric", month: "long", year: "numeric", hour: "2-digit", minute: "2-digit" });
  byId("title").textContent = "Profile of " + summary.title;
  document.title = "Profile of " + summary.title + ", " + date;
  byId("subtitle").textContent = [
    summary.model, count(summary.steps) + " steps in " + seconds(elapsed),
    plain ? "without the engine" : summary.mode + " updates, pages of " + bytesTo(0)(summary.page_bytes), date,
  ].join(" \u00b7 ");
  const parts = summary.bottleneck.split(/\b((?:memory|ssd|update|torch)\.[a-z_.]*[a-z])/);  // every second one is a key
  byId("verdict").append(...parts.map((part, i) => i % 2 ? node("code", {}, part) : part));
  const against = (p, form) => p.planned === null ? "no plan" : "planned " + form(p.planned);
  const cards = plain ? [
    ["Step, watched", seconds(step.measured), seconds(plain.unwatched_step_s) + " unwatched"],
    ["Tensors at the peak", bytes(plain.peak_bytes), "on all devices"],
    ...Object.entries(plain.at_peak).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([tag, n]) => [chip(ofTag(tag), tag[0].toUpperCase() + tag.slice(1) + " at the peak"), bytes(n), percent(share(n, plain.peak_bytes), 0) + " of it"]),
  ] : [
    ["Step", seconds(step.measured), against(step, seconds)],
    [chip("var(--waiting)", "Waiting"), percent(summary.lanes.waits.share), count(summary.lanes.waits.count) + " waits"],
    ...Object.entries(summary.tiers).filter(([, t]) => t.budget_bytes).map(([name, t]) => [tierName(name) + " peak", bytes(t.peak_bytes), percent(t.peak_bytes / t.budget_bytes, 0) + " of " + bytes(t.budget_bytes)]),
    [chip("var(--moved)", "Read a step"), bytes(plan.read_bytes.measured), against(plan.read_bytes, bytes)],
    [chip("var(--moved)", "Written a step"), bytes(plan.written_bytes.measured), against(plan.written_bytes, bytes)],
  ];
  byId("cards").append(...cards.map(([what, value, more]) => node("div", { class: "card" }, node("span", {}, what), node("b", {}, value), node("span", {}, more))));
}

// ---- the picture: rows of one time axis, one under the other ----

const LEFT = 84, RIGHT = 10, TOP = 20, ROW_GAP = 40;

/** The outline of values from base on, as steps. */
function outline(values, base, x, y) {
  let there = "", back = "";
  values.forEach((value, i) => { there += (i ? "L" : "M") + x(i) + " " + y(base[i] + value) + "L" + x(i + 1) + " " + y(base[i] + value); });
  for (let i = values.length - 1; i >= 0; i--) back += "L" + x(i + 1) + " " + y(base[i]) + "L" + x(i) + " " + y(base[i]);
  return there + back + "Z";
}

/** The area between values and base, as a curve through the middle of each. */
function curve(values, base, x, y) {
  const last = values.length, points = values.map((value, i) => x(i + 0.5) + " " + y(base[i] + value));
  return "M" + x(0) + " " + y(base[0]) + "L" + points.join("L") + "L" + x(last) + " " + y(base[last - 1]) + "Z";
}

/** Draws series on top of each other; each is [color, values, attributes]. */
function stack(series, x, y, add, form = outline) {
  let base = null;
  for (const [color, values, attributes] of series) {
    base = base || new Array(values.length).fill(0);
    const at = (i) => +(LEFT + x * i / values.length).toFixed(2);
    add("path", { d: form(values, base, at, y), fill: color, ...attributes });
    base = base.map((below, i) => below + values[i]);
  }
}

function axis(values, y, right, form, add) {
  for (const value of values) {
    add("line", { x1: LEFT, x2: right, y1: y(value), y2: y(value), stroke: "var(--grid)" });
    add("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, value ? form(Math.abs(value)) : "0");
  }
}

const tierRow = (tier) => ({ height: 150, draw(top, right, add) {
  const facts = summary.tiers[tier.name], budget = facts.budget_bytes && facts.budget_bytes < 4 * facts.peak_bytes ? facts.budget_bytes : 0;
  const full = Math.max(facts.peak_bytes, budget) * 1.04, values = ticks(full, 4, 1024), digits = digitsOf(values, 1024);
  const y = (value) => +(top + this.height * (1 - value / full)).toFixed(1);
  add("text", { x: LEFT, y: top - 8, class: "title" }, tierName(tier.name) + (facts.budget_bytes ? ", budget " + bytes(facts.budget_bytes) : ""));
  axis(values, y, right, bytesTo(digits), add);
  stack(Object.entries(tier.tags).map(([tag, held]) => [ofTag(tag), held, { "data-tag": tag }]), right - LEFT, y, add);
  if (budget) add("line", { x1: LEFT, x2: right, y1: y(budget), y2: y(budget), stroke: "var(--text)", "stroke-dasharray": "6 4", "stroke-width": 1.5 });
} });

const laneRow = (lane) => ({ height: 24, draw(top, right, add) {
  add("text", { x: LEFT, y: top - 8, class: "title" }, lane.name === "training" ? "Training thread" : "Update kernels");
  add("rect", { x: LEFT, y: top, width: right - LEFT, height: this.height, fill: "var(--grid)" });
  stack(Object.entries(lane.parts).map(([part, shares]) => [ofPart(part), shares, { "data-lane": part }]), right - LEFT, (v) => +(top + this.height * (1 - Math.min(1, v))).toFixed(1), add);
} });

/** Bandwidth: up is one direction, down the other. */
const rateRow = (title, up, down) => ({ height: down ? 130 : 70, draw(top, right, add) {
  const full = Math.max(1, ...up, ...(down || [])) * 1.05, values = ticks(full, down ? 3 : 2, 1000), digits = digitsOf(values, 1000), zero = down ? this.height / 2 : this.height;
  const y = (value) => +(top + zero * (1 - value / full)).toFixed(1);
  add("text", { x: LEFT, y: top - 8, class: "title" }, title);
  axis([...values, ...(down ? values.slice(1).map((v) => -v) : [])], y, right, rateTo(digits), add);
  const style = { stroke: "var(--moved)", "stroke-width": 1.2, "stroke-linejoin": "round" };
  stack([["var(--moved)", up, { "data-rate": "up", "fill-opacity": 0.8, ...style }]], right - LEFT, y, add, curve);
  if (down) stack([["var(--moved)", down.map((v) => -v), { "data-rate": "down", "fill-opacity": 0.35, ...style }]], right - LEFT, y, add, curve);
  add("line", { x1: LEFT, x2: right, y1: y(0), y2: y(0), stroke: "var(--soft)" });
} });

function rows() {
  const { read, write, h2d } = data.rates, none = (other) => other.map(() => 0);
  const made = [...data.lanes.map(laneRow), ...data.tiers.map(tierRow)];
  if (h2d) made.splice(made.length - 1, 0, rateRow("Copied to the device", h2d));
  if (read || write) made.push(rateRow("SSD: read upwards, written downwards", read || none(write), write || none(read)));
  return made;
}

function draw() {
  const width = Math.max(620, byId("chart").clientWidth), right = width - RIGHT, made = rows();
  const height = TOP + made.reduce((sum, row) => sum + row.height + ROW_GAP, 0) + 14;
  const picture = shape("svg", { width: width, height: height });
  const add = (...what) => picture.append(shape(...what));
  const bottom = height - 26, at = (s) => +(LEFT + (right - LEFT) * s / elapsed).toFixed(2), times = ticks(elapsed, 8, 0);
  for (const time of times) add("text", { x: at(time), y: height - 8, "text-anchor": at(time) > right - 20 ? "end" : "middle" }, time === 0 ? "0" : elapsed >= 1 ? +time.toFixed(3) + " s" : +(time * 1e3).toFixed(3) + " ms");
  let top = TOP + 24;
  for (const row of made) { row.draw(top, right, add); top += row.height + ROW_GAP; }
  for (const time of times) add("line", { x1: at(time), x2: at(time), y1: bottom, y2: bottom + 5, stroke: "var(--soft)" });
  data.step_ends_s.forEach((end, i) => {
    const begin = i ? data.step_ends_s[i - 1] : 0;
    add("line", { x1: at(end), x2: at(end), y1: TOP - 10, y2: bottom, stroke: "var(--text)", "stroke-dasharray": "1 3", "stroke-opacity": 0.7 });
    if (at(end) - at(begin) > 56) add("text", { x: (at(begin) + at(end)) / 2, y: 12, "text-anchor": "middle" }, "step " + (i + 1));
  });
  const hair = shape("line", { y1: TOP - 10, y2: bottom, stroke: "var(--text)", visibility: "hidden" });
  picture.append(hair);
  byId("chart").replaceChildren(picture);
  let bucket = -1;
  const left = () => picture.getBoundingClientRect().left, place = (b) => LEFT + (right - LEFT) * (b + 0.5) / data.n_buckets;
  const show = (b, x, y) => { bucket = b; point(b, place(b), hair, x, y); };
  picture.addEventListener("mousemove", (event) => {
    const b = Math.floor((event.clientX - left() - LEFT) / (right - LEFT) * data.n_buckets);
    if (b < 0 || b >= data.n_buckets) hide(hair); else show(b, event.clientX, event.clientY);
  });
  picture.addEventListener("mouseleave", () => hide(hair));
  byId("chart").onblur = () => hide(hair);
  byId("chart").onkeydown = (event) => {
    const by = event.shiftKey ? Math.round(data.n_buckets / 20) : Math.max(1, Math.round(data.n_buckets / 200)), last = data.n_buckets - 1;
    const next = { ArrowLeft: Math.max(0, bucket - by), ArrowRight: Math.min(last, bucket + by), Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide(hair);
    if (next === undefined) return;
    event.preventDefault();
    show(next, left() + place(next), picture.getBoundingClientRect().top + 60);
  };
}

function hide(hair) { hair.setAttribute("visibility", "hidden"); byId("tip").style.display = "none"; }

function point(bucket, place, hair, clientX, clientY) {
  for (const side of ["x1", "x2"]) hair.setAttribute(side, place);
  hair.setAttribute("visibility", "visible");
  const found = [["time", seconds(elapsed * bucket / data.n_buckets)]], tip = byId("tip");
  for (const lane of data.lanes) for (const [part, shares] of Object.entries(lane.parts)) if (shares[bucket]) found.push([chip(ofPart(part), lane.name === "training" ? part : "update kernels"), percent(shares[bucket], 0)]);
  for (const tier of data.tiers) {
    const held = Object.entries(tier.tags).map(([tag, values]) => [tag, values[bucket]]).filter(([, value]) => value);
    found.push([tierName(tier.name), bytes(held.reduce((sum, [, value]) => sum + value, 0))], ...held.map(([tag, value]) => [chip(ofTag(tag), tag), bytes(value)]));
  }
  for (const [name, title] of [["read", "SSD read"], ["write", "SSD written"], ["h2d", "to the device"]]) {
    const course = data.rates[name];
    if (course) found.push([chip("var(--moved)", title), rate(course[Math.min(course.length - 1, Math.floor(bucket / data.n_buckets * course.length))])]);
  }
  tip.replaceChildren(node("table", {}, ...found.map(([what, value]) => node("tr", {}, node("td", {}, what), node("td", { class: "number" }, value)))));
  tip.style.display = "block";
  tip.style.left = Math.max(4, Math.min(clientX + 16, window.innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(clientY + 16, window.innerHeight - tip.offsetHeight - 8)) + "px";
}

function legends() {
  const parts = [...new Set(data.lanes.flatMap((lane) => Object.keys(lane.parts)))];
  byId("tag-legend").append("Bytes held:", ...[...new Set(data.tiers.flatMap((tier) => Object.keys(tier.tags)))].map((tag) => chip(ofTag(tag), tag)));
  byId("lane-legend").append("Time:", ...parts.map((part) => chip(ofPart(part), part)), ...(Object.keys(data.rates).length ? [chip("var(--moved)", "bytes moved")] : []));
  byId("chart").setAttribute("aria-label", "Time of the training thread, bytes held and bytes moved over " + seconds(elapsed) + ". Arrow keys move a cursor that reads the values.");
  byId("chart-note").textContent = (plain ? "" : "Dashed line: budget. ") + "Dotted lines: optimizer steps. A column is " + seconds(elapsed / data.n_buckets) +
    " and shows its greatest total of bytes. Point at it, or use the arrow keys, for the values; every single " + (plain ? "span" : "move") + " is in trace.json, for ui.perfetto.dev. " +
    (plain ? "Bytes are those of tensors; what a kernel takes for itself while it runs is not seen." : "Bytes in RAM are whole pages and gradients in flight.");
}

heading();
if (plain) { plainTables(); peakTables(); } else { engineTables(); peakTables(); }
legends();
draw();
window.addEventListener("resize", draw);
byId("all").addEventListener("click", () => { for (const box of document.querySelectorAll("details")) box.open = true; });
document.documentElement.setAttribute("data-rendered", "yes");
