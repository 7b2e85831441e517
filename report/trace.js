// Plays the traces of a page; see report/trace.py, which writes the elements in their last state and the data.
document.querySelectorAll(".pt:not([data-ready])").forEach((root) => {
  root.dataset.ready = "";
  const find = (name) => root.querySelector(".pt-" + name);
  const data = JSON.parse(find("data").textContent);
  const { steps, given, wrong, size, last } = data;
  const cells = [...root.querySelectorAll("[data-cell]")];
  const slider = find("slider"), play = find("play"), status = find("status"), panel = find("candidates");
  const delay = Math.min(700, Math.max(80, 10000 / Math.max(1, steps.length)));
  let now = steps.length, chosen = null, timer = null;

  // What each cell holds after pass t: text, confidence in thousandths (null: none) and the pass that wrote it.
  function stateAt(t) {
    const state = cells.map((_, i) => (i in given ? { text: given[i], pass: 0 } : null));
    for (let pass = 1; pass <= t; pass++) {
      const step = steps[pass - 1];
      for (const i of step.e) state[i] = null;
      for (const i in step.w) state[i] = { text: step.w[i][0], confidence: step.w[i][1], pass };
    }
    return state;
  }
  const percent = (thousandths) => Math.round(thousandths / 10) + "%";
  // As report/trace.py writes it: an indentation after a newline is not part of the token's box.
  const visible = (text) => text.replace(/\n[ \t]*$/, "\n").replace(/\n/g, "↵") || "·";
  const nameOf = (i) =>
    size ? `Row ${Math.floor(i / size) + 1}, column ${(i % size) + 1}` : `Token ${i + 1}`;

  function draw() {
    const state = stateAt(now);
    let nFilled = 0, nToFill = 0;
    cells.forEach((cell, i) => {
      const held = state[i], isGiven = i in given, small = cell.querySelector("small");
      const isWritten = held !== null && held.pass > 0 && !(isGiven && held.text === given[i]);
      nToFill += !isGiven;
      nFilled += !isGiven && held !== null;
      if (held) cell.querySelector("span").textContent = size ? held.text : visible(held.text);
      else if (size) cell.querySelector("span").textContent = "";
      const shown = !isWritten ? "" : size ? (held.confidence === null ? "" : Math.round(held.confidence / 10)) : held.pass;
      small.textContent = shown;
      cell.classList.toggle("pt-given", isGiven && !isWritten);
      cell.classList.toggle("pt-written", isWritten);
      cell.classList.toggle("pt-masked", held === null);
      cell.classList.toggle("pt-now", held !== null && held.pass === now && now > 0 && isWritten);
      cell.classList.toggle("pt-wrong", i in wrong && held !== null && held.text === last[i]);
      cell.classList.toggle("pt-chosen", i === chosen);
      cell.style.setProperty("--confidence", isWritten && held.confidence !== null ? held.confidence / 10 + "%" : "100%");
    });
    slider.value = now;
    status.textContent = `Pass ${now} of ${steps.length}, ${nFilled} of ${nToFill} ${size ? "cells" : "tokens"} filled`;
    describe(state);
  }

  function line(...parts) {
    const paragraph = document.createElement("p");
    paragraph.textContent = parts.join("");
    panel.append(paragraph);
  }

  function describe(state) {
    panel.replaceChildren();
    if (chosen === null) return line(`Point at a ${size ? "cell" : "token"} to see its candidates.`);
    const held = state[chosen], name = nameOf(chosen);
    if (held === null) line(`${name}: empty after pass ${now}`);
    else if (held.pass === 0) line(`${name}: ${visible(held.text)}, given`);
    else if (held.confidence === null) line(`${name}: ${visible(held.text)}, written after pass ${held.pass}`);
    else line(`${name}: ${visible(held.text)}, written at pass ${held.pass} with ${percent(held.confidence)}`);
    if (chosen in wrong && held !== null && held.text === last[chosen]) line("Wrong: ", wrong[chosen]);
    const pass = held === null ? now : held.pass;
    const found = pass > 0 ? steps[pass - 1].c[chosen] : undefined;
    if (!found) {
      if (held === null && pass > 0) line("Candidates were kept only for the pass that writes a token.");
      return;
    }
    line(`Candidates at pass ${pass}:`);
    for (let k = 0; k < found.length; k += 2) {
      const row = document.createElement("div");
      row.className = "pt-candidate";
      const text = document.createElement("code"), bar = document.createElement("i"), value = document.createElement("b");
      text.textContent = visible(found[k]);
      bar.style.width = found[k + 1] / 10 + "%";
      value.textContent = (found[k + 1] / 10).toFixed(1) + "%";
      row.append(text, bar, value);
      panel.append(row);
    }
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function show(t) {
    now = Math.min(steps.length, Math.max(0, t));
    draw();
    if (now === steps.length) stop();
  }
  function toggle() {
    if (timer !== null) return stop();
    if (now === steps.length) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => show(now + 1), delay);
  }

  const jumps = { first: () => 0, back: () => now - 1, next: () => now + 1, end: () => steps.length };
  for (const name in jumps) find(name).addEventListener("click", () => { stop(); show(jumps[name]()); });
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  root.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const jump = { Home: jumps.first, ArrowLeft: jumps.back, ArrowRight: jumps.next, End: jumps.end }[event.key];
    if (jump) { stop(); show(jump()); }
    else if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
    else return;
    event.preventDefault();
  });
  const choose = (event) => {
    const cell = event.target.closest("[data-cell]");
    if (cell === null) return;
    chosen = cells.indexOf(cell);
    draw();
  };
  root.addEventListener("pointerover", choose);
  root.addEventListener("click", choose);
  root.querySelectorAll("button, input").forEach((element) => { element.disabled = steps.length === 0; });
  draw();
});
