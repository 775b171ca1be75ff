/** A loss curve: single steps faint, their moving average strong; point at it to read a step. */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 80;
const POINTS = 300;

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
 * @param {(number|null)[]} values of steps 1, 2, ...
 * @returns {[number, number][]}
 */
export function thinned(values, count) {
  const length = Math.max(1, Math.ceil(values.length / count));
  const points = [];
  for (let start = 0; start < values.length; start += length) {
    const stretch = values.slice(start, start + length).filter((value) => value !== null);
    if (stretch.length) {
      const mean = stretch.reduce((a, b) => a + b) / stretch.length;
      points.push([start + (Math.min(length, values.length - start) + 1) / 2, mean]);
    }
  }
  return points;
}

/** The values between which a curve is shown: a few outliers do not flatten the rest. */
export function range(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const low = sorted[0];
  const high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
  return high > low ? [low, high] : [low - 0.5, low + 0.5];
}

export class LossChart {
  constructor() {
    this.element = document.createElement("figure");
    this.element.className = "cd-chart";
    this.losses = [];
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" });
    this.svg.setAttribute("role", "img");
    this.raw = this.svg.appendChild(svg("path", { class: "cd-raw" }));
    this.average = this.svg.appendChild(svg("path", { class: "cd-average" }));
    this.cursor = this.svg.appendChild(svg("line", { class: "cd-cursor", y1: 0, y2: HEIGHT }));
    this.caption = document.createElement("figcaption");
    this.element.append(this.svg, this.caption);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#tellLast());
    this.show([]);
  }

  /** @param {(number|null)[]} losses of steps 1, 2, ... */
  show(losses) {
    this.losses = losses;
    this.averages = smoothed(losses);
    const raw = thinned(losses, POINTS);
    const [low, high] = range(raw.length ? raw.map(([, loss]) => loss) : [0]);
    this.raw.setAttribute("d", this.#path(raw, low, high));
    this.average.setAttribute("d", this.#path(thinned(this.averages, POINTS), low, high));
    this.#tellLast();
  }

  #path(points, low, high) {
    const at = ([step, loss]) => {
      const y = HEIGHT - 3 - ((loss - low) / (high - low)) * (HEIGHT - 6);
      return `${this.#x(step).toFixed(1)} ${Math.min(Math.max(y, 1), HEIGHT - 1).toFixed(1)}`;
    };
    return points.length ? `M${points.map(at).join("L")}` : "";
  }

  #x(step) {
    return ((step - 1) / Math.max(this.losses.length - 1, 1)) * WIDTH;
  }

  #point(event) {
    const box = this.svg.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    if (this.losses.length) this.#tell(1 + Math.round(share * (this.losses.length - 1)));
  }

  #tellLast() {
    this.#tell(this.losses.length);
  }

  #tell(step) {
    const known = step >= 1;
    this.cursor.style.display = known && step < this.losses.length ? "" : "none";
    this.cursor.setAttribute("x1", this.#x(step));
    this.cursor.setAttribute("x2", this.#x(step));
    const number = (value) => (value === null ? "no number" : value.toPrecision(3));
    this.caption.textContent = known
      ? `loss at step ${step}: ${number(this.averages[step - 1])} (this step ${number(this.losses[step - 1])})`
      : "no step yet";
    this.svg.setAttribute("aria-label", this.caption.textContent);
  }
}

function svg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
