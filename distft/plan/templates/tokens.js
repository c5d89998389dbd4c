"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const card = document.getElementById("card");
  const documents = [...document.querySelectorAll(".document")].map((root, number) => ({
    root, text: root.querySelector(".text"), tokens: [...root.querySelectorAll(".text i")], ...data.documents[number],
  }));
  const places = new Map();
  documents.forEach((one) => one.tokens.forEach((token, at) => places.set(token, [one, at])));
  const STEPS = 4;
  const SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
  let chosen = 0, current = null;

  const kind = (one, at, objective) => Math.floor((one.codes[objective].charCodeAt(at) - 65) / STEPS);
  const name = (one, at, objective) => data.treatments[kind(one, at, objective)];
  const percent = (share) => (share > 0 && share < 0.0005 ? "<0.1" : share === 1 || share === 0 ? `${100 * share}` : (100 * share).toFixed(1)) + " %";

  function paint(objective) {
    chosen = objective;
    document.querySelectorAll("[data-objective]").forEach((panel) => { panel.hidden = Number(panel.dataset.objective) !== objective; });
    for (const one of documents) {
      const codes = one.codes[objective], count = data.treatments.map(() => 0), mass = data.treatments.map(() => 0);
      one.tokens.forEach((token, at) => {
        const code = codes.charCodeAt(at) - 65, which = Math.floor(code / STEPS), step = code % STEPS;
        token.className = step ? `${data.treatments[which]} s${step}` : data.treatments[which];
        count[which] += 1;
        mass[which] += one.ce[at];
      });
      const total = mass.reduce((a, b) => a + b, 0) || 1;
      one.root.querySelector(".sums").textContent = data.treatments
        .map((word, which) => [word, which])
        .filter(([, which]) => count[which])
        .map(([, which]) => `${data.words[which]} ${percent(count[which] / one.tokens.length)} of tokens, ${percent(mass[which] / total)} of CE`)
        .join(" · ");
      one.root.querySelector(".stack").replaceChildren(...data.treatments.flatMap((word, which) => {
        if (!count[which]) return [];
        const part = document.createElement("i");
        part.className = word;
        part.style.width = `${(100 * mass[which]) / total}%`;
        return [part];
      }));
    }
    if (current) show(current);
  }

  const figure = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6) return value.toExponential(1).replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size < 0.001) return value.toExponential(1);
    return String(Number(value.toPrecision(3)));
  };
  const put = (field, value) => { card.querySelector(`[data-field=${field}]`).textContent = value; };

  function show(token) {
    const [one, at] = places.get(token);
    current = token;
    const ce = one.ce[at] / 1000, likely = Math.exp(-ce), what = name(one, at, chosen);
    put("word", token.textContent.replace(/\n/g, ""));
    const told = card.querySelector(".what");
    told.className = `what ${what}`;
    put("what", data.words[kind(one, at, chosen)]);
    put("q", figure(likely));
    put("ppl", figure(Math.exp(ce)));
    put("ce", figure(ce));
    put("entropy", figure(one.entropy[at] / 1000));
    put("rank", one.rank[at] ? `${one.rank[at].toLocaleString("en")} likelier` : "first choice");
    put("entries", one.entries[at]);
    put("id", one.ids[at]);
    put("position", one.positions[at].toLocaleString("en"));
    card.querySelector(".q i").style.width = `${100 * likely}%`;
    const objective = data.objectives[chosen];
    put("objective", objective.name + (objective.basis === "step 0" ? ", at step 0" : ""));
    const packed = one.weights[chosen], weights = packed
      ? objective.palette[SIGNS.indexOf(packed[2 * at]) * 64 + SIGNS.indexOf(packed[2 * at + 1])] : null;
    ["w-ce", "w-kl", "w-rkl", "w-entropy"].forEach((field, n) => put(field, weights ? figure(weights[n]) : "?"));
    card.querySelector(".rest").replaceChildren(...data.objectives.map((other, n) => {
      const item = document.createElement("li"), swatch = document.createElement("span");
      swatch.className = `swatch ${name(one, at, n)}`;
      item.append(swatch, other.name);
      return item;
    }));
    card.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect(), height = card.offsetHeight, width = card.offsetWidth;
    const below = box.bottom + 8 + height <= innerHeight;
    const top = below || box.top < height + 8 ? box.bottom + 8 : box.top - 8 - height;
    card.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
    card.style.left = `${Math.max(8, Math.min(box.left - 12, document.documentElement.clientWidth - width - 8))}px`;
  }

  function hide() { current = null; card.hidden = true; }

  const shown = (target) => (target instanceof Element ? target.closest(".text i") : null);
  document.addEventListener("pointerover", (event) => {
    const token = shown(event.target);
    if (token) show(token);
    else if (current && !shown(document.activeElement)) hide();
  });
  document.addEventListener("focusin", (event) => { const token = shown(event.target); if (token) show(token); else hide(); });
  document.addEventListener("scroll", () => { if (current) show(current); }, { passive: true });
  document.addEventListener("click", (event) => { const token = shown(event.target); if (token) go(token); });

  function go(token) {
    token.tabIndex = -1;
    token.setAttribute("aria-describedby", "card");
    token.focus({ preventScroll: true });
    const box = token.getBoundingClientRect();
    if (box.top < 130 || box.bottom > innerHeight - 40) token.scrollIntoView({ block: "center" });
    show(token);
  }

  document.querySelector(".reading").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const token = shown(event.target), home = event.target.closest(".text");
    if (!home) return;
    const one = documents.find((each) => each.text === home), at = token ? places.get(token)[1] : -1, last = one.tokens.length - 1;
    let next = null;
    if (event.key === "ArrowRight") next = Math.min(at + 1, last);
    else if (event.key === "ArrowLeft") next = Math.max(at - 1, 0);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if (event.key === "n" || event.key === "p") {
      const step = event.key === "n" ? 1 : -1, plain = data.treatments.indexOf("learned");
      for (let to = at + step; to >= 0 && to <= last; to += step) if (kind(one, to, chosen) !== plain) { next = to; break; }
      if (next === null) return;
    } else if (event.key === "Escape") { home.focus(); hide(); return; }
    if (next === null || last < 0) return;
    event.preventDefault();
    go(one.tokens[next]);
  });

  document.querySelectorAll("input[name=objective]").forEach((input) => {
    input.addEventListener("change", () => paint(Number(input.value)));
    if (input.checked && Number(input.value)) paint(Number(input.value));
  });
})();
