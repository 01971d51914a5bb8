// Draws the texts that playground.py sends, and what a token's alternatives were. What a model wrote is only ever set as
// text. Gradio runs this once: `element` is the view, `props.value` what was sent last, `watch` tells when that changes.
const status = element.querySelector("[role=status]");
const texts = element.querySelector(".texts");
const drawn = []; // how much of each text is on the page

function make(parent, tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return parent.appendChild(made);
}

function addLine(card, { prompt, text, token, p, top, end }) {
  if (prompt !== undefined) make(card, "span", "prompt", prompt);
  else if (token !== undefined) {
    const band = props.bands.filter((least) => p < least).length;
    make(card, "span", `token p${band}${text === "\n" ? " newline" : ""}`, text).about = { token, p, top };
  } else make(card, "span", `end ${end}`, text);
}

function draw() {
  const value = props.value;
  status.className = `status ${value.state}`;
  status.textContent = value.status;
  while (texts.children.length > value.texts.length) texts.lastChild.remove();
  value.texts.forEach((lines, number) => {
    const card = texts.children[number] ?? make(texts, "article", "text");
    if (!lines.startsWith(drawn[number] ?? "")) card.replaceChildren(); // another text
    const before = card.hasChildNodes() ? drawn[number].length : 0;
    for (const line of lines.slice(before).split("\n")) if (line) addLine(card, JSON.parse(line));
    drawn[number] = lines;
  });
}

draw();
watch("value", draw);

// The hint on a token.
const hint = make(document.body, "div", "");
hint.id = "hint";
hint.role = "tooltip";
hint.hidden = true;

const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const percent = (p) => (p < 0.001 ? "< 0.1" : (100 * p).toFixed(1)) + " %";

function addRow(text, p, chosen) {
  const row = make(hint, "div", chosen ? "row chosen" : "row");
  make(row, "code", "", visible(text));
  make(row, "i", "").style.setProperty("--p", p);
  make(row, "span", "", percent(p));
}

function showHint(at, { token, p, top }) {
  hint.replaceChildren();
  for (const [text, chance] of top) addRow(text, chance, text === token);
  if (!top.some(([text]) => text === token)) addRow(token, p, true);
  hint.hidden = false;
  const box = at.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - hint.offsetWidth - 8);
  const fits = box.bottom + 6 + hint.offsetHeight <= window.innerHeight;
  hint.style.left = `${Math.max(8, left)}px`;
  hint.style.top = `${fits ? box.bottom + 6 : Math.max(8, box.top - hint.offsetHeight - 6)}px`;
}

function point(event) {
  if (event.target.about) showHint(event.target, event.target.about);
  else hint.hidden = true;
}

element.addEventListener("pointerover", point);
element.addEventListener("click", point); // a finger does not hover
element.addEventListener("pointerleave", () => (hint.hidden = true));
window.addEventListener("scroll", () => (hint.hidden = true), { passive: true });
