"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = [...document.querySelectorAll(".node")], bands = [...document.querySelectorAll(".band")];
const tip = document.getElementById("tip"), status = document.getElementById("status");
const search = document.getElementById("search"), all = document.getElementById("all");
const joint = new Map(data.pairs.map(([upper, lower, mass]) => [upper + "," + lower, mass]));
const known = new Set(data.known.map(String));
const labels = nodes.map(node => node.querySelector("text.b")), texts = labels.map(label => label.textContent);
const masses = data.nodes.map(node => percent(node.mass));
const START = "Click a node to condition on it.", flow = document.getElementById("flow");
let given = null;

// Two significant digits, or less than 0.1%, as in the figure.
function percent(value) {
  const points = 100 * value;
  if (Math.abs(points) < 1e-13) return "0%";
  if (Math.abs(points) < 0.1) return "<0.1%";
  const digits = Math.max(0, 1 - Math.floor(Math.log10(Math.abs(points))));
  return points.toFixed(digits).replace("-", "−") + "%";
}

function title(number) { return data.nodes[number].layer + ", " + data.nodes[number].name; }

// Joint relevance of two nodes; null if it is not stored. Two groups of one layer share no walk.
function both(one, other) {
  if (one === other) return data.nodes[one].mass;
  const [a, b] = [data.nodes[one].column, data.nodes[other].column];
  if (a === b) return 0;
  const [upper, lower] = a > b ? [one, other] : [other, one];
  if (!known.has(String([Math.max(a, b), Math.min(a, b)]))) return null;
  return joint.get(upper + "," + lower) ?? 0;
}

function condition(number) {
  given = number;
  all.hidden = number === null;
  nodes.forEach((node, at) => {
    node.setAttribute("aria-pressed", String(at === number));
    const mass = number === null ? null : both(at, number);
    const share = mass === null ? null : mass / data.nodes[number].mass;
    const text = number === null ? masses[at] : share === null ? "not stored" : percent(share);
    const totals = /(\+\S+ −\S+|±\S+)$/;  // totals of both signs in place of a mass
    labels[at].textContent = number === null ? texts[at] : texts[at].replace(totals.test(texts[at]) ? totals : masses[at], text);
    // Blue marks evidence against the output, as in the ribbons, even if it is a positive share of a negative node.
    const evidence = mass ?? data.nodes[at].mass;
    labels[at].classList.toggle("negative", data.nodes[at].kind !== "off" && evidence < 0);
    node.dataset.share = text;
    node.classList.toggle("faint", share !== null && Math.abs(share) < 0.005);
    node.setAttribute("aria-label", title(at) + ": " + text +
      (number === null ? "" : " given " + data.nodes[number].name));
  });
  bands.forEach((band, at) => {
    const {lower, upper} = data.bands[at], touches = number === lower || number === upper;
    band.classList.toggle("faint", number !== null && !touches);
    band.classList.toggle("strong", touches);
  });
  flow.classList.toggle("given", number !== null);
  status.textContent = number === null ? START : givenText(number);
}

// What the numbers mean while a node is selected.
function givenText(number) {
  const opposed = nodes.some(node => node.dataset.share.startsWith("−"));
  return "Relevance given " + title(number) + ": numbers are shares of its " + masses[number] +
    (opposed ? ", negative where relevance has the opposite sign" : "") +
    ". Bars and images are those of the whole flow. Escape returns.";
}

// Draws one walk over groups: its nodes, and the ribbons between them in the color of its own sign.
function follow(walk, sign) {
  nodes.forEach((node, at) => node.classList.toggle("off-walk", walk !== null && !walk.includes(at)));
  bands.forEach((band, at) => {
    const {lower, upper} = data.bands[at];
    const on = walk !== null && walk.includes(lower) && walk.includes(upper);
    band.classList.toggle("off-walk", walk !== null && !on);
    band.classList.toggle("on-walk", on);
    band.classList.toggle("for-walk", on && sign > 0);
    band.classList.toggle("against-walk", on && sign < 0);
  });
}

function nodeText(number) {
  const lines = [title(number), "relevance " + masses[number]];
  if (given !== null && given !== number) lines.push("given " + title(given) + ": " + nodes[number].dataset.share);
  const own = data.bands.filter(band => band.lower === number || band.upper === number)
    .sort((a, b) => Math.abs(b.mass) - Math.abs(a.mass)).slice(0, 5);
  for (const band of own) {
    const other = band.lower === number ? band.upper : band.lower;
    lines.push((other === band.lower ? "from " : "to ") + title(other) + ": " + percent(band.mass));
  }
  return lines.join("\n");
}

function bandText(number) {
  const {lower, upper, mass} = data.bands[number];
  const lines = [title(lower) + " → " + title(upper), "joint relevance " + percent(mass)];
  for (const [one, other] of [[lower, upper], [upper, lower]]) {
    const total = data.nodes[other].mass;
    if (Math.abs(total) > 1e-6) lines.push(data.nodes[one].name + " given " + data.nodes[other].name + ": " + percent(mass / total));
  }
  return lines.join("\n");
}

function show(text, x, y, node) {
  tip.textContent = text;
  const image = node && [...node.querySelectorAll("image")].find(one => getComputedStyle(one).display !== "none");
  if (image) {
    const large = document.createElement("img");
    large.src = image.getAttribute("href");
    large.alt = "";
    large.style.aspectRatio = image.getAttribute("width") + " / " + image.getAttribute("height");  // before it is decoded
    tip.prepend(large);
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14) + "px";
  tip.style.top = Math.max(4, Math.min(y + 14, innerHeight - box.height - 4)) + "px";
}
function hide() { tip.hidden = true; }

function focusOn(number) {
  nodes.forEach((node, at) => node.setAttribute("tabindex", at === number ? "0" : "-1"));
  nodes[number].focus();
}

// The nearest node in another column, or the next one in this column.
function neighbour(number, key) {
  const {column} = data.nodes[number], places = nodes.map(node => node.getBoundingClientRect());
  const step = {ArrowLeft: -1, ArrowRight: 1}[key] ?? 0, turn = {ArrowUp: -1, ArrowDown: 1}[key] ?? 0;
  const others = nodes.map((_, at) => at).filter(at => at !== number && data.nodes[at].column === column + step &&
    (step !== 0 || turn * (places[at].y - places[number].y) > 0));
  return others.sort((a, b) => Math.abs(places[a].y - places[number].y) - Math.abs(places[b].y - places[number].y))[0];
}

nodes.forEach((node, number) => {
  node.addEventListener("click", () => { focusOn(number); condition(given === number ? null : number); });
  node.addEventListener("mousemove", event => show(nodeText(number), event.clientX, event.clientY, node));
  node.addEventListener("mouseleave", hide);
  node.addEventListener("focus", () => {
    const box = node.getBoundingClientRect();
    if (node.matches(":focus-visible")) show(nodeText(number), box.right, box.top, node);
  });
  node.addEventListener("blur", hide);
  node.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") condition(given === number ? null : number);
    else if (event.key.startsWith("Arrow")) {
      const next = neighbour(number, event.key);
      if (next !== undefined) focusOn(next);
    } else return;
    event.preventDefault();
  });
});
bands.forEach((band, number) => {
  band.addEventListener("mousemove", event => show(bandText(number), event.clientX, event.clientY));
  band.addEventListener("mouseleave", hide);
});
document.querySelectorAll("[data-walk]").forEach(button => {
  const number = Number(button.dataset.walk), walk = data.walks[number];
  for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => follow(walk, data.signs[number]));
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => follow(null));
});
if (nodes.length) nodes[nodes.length - 1].setAttribute("tabindex", "0");
all.addEventListener("click", () => condition(null));
search.addEventListener("input", () => {
  const words = search.value.trim().toLowerCase();
  const matches = nodes.map((_, at) => !words || title(at).toLowerCase().includes(words));
  nodes.forEach((node, at) => node.classList.toggle("unmatched", !matches[at]));
  const count = matches.filter(Boolean).length;
  status.textContent = words ? count + (count === 1 ? " node matches" : " nodes match") : START;
});
search.addEventListener("keydown", event => {
  const first = nodes.findIndex(node => !node.classList.contains("unmatched"));
  if (event.key === "Enter" && first >= 0) focusOn(first);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { hide(); search.value = ""; search.dispatchEvent(new Event("input")); condition(null); }
  if (event.key === "/" && document.activeElement !== search) { search.focus(); event.preventDefault(); }
});
