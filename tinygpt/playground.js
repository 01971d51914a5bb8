// The hint on a token: what it is, how likely it was, and what else the model thought of. Text is only ever set as text.
const hint = document.createElement("div");
hint.id = "hint";
hint.setAttribute("role", "tooltip");
hint.hidden = true;
document.body.append(hint);

const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const percent = (p) => (p < 0.001 ? "< 0.1" : (100 * p).toFixed(1)) + " %";

function row(text, probability, drawn) {
  const line = document.createElement("div");
  line.className = drawn ? "row drawn" : "row";
  const [name, bar, number] = ["code", "i", "span"].map((tag) => line.appendChild(document.createElement(tag)));
  name.textContent = visible(text);
  bar.style.setProperty("--p", probability);
  number.textContent = percent(probability);
  return line;
}

function show(token) {
  const [text, probability, top] = JSON.parse(token.dataset.token);
  const rows = top.map(([other, p]) => row(other, p, other === text));
  if (!top.some(([other]) => other === text)) rows.push(row(text, probability, true));
  hint.replaceChildren(...rows);
  hint.hidden = false;
  const at = token.getClientRects()[0];
  if (!at) return hide();
  const left = Math.min(at.left, document.documentElement.clientWidth - hint.offsetWidth - 8);
  const below = at.bottom + 6 + hint.offsetHeight <= window.innerHeight;
  hint.style.left = Math.max(8, left) + "px";
  hint.style.top = (below ? at.bottom + 6 : Math.max(8, at.top - hint.offsetHeight - 6)) + "px";
}

function hide() {
  hint.hidden = true;
}

const pointed = (event) => event.target.closest?.("[data-token]");
element.addEventListener("pointerover", (event) => (pointed(event) ? show(pointed(event)) : hide()));
element.addEventListener("pointerleave", hide);
element.addEventListener("click", (event) => pointed(event) && show(pointed(event))); // a finger does not hover
window.addEventListener("scroll", hide, { passive: true });
