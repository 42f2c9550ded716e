"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const svg = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const el = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const power = (n) => (n < 0 ? "⁻" : "") + [...String(Math.abs(n))].map((d) => SUPER[d]).join("");
  const format = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size && (size >= 1e6 || size < 1e-3)) {
      const exponent = Math.floor(Math.log10(size));
      const lead = Number((value / 10 ** exponent).toPrecision(3));
      return lead === 1 ? `10${power(exponent)}` : `${lead}·10${power(exponent)}`;
    }
    return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
  };
  const colour = (number) => `var(--c${number % 8})`;
  const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

  // -- clips --------------------------------------------------------------------------------------

  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const videos = [...document.querySelectorAll("video")];
  let playing = !still.matches;
  const seen = new Set();
  const update = (video) => {
    if (playing && seen.has(video)) video.play().catch(() => {});
    else video.pause();
  };
  if (videos.length) {
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) seen.add(entry.target);
        else seen.delete(entry.target);
        update(entry.target);
      }
    }, { rootMargin: "100px" });
    videos.forEach((video) => observer.observe(video));
    // Clips of one prompt have equal lengths, but start as they come into view.
    setInterval(() => {
      if (!playing) return;
      for (const row of document.querySelectorAll(".prompt")) {
        const own = [...row.querySelectorAll("video")].filter((v) => seen.has(v) && !v.paused);
        for (const video of own.slice(1)) {
          const gap = Math.abs(video.currentTime - own[0].currentTime);
          if (video.duration === own[0].duration && gap > 0.12) {
            video.currentTime = own[0].currentTime;
          }
        }
      }
    }, 1500);
  }
  const buttons = [...document.querySelectorAll("[data-play]")];
  const label = () => buttons.forEach((b) => {
    b.textContent = playing ? "Pause clips" : "Play clips";
    b.setAttribute("aria-pressed", String(playing));
  });
  buttons.forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => {
      playing = !playing;
      videos.forEach(update);
      label();
    });
  });
  label();
  document.querySelectorAll(".strip").forEach((strip) => { strip.scrollLeft = strip.scrollWidth; });

  // -- curves -------------------------------------------------------------------------------------

  const state = { smooth: 0, log: false };
  const smoothed = (values, weight) => {
    if (!weight) return values;
    // A mean that leans on the past, corrected for its start as Adam's moments are.
    let sum = 0, mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  };
  const ticks = (low, high, count) => {
    const raw = (high - low) / count || 1;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 5, 10].find((m) => m * size >= raw);
    const first = Math.ceil(low / step - 1e-9) * step;
    const list = [];
    for (let n = 0; n < 20 && first + n * step <= high + step * 1e-6; n += 1) {
      list.push(Number((first + n * step).toPrecision(12)));
    }
    return list;
  };
  const logTicks = (low, high) => {
    const from = Math.ceil(Math.log10(low)), to = Math.floor(Math.log10(high));
    if (to - from < 1) return ticks(low, high, 4).filter((v) => v > 0);
    const step = Math.ceil((to - from) / 5);
    const list = [];
    for (let e = from; e <= to; e += step) list.push(10 ** e);
    return list;
  };

  class Chart {
    constructor(figure, panel) {
      this.figure = figure;
      this.panel = panel;
      this.canvas = svg("svg", { role: "img", tabindex: "0" });
      this.tip = el("div", "tip");
      this.tip.hidden = true;
      figure.append(this.canvas, this.tip);
      const last = panel.curves.map((c) => {
        const known = c.y.filter((v) => v !== null);
        return `${c.label || panel.title} ${known.length ? format(known[known.length - 1]) : "none"}`;
      });
      this.canvas.setAttribute("aria-label",
        `${panel.title} by iteration; newest: ${last.join(", ")}. Arrow keys read values.`);
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", () => this.clear());
      this.canvas.addEventListener("blur", () => this.clear());
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      const xs = new Set(panel.curves.flatMap((c) => c.x));
      this.xs = [...xs].sort((a, b) => a - b);
      this.at = -1;
      new ResizeObserver(() => this.draw()).observe(this.canvas);
    }

    draw() {
      const box = this.canvas.getBoundingClientRect();
      if (!box.width) return;
      const { curves } = this.panel;
      this.lines = curves.map((c) => ({ ...c, s: smoothed(c.y, state.smooth) }));
      const values = this.lines.flatMap((c) => (state.smooth ? c.s : c.y)).filter((v) => v !== null);
      const all = this.lines.flatMap((c) => c.y).filter((v) => v !== null);
      this.canvas.replaceChildren();
      if (!values.length) {
        const note = svg("text", { x: 8, y: 30, class: "tick" });
        note.textContent = "no finite value";
        this.canvas.append(note);
        return;
      }
      this.isLog = state.log && Math.min(...all) > 0;
      // While curves are smoothed, spikes of the raw ones do not set the scale.
      let [low, high] = this.range(state.smooth ? this.trimmed(all, values) : values);
      if (this.isLog) [low, high] = [Math.log10(low), Math.log10(high)];
      if (!(high > low)) { const pad = Math.abs(low) * 0.05 || 0.5; low -= pad; high += pad; }
      const pad = (high - low) * 0.06;
      [low, high] = [low - pad, high + pad];
      const yTicks = this.isLog ? logTicks(10 ** low, 10 ** high) : ticks(low, high, 4);
      const left = Math.max(...yTicks.map((t) => format(t).length)) * 6.4 + 12;
      this.box = { left, right: box.width - 8, top: 10, bottom: box.height - 22, width: box.width };
      const first = this.xs[0], last = Math.max(this.xs[this.xs.length - 1], first + 1);
      this.px = (x) => left + ((x - first) / (last - first)) * (this.box.right - left);
      this.py = (value) => {
        const y = this.isLog ? Math.log10(value) : value;
        return this.box.bottom - ((y - low) / (high - low)) * (this.box.bottom - this.box.top);
      };
      const { top, bottom, right } = this.box;
      for (const tick of yTicks) {
        const y = this.py(tick);
        if (y < top - 1 || y > bottom + 1) continue;
        this.canvas.append(svg("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }));
        const text = svg("text", { x: left - 6, y: y + 4, "text-anchor": "end", class: "tick" });
        text.textContent = format(tick);
        this.canvas.append(text);
      }
      for (const tick of ticks(first, last, Math.max(2, box.width / 110))) {
        if (tick % 1) continue;
        const x = this.px(tick);
        const anchor = x > right - 16 ? "end" : "middle";
        const text = svg("text", { x, y: box.height - 5, "text-anchor": anchor, class: "tick" });
        text.textContent = tick.toLocaleString("en");
        this.canvas.append(text);
      }
      for (const alarm of data.alarms) {
        if (alarm < first || alarm > last) continue;
        const x = this.px(alarm);
        this.canvas.append(svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: "alarm" }));
      }
      const clip = svg("svg", { x: 0, y: top - 4, width: box.width, height: bottom - top + 8,
        overflow: "hidden" });
      const shift = svg("g", { transform: `translate(0 ${4 - top})` });
      clip.append(shift);
      for (const line of this.lines) {
        if (state.smooth) this.path(shift, line, line.y, "raw");
        this.path(shift, line, state.smooth ? line.s : line.y, "");
      }
      this.canvas.append(clip);
      this.marks = svg("g", {});
      this.canvas.append(this.marks);
    }

    range(values) {
      let low = Infinity, high = -Infinity;
      for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
      return [low, high];
    }

    trimmed(all, values) {
      const sorted = [...all].sort((a, b) => a - b);
      const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
      return [...values, at(0.02), at(0.98)];
    }

    path(parent, line, values, className) {
      let d = "", pen = false;
      values.forEach((value, i) => {
        if (value === null || (this.isLog && value <= 0)) { pen = false; return; }
        d += `${pen ? "L" : "M"}${this.px(line.x[i]).toFixed(1)} ${this.py(value).toFixed(1)}`;
        pen = true;
      });
      const path = svg("path", { d, class: className });
      path.style.stroke = colour(line.colour);
      if (line.dash) path.setAttribute("stroke-dasharray", DASHES[line.dash % 4]);
      parent.append(path);
      if (line.x.length === 1 && values[0] !== null) {
        const dot = svg("circle", { cx: this.px(line.x[0]), cy: this.py(values[0]), r: 3 });
        dot.style.fill = colour(line.colour);
        parent.append(dot);
        // What was measured once is what the others are compared with.
        const y = this.py(values[0]), x1 = this.px(line.x[0]);
        const kept = svg("line", { x1, x2: this.box.right, y1: y, y2: y, class: "kept" });
        kept.style.stroke = colour(line.colour);
        if (this.lines.length > 1) parent.append(kept);
      }
    }

    point(event) {
      if (!this.px) return;
      const x = event.clientX - this.canvas.getBoundingClientRect().left;
      let best = 0;
      this.xs.forEach((v, i) => {
        if (Math.abs(this.px(v) - x) < Math.abs(this.px(this.xs[best]) - x)) best = i;
      });
      this.show(best);
    }

    key(event) {
      const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
      if (event.key === "Escape") { this.clear(); return; }
      let to = this.at < 0 ? this.xs.length - 1 : this.at + (steps[event.key] ?? 0);
      if (event.key === "Home") to = 0;
      else if (event.key === "End") to = this.xs.length - 1;
      else if (!(event.key in steps)) return;
      event.preventDefault();
      this.show(Math.min(Math.max(to, 0), this.xs.length - 1));
    }

    show(index) {
      this.at = index;
      const iteration = this.xs[index], x = this.px(iteration);
      const { top, bottom } = this.box;
      this.marks.replaceChildren(svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: "hair" }));
      this.tip.replaceChildren(el("b", "", `iteration ${iteration.toLocaleString("en")}`));
      for (const line of this.lines) {
        const i = this.nearest(line.x, iteration);
        if (i < 0) continue;
        const value = state.smooth ? line.s[i] : line.y[i];
        const entry = el("div");
        const dot = el("i", "dot");
        dot.style.background = colour(line.colour);
        entry.append(dot, el("span", "", line.label || this.panel.title));
        entry.append(el("b", "", format(value)));
        this.tip.append(entry);
        if (value === null) continue;
        const circle = svg("circle", { cx: this.px(line.x[i]), cy: this.py(value), r: 3.5 });
        circle.style.fill = colour(line.colour);
        this.marks.append(circle);
      }
      this.tip.hidden = false;
      const beside = x > this.box.width / 2;
      this.tip.style.top = `${this.canvas.offsetTop + 4}px`;
      this.tip.style.left = beside ? "auto" : `${x + 26}px`;
      this.tip.style.right = beside ? `${this.box.width - x + 26}px` : "auto";
    }

    nearest(xs, x) {
      let low = 0, high = xs.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (xs[middle] <= x) low = middle;
        else high = middle - 1;
      }
      return xs.length && xs[low] <= x ? low : -1;
    }

    clear() {
      this.at = -1;
      this.tip.hidden = true;
      if (this.marks) this.marks.replaceChildren();
    }
  }

  const charts = [...document.querySelectorAll("[data-panel]")].map(
    (figure) => new Chart(figure, data.panels[Number(figure.dataset.panel)]));
  const redraw = () => charts.forEach((chart) => { chart.clear(); chart.draw(); });
  const smooth = document.getElementById("smooth"), log = document.getElementById("log");
  if (smooth) {
    smooth.addEventListener("input", () => {
      state.smooth = smooth.value / 100;
      document.getElementById("smoothed").textContent = state.smooth ? state.smooth.toFixed(2) : "off";
      redraw();
    });
    log.addEventListener("change", () => { state.log = log.checked; redraw(); });
  }

  // -- the rest -----------------------------------------------------------------------------------

  const links = [...document.querySelectorAll("nav a")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => {
        if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      });
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("section[id]").forEach((section) => watcher.observe(section));
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((details) => { details.open = true; });
    redraw();
  });
})();
