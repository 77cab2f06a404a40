"use strict";
// The readout: values of all curves of a chart at the step under the pointer. Without this script the page is whole.
(() => {
  const LEFT = 52, WIDTH = 560, VIEW = 624;
  const readout = document.getElementById("readout");
  const show = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));

  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  for (const figure of document.querySelectorAll("[data-chart]")) {
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
    let data = null;
    svg.addEventListener("pointermove", event => {
      data ??= JSON.parse(figure.querySelector("script").textContent);
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width * VIEW - LEFT) / WIDTH;
      const wanted = Math.max(0, Math.min(1, at)) * Math.max(data.steps - 1, 1);
      const places = data.lines.map(line => nearest(line.steps, wanted));
      const steps = data.lines.map((line, i) => line.steps[places[i]]);
      const step = steps.reduce((best, one) => Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best);
      const head = document.createElement("div");
      head.textContent = "step " + step.toLocaleString("en");
      const rows = data.lines.map((line, i) => {
        const row = document.createElement("div"), dot = document.createElement("i"), value = document.createElement("b");
        dot.className = "c" + line.colour;
        const place = places[i], range = line.least && line.least[place] !== line.most[place]
          ? ` (${show(line.least[place])} to ${show(line.most[place])})` : "";
        value.textContent = show(line.mean[place]) + range + (steps[i] === step ? "" : ` at ${steps[i].toLocaleString("en")}`);
        row.append(dot, line.name, value);
        return row;
      });
      readout.replaceChildren(head, ...rows);
      readout.hidden = false;
      const x = LEFT + WIDTH * step / Math.max(data.steps - 1, 1);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.removeAttribute("hidden");
      const right = event.clientX + 16 + readout.offsetWidth > innerWidth;
      readout.style.left = (right ? event.clientX - 16 - readout.offsetWidth : event.clientX + 16) + "px";
      readout.style.top = Math.min(event.clientY + 12, innerHeight - readout.offsetHeight - 4) + "px";
    });
    svg.addEventListener("pointerleave", () => { readout.hidden = true; cursor.setAttribute("hidden", ""); });
  }
})();
