/** The Train node shows the training that it has begun: pace, losses, the newest sample. */

import { element, errorParts, ProgressBar } from "./dom.js";
import { driftWarnings, pace, preparation, samplePicture } from "./job_card.js";
import { JobProgress } from "./job_progress.js";
import * as jobs from "./jobs.js";
import { LossChart } from "./loss_chart.js";
import { t } from "./words.js";

const shown = new Map(); // job → what shows it on nodes

export class NodeTraining {
  constructor() {
    this.pace = element("p", "cd-pace");
    this.bar = new ProgressBar(t("title"));
    this.trouble = element("div", "cd-error");
    this.warning = element("p", "cd-warning");
    this.chart = new LossChart();
    this.newest = element("div", "cd-samples");
    this.element = element(
      "div", "cd-training",
      this.pace, this.bar.element, this.trouble, this.warning, this.chart.element, this.newest,
    );
  }

  /** Shows another job. */
  async watch(id) {
    this.leave();
    this.id = id;
    this.step = 0;
    this.#picture(undefined);
    if (!shown.has(id)) shown.set(id, new Set());
    shown.get(id).add(this);
    const still = (act) => (now) => this.id === id && act(now); // else it shows another by now
    this.progress = new JobProgress(id, still((now) => this.#show(now)), still((error) => this.#fail(error)));
    await this.progress.refresh(true);
  }

  /** Before there is a job. */
  prepare(told) {
    this.leave();
    this.id = undefined;
    this.chart.show([]);
    this.#picture(undefined);
    this.pace.textContent = preparation(told);
    this.bar.set(told.progress, preparation(told));
  }

  /** Its node is gone, or has begun another job: nothing more is asked of the server. */
  leave() {
    shown.get(this.id)?.delete(this);
  }

  hear(job) {
    if (job.state === "deleted") return this.#fail(new Error(t("deleted")));
    if (this.step > job.step) this.progress.restart();
    this.step = job.step;
    this.#tell(job);
    this.progress.refresh(!jobs.ACTIVE.includes(job.state));
  }

  #show({ losses, validation, shown: job }) {
    this.#tell(job);
    this.chart.show(losses, validation);
    this.#picture(job.samples.at(-1));
  }

  /** The newest sample; undefined where none is drawn yet. */
  #picture(step) {
    if (step === this.sample) return;
    this.sample = step;
    this.newest.replaceChildren(...(step === undefined ? [] : [samplePicture(this.id, step)]));
  }

  #tell(job) {
    this.pace.textContent = `${t(job.state)}: ${pace(job)}`;
    this.bar.set(job.progress, pace(job));
    if (job.error !== this.error) this.trouble.replaceChildren(...(job.error ? errorParts(job.error) : []));
    this.error = job.error;
    this.warning.textContent = driftWarnings(job).join("\n");
  }

  /** The job was deleted, or is another ComfyUI's. */
  #fail(error) {
    this.pace.textContent = error.message;
    this.#picture(undefined);
  }
}

/** To be called once: what is shown follows what the server tells of the jobs. */
export function registerTraining() {
  jobs.listen((job) => {
    for (const training of shown.get(job.id) ?? []) training.hear(job);
  });
}
