/** One training job in the panel: how it is, its losses and samples, and what can be done with it. */

import { actionButton, element, ProgressBar } from "./dom.js";
import { JobProgress } from "./job_progress.js";
import * as jobs from "./jobs.js";
import { LossChart } from "./loss_chart.js";
import { StepSheet } from "./step_sheet.js";
import { t } from "./words.js";

const SAMPLES = 6;

const FAR = 3;
/* Lengths of its first embedding that a word may move before it is worth a warning: with the paper's
 * settings a word moves by about one. */

const ENDED = ["finished", "stopped", "failed"];
/** Until which states a click has not yet done what it says: a job acts between two steps. */
const GOALS = {
  pause: ["paused", ...ENDED],
  resume: [...jobs.ACTIVE, ...ENDED],
  again: [...jobs.ACTIVE, "paused", "finished"],
  stop: ENDED,
};
/** What can be done, with its icon, in which states; the words are in locales. */
const ACTIONS = [
  ["pause", "pi-pause", jobs.ACTIVE],
  ["resume", "pi-play", ["paused"]],
  ["release", "pi-sign-out", [...jobs.ACTIVE, "paused"]],
  ["stop", "pi-stop", [...jobs.ACTIVE, "paused"]],
  ["again", "pi-replay", ["stopped", "failed"]],
  ["more", "pi-forward", ["finished"]],
  ["compare", "pi-th-large", ["running", "paused", ...ENDED]],
  ["use", "pi-plus", ["finished", "stopped"]],
  ["remove", "pi-trash", ["paused", ...ENDED]],
];

/** 75 → "1 min 15 s" */
export function duration(seconds) {
  if (seconds < 60) return t("seconds", { seconds: Math.ceil(seconds) });
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return t("minutes", { minutes, seconds: Math.floor(seconds % 60) });
  return t("hours", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

/** How far a job is, in words. */
export function pace(job) {
  const told = [t("step", job)];
  if (job.waiting) told.push(t("waiting"));
  else if (job.doing) told.push(t(`${job.doing}Doing`));
  if (job.awaited && job.state === "paused") told.push(t("queueWaits"));
  if (job.seconds_per_step && job.state === "running") {
    const rate = 1 / job.seconds_per_step;
    told.push(
      rate >= 1
        ? t("stepsPerSecond", { rate: rate.toFixed(1) })
        : t("secondsPerStep", { seconds: job.seconds_per_step.toFixed(1) }),
    );
    told.push(t("left", { time: duration((job.steps - job.step) * job.seconds_per_step) }));
  }
  return told.join(" · ");
}

/** What is done before there is a job, in words. */
export const preparation = (told) => t(`${told.doing}Doing`, told);

/** How far each word has moved from where it began, in figures. */
export function drifts(job) {
  return Object.entries(job.drift ?? {})
    .map(([token, share]) => t("drift", { token, percent: (100 * share).toFixed(0) }))
    .join(" · ");
}

/** Of the words that have moved too far, in plain words. */
export function driftWarnings(job) {
  const far = Object.entries(job.drift ?? {}).filter(([, share]) => share > FAR);
  return far.map(([token]) => t("driftFar", { token }));
}

/** A small picture of a job's sample; a click shows all of it. */
export function samplePicture(id, step) {
  const link = element("a", "cd-sample");
  link.href = jobs.sampleUrl(id, step);
  link.target = "_blank";
  link.rel = "noopener";
  const picture = element("img");
  picture.src = link.href;
  picture.loading = "lazy";
  picture.alt = t("sample", { step });
  link.append(picture, element("span", "", String(step)));
  return link;
}

/** In the place of a job's card, as long as there is no job. */
export class PreparationCard {
  constructor({ name }) {
    this.bar = new ProgressBar(t("progress", { name }));
    this.words = element("p", "cd-pace");
    const head = element(
      "div", "cd-head",
      element("span", "cd-name", name), element("span", "cd-state", t("preparing")), this.bar.element,
    );
    this.element = element("div", "cd-job", head, this.words);
    this.element.dataset.state = "encoding";
  }

  update(told) {
    this.words.textContent = preparation(told);
    this.bar.set(told.progress, preparation(told));
  }
}

export class JobCard {
  /**
   * @param {object} job
   * @param {{onError: function(Error): void, onMemory: function(object): void,
   *          confirmRemoval: function(object): Promise<boolean>,
   *          askSteps: function(object): Promise<number|null>,
   *          addToGraph: function(object): Promise<void>}} host  and what StepSheet asks of it
   */
  constructor(job, host) {
    this.id = job.id;
    this.host = host;
    this.samples = [];
    this.progress = new JobProgress(job.id, (now) => this.#show(now), host.onError);
    this.name = element("span", "cd-name");
    this.state = element("span", "cd-state");
    this.state.setAttribute("role", "status");
    this.bar = new ProgressBar(t("progress", job));
    this.pace = element("p", "cd-pace");
    this.taught = element("p", "cd-taught");
    this.drift = element("p", "cd-warning");
    this.trouble = element("p", "cd-trouble");
    this.trace = element("pre");
    this.log = element("details", "cd-log", element("summary", "", t("log")), this.trace);
    this.chart = new LossChart();
    this.strip = element("div", "cd-samples");
    this.sheet = new StepSheet(job, host);
    this.buttons = element("div", "cd-buttons", ...ACTIONS.map((action) => this.#button(...action)));
    this.element = element(
      "details", "cd-job",
      element("summary", "cd-head", this.name, this.state, this.bar.element),
      this.pace, this.trouble, this.log, this.chart.element, this.strip, this.sheet.element, this.drift, this.taught,
      this.buttons,
    );
    this.element.dataset.job = job.id;
    this.element.open = jobs.ACTIVE.includes(job.state);
    this.element.addEventListener("toggle", () => this.element.open && this.progress.refresh());
    this.update(job);
  }

  update(job) {
    if (this.job && job.step < this.job.step) this.progress.restart();
    const drawn = this.job?.preview_step !== job.preview_step;
    this.job = job;
    this.element.dataset.state = job.state;
    this.name.textContent = job.name;
    this.name.title = job.id;
    if (GOALS[this.pending]?.includes(job.state)) this.pending = null;
    this.bar.set(job.progress, pace(job));
    this.pace.textContent = pace(job);
    this.drift.textContent = driftWarnings(job).join("\n");
    this.drift.title = this.taught.title = drifts(job);
    this.trouble.textContent = [job.error, ...(job.notes ?? [])].filter(Boolean).join("\n");
    this.log.hidden = true; // until it is asked for again
    this.#offer();
    if (!this.element.open || !this.element.isConnected) return; // nobody sees it
    this.progress.refresh(drawn || !jobs.ACTIVE.includes(job.state));
  }

  /** The state, or what a click has asked for, and what can be done in it. */
  #offer() {
    const { state, concept_file, awaited } = this.job;
    const missing = { use: !concept_file, release: !awaited };
    this.state.textContent = t(this.pending ? `${this.pending}Pending` : state);
    const focused = this.buttons.contains(document.activeElement);
    for (const [index, [verb, , states]] of ACTIONS.entries()) {
      const button = this.buttons.children[index];
      button.hidden = !states.includes(state) || Boolean(missing[verb]);
      button.ariaDisabled = String(Boolean(this.pending));
    }
    if (focused && !this.buttons.contains(document.activeElement)) {
      this.buttons.querySelector(":scope > :not([hidden])")?.focus();
    }
  }

  #show({ losses, validation, shown }) {
    this.chart.show(losses, validation);
    const words = (shown.concepts ?? []).map((c) => [c.token, c.class_noun].filter(Boolean).join(" "));
    this.taught.textContent = words.length ? t("teaches", { words: words.join(", ") }) : "";
    this.trace.textContent = shown.log;
    this.log.hidden = !shown.log;
    if (shown.compared) this.sheet.refresh().catch(this.host.onError);
    if (shown.memory) this.host.onMemory(shown.memory);
    const newest = shown.samples.slice(-SAMPLES).toReversed();
    if (newest.join() === this.samples.join()) return;
    this.samples = newest;
    this.strip.replaceChildren(...newest.map((step) => samplePicture(this.id, step)));
  }

  #button(verb, icon) {
    const act = () => this.#do(verb);
    const button = actionButton(t(verb), t(`${verb}Hint`), icon, act, this.host.onError);
    button.dataset.verb = verb;
    return button;
  }

  async #do(verb) {
    if (verb === "use") return this.host.addToGraph(this.job);
    if (verb === "compare") return this.sheet.draw(this.job);
    if (verb === "more") {
      const more = await this.host.askSteps(this.job);
      return more && jobs.startAgain(this.id, this.job.step + more);
    }
    if (verb === "release") return this.#ask(verb);
    if (verb === "remove") {
      // The server tells all tabs.
      return (await this.host.confirmRemoval(this.job)) && jobs.remove(this.id);
    }
    this.pending = verb;
    this.#offer();
    try {
      await this.#steer(verb);
    } catch (error) {
      this.pending = null;
      this.#offer();
      throw error;
    }
  }

  async #steer(verb) {
    // After a restart the server has not loaded the job's models: then its graph does that.
    if (verb === "again" || (verb === "resume" && !(await jobs.show(this.id)).loaded)) {
      await jobs.startAgain(this.id);
      this.pending = null;
      return this.#offer();
    }
    await this.#ask(verb);
  }

  /** An answer may come after the news of what has become of the job since. */
  async #ask(verb) {
    const before = this.job;
    const job = await jobs.steer(this.id, verb);
    if (this.job === before) this.update(job);
  }
}
