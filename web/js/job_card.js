/** One training job in the panel: how it is, its losses and samples, and what can be done with it. */

import * as jobs from "./jobs.js";
import { LossChart } from "./loss_chart.js";

const SAMPLES = 6;
const FETCH_EVERY_MS = 1000;

const STATES = {
  queued: "waits for its turn",
  preparing: "prepares",
  running: "learns",
  paused: "paused",
  finished: "finished",
  stopped: "stopped",
  failed: "failed",
};
/** State → what can be done: verb, label, icon, hint */
const ACTIONS = [
  ["pause", "Pause", "pi-pause", "Write a checkpoint and leave the device", jobs.ACTIVE],
  ["resume", "Go on", "pi-play", "Go on from the last checkpoint", ["paused"]],
  ["stop", "Stop and save", "pi-stop", "Save what was learnt and end", [...jobs.ACTIVE, "paused"]],
  ["again", "Go on", "pi-replay", "Queue its graph again: it goes on where it was", ["stopped", "failed"]],
  ["use", "Add to graph", "pi-plus", "Put nodes on the canvas that apply the concept", ["finished", "stopped"]],
  ["remove", "Delete", "pi-trash", "Remove the job; its concept stays", ["paused", "finished", "stopped", "failed"]],
];

/** 75 → "1 min 15 s" */
export function duration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** How far a job is, in words. */
export function pace(job) {
  const told = [`step ${job.step} of ${job.steps}`];
  if (job.waiting) told.push("makes room for a prompt");
  if (job.seconds_per_step && job.state === "running") {
    const rate = 1 / job.seconds_per_step;
    told.push(rate >= 1 ? `${rate.toFixed(1)} steps/s` : `${job.seconds_per_step.toFixed(1)} s/step`);
    told.push(`${duration((job.steps - job.step) * job.seconds_per_step)} left`);
  }
  return told.join(" · ");
}

export class JobCard {
  /**
   * @param {object} job
   * @param {{onError: function(Error): void, confirmRemoval: function(object): Promise<boolean>,
   *          addToGraph: function(object): void}} host
   */
  constructor(job, host) {
    this.id = job.id;
    this.host = host;
    this.losses = [];
    this.samples = [];
    this.fetchedAt = 0;
    this.element = element("details", "cd-job");
    this.element.dataset.job = job.id;
    this.element.open = jobs.ACTIVE.includes(job.state);
    this.name = element("span", "cd-name");
    this.state = element("span", "cd-state");
    this.state.setAttribute("role", "status");
    this.bar = element("progress", "cd-progress");
    this.bar.setAttribute("aria-label", `progress of ${job.name}`);
    const head = element("summary", "cd-head");
    head.append(this.name, this.state, this.bar);
    this.pace = element("p", "cd-pace");
    this.taught = element("p", "cd-taught");
    this.trouble = element("p", "cd-trouble");
    this.chart = new LossChart();
    this.strip = element("div", "cd-samples");
    this.buttons = element("div", "cd-buttons");
    this.element.append(
      head, this.pace, this.trouble, this.chart.element, this.strip, this.taught, this.buttons,
    );
    for (const [verb, label, icon, hint] of ACTIONS) this.#addButton(verb, label, icon, hint);
    this.element.addEventListener("toggle", () => this.element.open && this.#fetch());
    this.update(job);
  }

  update(job) {
    const began = this.job && job.step < this.job.step;
    const drawn = this.job?.preview_step !== job.preview_step;
    this.job = job;
    if (began) this.losses = [];
    this.element.dataset.state = job.state;
    this.name.textContent = job.name;
    this.name.title = job.id;
    this.state.textContent = STATES[job.state] ?? job.state;
    this.bar.max = job.steps;
    this.bar.value = job.step;
    this.pace.textContent = pace(job);
    this.trouble.textContent = [job.error, ...(job.notes ?? [])].filter(Boolean).join("\n");
    for (const [index, [, , , , states]] of ACTIONS.entries()) {
      this.buttons.children[index].hidden = !states.includes(job.state);
    }
    const useful = this.buttons.querySelector("[data-verb=use]");
    useful.hidden ||= !job.concept_file;
    if (this.element.open) this.#fetch(drawn || !jobs.ACTIVE.includes(job.state));
  }

  /** Losses since the last time, and what is drawn; at most once a second while a job learns. */
  async #fetch(now = false) {
    if (this.fetching || (!now && Date.now() - this.fetchedAt < FETCH_EVERY_MS)) return;
    this.fetching = true;
    this.fetchedAt = Date.now();
    try {
      const before = this.losses;
      const since = await jobs.losses(this.id, before.length);
      if (before !== this.losses) return; // it began anew meanwhile
      this.losses = before.concat(since);
      this.chart.show(this.losses);
      const shown = await jobs.show(this.id);
      this.#showSamples(shown.samples);
      const words = (shown.concepts ?? []).map((c) => [c.token, c.class_noun].filter(Boolean).join(" "));
      this.taught.textContent = words.length ? `teaches ${words.join(", ")}` : "";
    } catch (error) {
      this.host.onError(error);
    } finally {
      this.fetching = false;
    }
  }

  #showSamples(steps) {
    const newest = steps.slice(-SAMPLES).reverse();
    if (newest.join() === this.samples.join()) return;
    this.samples = newest;
    this.strip.replaceChildren(
      ...newest.map((step) => {
        const link = element("a", "cd-sample");
        link.href = jobs.sampleUrl(this.id, step);
        link.target = "_blank";
        link.rel = "noopener";
        const picture = element("img");
        picture.src = link.href;
        picture.loading = "lazy";
        picture.alt = `sample at step ${step}`;
        const caption = element("span");
        caption.textContent = step;
        link.append(picture, caption);
        return link;
      }),
    );
  }

  #addButton(verb, label, icon, hint) {
    const button = element("button");
    button.type = "button";
    button.dataset.verb = verb;
    button.title = hint;
    const sign = element("i", `pi ${icon}`);
    sign.setAttribute("aria-hidden", "true");
    button.append(sign, ` ${label}`);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await this.#do(verb);
      } catch (error) {
        this.host.onError(error);
      } finally {
        button.disabled = false;
      }
    });
    this.buttons.append(button);
  }

  /** After a restart the server has not loaded the job's models: then its graph does that. */
  async #resume() {
    const { loaded } = await jobs.show(this.id);
    if (loaded) this.update(await jobs.steer(this.id, "resume"));
    else await jobs.startAgain(this.id);
  }

  async #do(verb) {
    if (verb === "use") {
      this.host.addToGraph(this.job);
    } else if (verb === "again") {
      await jobs.startAgain(this.id);
    } else if (verb === "remove") {
      if (!(await this.host.confirmRemoval(this.job))) return;
      await jobs.remove(this.id); // the server tells all tabs
    } else if (verb === "resume") {
      await this.#resume();
    } else {
      this.update(await jobs.steer(this.id, verb));
    }
  }
}

function element(name, className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  return made;
}
