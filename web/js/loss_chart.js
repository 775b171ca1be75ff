/** A loss curve: single steps faint, their moving average strong, and with dots the loss on pictures
 * that are kept back, its lowest one larger. Point at it to read a step, drag
 * to enlarge a part, double-click to see all again; with the keyboard arrows, Home and End.
 */

import { element } from "./dom.js";
import { t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 80;
const POINTS = 300;
const FEWEST_STEPS = 2; // more than a hand that trembles

/**
 * Exponential moving averages, without the bias that they begin with (Kingma and Ba 2015, section 3).
 * @param {(number|null)[]} losses null where a loss was not finite: it counts as none
 * @returns {(number|null)[]}
 */
export function smoothed(losses, keep = 0.95) {
  let sum = 0;
  let weight = 0;
  return losses.map((loss) => {
    if (loss !== null) {
      sum = keep * sum + (1 - keep) * loss;
      weight = keep * weight + (1 - keep);
    }
    return weight ? sum / weight : null;
  });
}

/**
 * At most `count` points [step, value], the means of stretches of equal length.
 * @param {(number|null)[]} values of the steps from `first` on
 * @returns {[number, number][]}
 */
export function thinned(values, count, first = 1) {
  const length = Math.max(1, Math.ceil(values.length / count));
  const points = [];
  for (let start = 0; start < values.length; start += length) {
    const stretch = values.slice(start, start + length).filter((value) => value !== null);
    if (stretch.length) {
      const mean = stretch.reduce((a, b) => a + b) / stretch.length;
      points.push([first + start + (Math.min(length, values.length - start) - 1) / 2, mean]);
    }
  }
  return points;
}

/** The values between which a curve is shown: a few outliers do not flatten the rest. */
export function range(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const low = sorted[0];
  const high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
  return high > low ? [low, high] : [low - 0.5, low + 0.5];
}

export class LossChart {
  constructor() {
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" });
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("tabindex", "0");
    this.part = this.svg.appendChild(svg("rect", { class: "cd-part", y: 0, height: HEIGHT }));
    this.raw = this.svg.appendChild(svg("path", { class: "cd-raw" }));
    this.average = this.svg.appendChild(svg("path", { class: "cd-average" }));
    this.validated = this.svg.appendChild(svg("path", { class: "cd-validation" }));
    this.measured = this.svg.appendChild(svg("path", { class: "cd-measured" })); // a dot each
    this.best = this.svg.appendChild(svg("path", { class: "cd-best" }));
    this.cursor = this.svg.appendChild(svg("line", { class: "cd-cursor", y1: 0, y2: HEIGHT }));
    this.caption = element("figcaption");
    this.element = element("figure", "cd-chart", this.svg, this.caption);
    this.svg.append(svg("title", {}));
    this.svg.lastChild.textContent = t("chartHelp");
    this.losses = [];
    this.validation = [];
    this.span = null; // [first, last] step that is shown; null for all
    this.step = null; // that is read; null for the last
    const on = (type, act) => this.svg.addEventListener(type, act);
    on("pointermove", (event) => this.#point(event));
    on("pointerdown", (event) => this.#grab(event));
    on("pointerup", (event) => this.#drop(event));
    on("pointerleave", () => this.#read(null));
    on("blur", () => this.#read(null));
    on("dblclick", () => this.#enlarge(null));
    on("keydown", (event) => this.#press(event));
    this.show([]);
  }

  /**
   * @param {(number|null)[]} losses of steps 1, 2, ...
   * @param {Map<number, number>} validation step → loss on pictures that are kept back
   */
  show(losses, validation = new Map()) {
    if (losses.length < this.losses.length) this.span = this.step = null; // another training
    this.losses = losses;
    this.validation = [...validation].filter(([, loss]) => loss !== null).toSorted(([a], [b]) => a - b);
    this.averages = smoothed(losses);
    this.#draw();
    this.#read(this.step);
  }

  #draw() {
    const [first, last] = this.#shown();
    const part = (values) => thinned(values.slice(first - 1, last), POINTS, first);
    const raw = part(this.losses);
    const validation = this.validation.filter(([step]) => step >= first && step <= last);
    const drawn = [...raw, ...validation].map(([, loss]) => loss);
    const [low, high] = range(drawn.length ? drawn : [0]);
    const best = lowest(validation);
    const dots = (points) => points.map((point) => this.#path([point, point], low, high)).join("");
    this.validated.setAttribute("d", this.#path(validation, low, high));
    this.measured.setAttribute("d", dots(validation));
    this.best.setAttribute("d", dots(best ? [best] : []));
    this.raw.setAttribute("d", this.#path(raw, low, high));
    this.average.setAttribute("d", this.#path(part(this.averages), low, high));
  }

  /** The first and the last step that are shown. */
  #shown() {
    return this.span ?? [1, this.losses.length];
  }

  #path(points, low, high) {
    return path(points, (step) => this.#x(step), low, high);
  }

  #x(step) {
    const [first, last] = this.#shown();
    return ((step - first) / Math.max(last - first, 1)) * WIDTH;
  }

  #stepAt(event) {
    const box = this.svg.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const [first, last] = this.#shown();
    return first + Math.round(share * (last - first));
  }

  #point(event) {
    if (!this.losses.length) return;
    const step = this.#stepAt(event);
    this.#read(step);
    if (this.grabbed) this.#mark(this.grabbed, step);
  }

  #grab(event) {
    if (!this.losses.length) return;
    event.stopPropagation(); // on a node it would move the node
    this.svg.setPointerCapture(event.pointerId);
    this.grabbed = this.#stepAt(event);
  }

  #drop(event) {
    if (!this.grabbed) return;
    const [from, to] = [this.grabbed, this.#stepAt(event)].toSorted((a, b) => a - b);
    this.grabbed = null;
    this.#mark(0, 0);
    if (to - from >= FEWEST_STEPS) this.#enlarge([from, to]);
  }

  #mark(from, to) {
    const [left, right] = [this.#x(from), this.#x(to)].toSorted((a, b) => a - b);
    this.part.setAttribute("x", left);
    this.part.setAttribute("width", from ? right - left : 0);
  }

  #enlarge(span) {
    this.span = span;
    this.#draw();
    this.#read(null);
  }

  #press(event) {
    const [first, last] = this.#shown();
    const now = this.step ?? last;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: first, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.#read(Math.min(Math.max(to, first), last));
  }

  /** Tells of a step, or of the last one. */
  #read(step) {
    this.step = step;
    const told = step ?? this.losses.length;
    this.cursor.style.display = step === null ? "none" : "";
    this.cursor.setAttribute("x1", this.#x(told));
    this.cursor.setAttribute("x2", this.#x(told));
    this.caption.textContent = told ? [this.#told(told), ...this.#validationUntil(told)].join(" · ") : t("noStep");
    this.svg.setAttribute("aria-label", this.caption.textContent);
  }

  #told(step) {
    const [average, loss] = [this.averages, this.losses].map((each) => inWords(each[step - 1]));
    return t("chart", { step, average, loss });
  }

  /** What was measured last until a step, and where it was lowest of all. */
  #validationUntil(step) {
    const newest = this.validation.findLast(([at]) => at <= step);
    if (!newest) return [];
    const [best, loss] = lowest(this.validation);
    return [t("validation", { step: newest[0], loss: inWords(newest[1]), best, lowest: inWords(loss) })];
  }
}

/** Curves of several trainings over one another: averages strong, with dots the losses on pictures that
 * are kept back. Figures stand elsewhere: it is a picture.
 */
export class CurveChart {
  /** @param {string[]} names classes, one for each training */
  constructor(names) {
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.svg.setAttribute("aria-label", t("curves"));
    this.curves = names.map((name) =>
      ["cd-curve", "cd-checked"].map((kind) => this.svg.appendChild(svg("path", { class: `${kind} ${name}` }))),
    );
    this.element = element("figure", "cd-chart", this.svg);
  }

  /** @param {{losses: (number|null)[], validation: Map<number, number>}[]} trainings */
  show(trainings) {
    const last = Math.max(2, ...trainings.map(({ losses }) => losses.length));
    const lines = trainings.map(({ losses, validation }) => [
      thinned(smoothed(losses), POINTS),
      [...validation].filter(([, loss]) => loss !== null).toSorted(([a], [b]) => a - b),
    ]);
    const drawn = lines.flat(2).map(([, loss]) => loss);
    const [low, high] = range(drawn.length ? drawn : [0]);
    const place = (points) => path(points, (step) => ((step - 1) / (last - 1)) * WIDTH, low, high);
    for (const [number, [average, validation]] of lines.entries()) {
      const [curve, checked] = this.curves[number];
      curve.setAttribute("d", place(average));
      checked.setAttribute("d", validation.map((point) => place([point, point])).join(""));
    }
  }
}

/** The first of the points [step, loss] with the lowest loss; undefined of none. */
export function lowest(points) {
  return points.toSorted(([, a], [, b]) => a - b)[0];
}

export function inWords(loss) {
  return loss === null ? t("noNumber") : loss.toPrecision(3);
}

/** A line through points [step, loss], between two losses as bottom and top; `x` gives a step's place. */
function path(points, x, low, high) {
  const at = ([step, loss]) => {
    const y = HEIGHT - 3 - ((loss - low) / (high - low)) * (HEIGHT - 6);
    return `${x(step).toFixed(1)} ${Math.min(Math.max(y, 1), HEIGHT - 1).toFixed(1)}`;
  };
  return points.length ? `M${points.map(at).join("L")}` : "";
}

function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
