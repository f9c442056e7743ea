"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const percent = (prob) => (prob >= 0.001 || prob === 0 ? (100 * prob).toFixed(1) : "<0.1") + "%";
  const add = (parent, name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    parent.appendChild(made);
    return made;
  };
  const row = (table, label, prob, kind) => {
    const made = add(table, "tr", undefined, kind);
    add(made, "td", label, "piece");
    const cell = add(made, "td", undefined, "bar");
    add(cell, "span").style.width = (100 * Math.min(prob, 1)).toFixed(1) + "%";
    add(made, "td", percent(prob), "right");
  };
  let chosen = null;
  const show = (element) => {
    if (chosen) chosen.classList.remove("chosen");
    chosen = element;
    chosen.classList.add("chosen");
    const at = Number(element.dataset.at);
    const token = data.tokens[at];
    panel.replaceChildren();
    add(panel, "h3", "Token " + at + ": “" + data.pieces[token.sampled] + "”");
    add(panel, "p", "rank " + token.rank + ", probability " + percent(token.prob) + ", entropy " + token.entropy.toFixed(2) + " nats", "note");
    const table = add(panel, "table");
    token.ids.forEach((id, index) => {
      const sampled = id === token.sampled && index + 1 === token.rank;
      row(table, "“" + data.pieces[id] + "”" + (sampled ? " sampled" : ""), token.probs[index], sampled ? "sampled" : "");
    });
    if (token.more > 0) row(table, token.more + " more", token.rest, "muted");
    row(table, "outside the support", token.tail, "muted");
    if (token.draws) add(panel, "p", "Drawn from the tail: " + token.draws, "note");
  };
  const chain = document.getElementById("chain");
  const element = (at) => chain.querySelector('.t[data-at="' + Number(at) + '"]');
  if (chain.dataset.chosen !== undefined) show(element(chain.dataset.chosen));
  const tokenAt = (event) => event.target.closest(".t");
  for (const name of ["pointerover", "focusin", "click"]) {
    chain.addEventListener(name, (event) => {
      const pointed = tokenAt(event);
      if (pointed) show(pointed);
    });
  }
  chain.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !chosen) return;
    const next = element(Number(chosen.dataset.at) + step);
    if (next) {
      next.focus();
      event.preventDefault();
    }
  });
})();
