/** Two trainings beside each other: their losses in one chart, the settings in which they differ, and
 * what each has drawn. */

import { element } from "./dom.js";
import { pace, samplePicture } from "./job_card.js";
import { JobProgress } from "./job_progress.js";
import * as jobs from "./jobs.js";
import { CurveChart, inWords, lowest, smoothed } from "./loss_chart.js";
import { StepSheet } from "./step_sheet.js";
import { t } from "./words.js";

const SAMPLES = 6;

export class TrainingComparison {
  /** @param {object} host what StepSheet asks of it */
  constructor(host) {
    this.host = host;
    this.jobs = [];
    this.sides = ["one", "other"].map((key) => new Side(t(`${key}Training`), host, () => this.#show()));
    this.chart = new CurveChart(["cd-one", "cd-other"]);
    this.table = element("table");
    const parts = (name) => element("div", "cd-sides", ...this.sides.map((side) => side[name]));
    this.element = element(
      "details", "cd-rivals",
      element("summary", "cd-name", t("rivals")),
      parts("choice"), this.chart.element, element("div", "cd-notes", this.table), parts("drawn"),
    );
    this.element.hidden = true;
    this.element.addEventListener("toggle", () => this.#choose());
    for (const side of this.sides) side.choice.addEventListener("change", () => this.#choose(true));
  }

  /** @param {object[]} all jobs, the newest first; until the user has chosen, the newest two are shown */
  offer(all) {
    this.jobs = all;
    this.element.hidden = all.length < 2;
    const ids = all.map(({ id }) => id);
    if (ids.join() !== this.ids) {
      this.ids = ids.join();
      const stay = this.chosen && this.sides.every((side) => ids.includes(side.choice.value));
      for (const [place, side] of this.sides.entries()) side.offer(all, stay ? side.choice.value : ids[place]);
      this.chosen = stay;
    }
    this.#choose();
  }

  /** Asks for what is chosen, where somebody sees it. */
  #choose(byUser = false) {
    this.chosen ||= byUser;
    if (!this.element.open || this.element.hidden) return;
    const pair = this.sides.map((side) => side.choice.value);
    if (pair.join() !== this.pair) {
      this.pair = pair.join();
      this.differing = null;
      jobs.differences(...pair).then((found) => {
        if (pair.join() !== this.pair) return; // another pair was chosen meanwhile
        this.differing = found.settings;
        this.#show();
      }, this.host.onError);
    }
    for (const side of this.sides) side.watch(this.jobs.find(({ id }) => id === side.choice.value));
  }

  #show() {
    const [one, other] = this.sides;
    this.chart.show(this.sides.map(({ losses, validation }) => ({ losses, validation })));
    const rows = [
      row(t("state"), ...this.sides.map(({ job }) => job && `${t(job.state)}, ${pace(job)}`)),
      row(t("rivalLoss"), lastLoss(one), lastLoss(other)),
      row(t("rivalValidation"), leastValidation(one), leastValidation(other)),
      ...Object.entries(this.differing ?? {}).map(([name, values]) => row(name, ...values)),
    ];
    if (this.differing && !Object.keys(this.differing).length) rows.push(row(t("rivalSame"), "", ""));
    const heads = this.sides.map(({ job }, place) => {
      const head = element("th", place ? "cd-other" : "cd-one", job?.name ?? "");
      head.scope = "col";
      return head;
    });
    const body = element("tbody", "", ...rows);
    this.table.replaceChildren(element("thead", "", element("tr", "", element("td"), ...heads)), body);
  }
}

/** One of the two trainings: which it is, and what is known of it. */
class Side {
  constructor(label, host, onNews) {
    this.host = host;
    this.onNews = onNews;
    this.choice = element("select");
    this.choice.setAttribute("aria-label", label);
    this.drawn = element("div");
    this.#forget();
  }

  #forget() {
    this.losses = [];
    this.validation = new Map();
    this.shown = "";
    this.sheet = null;
    this.drawn.replaceChildren();
  }

  offer(all, chosen) {
    const options = all.map(({ id, name }) => {
      const option = element("option", "", name);
      [option.value, option.title, option.selected] = [id, id, id === chosen];
      return option;
    });
    this.choice.replaceChildren(...options);
  }

  watch(job) {
    if (this.progress?.id !== job.id) {
      this.#forget();
      const progress = new JobProgress(job.id, (now) => progress === this.progress && this.#hear(now), this.host.onError);
      this.progress = progress;
    } else if (job.step < this.job.step) {
      this.progress.restart();
    }
    this.job = job;
    this.progress.refresh(!jobs.ACTIVE.includes(job.state));
  }

  #hear({ losses, validation, shown }) {
    this.losses = losses;
    this.validation = validation;
    const steps = shown.samples.slice(-SAMPLES);
    const drawn = [...steps, "sheet", shown.compared].join();
    if (drawn !== this.shown) {
      this.shown = drawn;
      this.#draw(steps, shown);
    }
    this.onNews();
  }

  #draw(steps, { id, name, compared }) {
    const samples = element("div", "cd-samples", ...steps.map((step) => samplePicture(id, step)));
    this.sheet ??= new StepSheet({ id, name }, this.host);
    this.drawn.replaceChildren(samples, this.sheet.element);
    if (compared) this.sheet.refresh().catch(this.host.onError);
  }
}

function row(name, ...values) {
  const head = element("th", "", name);
  head.scope = "row";
  return element("tr", "", head, ...values.map((value) => element("td", "", value ?? "–")));
}

function lastLoss({ losses }) {
  return losses.length ? inWords(smoothed(losses).at(-1)) : null;
}

function leastValidation({ validation }) {
  const best = lowest([...validation].filter(([, loss]) => loss !== null));
  return best && t("rivalLowest", { loss: inWords(best[1]), step: best[0] });
}
